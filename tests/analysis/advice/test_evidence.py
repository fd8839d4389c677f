"""The numbers of the evidence against scikit-learn, statsmodels' formulas by hand, and coverage."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from csba_jax.analysis import rates
from csba_jax.analysis.advice import evidence
from csba_jax.analysis.advice.evidence import Evidence
from csba_jax.measure.calibration import Validation

COUNTS = np.array([90, 30, 10])


def made(seed=0, n=(40, 25, 6)):
  rng = np.random.default_rng(seed)
  labels = np.repeat(np.arange(3), n)
  logits = rng.normal(size=(len(labels), 3)) + 1.5 * np.eye(3)[labels]
  return Evidence(('a', 'b', 'c'), COUNTS, Validation(logits.astype(np.float32), labels))


def test_recalls_are_scikit_learns_with_exact_intervals():
  e = made()
  recalls = metrics.recall_score(e.validation.labels, e.predicted, average=None)
  for c in range(3):
    found = e.recall(c)
    k, n = round(recalls[c] * e.support[c]), e.support[c]
    assert found.value == pytest.approx(recalls[c])
    assert found.low == pytest.approx(stats.beta.ppf(0.025, k, n - k + 1))
    assert found.high == pytest.approx(stats.beta.ppf(0.975, k + 1, n - k))
  balanced = metrics.balanced_accuracy_score(e.validation.labels, e.predicted)
  assert e.mean_recall.value == pytest.approx(balanced)


def test_gain_is_that_of_the_adjusted_predictions():
  e = made()
  adjusted = (e.validation.logits - np.log(COUNTS / COUNTS.sum())).argmax(1)
  np.testing.assert_array_equal(e.adjusted, adjusted)
  before, after = (
    metrics.balanced_accuracy_score(e.validation.labels, p) for p in (e.predicted, adjusted)
  )
  assert e.gain.value == pytest.approx(after - before)


def test_the_interval_of_one_class_is_agresti_and_mins():
  """Half an image joins each cell of the table of two answers: (b - c) / (n + 2) and its error."""
  labels = np.zeros(20, int)
  logits = np.zeros((20, 2))
  logits[:, 0] = [1.0] * 9 + [-0.5] * 4 + [-9.0] * 7  # right; right once adjusted; wrong
  e = Evidence(('a', 'b'), np.array([10, 30]), Validation(logits.astype(np.float32), labels))
  n, gained, lost = 22, 4.5, 0.5
  centre = (gained - lost) / n
  width = 1.959964 * np.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
  assert e.gain.value == pytest.approx(0.2)
  assert e.gain.low == pytest.approx(centre - width)
  assert e.gain.high == pytest.approx(centre + width)


def test_a_share_of_nothing_has_no_interval():
  assert np.isnan(evidence.share(0, 0)).all()
  assert evidence.share(3, 3)[0] == evidence.share(3, 3)[2] == 1
  assert str(evidence.share(1, 2)) == '0.50 (0.01 to 0.99)'
  found, of = np.arange(6), np.full(6, 5)
  for level in (0.95, 0.999):
    low, high = rates.share_ends(found, of, level)
    for k in range(6):
      expected = stats.binomtest(k, 5).proportion_ci(level, 'exact')
      assert (low[k], high[k]) == pytest.approx((expected.low, expected.high))


def test_auc_is_scikit_learns():
  rng = np.random.default_rng(0)
  larger, smaller = rng.integers(0, 9, 30) + 2, rng.integers(0, 9, 12)  # with ties
  truth = np.r_[np.ones(30), np.zeros(12)]
  found = evidence.auc(larger, smaller)
  assert found.value == pytest.approx(metrics.roc_auc_score(truth, np.r_[larger, smaller]))
  above = np.array([[(a > b) + (a == b) / 2 for b in smaller] for a in larger])
  error = np.sqrt(above.mean(1).var(ddof=1) / 30 + above.mean(0).var(ddof=1) / 12)
  assert found.high - found.value == pytest.approx(min(1.959964 * error, 1 - found.value))
  assert np.isnan(evidence.auc(larger, smaller[:1])).all()


def test_intervals_cover_the_truth():
  """Of 400 made-up validation parts, the mean recall and the gain of the population."""
  many = made(1, (20_000, 20_000, 20_000))
  hits = np.zeros(2)
  for seed in range(400):
    e = made(seed + 2)
    for i, (found, truth) in enumerate(((e.mean_recall, many.mean_recall), (e.gain, many.gain))):
      hits[i] += found.low <= truth.value <= found.high
  assert (hits >= 0.93 * 400).all(), hits
