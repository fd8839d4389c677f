"""The text of a diagnosis holds the numbers of its Conflict, classes from large to small."""

import dataclasses

import numpy as np
import pytest

from csba_jax.gradients import flow
from csba_jax.gradients.conflict import Conflict, interference
from csba_jax.gradients.gram import ClassGrams
from csba_jax.report.terminal import diagnosis

COUNTS = np.array([40, 500, 8])


def make(classes=3, counts=COUNTS):
  g = np.random.default_rng(0).normal(size=(classes, 9))
  grams = {'stem/conv': g[:, :6] @ g[:, :6].T, 'head': g[:, 6:] @ g[:, 6:].T}
  found = ClassGrams(
    grams, sum(grams.values()), grams['stem/conv'], np.full(classes, 4), np.arange(classes) / 7
  )
  return Conflict.of(found, [f'kind{c}' for c in range(classes)], counts, {'step': 3})


@pytest.fixture(scope='module')
def conflict():
  return make()


def block(text, title):
  """Rows of cells of the table whose first line starts with a title."""
  lines = text.split('\n\n')
  found = next(part for part in lines if part.startswith(title)).splitlines()
  return [line.split() for line in found]


def test_the_matrix_is_ordered_by_frequency(conflict):
  rows = block(diagnosis.describe(conflict), 'conflict matrix')
  assert rows[0][2:] == ['kind1', 'kind0', 'kind2']
  cosines = conflict.cosine()
  for row, c in zip(rows[1:4], (1, 0, 2), strict=True):
    assert row[:2] == [f'kind{c}', f'({COUNTS[c]})']
    assert row[2:] == [f'{cosines[c, d]:.3f}' for d in (1, 0, 2)]


def test_stars_mark_what_a_sample_distinguishes_from_0(conflict):
  low = np.where(np.eye(3, dtype=bool)[::-1], -2.0, conflict.low)
  sampled = dataclasses.replace(conflict, errors=conflict.errors + 1e-6, low=low, high=low + 0.5)
  rows = block(diagnosis.describe(sampled), 'conflict matrix')
  marks = np.array([[cell.endswith('*') for cell in row[2:]] for row in rows[1:4]])
  known = sampled.distinguishable()[np.ix_([1, 0, 2], [1, 0, 2])] & ~np.eye(3, dtype=bool)
  np.testing.assert_array_equal(marks, known)
  assert 0 < marks.sum() < 6


def test_classes_and_layers(conflict):
  text = diagnosis.describe(conflict)
  found = flow.flow(conflict)
  disturbed = interference(conflict.gram(), conflict.prior)
  rows = block(text, 'class ')
  for row, c in zip(rows[1:], (1, 0, 2), strict=True):
    values = (conflict.losses[c], found.norms[0, c], found.shares[0, c], found.cosines[0, c])
    expected = [f'{v:.3f}' for v in (*values, disturbed[c])]
    assert row == [f'kind{c}', str(COUNTS[c]), *expected]
  rows = block(text, 'layer')
  assert [row[0] for row in rows[1:]] == ['shared', 'total', 'stem/conv', 'head']
  assert rows[3][4] == f'{found.norm_ratio[2]:.3f}'
  assert 'target batch, 12 images; of 3 pairs' in text


def test_of_a_sample_measures_of_classes_have_intervals_or_are_not_shown(conflict):
  intervals = np.stack([conflict.class_measures() - 0.125, conflict.class_measures() + 0.25], 1)
  intervals[0, :, 2] = np.nan
  sampled = dataclasses.replace(conflict, errors=conflict.errors + 1e-6, class_intervals=intervals)
  text = diagnosis.describe(sampled)
  rows = block(text, 'class ')
  values = conflict.class_measures()
  for row, c in zip(rows[1:4], (1, 0, 2), strict=True):
    expected = [
      '-' if np.isnan(intervals[m, 0, c])
      else f'{values[m, c]:.2f} [{intervals[m, 0, c]:.2f}, {intervals[m, 1, c]:.2f}]'
      for m in range(3)
    ]  # fmt: skip
    assert ' '.join(row[4:]) == ' '.join(expected)
  assert 'with 95 % intervals; -: no interval' in text
  text = diagnosis.describe(dataclasses.replace(sampled, class_intervals=None))
  assert all(row[4:] == ['-', '-', '-'] for row in block(text, 'class ')[1:4])  # an earlier file


@pytest.mark.parametrize(
  ('statistics', 'words'),
  [('batch', 'each batch with its own statistics'), ('frozen', '--statistics=batch'), ('none', '')],
)
def test_it_says_which_statistics_batchnorm_had(conflict, statistics, words):
  about = {**conflict.about, 'statistics': statistics}
  text = diagnosis.describe(dataclasses.replace(conflict, about=about))
  assert words in text.splitlines()[-1]
  assert ('statistics' in text.splitlines()[-1]) == bool(words)


def test_what_is_not_resolvable_is_a_dash(conflict):
  grams = conflict.grams.copy()
  grams[:, 2, 2] = -1.0
  unknown = dataclasses.replace(conflict, grams=grams, low=grams * np.nan)
  text = diagnosis.describe(unknown)
  rows = block(text, 'conflict matrix')
  assert rows[3][2:] == ['-', '-', '-']
  assert not any('*' in row for row in (''.join(row) for row in rows[1:4]))
  assert '3 not resolvable' in text


def test_an_estimate_that_is_mostly_noise_is_a_dash(conflict):
  errors = conflict.errors.copy()
  errors[:, 1, 1] = conflict.grams[:, 1, 1]  # one standard error, not two
  noisy = dataclasses.replace(conflict, errors=errors)
  text = diagnosis.describe(noisy)
  rows, dash = block(text, 'conflict matrix'), ~noisy.resolvable()
  order = conflict.by_frequency
  assert dash.any()
  assert not dash.all()
  found = [[cell == '-' for cell in row[2:]] for row in rows[1:4]]
  np.testing.assert_array_equal(found, dash[np.ix_(order, order)])


def test_a_matrix_too_wide_for_a_terminal_is_left_to_the_picture():
  text = diagnosis.describe(make(13, np.arange(13, 0, -1)))
  assert 'conflict matrix' not in text
  assert 'kind12' in text
