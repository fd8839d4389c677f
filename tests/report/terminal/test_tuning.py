"""The table of a study of learning rates, to the letter."""

import runpy
import types
from pathlib import Path

from csba_jax.report.terminal import tuning
from csba_jax.study import results

simulated = types.SimpleNamespace(**runpy.run_path(Path(__file__).parents[2] / 'simulated.py'))


def described(folder, scores):
  found = results.read(simulated.write(folder, *simulated.tuning(scores)))
  return tuning.describe(found).split('\n')


def test_means_and_a_star_at_the_best(tmp_path):
  lines = described(
    tmp_path,
    {
      'none': {0.1: [0.5, 0.7], 0.02: [0.9, 0.2125]},
      'csba': {0.1: [0.8, 0.8], 0.02: [0.1, 0.9]},
    },
  )
  assert lines == [
    'mean validation score at learning rate   0.02     0.1',
    'variant=csba                            0.500   0.800*',
    'variant=none                            0.556   0.600*',
    '* chosen; runs a number: 2; no test part was looked at',
  ]


def test_of_equal_means_the_smaller_rate_has_the_star(tmp_path):
  lines = described(tmp_path, {'none': {0.2: [0.5], 0.1: [0.5], 0.05: [0.25]}})
  assert lines[0].split()[-3:] == ['0.05', '0.1', '0.2']
  assert lines[1].split()[-3:] == ['0.250', '0.500*', '0.500']


def test_a_rate_that_one_variant_was_not_run_with(tmp_path):
  lines = described(tmp_path, {'none': {0.1: [0.5], 0.2: [0.25]}, 'csba': {0.2: [0.5, 1.0]}})
  rows = {line.split()[0]: line.split()[1:] for line in lines[1:-1]}
  assert rows == {'variant=csba': ['-', '0.750*'], 'variant=none': ['0.500*', '0.250']}
  assert lines[-1].startswith('* chosen; runs a number: 1 to 2;')


def test_a_row_is_named_by_what_varies_alone(tmp_path):
  alone = described(tmp_path / 'one', {'csba': {0.1: [0.5]}})[1]
  assert alone.startswith('depth=1 imbalance_factor=33.0 method=cross_entropy model=multibranch ')
  several = described(tmp_path / 'two', {'csba': {0.1: [0.5]}, 'se': {0.1: [0.5]}})
  assert [line.split()[:-1] for line in several[1:-1]] == [['variant=csba'], ['variant=se']]
