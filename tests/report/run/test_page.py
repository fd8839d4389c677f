"""The page of a run and the card of its net hold the run's numbers; names of users stay text."""

import dataclasses
import html.parser
import io
import json
import re

import numpy as np
import PIL.Image
import pytest
import yaml

from csba_jax.analysis import run_facts
from csba_jax.measure.calibration import Calibration
from csba_jax.measure.predict import Predictor
from csba_jax.report import folder
from csba_jax.report.run import card, content, page
from csba_jax.report.terminal import table
from csba_jax.run.net import Net
from csba_jax.runtime.signals import StopRequest
from csba_jax.training import loop

NAMES = ('oak', 'ash', 'elm')
COUNTS = (40, 100, 8)
HOSTILE = ('<script>alert(1)</script>', 'a|b`c', 'line\nbreak "quoted" \u202eright')


@pytest.fixture
def made(made_up_run):
  """(class names, changes) -> the facts of a run that was not made."""
  return made_up_run.facts


class _Texts(html.parser.HTMLParser):
  """The visible text, the tags and the sources of a page."""

  def __init__(self, text):
    super().__init__()
    self.words, self.tags, self.sources = [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.sources += [value for name, value in attrs if name in ('src', 'href')]

  def handle_data(self, data):
    self.words.append(data)


def test_the_page_has_the_numbers_of_the_result(made):
  facts = made()
  read = _Texts(page.render(facts))
  text = ' '.join(' '.join(read.words).split())
  assert f'Macro-F1 {facts.result["macro_f1"]:.3f} (95 % interval ' in text
  low, high = facts.rates.macro_f1
  assert f'{low:.3f} to {high:.3f})' in text
  for c, name in enumerate(NAMES):
    f1, (low, high) = facts.result['per_class']['f1'][c], facts.rates.f1[c]
    assert f'{f1:.2f} ({low:.2f} to {high:.2f})' in text, name
  order = [text.index(f'{name} ({n})') for name, n in zip(NAMES, COUNTS, strict=True)]
  assert order[1] < order[0] < order[2]  # from the largest class to the smallest
  assert 'Fewer than 20 test images, so that little can be said: elm (6).' in text
  assert 'elm 0.97, labelled oak: oak/1.jpg' in text
  assert (
    'Next: csba-train --config=runs/trees/config.json --config.loss.name=balanced_softmax' in text
  )
  assert 'Class gradients at step 12, 48 images (batch): of 3 pairs of classes ' in text


def test_the_page_loads_and_runs_nothing(made):
  read = _Texts(page.render(made(HOSTILE)))
  assert 'script' not in read.tags
  assert 'alert(1)' in ' '.join(read.words)  # it is text
  assert all(source.startswith(('#', 'data:image/jpeg;base64,')) for source in read.sources)


def test_a_mistake_is_shown_as_the_net_sees_it(made):
  (one,) = made().mistakes
  image = PIL.Image.open(io.BytesIO(content.picture(one)))
  assert image.size == (128, 128)
  assert abs(np.asarray(image).astype(int) - 200).max() <= 2
  grey = one._replace(image=np.full((300, 200, 1), 9, np.uint8))
  assert PIL.Image.open(io.BytesIO(content.picture(grey))).size == (171, 256)


def test_what_is_missing_is_said(made):
  facts = made(conflict=None, mistakes=(), validation=None, no_mistakes='The test images are gone.')
  text = ' '.join(' '.join(_Texts(page.render(facts)).words).split())
  assert 'Not measured. Measure it: csba-diagnose --workdir=runs/trees' in text
  assert 'The test images are gone.' in text
  assert 'audit' not in text
  assert content.calibration_sentence(facts, facts.calibration).startswith(
    'Probabilities are not calibrated'
  )
  right = ' '.join(_Texts(page.render(made(mistakes=()))).words)
  assert 'No test image was predicted wrongly.' in right


def test_the_audit_is_told(made):
  audit = {'copies': [['a', 'b']] * 3, 'copies_across_classes': [['a', 'b']], 'unreadable': []}
  lines = content.data(made(audit=audit)).blocks[0].items
  assert 'audit.html beside this page' in page.render(made(audit=audit))
  assert 'Sets of photos that are copies or look the same: 3.' in lines
  assert 'Of these, sets in more than one class (labels to check): 1.' in lines
  assert not [line for line in lines if line.startswith('Files that cannot')]


def card_of(facts, weights=(1.0, 1.0, 1.0), least=0.0, name='trees'):
  net = Net(None, {'params': {}, 'batch_stats': {}}, facts.metadata)
  predictor = Predictor(net, facts.validation, facts.calibration, np.asarray(weights))
  return card.render(facts, predictor, least, name)


def test_the_card_has_metadata_that_hubs_read(made):
  facts = made()
  _, head, body = card_of(facts).split('---\n', 2)
  told = yaml.safe_load(head)
  assert told['pipeline_tag'] == 'image-classification'
  (index,) = told['model-index']
  values = {m['name']: m['value'] for m in index['results'][0]['metrics']}
  assert values == {
    'macro-F1': facts.result['macro_f1'],
    'balanced accuracy': facts.result['balanced_accuracy'],
    'accuracy': facts.result['accuracy'],
  }
  assert '# trees: images of 3 classes' in body
  for title in ('Use', 'Results', 'Calibration', 'Conflict between classes', 'Data', 'Limits'):
    assert f'\n## {title}\n' in body
  assert 'temperature 1.25 on 76 validation images' in ' '.join(body.split())
  assert 'runs/trees' not in body  # nothing of the machine where it was trained
  assert 'multiplied' not in body


def test_the_card_tells_of_weights_and_of_the_least_confidence(made):
  text = ' '.join(card_of(made(), (1.0, 1.0, 2.5), 0.6).split())
  assert '| elm | 2.5 |' in text
  assert 'Below a probability of 0.6 no class is predicted.' in text


def test_the_card_speaks_of_the_net_that_is_handed_over(made):
  facts = made()
  other = Calibration(3.5, np.asarray([0.0, 1.0, -1.0]))
  net = Net(None, {'params': {}, 'batch_stats': {}}, facts.metadata)
  text = card.render(facts, Predictor(net, facts.validation, other, np.ones(3)), 0.0, 'trees')
  text = ' '.join(text.split())
  assert 'temperature 3.50 on 76 validation images, for other class shares' in text
  assert 'These results are of the most probable class, without the weights' in text
  assert 'These results' not in ' '.join(card_of(facts).split())
  assert 'audit.html' not in card_of(made(audit={'copies': [['a', 'b']]}))


def test_names_of_users_stay_text_in_the_card(made):
  text = card_of(made(HOSTILE), name='my "net"\n---\nlicense: mit')
  assert '<script' not in text
  _, head, _ = text.split('---\n', 2)
  assert set(yaml.safe_load(head)) == {'library_name', 'pipeline_tag', 'tags', 'model-index'}
  assert '\nlicense' not in text
  assert not re.search('\u202e', text)


# ---- a real run


@pytest.fixture(scope='module')
def run(driver, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('page') / 'run'
  with StopRequest() as stop:
    loop.train_and_evaluate(driver.tiny_config(train__epochs=1), str(workdir), stop)
  return workdir


def test_the_facts_are_those_of_the_folder(run):
  facts = run_facts.facts_of(str(run))
  assert facts.conflict is None
  assert facts.audit is None
  assert facts.result == json.loads((run / 'result.json').read_text())
  assert facts.advice[0].rule == 'hardly trained'


def test_a_result_of_an_earlier_version_is_one_line(run, monkeypatch):
  result = json.loads((run / 'result.json').read_text())
  del result['confusion_matrix']
  monkeypatch.setattr(run_facts, 'read_result', lambda path: result)
  with pytest.raises(run_facts.UserError, match='a result.json with confusion_matrix in .*earlier'):
    run_facts.facts_of(str(run))


def test_mistakes_are_the_surest_of_the_test_part(run):
  facts = run_facts.with_mistakes(run_facts.facts_of(str(run)))
  result = facts.result
  wrong = result['examples'] - round(result['accuracy'] * result['examples'])
  assert len(facts.mistakes) == min(wrong, run_facts.WORST)
  sure = [one.probability for one in facts.mistakes]
  assert sure == sorted(sure, reverse=True)
  for one in facts.mistakes:
    assert one.label != one.predicted
    assert result['confusion_matrix'][one.label][one.predicted] > 0
    assert one.name.startswith('digits/')


def test_report_of_a_run_writes_the_page(run):
  text = folder.describe(str(run))
  assert text == (
    f'{table.single(json.loads((run / "result.json").read_text()))}\nworkdir: {run}\n'
    f'written: {run}/report.html'
  )
  assert (run / 'report.html').read_text().startswith('<!DOCTYPE html>')


def test_the_table_is_there_though_the_page_cannot_be_written(run, monkeypatch):
  def fail(path, fill):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(page, 'write_atomically', fail)
  *_, last = folder.describe(str(run)).splitlines()
  assert last.startswith('the page was not written: expected ')
  assert 'No space left on device' in last


def test_data_that_moved_is_a_note(run, monkeypatch):
  def gone(*args, **kwargs):
    raise run_facts.UserError('data', 'none', 'look')

  monkeypatch.setattr(run_facts.restore, 'load_run', gone)
  facts = run_facts.with_mistakes(run_facts.facts_of(str(run)))
  assert (
    facts.no_mistakes
    == 'The test images cannot be read: expected data; found none; to fix it: look'
  )


def test_the_latest_conflict_of_all_layers(made, tmp_path):
  (tmp_path / 'conflict').mkdir()

  def save(name, step, layers='', target='train'):
    about = {'step': step, 'layers': layers, 'target': target}
    dataclasses.replace(made().conflict, about=about).save(tmp_path / 'conflict' / name)

  assert run_facts.latest_conflict(tmp_path, 10) is None
  save('end_train.npz', 30)
  save('step000040_probe.npz', 40)
  assert run_facts.latest_conflict(tmp_path, 10).about['step'] == 40
  save('step000010_train_exact.npz', 10)
  save('step000020_train_exact.npz', 20)
  save('step000030_train_exact_conv.npz', 30, layers='conv')
  (tmp_path / 'conflict/step000050_train_exact.npz').write_bytes(b'damaged')
  save('step000010_val_batches.npz', 10, target='validation batches')
  save('tested_train.npz', 10)
  assert run_facts.latest_conflict(tmp_path, 10).about['step'] == 10
  assert run_facts.latest_conflict(tmp_path, 5).about['step'] == 20  # the last that was asked for
