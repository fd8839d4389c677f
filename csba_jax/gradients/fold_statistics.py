"""Statistics of class gradients over folds of images: unbiased Grams, errors and intervals."""

import numpy as np

from csba_jax.gradients.conflict import class_intervals, class_measures, conflict_matrix

LEVEL = 0.95  # of the intervals


def unbiased(
  sums: np.ndarray, sizes: np.ndarray, counts: np.ndarray | None = None
) -> tuple[np.ndarray, ...]:
  """Unbiased Gram of class gradients, its standard errors and 95 % intervals of the cosines.

  The cosines of this Gram are not unbiased, see `estimated_conflict`.

  With s_ck the gradient sum of fold k of class c and n_ck its images,
    G[c, d] = sum_kl <s_ck, s_dl> / (n_c n_d)                  for c != d, block sums,
    G[c, c] = sum_{k != l} <s_ck, s_cl> / sum_{k != l} n_ck n_cl,   cross-fold products.
  Images of different classes are independent, so all products of two classes count. The variance of
  an entry is the sum over its classes of (K_c - 1) / K_c sum_k (t_ck - mean_k t_ck)^2, t_ck the
  entry without fold k of class c; t quantiles have min(K_c, K_d) - 1 degrees of freedom.

  Args:
    sums: [..., C K, C K] float.
    sizes: [C, K] int.
    counts: [C] images of each class; one with fewer than two gets no interval.

  Returns:
    (gram, errors, low, high), each [..., C, C] float64.
  """
  used, itself = sizes > 0, np.eye(len(sizes), dtype=bool)
  gram, gram_own, off, own_rest = _with_and_without(sums, sizes)
  norms = np.sqrt(np.where(gram_own > 0, gram_own, np.nan))
  norms_rest = np.sqrt(np.where(own_rest > 0, own_rest, np.nan))
  cosines = off / (norms_rest[..., None] * norms[..., None, None, :])

  spread_own = _jackknife(own_rest[..., None], used)
  spread, spread_cosine = (_jackknife(x, used) for x in (off, cosines))
  errors = np.sqrt(np.where(itself, spread_own, spread + spread.swapaxes(-1, -2)))
  number = _folds_of(sizes, counts)
  t = quantile(np.minimum(number[:, None], number[None]))
  width = t * np.where(itself, 0, np.sqrt(spread_cosine + spread_cosine.swapaxes(-1, -2)))
  cosine = conflict_matrix(gram)
  return gram, errors, np.clip(cosine - width, -1, 1), np.clip(cosine + width, -1, 1)


def class_intervals_over_folds(
  sums: np.ndarray, sizes: np.ndarray, counts: np.ndarray, prior: np.ndarray
) -> np.ndarray:
  """95 % intervals of `class_measures`, from the same jackknife over the folds of every class.

  Args:
    sums: [C K, C K], as in `unbiased`.
    sizes: [C, K].
    counts: [C], as in `unbiased`.
    prior: [C].

  Returns:
    [3, 2, C], lower and upper ends; NaN for a class with fewer than two images, and where a measure
    is undefined without one of the folds.
  """
  classes, used, itself = len(sizes), sizes > 0, np.eye(len(sizes), dtype=bool)
  gram, own, off, own_rest = _with_and_without(sums, sizes)
  with_batch = gram @ prior
  # [C, K, C]: <g_d, g> without fold k of class c, whose row and column of the Gram are then others
  row = np.where(itself[:, None], own_rest[..., None], off)
  moved = with_batch + prior[:, None, None] * (row - gram[:, None])
  moved = np.where(itself[:, None], (row @ prior)[..., None], moved)
  without = class_measures(moved, np.where(itself[:, None], own_rest[..., None], own), prior)
  spread = _jackknife(without.reshape(classes, -1, without.shape[-2] * classes), used).sum(0)
  number = _folds_of(sizes, counts)
  several = number > 1
  t = float(quantile(number[several].min(initial=number.max(initial=0))))
  values = np.where(several, class_measures(with_batch, own, prior), np.nan)
  return class_intervals(spread.reshape(values.shape), values, t)


def _folds_of(sizes: np.ndarray, counts: np.ndarray | None) -> np.ndarray:
  """Folds with images of each class, [C]; 0 for a class with fewer than two images."""
  number = (sizes > 0).sum(1)
  return number if counts is None else np.where(counts < 2, 0, number)


def quantile(number: np.ndarray | int) -> np.ndarray:
  """Of Student's t, for a jackknife over so many folds or batches; NaN for fewer than two."""
  import scipy.special  # late: it takes as long as half of JAX

  degrees = np.where(np.asarray(number) > 1, np.asarray(number) - 1, np.nan)
  return scipy.special.stdtrit(degrees, 0.5 + LEVEL / 2)


def _with_and_without(sums: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, ...]:
  """The unbiased Gram, and its entries without each fold.

  Returns:
    The Gram [..., C, C]; its diagonal [..., C]; without fold k of class c, row c off the diagonal,
    [..., C, K, C], and its entry on the diagonal, [..., C, K].
  """
  classes, folds = sizes.shape
  products = np.asarray(sums, np.float64).reshape(*sums.shape[:-2], *2 * (classes, folds))
  n, itself = sizes.sum(1), np.eye(classes, dtype=bool)
  by_fold = products.sum(-1)  # [..., C, K, C]: fold k of class c with all of class d
  blocks = by_fold.sum(-2)  # [..., C, C]
  own = np.einsum('...ckck->...ck', products)  # squared norms
  to_others = np.einsum('...ckc->...ck', by_fold) - own  # fold k with the class's other folds

  diagonal, pairs = to_others.sum(-1), (sizes * (n[:, None] - sizes)).sum(1)
  gram_own = _divide(diagonal, pairs)
  gram = np.where(itself, gram_own[..., None], blocks / outer(sizes))

  rest = n[:, None] - sizes
  off = _divide(blocks[..., None, :] - by_fold, rest[:, :, None] * n)
  own_rest = _divide(diagonal[..., None] - 2 * to_others, pairs[:, None] - 2 * sizes * rest)
  return gram, gram_own, off, own_rest


def _jackknife(x: np.ndarray, used: np.ndarray) -> np.ndarray:
  """(K_c - 1) / K_c sum_k (x_ck - mean_k x_ck)^2, folds in use.  [..., C, K, D] -> [..., C, D]"""
  used = used[:, :, None]
  number = np.maximum(used.sum(1), 1)
  mean = np.where(used, x, 0).sum(-2) / number
  squares = np.where(used, (x - mean[..., None, :]) ** 2, 0).sum(-2)
  return (number - 1) / number * squares


def outer(sizes: np.ndarray) -> np.ndarray:
  """n_c n_d, 1 in place of 0.   [C, K] -> [C, C]"""
  n = np.maximum(sizes.sum(1), 1).astype(np.float64)
  return n[:, None] * n[None]


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """a / b, and 0 where b is 0: a class without images or without a second fold."""
  return np.where(b > 0, a / np.maximum(b, 1), 0)
