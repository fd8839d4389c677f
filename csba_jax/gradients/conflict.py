"""From Grams of class gradients to the conflict matrix and the measures that know magnitudes.

Functions take NumPy or JAX arrays and stay with them. NaN means undefined, and nothing else: the
cosine of a class without images, with a zero gradient, or whose unbiased squared norm is not
positive. Undefined entries are left out of every mean.
"""

import dataclasses
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from csba_jax.errors import UserError
from csba_jax.files import write_atomically
from csba_jax.longtail import shot_groups
from csba_jax.longtail import shot_groups

Array = Any  # NumPy or JAX
SCOPES = ('shared', 'total')  # sums of layers, ahead of the layers


def conflict_matrix(gram: Array) -> Array:
  """Cosines G[c, d] / sqrt(G[c, c] G[d, d]), the Gradient Conflict Matrix of arXiv 2606.05740.

  Args:
    gram: [..., C, C], symmetric.

  Returns:
    [..., C, C] from -1 to 1, 1 on the diagonal; NaN in the rows and columns of classes whose
    diagonal is not positive.

  Example:
    >>> conflict_matrix(np.array([[4.0, -1.0], [-1.0, 1.0]]))
    array([[ 1. , -0.5],
           [-0.5,  1. ]])
  """
  xp = gram.__array_namespace__()
  norms = _norms(gram)
  cosines = xp.clip(gram / (norms[..., :, None] * norms[..., None, :]), -1, 1)
  eye = xp.eye(gram.shape[-1], dtype=bool)
  return xp.where(eye & ~xp.isnan(cosines), xp.ones_like(cosines), cosines)


def magnitude_similarity(gram: Array) -> Array:
  """Gradient-magnitude similarity 2 |a| |b| / (|a|^2 + |b|^2) (Yu et al. 2020).

  [..., C, C] -> [..., C, C] from 0 to 1; NaN as in `conflict_matrix`.
  """
  norms = _norms(gram)
  a, b = norms[..., :, None], norms[..., None, :]
  return 2 * a * b / (a * a + b * b)


def progress(gram: Array, prior: Array) -> Array:
  """progress[c, d] = pi_d G[c, d]: what class d does for class c.

  One step of plain SGD with rate lr on the loss sum_d pi_d L_d lowers L_c by lr sum_d
  progress[c, d] to first order. It speaks of that step alone: momentum, weight decay and weights
  on classes change the direction or pi.

  Args:
    gram: [..., C, C].
    prior: pi [C], sums to 1.
  """
  return gram * prior.reshape((1,) * (gram.ndim - 1) + (-1,))


def interference(gram: Array, prior: Array) -> Array:
  """max(0, -sum_{d != c} pi_d G[c, d]) / (pi_c G[c, c]): 1 means the others undo all that c gains.

  [..., C, C], [C] -> [..., C]; NaN where G[c, c] is not positive.
  """
  xp = gram.__array_namespace__()
  done = progress(gram, prior)
  own = xp.sum(done * xp.eye(gram.shape[-1], dtype=done.dtype), axis=-1)
  others = xp.sum(done, axis=-1) - own
  return xp.where(own > 0, xp.maximum(-others, xp.zeros_like(own)), xp.nan) / xp.where(
    own > 0, own, xp.ones_like(own)
  )


def conflict_rate(cosines: np.ndarray, pairs: np.ndarray | None = None) -> float:
  """Share of unordered pairs c != d whose cosine is negative, of those where it is defined.

  Args:
    cosines: [C, C].
    pairs: [C, C] bool, the pairs to count, in either order; all by default.

  Returns:
    0 to 1; NaN where no pair is defined.
  """
  cosines = np.asarray(cosines)
  counted = np.triu(np.ones_like(cosines, bool), 1)
  if pairs is not None:
    counted &= pairs | pairs.T
  counted &= ~np.isnan(cosines)
  return float((cosines[counted] < 0).mean()) if counted.any() else float('nan')


def majority_minority(class_counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Masks [C] of the many-shot classes (> 100 images) and the others.

  Where one group would be empty: the largest and the smallest third, a tie at their edge in the
  order of classes.
  """
  counts = np.asarray(class_counts)
  many = np.isin(np.arange(len(counts)), shot_groups(counts)['many'])
  if many.any() and not many.all():
    return many, ~many
  order = np.argsort(-counts, kind='stable')
  third = max(1, len(counts) // 3) if len(counts) > 1 else 0
  largest, smallest = np.zeros(len(counts), bool), np.zeros(len(counts), bool)
  largest[order[:third]], smallest[order[len(counts) - third :]] = True, True
  return largest, smallest


def head_tail_conflict(cosines: np.ndarray, class_counts: np.ndarray) -> float:
  """`conflict_rate` over pairs of one class of `majority_minority` each."""
  majority, minority = majority_minority(class_counts)
  return conflict_rate(cosines, majority[:, None] & minority[None])


def _norms(gram: Array) -> Array:
  """|g_c| from the diagonal, [..., C]; NaN where it is not positive."""
  xp = gram.__array_namespace__()
  squares = xp.sum(gram * xp.eye(gram.shape[-1], dtype=gram.dtype), axis=-1)
  return xp.sqrt(xp.where(squares > 0, squares, xp.nan))
