"""The number of images of each class: long-tailed profiles, priors, weights, shot groups."""

import math

import numpy as np

from csba_jax.errors import UserError


def profile_counts(
  n_max: int, num_classes: int, imbalance_factor: float, profile: str
) -> np.ndarray:
  """Images of each class in a long-tailed set, largest class first.

  - 'exp' (Cao et al. 2019):  n_c = int(n_max * imbalance_factor ** (-c / (C - 1)))
  - 'step' (Buda et al. 2018):  n_c = n_max for c < C // 2, else int(n_max / imbalance_factor)

  With an odd C, 'step' gives the middle class the small count (Cao et al.'s code drops the class).

  Args:
    n_max: images of the largest class, >= 1.
    num_classes: C.
    imbalance_factor: n_max / n_min >= 1.
    profile: 'exp' or 'step'.

  Returns:
    [C] int64, non-increasing, every entry >= 1.

  Raises:
    UserError: a factor below 1 or not finite, an unknown profile, or a class without an image.

  Example:
    >>> profile_counts(5000, 10, 100, 'exp').tolist()
    [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
  """
  if not (math.isfinite(imbalance_factor) and imbalance_factor >= 1):
    raise UserError(
      'imbalance_factor = n_max / n_min, finite and >= 1',
      f'{imbalance_factor}',
      'give n_max / n_min; if you have the inverse, such as 0.01, give 1 / 0.01 = 100',
    )
  position = np.arange(num_classes)
  if profile == 'exp':
    exponent = position / max(num_classes - 1, 1)
  elif profile == 'step':
    exponent = (position >= num_classes // 2).astype(np.float64)
  else:
    raise UserError("profile 'exp' or 'step'", repr(profile), "choose 'exp' or 'step'")
  exact = n_max / np.float64(imbalance_factor) ** exponent
  counts = np.floor(exact * (1 + 1e-9)).astype(np.int64)  # 0.99999... is a rounding error of 1
  if (counts < 1).any():
    raise UserError(
      'at least 1 image in every class',
      f'0 images for class {int(np.argmax(counts < 1))} of the class order '
      f'(largest class {n_max}, imbalance_factor {imbalance_factor:g})',
      f'set data.imbalance_factor to {n_max} or less',
    )
  return counts


def class_counts(labels: np.ndarray, num_classes: int) -> np.ndarray:
  """Images of each class: counts[c] = #{i: labels[i] = c}.   [N] int -> [C] int64

  Raises:
    UserError: a label outside 0..C-1.
  """
  labels = np.asarray(labels)
  if labels.size and not (labels.min() >= 0 and labels.max() < num_classes):
    raise UserError(
      f'labels from 0 to {num_classes - 1}',
      f'labels from {labels.min()} to {labels.max()}',
      'number the classes from 0 and give every class a name',
    )
  return np.bincount(labels.astype(np.int64), minlength=num_classes).astype(np.int64)


def members(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
  """The indices of each class, ascending.   [N] int -> C arrays of int64"""
  ends = np.cumsum(np.bincount(labels, minlength=num_classes))
  return np.split(np.argsort(labels, kind='stable'), ends[:-1])


def by_frequency(counts: np.ndarray) -> np.ndarray:
  """Classes from the largest to the smallest, ties by index: their order in tables and pictures.

  [C] -> [C] int64
  """
  return np.argsort(-np.asarray(counts), kind='stable')


def shot_groups(counts: np.ndarray) -> dict[str, np.ndarray]:
  """Class indices by the number of training images: many > 100, medium 20..100, few < 20.

  Args:
    counts: [C] int, training images of each class.

  Returns:
    {'many', 'medium', 'few'}: int64 arrays of class indices, ascending, together 0..C-1.
  """
  counts = np.asarray(counts)
  return {
    'many': np.flatnonzero(counts > 100),
    'medium': np.flatnonzero((counts >= 20) & (counts <= 100)),
    'few': np.flatnonzero(counts < 20),
  }


def prior(counts: np.ndarray) -> np.ndarray:
  """pi_c = n_c / sum_d n_d, the share of each class.   [C] -> [C] float64

  Raises:
    UserError: a class without images: its log prior and weight are undefined.
  """
  counts = np.asarray(counts, np.float64)
  if not (counts > 0).all():
    empty = ', '.join(str(c) for c in np.flatnonzero(~(counts > 0)))
    raise UserError(
      'at least 1 training image in every class',
      f'none of class {empty}',
      'add images to the class, or remove it',
    )
  return counts / counts.sum()


def inverse_frequency(counts: np.ndarray, beta: float) -> np.ndarray:
  """Weight 1 / n_c."""
  del beta  # only effective_number has it
  return 1 / counts


def effective_number(counts: np.ndarray, beta: float) -> np.ndarray:
  """1 / E_c with the effective number of images E_c = (1 - beta^n_c) / (1 - beta).

  Cui et al. 2019. With beta = 0 all weights are equal; beta -> 1 gives the inverse frequency.
  """
  if beta == 0:
    return np.ones(len(counts))
  return (1 - beta) / -np.expm1(counts * np.log(beta))


def no_weights(counts: np.ndarray, beta: float) -> np.ndarray:
  """Weight 1 for every class."""
  del beta
  return np.ones(len(counts))


# (counts [C] float64, beta) -> weights [C] up to a factor
WEIGHTS = {'none': no_weights, 'inverse': inverse_frequency, 'effective': effective_number}


def class_weights(name: str, counts: np.ndarray, beta: float = 0.9999) -> np.ndarray:
  """Weight of each class, scaled so that they sum to C (Cui et al. 2019).   [C] -> [C] float64

  Args:
    name: a row of WEIGHTS.
    counts: [C], training images of each class, all at least 1.
    beta: parameter of 'effective', 0 <= beta < 1.

  Raises:
    UserError: unknown name, a class without images, beta out of range.
  """
  if name not in WEIGHTS:
    raise UserError(
      f'loss.weights among {", ".join(WEIGHTS)}', repr(name), 'set --config.loss.weights'
    )
  if not 0 <= beta < 1:
    raise UserError('0 <= beta < 1', f'beta {beta}', 'set --config.loss.beta=0.9999')
  prior(counts)
  weights = WEIGHTS[name](np.asarray(counts, np.float64), beta)
  return weights * (len(weights) / weights.sum())
