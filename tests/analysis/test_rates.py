"""Intervals of one evaluation: exact where there is a formula, and covering by simulation."""

import numpy as np
import pytest
from scipy import stats

from csba_jax.analysis import rates
from csba_jax.methods import metrics


def macro(counts):
  return metrics.macro_f1_at(counts, np.asarray(counts).sum(1))


def test_recall_is_exact():
  found = rates.intervals([[8, 2, 0], [0, 5, 0], [0, 0, 0]])
  np.testing.assert_allclose(
    found.recall[0], [stats.beta.ppf(0.025, 8, 3), stats.beta.ppf(0.975, 9, 2)]
  )
  np.testing.assert_allclose(found.recall[1], [0.025 ** (1 / 5), 1])
  assert np.isnan(found.recall[2]).all()
  assert np.isnan(found.f1[2]).all()


def test_of_two_classes_without_errors_the_interval_is_that_of_jeffreys():
  """Half an image on each side: with one other answer, recall is Beta(n + 1/2, 1/2)."""
  found = rates.intervals([[30, 0], [0, 10_000_000]])
  recall = stats.beta.rvs(30.5, 0.5, size=200_000, random_state=1)
  taken = stats.gamma.rvs(0.5, size=200_000, random_state=2)  # of the other class, by its prior
  f1 = 60 * recall / (30 + 30 * recall + taken)
  np.testing.assert_allclose(found.f1[0], np.quantile(f1, [0.025, 0.975]), atol=2e-3)


def test_a_class_that_was_found_whole_is_not_certain():
  (low, high), _ = rates.intervals([[3, 0], [0, 40]]).f1
  assert low < 0.75
  assert high > 0.99


def test_nothing_was_tested():
  found = rates.intervals(np.zeros((2, 2), int))
  assert np.isnan(found.macro_f1).all()


@pytest.mark.parametrize('right', [0.65, 0.98])
def test_intervals_cover_the_truth(right):
  """Of 150 test parts; images of each class fall from 60 to 8."""
  support = np.array([60, 30, 15, 8])
  truth = np.full((4, 4), (1 - right) / 3)
  np.fill_diagonal(truth, right)
  population = truth * support[:, None]
  expected = 2 * np.diag(population) / (support + population.sum(0))
  rng = np.random.default_rng(0)
  hits, of_macro = np.zeros(4), 0
  for _ in range(150):
    counts = np.stack([rng.multinomial(n, row) for n, row in zip(support, truth, strict=True)])
    found = rates.intervals(counts)
    hits += (found.f1[:, 0] <= expected) & (expected <= found.f1[:, 1])
    of_macro += found.macro_f1[0] <= expected.mean() <= found.macro_f1[1]
  least = 150 * 0.95 - 3 * np.sqrt(150 * 0.95 * 0.05)  # three standard errors of 150 trials
  assert of_macro >= least
  assert (hits >= least).all(), hits


def test_the_value_lies_inside():
  rng = np.random.default_rng(0)
  for _ in range(20):
    counts = rng.integers(0, 9, (5, 5)) + np.diag(rng.integers(0, 40, 5))
    low, high = rates.intervals(counts).macro_f1
    assert low < macro(counts) < high
