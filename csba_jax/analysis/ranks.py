"""Rank correlations, of many samples at once."""

import numpy as np
import scipy.stats

from csba_jax.analysis import resampling


def resampled_association(
  x: np.ndarray, y: np.ndarray, seed: int, resamples: int
) -> tuple[np.ndarray, np.ndarray]:
  """(r, probability) of each bootstrap sample of the seeds of x and y [S, C].   [M], [M]

  r is the mean over the classes that vary in the sample, NaN without any.
  """
  n = len(x)
  counts, chances = resampling.multisets(n, seed, resamples)

  def ranks(z: np.ndarray) -> np.ndarray:
    """Ranks of the units of one class in each sample, about their mean.   [S] -> [M, S]"""
    before = (z[:, None] < z) + 0.5 * (z[:, None] == z)
    return counts @ before - n / 2

  total, varying = np.zeros(len(counts)), np.zeros(len(counts))
  for own_x, own_y in zip(x.T, y.T, strict=True):
    a, b = ranks(own_x), ranks(own_y)
    weighted = counts * a
    variances = (weighted * a).sum(1) * (counts * b * b).sum(1)
    some = variances > 0
    r = np.divide((weighted * b).sum(1), np.sqrt(variances), where=some, out=np.zeros(len(counts)))
    total, varying = total + r, varying + some
  return np.divide(total, varying, where=varying > 0, out=np.full(len(counts), np.nan)), chances


def unit_ranks(x: np.ndarray) -> np.ndarray:
  """Ranks along the last axis, of mean 0 and norm 1, whose products sum to Spearman's r."""
  ranks = scipy.stats.rankdata(x, axis=-1) - (x.shape[-1] + 1) / 2
  return ranks / np.linalg.norm(ranks, axis=-1, keepdims=True)


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Spearman's r along the last axis, of entries that neither misses; NaN where one is constant."""
  x, y = np.broadcast_arrays(x, y)
  present = ~(np.isnan(x) | np.isnan(y))
  middle = (present.sum(-1, keepdims=True) + 1) / 2
  # what is missing takes the last ranks, then no part in the sums
  x, y = (
    np.where(present, scipy.stats.rankdata(np.where(present, z, np.inf), axis=-1) - middle, 0.0)
    for z in (x, y)
  )
  variances = (x * x).sum(-1) * (y * y).sum(-1)
  return np.where(variances, (x * y).sum(-1) / np.sqrt(np.where(variances, variances, 1)), np.nan)
