"""Tables of results, to the letter."""

import numpy as np
import pytest

from csba_jax.report.terminal import by_net, table


def result(f1, **changes):
  """What summarise and train_and_evaluate write for three classes."""
  return {
    'accuracy': 0.75,
    'macro_f1': 0.5,
    'balanced_accuracy': 0.625,
    'expected_calibration_error': 0.0625,
    'group_accuracy': {'many': 0.9, 'medium': None, 'few': 0.25},
    'per_class': {
      'precision': [0.5, 0.25, 0.0],
      'recall': [1.0, 0.125, None],
      'f1': f1,
      'support': [1000, 10, 0],
    },
    'class_names': ['cat', 'physical damage', 'ox'],
    'class_counts': [500, 50, 5],
  } | changes


def test_comparison():
  text = table.comparison(
    {
      'none': result([0.5, 0.25, 0.0]),
      'csba_class': result([0.75, 1.0, 0.3333], macro_f1=0.695, accuracy=None),
    }
  )
  assert text == '\n'.join(
    [
      'F1 of class        training images   none  csba_class',
      'cat                            500  0.500       0.750',
      'physical damage                 50  0.250       1.000',
      'ox                               5  0.000       0.333',
      '',
      'macro-F1                            0.500       0.695',
      'balanced accuracy                   0.625       0.625',
      'accuracy                            0.750           -',
    ]
  )


def test_comparison_keeps_the_order_of_the_runs():
  runs = {name: result([0.1, 0.2, 0.3]) for name in ('z', 'a', 'm')}
  assert table.comparison(runs).splitlines()[0].split()[-3:] == ['z', 'a', 'm']


def test_long_titles_are_cut_and_stay_distinct(monkeypatch):
  monkeypatch.setenv('COLUMNS', '90')
  long = [f'a-study-of-many-things/multibranch-width-{width}-csba' for width in (8, 16)]
  lines = table.comparison({name: result([0.1, 0.2, 0.3]) for name in long}).splitlines()
  assert max(map(len, lines)) <= 90
  first, second = lines[0].split()[-2:]
  assert first != second
  assert first.startswith('a-')
  assert table.titles(['none', 'csba'], result([0.1, 0.2, 0.3])) == ['none', 'csba']
  many = [f'runs-of-a-net-{i:02}' for i in range(20)]
  assert table.titles(many, result([0.1, 0.2, 0.3])) == [f'runs-of-a-..{i:02}' for i in range(20)]


def test_single():
  assert table.single(result([0.6667, 0.1667, None])) == '\n'.join(
    [
      'class               training images  precision  recall     F1  support',
      'cat                             500      0.500   1.000  0.667     1000',
      'physical damage                  50      0.250   0.125  0.167       10',
      'ox                                5      0.000       -      -        0',
      '',
      'macro-F1                      0.500',
      'balanced accuracy             0.625',
      'accuracy                      0.750',
      'many-shot accuracy            0.900',
      'few-shot accuracy             0.250',
      'calibration error             0.062',
    ]
  )


@pytest.mark.parametrize('missing', [None, float('nan')])
def test_a_missing_number_is_a_dash_and_a_missing_group_no_row(missing):
  groups = {'many': missing, 'medium': 0.5, 'few': missing}
  changes = {'macro_f1': missing, 'expected_calibration_error': missing, 'group_accuracy': groups}
  lines = table.single(result([missing] * 3, **changes)).splitlines()
  assert [line.split()[-2] for line in lines[1:4]] == ['-'] * 3
  assert [line.split() for line in lines if line.startswith(('macro', 'calibration'))] == [
    ['macro-F1', '-'],
    ['calibration', 'error', '-'],
  ]
  assert [line.split()[0] for line in lines if '-shot' in line] == ['medium-shot']


def test_class_names_need_not_be_strings():
  text = table.comparison({'a': result([0.1, 0.2, 0.3], class_names=[0, 1, 2])})
  assert [line.split()[0] for line in text.splitlines()[1:4]] == ['0', '1', '2']


def test_classes_stand_from_the_largest_to_the_smallest():
  found = result([0.1, 0.2, 0.3], class_counts=[5, 50, 500], confusion_matrix=np.eye(3, dtype=int))
  for text in (
    table.single(found),
    table.comparison({'a': found}),
    by_net.describe({'a': [found] * 2, 'b': [found] * 2}),
  ):
    assert [line.split()[0] for line in text.splitlines()[1:4]] == ['ox', 'physical', 'cat']
  assert table.comparison({'a': found}).splitlines()[1].split() == ['ox', '500', '0.300']


def test_a_name_that_is_too_long_is_cut_and_stays_distinct():
  names = [
    f'{"Electrical-damage of the junction box, "}{side}' for side in ('left', 'right', 'top')
  ]
  rows = table.single(result([0.1, 0.2, 0.3], class_names=names)).splitlines()[1:4]
  assert len({row.split('  ')[0] for row in rows}) == 3
  assert max(len(row.split('  ')[0]) for row in rows) == 40
