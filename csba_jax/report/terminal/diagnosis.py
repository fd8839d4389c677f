"""A diagnosis as text: the conflict matrix, the classes and the layers."""

import numpy as np

from csba_jax.gradients import flow as flow_lib
from csba_jax.gradients.conflict import Conflict
from csba_jax.report.terminal import table
from csba_jax.runtime import text_table

STATISTICS = {  # of BatchNorm, in words, by about['statistics']
  'batch': ', each batch with its own statistics, as in training',
  'frozen': ', with the running statistics of BatchNorm (most training takes those of each batch: '
  'measure it with --statistics=batch)',
}


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
  at, sampled = conflict.at('shared'), conflict.errors.any()
  values, intervals = conflict.class_measures(), conflict.class_intervals
  rows = [['class', 'images', 'loss', '|g_c|', 'share', 'cos with g', 'interference']]
  names = text_table.fit(conflict.class_names, text_table.LONGEST_NAME)
  for c in conflict.by_frequency:
    cells = [_cell(value) for value in values[:, c]]
    if sampled:
      cells = ['-' for _ in cells]
    if sampled and intervals is not None:
      cells = [_with_interval(*of) for of in zip(values[:, c], *intervals[:, :, c].T, strict=True)]
    name, n = names[c], conflict.class_counts[c]
    rows.append([name, str(n), f'{conflict.losses[c]:.3f}', _cell(flow.norms[at, c]), *cells])
  said = '\nwith 95 % intervals; -: no interval' if sampled else ''
  return f'{text_table.align(rows)}{said}'


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
  statistics = STATISTICS.get(conflict.about.get('statistics', ''), '')
  return (
    f'target {conflict.about["target"]}, {conflict.counts.sum()} images{statistics}; of {pairs} '
    f'pairs in the shared scope {found["pairs_in_conflict"]} in conflict, '
    f'{found["pairs_in_agreement"]} in agreement, {found["pairs_not_resolvable"]} not resolvable,'
    ' the rest not distinguishable from 0'
  )


def _with_interval(value: float, low: float, high: float) -> str:
  """'0.75 [0.31, 1.2]'; '-' where there is no interval."""
  if np.isnan([value, low, high]).any():
    return '-'
  return f'{value:.2f} [{low:.2f}, {high:.2f}]'


def _cell(value: float) -> str:
  if np.isnan(value):
    return '-'
  return f'{value:.3f}' if abs(value) < 1000 else f'{value:.2e}'
