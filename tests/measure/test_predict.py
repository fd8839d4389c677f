"""Predictions for files: the net's own logits, in order, whatever cannot be read."""

import csv
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from scipy.special import softmax

from csba_jax import files as files_lib
from csba_jax.data.folder_listing import images_below
from csba_jax.errors import UserError
from csba_jax.measure import predict as lib
from csba_jax.measure.calibration import Calibration, Validation
from csba_jax.measure.predict import Predictor
from csba_jax.report.terminal import predictions
from csba_jax.run.net import Metadata, Net

NAMES = ('cat', 'dog', 'owl')
PLAIN = Calibration(1.0, np.zeros(3))


class Linear(nn.Module):
  """One layer: enough to tell photos apart."""

  @nn.compact
  def __call__(self, x, train=False):
    return nn.Dense(3)(x.reshape(x.shape[0], -1))


@pytest.fixture(scope='module')
def net():
  shape = (6, 6, 3)
  variables = {'batch_stats': {}, **Linear().init(jax.random.key(0), jnp.zeros((1, *shape)))}
  return Net(Linear(), variables, Metadata(NAMES, np.asarray([5, 3, 2]), shape))


@pytest.fixture
def folder(tmp_path):
  """Photos of the net's size, one that is none, one below a folder."""
  rng = np.random.default_rng(0)
  (tmp_path / 'photos/more').mkdir(parents=True)
  for name in ('b.png', 'a.png', 'more/c.png', 'more/é.png'):
    pixels = rng.integers(0, 256, (6, 6, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / 'photos' / name)
  (tmp_path / 'photos/broken.jpg').write_bytes(b'no photo')
  (tmp_path / 'photos/notes.txt').write_text('')
  return tmp_path / 'photos'


def expected(net, files):
  """softmax of the logits of one photo at a time."""
  rows = []
  for file in files:
    pixels = np.asarray(PIL.Image.open(file))[None]
    rows.append(softmax(np.asarray(net.logits(pixels), np.float64)[0]))
  return np.stack(rows)


def test_each_file_has_the_probabilities_of_the_net_in_order(net, folder):
  files = images_below(folder)
  assert [file.relative_to(folder).as_posix() for file in files] == [
    *('a.png', 'b.png', 'broken.jpg', 'more/c.png', 'more/é.png')
  ]
  ticks = []
  predictor = Predictor(net, None, PLAIN, np.ones(3))
  found = list(predictor.predict(files, tick=lambda *done: ticks.append(done)))
  assert [one.file for one in found] == files
  assert [one.reason for one in found] == [*['', ''], 'not an image of a known format', *['', '']]
  readable = [one for one in found if not one.reason]
  wanted = expected(net, [one.file for one in readable])
  np.testing.assert_allclose([one.probabilities for one in readable], wanted, atol=1e-6)
  assert [one.label for one in readable] == wanted.argmax(1).tolist()
  np.testing.assert_allclose([one.confidence for one in readable], wanted.max(1), atol=1e-6)
  assert (found[2].label, found[2].confidence, found[2].probabilities.tolist()) == (-1, 0, [0] * 3)
  assert ticks == [(5, 5)]


def test_more_files_than_a_batch_and_a_block(net, folder, monkeypatch):
  monkeypatch.setattr(lib.cache, 'BLOCK', 7)
  monkeypatch.setattr(lib, 'BATCH', 3)
  files = [folder / 'a.png', folder / 'broken.jpg', folder / 'b.png'] * 9
  found = list(Predictor(net, None, PLAIN, np.ones(3)).predict(files))
  wanted = expected(net, files[::3][:1] + files[2::3][:1])
  for i, one in enumerate(found):
    if i % 3 == 1:
      assert one.reason
    else:
      np.testing.assert_allclose(one.probabilities, wanted[i % 3 // 2], atol=1e-6)


def test_weights_and_confidence_decide(net, folder):
  files = [folder / 'a.png']
  plain = expected(net, files)[0]
  last = int(plain.argmin())
  weights = np.ones(3)
  weights[last] = 1.1 * plain.max() / plain.min()
  [one] = Predictor(net, None, PLAIN, weights).predict(files)
  assert one.label == last
  assert one.confidence == pytest.approx(plain[last], abs=1e-6)
  [sure] = Predictor(net, None, PLAIN, np.ones(3)).predict(files, plain.max() - 1e-4)
  [unsure] = Predictor(net, None, PLAIN, np.ones(3)).predict(files, plain.max() + 1e-4)
  assert (sure.label, unsure.label) == (int(plain.argmax()), -1)
  assert unsure.confidence == pytest.approx(plain.max(), abs=1e-6)


def test_the_files_hold_what_was_predicted(net, folder, tmp_path):
  predictor = Predictor(net, None, PLAIN, np.ones(3))
  found = list(predictor.predict(images_below(folder), 0.5))
  for name in ('x.csv', 'x.jsonl'):
    predictions.write(tmp_path / name, NAMES, found)
  with (tmp_path / 'x.csv').open(newline='', encoding='utf-8') as file:
    rows = list(csv.DictReader(file))
  records = [json.loads(line) for line in (tmp_path / 'x.jsonl').read_text('utf-8').splitlines()]
  for one, row, record in zip(found, rows, records, strict=True):
    assert row['file'] == record['file'] == str(one.file)
    if one.reason:
      assert record == {'file': str(one.file), 'error': one.reason}
      assert (row['class'], row['confidence'], row['p:cat']) == ('', '', '')
      assert row['error'] == one.reason
      continue
    name = NAMES[one.label] if one.label >= 0 else None
    assert (row['class'] or None, record['class']) == (name, name)
    assert (
      float(row['confidence']) == record['confidence'] == pytest.approx(one.confidence, abs=1e-6)
    )
    for c, class_name in enumerate(NAMES):
      p = float(row[f'p:{class_name}'])
      assert p == record['probabilities'][class_name]
      assert p == pytest.approx(one.probabilities[c], abs=1e-6)


def test_a_file_that_appears_meanwhile_stays_and_nothing_half_written_is_left(tmp_path):
  (tmp_path / 'x.csv').write_text('mine')
  with pytest.raises(UserError, match=r'to write .*x.csv; found .*File exists'):
    predictions.write(tmp_path / 'x.csv', NAMES, [])

  def broken():
    raise KeyboardInterrupt
    yield

  with pytest.raises(KeyboardInterrupt):
    predictions.write(tmp_path / 'y.csv', NAMES, broken())
  assert [path.name for path in tmp_path.iterdir()] == ['x.csv']
  assert (tmp_path / 'x.csv').read_text() == 'mine'


def test_lines(net, folder, tmp_path):
  [one] = Predictor(net, None, PLAIN, np.ones(3)).predict([folder / 'a.png'])
  assert predictions.line(one, NAMES) == f'{one.confidence:.3f}  {NAMES[one.label]}  {folder}/a.png'
  [one] = Predictor(net, None, PLAIN, np.ones(3)).predict([folder / 'a.png'], 1.0)
  assert predictions.line(one, NAMES) == f'{one.confidence:.3f}  -  {folder}/a.png'
  [one] = Predictor(net, None, PLAIN, np.ones(3)).predict([folder / 'broken.jpg'])
  words = f'cannot be read: {folder}/broken.jpg (not an image of a known format)'
  assert predictions.line(one, NAMES) == words


def test_what_is_explained(net):
  def text(*arguments):
    return list(predictions.explain(Predictor(net, *arguments)))

  few = Validation(np.zeros((3, 3), np.float32), np.zeros(3, np.int32))
  nothing = 'probabilities are not calibrated: the run has kept {} validation images'
  assert text(None, PLAIN, np.ones(3)) == [nothing.format(0)]
  assert text(few, PLAIN, np.ones(3)) == [nothing.format(3)]
  labels = np.arange(30, dtype=np.int32) % 3
  logits = np.eye(3, dtype=np.float32)[np.where(np.arange(30) < 15, labels, 0)] * 9
  many = Validation(logits, labels)
  lines = text(many, Calibration(6.0, np.zeros(3)), np.asarray([1, 2.5, 1]))
  assert lines[0].startswith(
    'temperature 6.00 from 30 validation images: their calibration error is'
  )
  assert lines[1] == 'weights of classes: dog 2.5; others 1'
  assert text(many, Calibration(2.0, np.ones(3)), np.ones(3)) == [
    'temperature 2.00, and other class shares'
  ]


def test_places_for_the_file(tmp_path):
  (tmp_path / 'x.csv').write_text('')
  for name, words in (
    ('x.txt', r'--out=FILE.csv or FILE.jsonl; found .*x.txt; to fix it: give'),
    ('x.csv', 'a new file for --out; found .*, which exists; to fix it: name another'),
    ('nix/x.csv', 'a folder for --out; found no .*nix; to fix it: make'),
  ):
    with pytest.raises(UserError, match=words):
      files_lib.check_new('--out', tmp_path / name, ('.csv', '.jsonl'))
  files_lib.check_new('--out', tmp_path / 'y.jsonl', ('.csv', '.jsonl'))


def test_nothing_to_predict(tmp_path):
  with pytest.raises(UserError, match='a photo or a folder of photos; found nothing at .*/nix'):
    images_below(tmp_path / 'nix')
  (tmp_path / 'x.heic').write_bytes(b'')
  with pytest.raises(
    UserError, match=r'images \(.*\) in .*; found none: 1 .heic left out; .*pillow-heif'
  ):
    images_below(tmp_path)
  assert images_below(tmp_path / 'x.heic') == [tmp_path / 'x.heic']  # it says why it cannot be read
