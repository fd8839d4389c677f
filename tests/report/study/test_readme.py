"""The results section of a README: the numbers of the studies, and nothing else touched."""

import dataclasses
import re
import runpy
import types
from pathlib import Path

import numpy as np
import pytest

from csba_jax.analysis import findings
from csba_jax.errors import UserError
from csba_jax.report.study import readme
from csba_jax.report.study.readme import BEGIN, END
from csba_jax.study import results

ROOT = Path(__file__).parents[3]
simulated = types.SimpleNamespace(**runpy.run_path(ROOT / 'tests/simulated.py'))
INTERVAL = re.compile(r'(\S+) \[(\S+), (\S+)\]')


def tiny(folder, **options):
  return simulated.study(folder, **{'seeds': 2, 'variants': ('none',), **options})


def rows(text, first):
  """The cells of a table's rows, from the one whose first cell is `first`."""
  lines = [re.split(r' (?<!\\)\| ', line[2:-2]) for line in text.splitlines() if line[:2] == '| ']
  return lines[[line[0] for line in lines].index(first) :]


@pytest.mark.parametrize(
  'text',
  [
    '',
    f'a {BEGIN} b',
    f'a {END} b',
    f'{BEGIN}{END}{END}',
    f'{BEGIN}{BEGIN}{END}',
    f'{BEGIN}{END} {BEGIN}{END}',
    f'{END} a {BEGIN}',
  ],
)
def test_marks_that_are_not_there_once_each(text):
  with pytest.raises(UserError) as caught:
    readme.replaced(text, 'new', 'docs/README.md')
  assert str(caught.value) == (
    f'expected the lines {BEGIN} and {END} in docs/README.md, once each; found not so; '
    'to fix it: put them back'
  )


@pytest.mark.parametrize('between', ['', '\n', '\n\nold\n', ' old | \\1 $& ## '])
@pytest.mark.parametrize(('head', 'rest'), [('', ''), ('# A\n\n\n', '\n\n## B  \n\tc'), ('ä', 'ß')])
def test_only_what_is_between_the_marks_changes(between, head, rest):
  text = readme.replaced(f'{head}{BEGIN}{between}{END}{rest}', 'new \\1\n')
  assert text == f'{head}{BEGIN}\n\nnew \\1\n\n{END}{rest}'
  assert readme.replaced(text, 'new \\1\n') == text


def test_update_writes_the_section_and_keeps_every_other_byte(tmp_path):
  tiny(tmp_path / 'results/one')
  path = tmp_path / 'README.md'
  head, rest = b'# T\xc3\xa4st\r\n\r\n', b'\r\n\x0c\xe2\x80\xa8end, no line end'
  path.write_bytes(head + BEGIN.encode() + b' old \r\n' + END.encode() + rest)
  assert readme.update(str(path), str(tmp_path / 'results')) == f'{path} updated'
  after = path.read_bytes()
  section = readme.section(tmp_path / 'results', beside=tmp_path)
  assert after == head + f'{BEGIN}\n\n{section}\n{END}'.encode() + rest
  assert readme.update(str(path), str(tmp_path / 'results')) == f'{path} is as it was'
  assert path.read_bytes() == after
  assert sorted(p.name for p in tmp_path.iterdir()) == ['README.md', 'results']


def test_a_readme_without_marks_is_left_alone(tmp_path):
  tiny(tmp_path / 'results/one')
  path = tmp_path / 'README.md'
  path.write_text('# Title\n')
  with pytest.raises(UserError, match=f'in {path}, once each'):
    readme.update(str(path), str(tmp_path / 'results'))
  assert path.read_text() == '# Title\n'


@pytest.mark.parametrize('kind', ['absent', 'folder', 'not UTF-8'])
def test_a_readme_that_cannot_be_read_is_one_line(tmp_path, kind):
  path = tmp_path / 'README.md'
  if kind == 'folder':
    path.mkdir()
  elif kind == 'not UTF-8':
    path.write_bytes(b'\xff')
  message = {'absent': 'No such file', 'folder': 'Is a directory', 'not UTF-8': "can't decode"}
  with pytest.raises(UserError, match=f'at {path}; found .*{message[kind]}') as caught:
    readme.update(str(path), str(tmp_path))
  assert '\n' not in str(caught.value)


def test_studies_in_the_order_of_names_without_those_that_tune(tmp_path):
  tiny(tmp_path / 'b', name='second')
  tiny(tmp_path / 'a', name='first')
  simulated.write(tmp_path / 'a_tuning', *simulated.tuning({'none': {0.1: [0.5]}}))
  (tmp_path / 'empty').mkdir()
  section = readme.section(tmp_path, beside=tmp_path)
  assert re.findall('^### (.*)$', section, re.M) == ['first', 'second']
  one, two = (
    readme.of_study(findings.analyse(results.read(tmp_path / name)), name) for name in 'ab'
  )
  assert section == f'{one}\n{two}'
  assert '[b/report.md](b/report.md)' in two


@pytest.mark.parametrize('tunes', [False, True])
def test_no_studies(tmp_path, tunes):
  if tunes:
    simulated.write(tmp_path / 'a', *simulated.tuning({'none': {0.1: [0.5]}}))
  with pytest.raises(UserError, match=f'studies under {tmp_path}; found none; '):
    readme.section(tmp_path)


@pytest.fixture(scope='module')
def two_methods(tmp_path_factory):
  """Findings of two variants and two methods, three seeds, one failed run; outcome F1 of snow."""
  about, records = simulated.make(
    seeds=3,
    variants=('none', 'csba'),
    methods=('cross_entropy', 'balanced_softmax'),
    outcome='f1:snow',
  )
  records[-1] = {k: v for k, v in records[-1].items() if k != 'result'}
  records[-1] |= {'status': 'failed', 'error': 'out of memory'}
  folder = simulated.write(tmp_path_factory.mktemp('two'), about, records)
  return findings.analyse(results.read(folder), resamples=199)


def test_numbers_are_those_of_the_scores(two_methods):
  head, rule, *found = rows(readme.of_study(two_methods, 'results/x'), 'condition')
  assert head[:4] == ['condition', 'variant', 'parameters', 'runs']
  assert head[4:] == ['F1 of snow', 'macro-F1', 'accuracy', 'balanced accuracy']
  assert set(rule) == {'---'}
  assert len(found) == len(two_methods.scores) == 4
  assert sorted(int(row[3]) for row in found) == [2, 3, 3, 3]  # one run failed
  for row, score in zip(found, two_methods.scores, strict=True):
    assert row[0] == score.cell['method'].replace('_', ' ')
    assert row[1:3] == [f'`{score.variant}`', f'{score.parameters:,}']
    assert int(row[3]) == score.metrics['f1:snow'].n
    for cell, name in zip(
      row[4:], ('f1:snow', 'macro_f1', 'accuracy', 'balanced_accuracy'), strict=True
    ):
      estimate = score.metrics[name]
      numbers = [float(text.replace('−', '-')) for text in INTERVAL.fullmatch(cell).groups()]
      wanted = [estimate.value, estimate.low, estimate.high]
      assert numbers == pytest.approx(wanted, abs=0.0005001)


def test_verdicts_and_where_it_comes_from(two_methods):
  text = readme.of_study(two_methods, 'results/x')
  assert text.startswith('### simulated\n\n11 runs, 1 failed; 4 classes, ')
  images = (
    'images to train in the first condition: clean (400), dusty (160), snow (60), broken (12)'
  )
  assert f'; 4 classes, {images}. simulated CPU, JAX 0.10.2. ' in text
  assert '[results/x/report.md](results/x/report.md)' in text
  command = 'csba-study --config=configs/simulated.py --workdir=runs/simulated'
  assert f'Made by:\n\n    {command}\n' in text
  found = [row for row in rows(text, 'link of the argument')[2:] if len(row) == 2]
  assert found == [[claim.title, f'**{claim.verdict}**'] for claim in two_methods.claims]


def test_training_images_are_named_largest_first_and_many_by_their_ends(two_methods):
  def text(names, counts):
    found = dataclasses.replace(two_methods, class_names=names, class_counts=[np.array(counts)] * 2)
    return readme.of_study(found, 'results/x').split(' in the first condition: ')[1]

  assert text(('a|b', '*c*', 'd'), [8, 148.6, 9.4]).startswith('\\*c\\* (149), d (9), a\\|b (8). ')
  names = tuple(f'c{i}' for i in range(21))
  assert text(names, range(21)).startswith('c20 (20) to c0 (0). ')
  assert text(names[:20], range(20)).startswith('c19 (19), c18 (18), ')


def test_a_caution_stands_below_the_verdicts(tmp_path, two_methods):
  made = simulated.make(seeds=6, variants=('none', 'csba'), redrawn=True)
  found = findings.analyse(results.read(simulated.write(tmp_path, *made)), resamples=199)
  found = dataclasses.replace(found, cautions=(*found.cautions, 'of *rates*'))
  words = f'\n\nCaution: {found.cautions[0]}.\n\nCaution: of \\*rates\\*.\n\n'
  assert words in readme.of_study(found, 'results/x')
  assert 'Caution' not in readme.of_study(two_methods, 'results/x')


def test_runs_of_different_origin_are_pooled_only_on_request(tmp_path):
  about, records = simulated.make(seeds=2, variants=('none',))
  records[0]['versions'] = records[0]['versions'] | {'numpy': '2.5.0'}
  simulated.write(tmp_path / 'one', about, records)
  path = tmp_path / 'README.md'
  path.write_text(f'{BEGIN}{END}')
  with pytest.raises(UserError, match='--pool'):
    readme.update(str(path), str(tmp_path))
  assert readme.update(str(path), str(tmp_path), pool=True) == f'{path} updated'
  assert '\n\npooled: versions.numpy: 2.4.0 in 1 runs, 2.5.0 in 1.\n\n' in path.read_text()


def test_names_are_text(tmp_path):
  path = tmp_path / 'README.md'
  path.write_text(f'{BEGIN}{END}')
  tiny(tmp_path / 'one', name=f'a|b *c* {END}')
  readme.update(str(path), str(tmp_path))
  assert '### a\\|b \\*c\\* &lt;!-- end of results --&gt;\n' in path.read_text()
  assert readme.update(str(path), str(tmp_path)).endswith('is as it was')


def test_links_lead_from_where_the_readme_is(tmp_path):
  tiny(tmp_path / 'results/one', variants=('none', 'csba'))
  for path, link in (('README.md', 'results/one'), ('results/README.md', 'one')):
    (tmp_path / path).write_text(f'{BEGIN}{END}')
    readme.update(str(tmp_path / path), str(tmp_path / 'results'))
    text = (tmp_path / path).read_text()
    assert f'[{link}/report.md]({link}/report.md)' in text
    assert f'![forest plot]({link}/forest.svg)' in text


@pytest.mark.slow
def test_the_page_of_results_is_that_of_the_results(monkeypatch):
  text = (ROOT / 'results/README.md').read_text(encoding='utf-8')
  monkeypatch.chdir(ROOT)
  made = readme.section(Path('results'), beside=Path('results'))
  assert text.partition(BEGIN)[2].partition(END)[0] == f'\n\n{made}\n', (
    'csba-report --readme=results/README.md makes it anew'
  )
  for link in re.findall(r'\]\(([^)#:]+)\)', text):
    assert (ROOT / 'results' / link).exists(), link
