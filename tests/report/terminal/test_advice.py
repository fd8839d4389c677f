"""The text of advice: a row for each rule, wrapped, and a command that can be given as it is."""

import shlex

import pytest

from csba_jax.analysis.advice.rules import Finding
from csba_jax.report.terminal import advice

LONG = ' '.join(f'word{i}' for i in range(40)) + '.'


def lines_of(*findings, workdir='runs/a'):
  return advice.describe([Finding(*f) for f in findings], workdir).splitlines()


def test_rows_are_aligned_and_wrapped(monkeypatch):
  monkeypatch.setenv('COLUMNS', '70')
  title, first, *rest, second, last = lines_of(('sizes', 'no', LONG), ('a long name', 'yes', 'x'))
  assert title == 'advice (a problem: yes, no, or not known)'
  assert first.startswith('sizes        no         word0 word1 ')
  assert all(line.startswith(' ' * 24 + 'word') for line in rest)
  assert all(len(line) <= 70 for line in (first, *rest))
  assert ' '.join([first[24:], *(line.strip() for line in rest)]) == LONG
  assert second == 'a long name  yes        x'
  assert last == 'next: see first to: a long name'


@pytest.mark.parametrize('workdir', ['runs/a', 'runs/a/', '/my photos/b', '~/c'])
def test_the_next_training_is_a_command(workdir):
  problem = ('class sizes', 'yes', 'x', {'loss.name': 'balanced_softmax'})
  last = lines_of(problem, workdir=workdir)[-1]
  where = workdir.rstrip('/')
  assert shlex.split(last.removeprefix('next: ')) == [
    'csba-train',
    f'--config={where}/config.json',
    '--config.loss.name=balanced_softmax',
    f'--workdir={where}-balanced_softmax',
  ]


def test_where_nothing_is_to_be_done():
  assert lines_of(('a', 'no', 'x'))[-1] == 'next: nothing that these numbers ask for'
  last = lines_of(('a', 'no', 'x'), ('b', 'not known', 'y'))[-1]
  assert last.endswith('what is not known needs more validation images')
