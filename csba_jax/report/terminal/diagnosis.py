"""A diagnosis as text: the conflict matrix, the classes and the layers."""

import numpy as np

from csba_jax.gradients import flow as flow_lib
from csba_jax.gradients.conflict import Conflict, interference
from csba_jax.report.terminal import table
from csba_jax.runtime import text_table


def describe(conflict: Conflict) -> str:
  """All of it; classes from the largest to the smallest."""
  flow = flow_lib.flow(conflict)
  parts = [_classes(conflict, flow), _layers(conflict, flow), _summary(conflict)]
  if len(conflict.class_names) <= table.LARGEST_MATRIX:
    parts.insert(0, _matrix(conflict))
  return '\n\n'.join(parts)


def _matrix(conflict: Conflict) -> str:
  order, sampled = conflict.by_frequency, conflict.errors.any()
  cosines = np.where(conflict.resolvable(), conflict.cosine(), np.nan)
  known = conflict.distinguishable() & sampled
  names, counts = [conflict.class_names[c] for c in order], conflict.class_counts[order].tolist()
  cells = [
    [_cell(cosines[c, d]) + ('*' if known[c, d] and c != d else ' ') for d in order] for c in order
  ]
  stars = '* 95 % interval without 0 (one in twenty by chance); ' if sampled else ''
  return f'{text_table.matrix("conflict matrix", names, counts, cells)}\n{stars}-: not resolvable'


def _classes(conflict: Conflict, flow: flow_lib.Flow) -> str:
  at = conflict.at('shared')
  disturbed = interference(conflict.gram(), conflict.prior)
  rows = [['class', 'images', 'loss', '|g_c|', 'share', 'cos with g', 'interference']]
  names = text_table.fit(conflict.class_names, text_table.LONGEST_NAME)
  for c in conflict.by_frequency:
    name, n = names[c], conflict.class_counts[c]
    values = (flow.norms[at, c], flow.shares[at, c], flow.cosines[at, c], disturbed[c])
    rows.append([name, str(n), f'{conflict.losses[c]:.3f}', *map(_cell, values)])
  return text_table.align(rows)


def _layers(conflict: Conflict, flow: flow_lib.Flow) -> str:
  rows = [['layer', 'conflict', 'head-tail', 'mean cos', 'norm ratio', 'pull ratio']]
  for at, scope in enumerate(conflict.scopes):
    summary = conflict.summary(scope)
    names = ('conflict_rate', 'head_tail_conflict', 'mean_cosine')
    values = [*(summary[name] for name in names), flow.norm_ratio[at], flow.pull_ratio[at]]
    rows.append([scope, *map(_cell, values)])
  return text_table.align(rows)


def _summary(conflict: Conflict) -> str:
  found = conflict.summary()
  pairs = len(conflict.class_names) * (len(conflict.class_names) - 1) // 2
  return (
    f'target {conflict.about["target"]}, {conflict.counts.sum()} images; of {pairs} pairs in the '
    f'shared scope {found["pairs_in_conflict"]} in conflict, {found["pairs_in_agreement"]} in '
    f'agreement, {found["pairs_not_resolvable"]} not resolvable,'
    ' the rest not distinguishable from 0'
  )


def _cell(value: float) -> str:
  if np.isnan(value):
    return '-'
  return f'{value:.3f}' if abs(value) < 1000 else f'{value:.2e}'
