"""Layer-wise gradient flow: which classes move which layer, computed from the Grams of a Conflict.

With pi the prior, g_c the class gradients of a layer and g = sum_c pi_c g_c the batch gradient.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from csba_jax.errors import UserError
from csba_jax.gradients.conflict import Conflict, majority_minority


@dataclasses.dataclass(frozen=True, eq=False)
class Flow:
  """How much each class moves each scope. NaN for absent or unresolvable classes.

  A class is unresolvable where its unbiased squared norm is not positive.
  """

  scopes: tuple[str, ...]  # as in the Conflict: shared, total, layers
  norms: np.ndarray  # [S, C]   |g_c|
  shares: np.ndarray  # [S, C]   pi_c <g_c, g> / |g|^2: parts of the batch gradient, sum 1
  cosines: np.ndarray  # [S, C]   cosine of g_c with g
  norm_ratio: np.ndarray  # [S]   mean |g_c| of the majority / mean |g_c| of the minority
  pull_ratio: np.ndarray  # [S]   |sum_majority pi_c g_c| / |sum_minority pi_c g_c|


def flow(conflict: Conflict) -> Flow:
  """The gradient flow of a conflict; majority and minority as in `majority_minority`."""
  grams, prior = conflict.grams, conflict.prior
  majority, minority = majority_minority(conflict.class_counts)
  with_batch = grams @ prior  # [S, C]   <g_c, g>
  squared = with_batch @ prior  # [S]   |g|^2
  norms = _root(np.einsum('scc->sc', grams))
  batch_norm = _root(squared)[:, None]
  return Flow(
    scopes=conflict.scopes,
    norms=norms,
    shares=prior * with_batch / batch_norm**2,
    cosines=np.clip(with_batch / (norms * batch_norm), -1, 1),
    norm_ratio=_mean(norms[:, majority]) / _mean(norms[:, minority]),
    pull_ratio=_pull(grams, prior * majority) / _pull(grams, prior * minority),
  )


def over_training(snapshots: Sequence[Conflict]) -> tuple[np.ndarray, list[Flow]]:
  """The flow of a run's snapshots in the order of their steps.

  Args:
    snapshots: at least one, with about['step'], all of the same scopes.

  Returns:
    Steps [T], and T flows.
  """
  if not snapshots:
    raise UserError('at least one snapshot', 'none', 'train with --config.diagnostics.every=K')
  if not all('step' in snapshot.about for snapshot in snapshots):
    raise UserError(
      "snapshots with about['step']", 'one without', "measure with about={'step': step}"
    )
  ordered = sorted(snapshots, key=lambda snapshot: snapshot.about['step'])
  for snapshot in ordered:
    if snapshot.scopes != ordered[0].scopes or snapshot.class_names != ordered[0].class_names:
      raise UserError(
        'snapshots of one run',
        f'other layers or classes at step {snapshot.about["step"]}',
        'remove the snapshots of other runs',
      )
  return np.array([s.about['step'] for s in ordered]), [flow(s) for s in ordered]


def _pull(grams: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """|sum_c w_c g_c|.   [S, C, C], [C] -> [S]"""
  return _root(grams @ weights @ weights)


def _root(squares: np.ndarray) -> np.ndarray:
  return np.sqrt(np.where(squares > 0, squares, np.nan))


def _mean(x: np.ndarray) -> np.ndarray:
  """Mean of the defined entries over the last axis; NaN where there are none."""
  known = ~np.isnan(x)
  return np.where(known, x, 0).sum(-1) / np.where(known.any(-1), known.sum(-1), np.nan)
