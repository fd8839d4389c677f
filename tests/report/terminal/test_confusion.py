"""The confusion matrix as text: every number where its two classes meet."""

import numpy as np
import pytest

from csba_jax.report.terminal import confusion

NAMES = ['cat', 'physical damage', 'ox']


def result(matrix, names=NAMES, train=(50, 500, 5)):
  return {
    'class_names': names,
    'class_counts': list(train),
    'confusion_matrix': np.asarray(matrix).tolist(),
  }


def test_the_matrix_to_the_letter_with_the_largest_class_first():
  assert confusion.describe(result([[8, 2, 0], [1, 95, 4], [0, 0, 0]])) == '\n'.join(
    [
      'confusion matrix       physical damage  cat  ox',
      'physical damage (100)               95    1   4',
      'cat (10)                             2    8   0',
      'ox (0)                               0    0   0',
      'rows: true class (its images), columns: predicted class',
    ]
  )


@pytest.mark.parametrize('classes', [13, 40])
def test_of_many_classes_the_largest_confusions_are_listed(classes):
  rng = np.random.default_rng(classes)
  matrix = rng.integers(0, 3, (classes, classes)) + np.diag(rng.integers(90, 99, classes))
  matrix[3, 7], matrix[9, 2] = 50, 40
  names = [f'class {c}' for c in range(classes)]
  lines = confusion.describe(result(matrix, names, range(1, classes + 1))).splitlines()
  assert lines[0].split() == ['true', 'class', 'taken', 'for', 'images', 'of']
  assert lines[1].split() == ['class', '3', 'class', '7', '50', str(matrix[3].sum())]
  assert lines[2].split() == ['class', '9', 'class', '2', '40', str(matrix[9].sum())]
  number = np.count_nonzero(matrix) - classes
  assert lines[-1] == f'the most frequent of {number} confusions'
  assert len(lines) == confusion.MOST + 2
  assert [int(line.split()[-2]) for line in lines[1:-1]] == sorted(
    matrix[~np.eye(classes, dtype=bool)].tolist(), reverse=True
  )[: confusion.MOST]


def test_no_confusion_at_all():
  names = [f'c{c}' for c in range(20)]
  assert confusion.describe(result(np.eye(20, dtype=int), names, range(20))) == (
    'no image is taken for another class'
  )
