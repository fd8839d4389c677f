"""Plain-text tables of results for a terminal."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.cells import cell_len

from csba_jax.data.class_counts import by_frequency
from csba_jax.report.terminal import same_splits
from csba_jax.run.workdir import read_result
from csba_jax.runtime import text_table
from csba_jax.study import protocol

HEADLINES = (
  ('macro-F1', 'macro_f1'),
  ('balanced accuracy', 'balanced_accuracy'),
  ('accuracy', 'accuracy'),
)
SHORTEST_TITLE = 14  # columns: no title is cut below this width
LARGEST_MATRIX = 12  # classes; a wider one does not fit a terminal
ONE_RUN = (
  'One run of each proves nothing: another seed gives other numbers. Needed: the same {} seeds or '
  'more of each (csba-study, or all their workdirs in --workdirs).'
)
GROUPS = ('many', 'medium', 'few')


def comparison(results: Mapping[str, Mapping[str, Any]]) -> str:
  """Per-class F1, macro-F1, balanced accuracy and accuracy of runs on the same data, side by side.

  Args:
    results: content of result.json by column title.
  """
  first = next(iter(results.values()))
  rows = [['F1 of class', 'training images', *titles(results, first)]]
  for c, name in names_in_order(first):
    f1 = [_number(result['per_class']['f1'][c]) for result in results.values()]
    rows.append([name, str(first['class_counts'][c]), *f1])
  rows.append([])
  for title, key in HEADLINES:
    rows.append([title, '', *(_number(result[key]) for result in results.values())])
  return text_table.align(rows)


def of_workdirs(workdirs: Sequence[str]) -> str:
  """`comparison` of finished runs, each under its folder's name, and what one run of each tells.

  Raises:
    UserError: a folder without a result, or runs on different splits.
  """
  workdirs = [path.rstrip('/') for path in workdirs]
  titles = [os.path.basename(path) for path in workdirs]
  if len(set(titles)) < len(titles):
    titles = workdirs
  results = {title: read_result(path) for title, path in zip(titles, workdirs, strict=True)}
  same_splits.check(dict(zip(workdirs, results.values(), strict=True)))
  note = [ONE_RUN.format(protocol.seeds_needed(1))] if len(workdirs) > 1 else []
  return '\n'.join([comparison(results), *note, f'workdirs: {" ".join(workdirs)}'])


def single(result: Mapping[str, Any]) -> str:
  """Every metric of one evaluation: a row for each class, then the summary."""
  per_class = result['per_class']
  rows = [['class', 'training images', 'precision', 'recall', 'F1', 'support']]
  for c, name in names_in_order(result):
    numbers = [_number(per_class[key][c]) for key in ('precision', 'recall', 'f1')]
    support = str(per_class['support'][c])
    rows.append([name, str(result['class_counts'][c]), *numbers, support])
  rows.append([])
  rows += [[title, _number(result[key])] for title, key in HEADLINES]
  rows += [
    [f'{name}-shot accuracy', _number(result['group_accuracy'][name])]
    for name in GROUPS
    if _number(result['group_accuracy'][name]) != '-'
  ]
  rows.append(['calibration error', _number(result['expected_calibration_error'])])
  return text_table.align(rows)


def titles(names: Iterable[str], first: Mapping[str, Any]) -> list[str]:
  """Titles of columns that fit beside the names of the classes, cut where they are too long.

  Args:
    names: of the runs or nets.
    first: content of result.json of one of them.
  """
  found, left = list(names), max(cell_len(name) for _, name in names_in_order(first))
  room = text_table.columns() - max(left, len('balanced accuracy')) - len('  training images')
  return text_table.fit(found, max(room // len(found) - 2, SHORTEST_TITLE))


def names_in_order(result: Mapping[str, Any]) -> list[tuple[int, str]]:
  """(class, name to print) from the largest class of training to the smallest."""
  names = text_table.fit([str(name) for name in result['class_names']], text_table.LONGEST_NAME)
  return [(c, names[c]) for c in by_frequency(result['class_counts']).tolist()]


def _number(value: float | None) -> str:
  return '-' if value is None or math.isnan(value) else f'{value:.3f}'
