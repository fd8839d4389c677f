"""From Grams of class gradients to the conflict matrix and the magnitude-aware measures.

Functions take NumPy or JAX arrays and return arrays of the same kind. NaN means undefined and
nothing else: the cosine of a class without images, of one with a zero gradient, or of one whose
unbiased squared norm is not positive. Undefined entries are left out of every mean.
"""

import dataclasses
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from csba_jax.data.class_counts import by_frequency, shot_groups
from csba_jax.errors import UserError
from csba_jax.files import write_atomically
from csba_jax.gradients.gram import RESERVED, ClassGrams

Array = Any  # NumPy or JAX
SCOPES = RESERVED  # they stand before the layers
CLASS_MEASURES = ('share', 'cosine', 'interference')
CLASS_RANGES = ((-np.inf, np.inf), (-1, 1), (0, np.inf))  # of the measures as they are shown


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
  """progress[c, d] = pi_d G[c, d]: how much class d lowers the loss of class c.

  One step of plain SGD with rate lr on the loss sum_d pi_d L_d lowers L_c by lr sum_d
  progress[c, d] to first order. This holds for that step alone: momentum, weight decay and class
  weights change the direction or pi.

  Args:
    gram: [..., C, C].
    prior: pi [C], sums to 1.
  """
  return gram * prior.reshape((1,) * (gram.ndim - 1) + (-1,))


def interference(gram: Array, prior: Array) -> Array:
  """max(0, -sum_{d != c} pi_d G[c, d]) / (pi_c G[c, c]): at 1 the others undo all that c gains.

  [..., C, C], [C] -> [..., C]; NaN where G[c, c] is not positive.
  """
  xp = gram.__array_namespace__()
  done = progress(gram, prior)
  own = xp.sum(done * xp.eye(gram.shape[-1], dtype=done.dtype), axis=-1)
  others = xp.sum(done, axis=-1) - own
  return xp.where(own > 0, xp.maximum(-others, xp.zeros_like(own)), xp.nan) / xp.where(
    own > 0, own, xp.ones_like(own)
  )


def class_measures(with_batch: np.ndarray, own: np.ndarray, prior: np.ndarray) -> np.ndarray:
  """Of each class its share of the batch gradient g, its cosine with g, and its interference.

  With g = sum_c pi_c g_c: pi_c <g_c, g> / |g|^2 (shares sum to 1), <g_c, g> / (|g_c| |g|), and
  -<g_c, g - pi_c g_c> / (pi_c |g_c|^2), which `interference` cuts at 0.

  Args:
    with_batch: <g_c, g>, [..., C].
    own: |g_c|^2, [..., C].
    prior: pi [C].

  Returns:
    [..., 3, C] in the order of CLASS_MEASURES; NaN where a squared norm is not positive.
  """
  squared = with_batch @ prior
  squared = np.where(squared > 0, squared, np.nan)[..., None]
  own = np.where(own > 0, own, np.nan)
  mine = prior * own
  undone = np.divide(
    mine - with_batch, mine, out=np.full_like(mine, np.nan), where=np.abs(mine) > 0
  )
  cosine = with_batch / np.sqrt(own * squared)
  return np.stack([prior * with_batch / squared, cosine, undone], axis=-2)


def conflict_rate(cosines: np.ndarray, pairs: np.ndarray | None = None) -> float:
  """Share of unordered pairs c != d whose cosine is negative, among those where it is defined.

  Args:
    cosines: [C, C].
    pairs: [C, C] bool, the pairs to count, in either order; by default all.

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
  """Masks [C] of the many-shot classes (> 100 images) and of the others.

  Where one of the groups would be empty: of the largest and of the smallest third of the classes,
  with ties in the order of the classes.
  """
  counts = np.asarray(class_counts)
  many = np.isin(np.arange(len(counts)), shot_groups(counts)['many'])
  if many.any() and not many.all():
    return many, ~many
  order = by_frequency(counts)
  third = max(1, len(counts) // 3) if len(counts) > 1 else 0
  largest, smallest = np.zeros(len(counts), bool), np.zeros(len(counts), bool)
  largest[order[:third]], smallest[order[len(counts) - third :]] = True, True
  return largest, smallest


def head_tail_conflict(cosines: np.ndarray, class_counts: np.ndarray) -> float:
  """`conflict_rate` over pairs of a majority and a minority class, see `majority_minority`."""
  majority, minority = majority_minority(class_counts)
  return conflict_rate(cosines, majority[:, None] & minority[None])


def minority_interference(gram: np.ndarray, class_counts: np.ndarray, prior: np.ndarray) -> float:
  """Mean over the minority of min(1, `interference`): the share of its gain that others undo.

  In [0, 1]. Interference is cut at 1 because it has no upper bound: one class whose own gradient is
  small for a moment would dominate the mean over classes, and its run the mean over runs.
  """
  _, minority = majority_minority(class_counts)
  undone = np.minimum(interference(gram, prior)[minority], 1)
  known = undone[~np.isnan(undone)]
  return float(known.mean()) if known.size else float('nan')


def summary(gram: np.ndarray, class_counts: np.ndarray, prior: np.ndarray) -> dict[str, float]:
  """`conflict_rate`, `head_tail_conflict`, mean cosine and `minority_interference`.

  Means are over defined entries, NaN where there are none; pairs of classes are unordered.

  Args:
    gram: [C, C].
    class_counts: [C] training images, which decide the minority.
    prior: pi [C].
  """
  cosines = conflict_matrix(gram)
  off = cosines[np.triu(~np.isnan(cosines), 1)]
  return {
    'conflict_rate': conflict_rate(cosines),
    'head_tail_conflict': head_tail_conflict(cosines, class_counts),
    'mean_cosine': float(off.mean()) if off.size else float('nan'),
    'minority_interference': minority_interference(gram, class_counts, prior),
  }


def shares(weights: np.ndarray) -> np.ndarray:
  """weights / sum(weights).   [C] -> [C] float64"""
  weights = np.asarray(weights, np.float64)
  return weights / weights.sum()


def weigh_classes(
  class_counts: np.ndarray | None, prior: np.ndarray | None, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """class_counts [C], by default counts, and the prior [C], by default their shares; checked."""
  found = []
  for name, given in (('class_counts', class_counts), ('prior', prior)):
    weights = np.asarray(counts if given is None else given)
    numbers = weights.dtype.kind in 'biuf' and weights.shape == np.shape(counts)
    if not numbers or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
      raise UserError(
        f'{name}, {len(counts)} numbers of at least 0, not all 0',
        repr(weights.tolist())[:80],
        'give one for each class, in the order of the labels',
      )
    found.append(weights)
  return found[0], shares(found[0] if prior is None else found[1])


def name_classes(class_names: Sequence[str] | None, classes: int) -> tuple[str, ...]:
  """The names as strings; 'class 0', 'class 1', ... for None."""
  if class_names is None:
    return tuple(f'class {c}' for c in range(classes))
  if not hasattr(class_names, '__len__') or isinstance(class_names, Mapping):
    raise UserError(f'{classes} class names', type(class_names).__name__, 'pass a list of names')
  if len(class_names) != classes:
    raise UserError(f'{classes} class names', f'{len(class_names)}', 'name every class once')
  return tuple(map(str, class_names))


def class_intervals(variance: np.ndarray, values: np.ndarray, quantile: float) -> np.ndarray:
  """Intervals of CLASS_MEASURES, cut at their ranges.   [3, C], [3, C] -> [3, 2, C]"""
  width = quantile * np.sqrt(variance)
  return np.stack([_within_ranges(values - width), _within_ranges(values + width)], axis=1)


def _within_ranges(values: np.ndarray) -> np.ndarray:
  """Values of CLASS_MEASURES, [3, C], cut at their ranges."""
  low, high = np.array(CLASS_RANGES, np.float64).T
  return np.clip(values, low[:, None], high[:, None])


def _norms(gram: Array) -> Array:
  """|g_c| from the diagonal, [..., C]; NaN where it is not positive."""
  xp = gram.__array_namespace__()
  squares = xp.sum(gram * xp.eye(gram.shape[-1], dtype=gram.dtype), axis=-1)
  return xp.sqrt(xp.where(squares > 0, squares, xp.nan))


@dataclasses.dataclass(frozen=True, eq=False)
class Conflict:
  """Grams of class gradients by scope, with their errors, and a description of their origin.

  S scopes: 'shared' (all layers but the classifier head), 'total', then every layer in the order of
  the parameter tree (`take` gives another). C classes in the order of their labels. An unbiased
  estimate need not be positive semidefinite.
  """

  scopes: tuple[str, ...]
  grams: np.ndarray  # [S, C, C] float64
  errors: np.ndarray  # [S, C, C] standard errors of grams; 0 where exact, NaN where unknown
  low: np.ndarray  # [S, C, C] lower end of the cosines' 95 % intervals; NaN where there is none
  high: np.ndarray  # [S, C, C]
  losses: np.ndarray  # [C] mean loss
  counts: np.ndarray  # [C] images that were used, repetitions included
  class_names: tuple[str, ...]
  class_counts: np.ndarray  # [C] training images
  prior: np.ndarray  # [C] pi, the weight of each class in the training loss; sums to 1
  about: Mapping[str, Any]  # target, step and the like; JSON
  # [3, 2, C]: lower and upper ends of the 95 % intervals of CLASS_MEASURES in the shared scope; NaN
  # where there is none; None where they are not known, as in files of earlier versions
  class_intervals: np.ndarray | None = None

  @classmethod
  def of(
    cls,
    found: ClassGrams,
    class_names: Sequence[str] | None = None,
    class_counts: np.ndarray | None = None,
    about: Mapping[str, Any] | None = None,
    prior: np.ndarray | None = None,
  ) -> 'Conflict':
    """The conflict of one batch as it is, without sampling error.

    Args:
      found: of `class_grams`.
      class_names: 'class 0', ... by default.
      class_counts: training images of each class; by default those of the batch.
      about: other facts to keep, as JSON.
      prior: weight of each class in the training loss; by default its share of `class_counts`, as
        in a plain mean over the training set.
    """
    if not isinstance(found, ClassGrams):
      raise UserError('ClassGrams', type(found).__name__, 'pass what class_grams returns')
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(found)):
      raise UserError(
        'ClassGrams that are known: a Conflict is made on the host',
        'traced ones, inside of jit or another transformation',
        'return the ClassGrams, and call Conflict.of outside',
      )
    scopes = (*SCOPES, *found.grams)
    grams = np.stack([found.shared, found.total, *found.grams.values()]).astype(np.float64)
    cosines = conflict_matrix(grams)
    counts = np.asarray(found.counts)
    class_counts, prior = weigh_classes(class_counts, prior, counts)
    return cls(
      scopes=scopes,
      grams=grams,
      errors=np.zeros_like(grams),
      low=cosines,
      high=cosines,
      losses=np.asarray(found.losses, np.float64),
      counts=counts,
      class_names=name_classes(class_names, len(counts)),
      class_counts=class_counts,
      prior=prior,
      about={'target': 'batch', **(about or {})},
    )

  @property
  def layers(self) -> tuple[str, ...]:
    """The scopes that are single layers."""
    return self.scopes[len(SCOPES) :]

  @property
  def by_frequency(self) -> np.ndarray:
    """Classes from the largest to the smallest; equal ones in the order of their labels."""
    return by_frequency(self.class_counts)

  def at(self, scope: str = 'shared') -> int:
    """Index of a scope; UserError for a scope that is absent."""
    if scope not in self.scopes:
      raise UserError(f'a scope among {", ".join(self.scopes)}', repr(scope), 'use one of these')
    return self.scopes.index(scope)

  def take(self, scopes: Sequence[str]) -> 'Conflict':
    """The conflict of these scopes alone, in this order, after 'shared' and 'total'."""
    scopes = (*SCOPES, *(scope for scope in scopes if scope not in SCOPES))
    at = [self.at(scope) for scope in scopes]
    parts = {name: getattr(self, name)[at] for name in ('grams', 'errors', 'low', 'high')}
    return dataclasses.replace(self, scopes=scopes, **parts)

  def class_measures(self) -> np.ndarray:
    """CLASS_MEASURES of each class in the shared scope, as they are shown, [3, C]."""
    gram = self.gram()
    found = class_measures(gram @ self.prior, np.diagonal(gram), self.prior)
    return _within_ranges(found)

  def gram(self, scope: str = 'shared') -> np.ndarray:
    """<g_c, g_d>, [C, C]."""
    return self.grams[self.at(scope)]

  def cosine(self, scope: str = 'shared') -> np.ndarray:
    """The conflict matrix, [C, C]; NaN where not resolvable."""
    return conflict_matrix(self.gram(scope))

  def resolvable(self, scope: str = 'shared') -> np.ndarray:
    """Entries [C, C] both of whose squared norms exceed two standard errors."""
    squares = np.diagonal(self.gram(scope))
    known = squares > 2 * np.diagonal(self.errors[self.at(scope)])
    known &= ~np.isnan(np.diagonal(self.low[self.at(scope)]))
    return known[:, None] & known[None]

  def distinguishable(self, scope: str = 'shared') -> np.ndarray:
    """Resolvable entries [C, C] whose 95 % interval excludes 0; by chance, one in twenty."""
    at = self.at(scope)
    return self.resolvable(scope) & ((self.low[at] > 0) | (self.high[at] < 0))

  def summary(self, scope: str = 'shared') -> dict[str, float]:
    """The measures of the function `summary` in this module, and counts of pairs.

    The pairs counted are those in conflict, those in agreement, and those not resolvable.
    """
    cosines, upper = self.cosine(scope), np.triu(np.ones_like(self.gram(scope), bool), 1)
    known = self.distinguishable(scope) & upper
    return summary(self.gram(scope), self.class_counts, self.prior) | {
      'pairs_in_conflict': int((known & (cosines < 0)).sum()),
      'pairs_in_agreement': int((known & (cosines > 0)).sum()),
      'pairs_not_resolvable': int((upper & ~self.resolvable(scope)).sum()),
    }

  def save(self, path: str | os.PathLike) -> None:
    """Writes an npz file without pickles, as a whole or not at all; UserError for a bad `about`."""
    names = {'scopes': self.scopes, 'class_names': self.class_names, 'about': dict(self.about)}
    arrays = {name: getattr(self, name) for name in _ARRAYS}
    if self.class_intervals is not None:
      arrays['class_intervals'] = self.class_intervals
    try:
      text = json.dumps(names)
    except (TypeError, ValueError) as error:
      raise UserError('about as JSON', str(error), 'use numbers, strings and lists') from error
    path = Path(path)
    write_atomically(path, lambda file: np.savez(file, names=text, **arrays))

  @classmethod
  def load(cls, path: str | os.PathLike) -> 'Conflict':
    """Reads what `save` wrote; UserError for anything else."""
    try:
      content = io.BytesIO(Path(path).read_bytes())
      with np.load(content, allow_pickle=False) as file:
        arrays = {name: file[name] for name in _ARRAYS}
        if 'class_intervals' in file:
          arrays['class_intervals'] = file['class_intervals']
        names = json.loads(str(file['names']))
      found = cls(
        **arrays,
        scopes=tuple(names['scopes']),
        class_names=tuple(names['class_names']),
        about=names['about'],
      )
      shape = (len(found.scopes), len(found.class_names), len(found.class_names))
      _check_arrays(found, shape)
      return found
    except Exception as error:  # a damaged zip fails in a dozen ways
      raise UserError(
        f'a conflict file of csba_jax at {path}',
        f'{type(error).__name__}: {error}',
        'use another file',
      ) from error


def _check_arrays(found: Conflict, shape: tuple[int, int, int]) -> None:
  """Raises ValueError unless the arrays are numbers of the shapes that the names ask for."""
  names = (*found.scopes, *found.class_names)
  if not isinstance(found.about, dict) or not all(isinstance(name, str) for name in names):
    raise ValueError('scopes, class_names or about of another type')
  for name in _ARRAYS:
    array = getattr(found, name)
    wanted = shape if name in _ARRAYS[:4] else shape[1:2]
    if array.shape != wanted or array.dtype.kind not in 'fiu':
      raise ValueError(f'{name}: {array.dtype} {array.shape}, names for {wanted}')
  intervals, wanted = found.class_intervals, (len(CLASS_MEASURES), 2, shape[1])
  if intervals is not None and (intervals.shape != wanted or intervals.dtype.kind != 'f'):
    raise ValueError(f'class_intervals: {intervals.dtype} {intervals.shape}, expected {wanted}')


_ARRAYS = ('grams', 'errors', 'low', 'high', 'losses', 'counts', 'class_counts', 'prior')
