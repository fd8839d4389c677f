"""The folds of a cross-validation: stratified, with duplicates kept together."""

import numpy as np

from csba_jax.data.class_counts import class_counts
from csba_jax.data.grouped import every_class_everywhere, groups_of_classes
from csba_jax.errors import UserError


def cross_validation_folds(
  labels: np.ndarray,
  folds: int,
  seed: int,
  groups: np.ndarray | None,
  class_names: tuple[str, ...],
) -> np.ndarray:
  """The fold of every image; scikit-learn's stratified folds, with duplicate groups together.

  Without groups a class has floor or ceil of n_c / folds images in each fold. With groups, a fold
  may come out without a class. Then groups are moved (`grouped.every_class_everywhere`).

  Args:
    labels: [N] int.
    folds: K >= 2.
    seed: seed of the draw; another seed is another repetition of the cross-validation.
    groups: [N] int, equal for images that must stay together; None: there are no duplicates.
    class_names: C names, for the message.

  Returns:
    [N] int64, 0 to K - 1.

  Raises:
    UserError: a class with fewer images than folds or in one group alone, or too few groups for
      the folds.
  """
  from sklearn import model_selection  # here: most runs have no folds and need not load it

  _check_folds(labels, folds, groups, class_names)
  kind = model_selection.StratifiedKFold if groups is None else model_selection.StratifiedGroupKFold
  found = np.empty(len(labels), np.int64)
  parts = kind(folds, shuffle=True, random_state=seed).split(labels, labels, groups)
  for fold, (_, held) in enumerate(parts):
    found[held] = fold
  if groups is None:
    return found
  found = every_class_everywhere(labels, groups, found, [1 / folds] * folds)
  if (number := len(np.unique(found))) < folds:
    fewest = groups_of_classes(labels, groups, len(class_names)).min()
    raise UserError(
      f'groups that stay together for data.folds = {folds} test parts',
      f'groups for {number}',
      f'set data.folds to {fewest} or fewer',
    )
  return found


def _check_folds(
  labels: np.ndarray, folds: int, groups: np.ndarray | None, class_names: tuple[str, ...]
) -> None:
  """Raises UserError if there cannot be as many folds."""
  counts = class_counts(labels, len(class_names))
  units, expected = counts, 'at least 2 images of every class'
  if groups is not None:
    units = groups_of_classes(labels, groups, len(class_names))
    expected = 'images of every class in at least 2 groups that stay together'
  fewest = int(units.argmin())
  name, n = class_names[fewest], int(units[fewest])
  if n < 2:
    raise UserError(
      f'{expected}, to test and to train, with data.folds = {folds}',
      f'{counts[fewest]} of {name}' + (f' in {n} group' if groups is not None else ''),
      f'set data.folds to 0, which leaves {name} untested, or add other images of it, or remove it',
    )
  if counts.min() < folds:
    smallest = int(counts.argmin())
    raise UserError(
      f'at least as many images of every class as data.folds = {folds}',
      f'{counts[smallest]} of {class_names[smallest]}',
      f'set data.folds to {n} or fewer',
    )
  if groups is not None and (number := len(np.unique(groups))) < folds:
    raise UserError(
      f'at least as many groups that stay together as data.folds = {folds}',
      f'{number}',
      f'set data.folds to {n} or fewer',
    )
