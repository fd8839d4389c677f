"""Which class is taken for which, as text: the confusion matrix, or of many classes its largest."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from csba_jax.data.class_counts import by_frequency
from csba_jax.report.terminal import table
from csba_jax.runtime import text_table

MOST = 10  # confusions that are listed where the matrix is too wide


def describe(result: Mapping[str, Any]) -> str:
  """Images by true and predicted class, classes from the largest to the smallest.

  Args:
    result: content of result.json.
  """
  order = by_frequency(result['class_counts']).tolist()
  if len(order) > table.LARGEST_MATRIX:
    return _largest(result)
  counts = np.asarray(result['confusion_matrix'])[np.ix_(order, order)]
  names = [str(result['class_names'][c]) for c in order]
  cells = [[str(n) for n in row] for row in counts.tolist()]
  tested = counts.sum(1).tolist()
  matrix = text_table.matrix('confusion matrix', names, tested, cells)
  return f'{matrix}\nrows: true class (its images), columns: predicted class'


def _largest(result: Mapping[str, Any]) -> str:
  counts = np.asarray(result['confusion_matrix'])
  names = dict(table.names_in_order(result))
  wrong = np.where(np.eye(len(counts), dtype=bool), 0, counts)
  rows = [['true class', 'taken for', 'images', 'of']]
  for at in np.argsort(-wrong, axis=None, kind='stable')[:MOST].tolist():
    c, d = divmod(at, len(counts))
    if wrong[c, d]:
      rows.append([names[c], names[d], str(wrong[c, d]), str(counts[c].sum())])
  if len(rows) == 1:
    return 'no image is taken for another class'
  return f'{text_table.align(rows)}\nthe most frequent of {np.count_nonzero(wrong)} confusions'
