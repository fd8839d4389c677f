"""The long-tailed subset of a training set: which images of each class are kept."""

import numpy as np

from csba_jax.data.class_counts import class_counts, members, profile_counts
from csba_jax.data.random_draws import permutation
from csba_jax.errors import UserError


def long_tail_subset(
  labels: np.ndarray,
  num_classes: int,
  imbalance_factor: float,
  profile: str,
  class_order: str,
  seed: int,
  largest_class: int = 0,
  disjoint_subsets: int = 0,
) -> np.ndarray:
  """Indices of a long-tailed subset:  n_c = min(available_c, profile count of c's position).

  n_max is the number of images of the first class in the order, or `largest_class`. Each class
  keeps the first images of one permutation. So with the same seed, a larger factor gives a subset
  of a smaller factor's set.

  With `disjoint_subsets` = S, the permutation of a class is the same for every seed and is cut into
  S equal parts; a remainder is left out. Seed s takes the first images of part s, so that subsets
  of different seeds have no image in common.

  Args:
    labels: [N] int.
    num_classes: C.
    imbalance_factor: n_max / n_min >= 1; 1 for 'natural'.
    profile: 'exp' or 'step' (`class_counts.profile_counts`), or 'natural': all images.
    class_order: 'index' (class 0 is the largest) or 'frequency' (most frequent class first, ties by
      index).
    seed: seed of the draw; with disjoint subsets which of them, counted from 0.
    largest_class: n_max; 0: the number of images of the first class, or of a part of it.
    disjoint_subsets: S; 0: every seed draws from all images.

  Returns:
    Sorted int64 indices.

  Raises:
    UserError: an unknown profile or order; an imbalance factor that leaves a class without images;
      a largest class or S with 'natural'; fewer images of the first class than n_max; fewer images
      of any class than S; a seed that is not below S.
  """
  labels = np.asarray(labels)
  if profile == 'natural':
    _check_natural(imbalance_factor, largest_class, disjoint_subsets)
    return np.arange(len(labels))
  if disjoint_subsets and not 0 <= seed < disjoint_subsets:
    raise UserError(
      f'a seed from 0 to {disjoint_subsets - 1} with {disjoint_subsets} disjoint subsets',
      f'{seed}',
      'set data.seed, or more data.disjoint_subsets',
    )
  pools = _pools(labels, num_classes, seed, disjoint_subsets)
  available = np.array([len(pool) for pool in pools])
  if disjoint_subsets and not available.all():
    c = int(np.argmin(available))
    raise UserError(
      f'an image of every class for each of {disjoint_subsets} disjoint subsets',
      f'{int((labels == c).sum())} images of class {c}, counted from 0',
      'set a smaller data.disjoint_subsets',
    )
  order = _class_order(class_counts(labels, num_classes), class_order)
  most = int(available[order[0]])
  if largest_class > most:
    raise UserError(
      f'data.largest_class of at most {most}: images of the first class'
      + (f', for each of {disjoint_subsets} disjoint subsets' if disjoint_subsets else ''),
      f'{largest_class}',
      'set a smaller data.largest_class'
      + (', or fewer data.disjoint_subsets' if disjoint_subsets else ''),
    )
  wanted = profile_counts(largest_class or most, num_classes, imbalance_factor, profile)
  parts = [pools[c][:n] for c, n in zip(order.tolist(), wanted.tolist(), strict=True)]
  return np.sort(np.concatenate(parts))


def _pools(labels: np.ndarray, num_classes: int, seed: int, subsets: int) -> list[np.ndarray]:
  """The images that each class may take, in the order in which it takes them."""
  pools = []
  for c, images in enumerate(members(labels, num_classes)):
    if subsets:
      size = len(images) // subsets
      order = permutation(('disjoint subsets', c), len(images))[seed * size : (seed + 1) * size]
    else:
      order = permutation((seed, 'long tail', c), len(images))
    pools.append(images[order])
  return pools


def _check_natural(imbalance_factor: float, largest_class: int, disjoint_subsets: int) -> None:
  """Raises UserError for what only a long-tailed profile can have."""
  if imbalance_factor != 1:
    raise UserError(
      "imbalance_factor 1 with profile 'natural', which keeps every image",
      f'imbalance_factor {imbalance_factor:g}',
      "set data.profile to 'exp' or 'step', or data.imbalance_factor to 1",
    )
  if largest_class or disjoint_subsets:
    raise UserError(
      "largest_class 0 and disjoint_subsets 0 with profile 'natural', which keeps every image",
      f'{largest_class} and {disjoint_subsets}',
      "set data.profile to 'exp' or 'step', or both to 0",
    )


def _class_order(available: np.ndarray, class_order: str) -> np.ndarray:
  """Classes in order of their size in the long-tailed subset, largest first, [C] int64."""
  if class_order == 'index':
    return np.arange(len(available))
  if class_order == 'frequency':
    return np.argsort(-available, kind='stable')
  raise UserError(
    "class_order 'index' or 'frequency'", repr(class_order), "choose 'index' or 'frequency'"
  )
