"""Intervals of shares, and of recall, F1 and macro-F1 of one evaluation."""

import dataclasses

import numpy as np

DRAWS, SEED = 4000, 0
LEVEL = 0.95


@dataclasses.dataclass(frozen=True, eq=False)
class Rates:
  """95 % intervals for the images that were tested; another training would differ by more.

  Attributes:
    recall: [C, 2] lower and upper ends; NaN of a class without images.
    f1: [C, 2].
    macro_f1: [2].
  """

  recall: np.ndarray
  f1: np.ndarray
  macro_f1: np.ndarray


def intervals(counts: np.ndarray) -> Rates:
  """The intervals of a confusion matrix.

  Recall: exact (Clopper-Pearson). F1: a credible interval. The predictions of the images of a class
  are multinomial, with a Dirichlet prior of half an image on the right answer and half an image on
  all wrong ones together (for recall, Jeffreys' prior). Without it, three images that were all
  found would have F1 1 for certain. Over many classes the prior adds up: so macro-F1 has the
  interval that holds both its interval with the prior and that of the Bayesian bootstrap without
  it. How many images each class has is taken as given.

  Args:
    counts: [C, C]; rows are true classes.
  """
  counts = np.asarray(counts, np.int64)
  support, classes = counts.sum(1), len(counts)
  f1, some = np.full((classes, 2), np.nan), np.flatnonzero(support)
  recall = np.stack(share_ends(np.diag(counts), support, LEVEL), axis=1)
  if not len(some):
    return Rates(recall, f1, np.full(2, np.nan))
  prior = np.full((classes, classes), 0.5 / max(classes - 1, 1))
  np.fill_diagonal(prior, 0.5)
  with_prior, without = _drawn_f1(counts, prior), _drawn_f1(counts, 0.0 * prior)
  ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
  f1[some] = np.quantile(with_prior, ends, axis=0).T
  low, high = np.quantile([with_prior.mean(1), without.mean(1)], ends, axis=1)
  return Rates(recall, f1, np.array([low.min(), high.max()]))


def _drawn_f1(counts: np.ndarray, prior: np.ndarray) -> np.ndarray:
  """F1 of the classes that have images, for draws of the posterior; [DRAWS, classes]."""
  rng = np.random.default_rng(SEED)
  support = counts.sum(1)
  right, claimed = np.zeros((2, DRAWS, len(counts)))
  for c in np.flatnonzero(support):  # a Dirichlet draw is Gamma draws over their sum
    drawn = rng.standard_gamma(counts[c] + prior[c], (DRAWS, len(counts)))
    drawn *= support[c] / drawn.sum(1, keepdims=True)
    right[:, c] = drawn[:, c]
    claimed += drawn
  some = support > 0
  return 2 * right[:, some] / (support + claimed)[:, some]


def share_ends(
  found: np.ndarray, of: np.ndarray, level: float = LEVEL
) -> tuple[np.ndarray, np.ndarray]:
  """Ends of the exact intervals (Clopper-Pearson) of proportions; NaN of nothing.   [N], [N]"""
  from scipy import stats

  tail = (1 - level) / 2
  low = np.where(found > 0, stats.beta.ppf(tail, np.maximum(found, 1), of - found + 1), 0.0)
  left = np.maximum(of - found, 1)
  high = np.where(found < of, stats.beta.ppf(1 - tail, found + 1, left), 1.0)
  return np.where(of > 0, low, np.nan), np.where(of > 0, high, np.nan)
