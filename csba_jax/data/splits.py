"""The training, validation and test parts: long-tailed, stratified, duplicates kept together."""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from csba_jax.data.class_counts import class_counts, members
from csba_jax.data.folds import cross_validation_folds
from csba_jax.data.grouped import every_class_everywhere, group_sizes, groups_of_classes
from csba_jax.data.long_tail import long_tail_subset
from csba_jax.data.random_draws import permutation
from csba_jax.errors import UserError
from csba_jax.files import write_atomically

NAMED = 8  # classes that one line names


@dataclasses.dataclass(frozen=True, eq=False)
class Splits:
  """Indices of the three parts of a data set.

  Attributes:
    train: [n_train] int64, sorted indices into the training set.
    val: [n_val] int64, sorted indices into the training set; empty without a validation part.
    test: [n_test] int64, sorted indices into the test set if there is a separate one, else into the
      training set.
    test_is_separate: whether `test` indexes a separate test set.
    class_counts: [C] int64, images of each class in `train`.
    classes_without_val: indices of the classes without a validation image; empty if there is no
      validation part at all.
    source_sha256: digest of the names and labels of the source; the caller sets it.
    content: uint64 of every image of the training set, then of a separate test set: what says
      whether it is still the same image (the first eight bytes of `sources.content_sum`); the
      caller sets it. None in files of versions that did not keep it.
  """

  train: np.ndarray
  val: np.ndarray
  test: np.ndarray
  test_is_separate: bool
  class_counts: np.ndarray
  classes_without_val: tuple[int, ...]
  source_sha256: str = ''
  content: np.ndarray | None = None

  @property
  def sha256(self) -> str:
    """Hex SHA-256 over train, val and test, of each its length and indices as '<i8' bytes."""
    digest = hashlib.sha256()
    for part in (self.train, self.val, self.test):
      digest.update(np.asarray([len(part)], '<i8').tobytes())
      digest.update(np.ascontiguousarray(part, '<i8').tobytes())
    return digest.hexdigest()

  @property
  def content_sha256(self) -> str:
    """Hex SHA-256 over `content` as '<u8' bytes; '' without it."""
    if self.content is None:
      return ''
    return hashlib.sha256(np.ascontiguousarray(self.content, '<u8').tobytes()).hexdigest()

  @property
  def members(self) -> np.ndarray:
    """Positions in `content` of the images of train, then val, then test."""
    assert self.content is not None
    before_test = len(self.content) - len(self.test) if self.test_is_separate else 0
    return np.concatenate([self.train, self.val, self.test + before_test])

  def save(self, path: str | os.PathLike) -> None:
    """Writes an npz file, atomically and without pickle."""
    arrays = dataclasses.asdict(self) | {'sha256': self.sha256}
    if self.content is None:
      del arrays['content']
    arrays['classes_without_val'] = np.asarray(self.classes_without_val, np.int64)
    write_atomically(pathlib.Path(path), lambda file: np.savez(file, **arrays))

  @classmethod
  def load(cls, path: str | os.PathLike) -> 'Splits':
    """Reads what `save` wrote.

    Raises:
      UserError: the file is missing or damaged, or its indices do not match the saved sha256.
    """
    try:
      # open the file here, because np.load leaves a damaged one open
      with open(path, 'rb') as file, np.load(file, allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in arrays.files}
      saved = str(found.pop('sha256'))
      found['test_is_separate'] = bool(found['test_is_separate'])
      found['classes_without_val'] = tuple(found['classes_without_val'].tolist())
      found['source_sha256'] = str(found['source_sha256'])
      splits = cls(**found)
      for name in ('train', 'val', 'test', 'class_counts'):
        array = found[name]
        if array.ndim != 1 or array.dtype.kind != 'i':
          raise ValueError(f'{name}: {array.dtype} {array.shape}')
    except Exception as error:  # a damaged zip fails in a dozen ways
      raise _unusable(path, f'{type(error).__name__}: {error}') from error
    if splits.sha256 != saved:
      raise _unusable(path, f'indices with sha256 {splits.sha256[:12]}, saved as {saved[:12]}')
    if splits.content is not None:
      last = int(splits.members.max())
      if splits.content.ndim != 1 or len(splits.content) <= last:
        raise _unusable(path, f'content sums {splits.content.shape} and an image {last}')
    return splits


def make_splits(
  labels: np.ndarray,
  groups: np.ndarray | None = None,
  test_labels: np.ndarray | None = None,
  *,
  class_names: tuple[str, ...],
  imbalance_factor: float,
  profile: str,
  class_order: str,
  val_fraction: float,
  test_fraction: float,
  seed: int,
  folds: int = 0,
  fold: int = 0,
  part_of: Sequence[str] | None = None,
  largest_class: int = 0,
  disjoint_subsets: int = 0,
) -> Splits:
  """Splits a data set: first the test part, then the long-tailed subset, then the validation part.

  1. test: the separate test set, else one of `folds` parts, else test_fraction of all images. So
     its class frequencies are those of the source, whatever the imbalance factor is.
  2. The long-tailed subset of the rest.
  3. val: val_fraction of that subset; train: the remainder of it.
  Steps 1 and 3 are stratified and keep duplicate groups together (`stratified_split`). If the test
  part leaves too few groups of a class for validation, groups are moved between the three parts,
  unless the test part is a fold or step 2 has left out images.

  Images stay in parts that the source gives. The training part is cut to a long tail, and a part
  that is not there is taken from it: test as in step 1, val as in step 3.

  Args:
    labels: [N] int, labels of the training set.
    groups: [N] int, equal for duplicates; None if there are no duplicates.
    test_labels: [M] int, labels of a separate test set, or None; then test_fraction applies.
    class_names: C names, for the messages.
    imbalance_factor: n_max / n_min >= 1.
    profile: 'exp', 'step' or 'natural' (`long_tail_subset`).
    class_order: 'index' or 'frequency' (`long_tail_subset`).
    val_fraction: in [0, 1); 0 means no validation part.
    test_fraction: in [0, 1), and above 0 if there is no separate test set.
    seed: seed of every draw.
    folds: number of `cross_validation_folds`, in place of test_fraction; 0 for none.
    fold: index of the fold that is the test part.
    part_of: 'train', 'val' or 'test' of each image, which the source gives; None if it does not.
    largest_class: n_max, 0 for all images of the largest class (`long_tail_subset`).
    disjoint_subsets: number of subsets without a common image, of which `seed` takes one
      (`long_tail_subset`); 0 for independent draws.

  Raises:
    UserError: a fraction out of range, a class without training images, no test images, folds
      together with a separate test set or given parts, too many folds (`cross_validation_folds`),
      an imbalance factor for which a class has too few images, or disjoint subsets without a test
      part of its own.
  """
  labels = np.asarray(labels)
  _check_fraction('data.val_fraction', val_fraction)
  _check_fraction('data.test_fraction', test_fraction)
  rest, given_val, test = _sides(
    labels, groups, test_labels, part_of, class_names, test_fraction, folds, fold, seed
  )
  if not len(test):
    raise _no_test(test_fraction)
  _check_every_class(labels[rest], class_names, 'in the training set')
  if disjoint_subsets and test_labels is None and 'test' not in (part_of or ()):
    raise _drawn_test()
  rest = rest[
    long_tail_subset(
      labels[rest],
      len(class_names),
      imbalance_factor,
      profile,
      class_order,
      seed,
      largest_class,
      disjoint_subsets,
    )
  ]
  fraction = 0.0 if len(given_val) else val_fraction
  kept, held = stratified_split(
    labels[rest], fraction, seed, None if groups is None else np.asarray(groups)[rest]
  )
  train, val = rest[kept], given_val if len(given_val) else rest[held]
  whole = test_labels is None and part_of is None and not folds
  if groups is not None and whole and val_fraction:
    train, val, test = _with_every_class(labels, groups, (train, val, test))
  counts = _check_every_class(labels[train], class_names, 'in the training part')
  without = np.setdiff1d(np.arange(len(class_names)), labels[val]) if len(val) else ()
  return Splits(train, val, test, test_labels is not None, counts, tuple(int(c) for c in without))


def _sides(
  labels: np.ndarray,
  groups: np.ndarray | None,
  test_labels: np.ndarray | None,
  part_of: Sequence[str] | None,
  class_names: tuple[str, ...],
  test_fraction: float,
  folds: int,
  fold: int,
  seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(images to train on, a validation part that is given or nothing, the test part)."""
  rest, given_val = np.arange(len(labels)), np.arange(0)
  if folds and (test_labels is not None or part_of is not None):
    expected = 'data.folds only for a source without parts of its own'
    found = f'{folds} folds and {"a separate test set" if part_of is None else "given parts"}'
    raise UserError(expected, found, 'set data.folds to 0')
  if part_of is not None:
    given = np.asarray(part_of)
    rest, given_val, test = (np.flatnonzero(given == part) for part in ('train', 'val', 'test'))
    if not len(test):
      of_rest = None if groups is None else np.asarray(groups)[rest]
      kept, held = stratified_split(labels[rest], test_fraction, seed, of_rest)
      rest, test = rest[kept], rest[held]
  elif test_labels is not None:
    test = np.arange(len(test_labels))
  elif folds:
    at = cross_validation_folds(labels, folds, seed, groups, class_names)
    rest, test = np.flatnonzero(at != fold), np.flatnonzero(at == fold)
  else:
    rest, test = stratified_split(labels, test_fraction, seed, groups)
  return rest, given_val, test


def _with_every_class(
  labels: np.ndarray, groups: np.ndarray, parts: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, ...]:
  """The parts after groups were moved, so that each has every class; if no image was left out."""
  if sum(map(len, parts)) < len(labels):
    return parts
  at = np.empty(len(labels), np.int64)
  for side, part in enumerate(parts):
    at[part] = side
  shares = [len(part) / len(labels) for part in parts]
  at = every_class_everywhere(labels, groups, at, shares)
  return tuple(np.flatnonzero(at == side) for side in range(len(parts)))


def absences(
  found: Splits,
  labels: np.ndarray,
  groups: np.ndarray | None = None,
  test_labels: np.ndarray | None = None,
  *,
  class_names: tuple[str, ...],
  folds: int = 0,
) -> list[str]:
  """A line for the test and for the validation part if it lacks classes: which, and what to do.

  Args:
    found: of these labels; the others are as in `make_splits`.
  """
  tested = (labels if test_labels is None else test_labels)[found.test]
  without_test = np.setdiff1d(np.arange(len(class_names)), tested).tolist()
  do = 'add images of it'
  if groups is not None:
    do += ' that no group holds together with its others'
  lines = []
  if without_test:
    remedy = do if test_labels is None else 'add images of it to the test set'
    if folds and groups is not None:
      most = int(groups_of_classes(labels, groups, len(class_names))[without_test].min())
      remedy += f', or set data.folds to {most} or fewer' if 2 <= most < folds else ''
    names = _some([class_names[c] for c in without_test])
    lines.append(f'no test image of {names}: macro-F1 is the mean of the other classes; {remedy}')
  if found.classes_without_val:
    names = _some([class_names[c] for c in found.classes_without_val])
    lines.append(f'no validation image of {names}: the best checkpoint is chosen without it; {do}')
  return lines


def stratified_split(
  labels: np.ndarray, fraction: float, seed: int, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Holds out about `fraction` of each class; duplicate groups are not split.

  Of class c, with n_c images, h_c = floor(fraction * n_c + 1/2) are to be held out, at least 1 and
  at most n_c - 1. So every class keeps an image, and a class of one image keeps it.

  Without groups exactly h_c images are held out. With groups, classes are taken in order, rarest
  first. Each goes through its groups in random order and holds out those that bring no class above
  its h_c. Then a class with no image held out holds out its smallest group, if every class still
  keeps an image. If all groups of a class lie in it alone, |held_c - h_c| < size of its largest
  group. A group with images of several classes counts in each of them; it may be left in place
  because of one of them. If that leaves a class without an image held out, groups are moved until
  none does, or until no more is found (`grouped.every_class_everywhere`).

  Args:
    labels: [N] int >= 0.
    fraction: in [0, 1); 0 holds out nothing.
    seed: seed of the draw.
    groups: [N] int, equal for images that must stay together; None: there are no duplicates.

  Returns:
    (kept, held): sorted int64 indices, together 0..N-1.

  Raises:
    UserError: a fraction out of range.
  """
  _check_fraction('fraction', fraction)
  labels = np.asarray(labels)
  if fraction == 0 or not len(labels):
    return np.arange(len(labels)), np.arange(0)
  available = np.bincount(labels)
  wanted = np.maximum(np.floor(fraction * available + 0.5).astype(np.int64), 1)
  group_of, sizes = group_sizes(labels, np.arange(len(labels)) if groups is None else groups)
  in_order = [
    list(dict.fromkeys(group_of[m[permutation((seed, 'hold out', c, len(m)), len(m))]].tolist()))
    for c, m in enumerate(members(labels, len(available)))
  ]
  chosen = _choose_groups(
    in_order, sizes, np.clip(wanted, 0, np.maximum(available - 1, 0)), available
  )
  is_held = np.isin(group_of, chosen).astype(np.int64)
  if groups is not None:
    is_held = every_class_everywhere(labels, groups, is_held, (1 - fraction, fraction))
  return np.flatnonzero(is_held == 0), np.flatnonzero(is_held)


def _choose_groups(
  in_order: list[list[int]], sizes: list[dict[int, int]], target: np.ndarray, available: np.ndarray
) -> list[int]:
  """The greedy choice that `stratified_split` describes, as group ids."""
  held, chosen = np.zeros_like(target), set()

  def hold_if_within(group: int, limit: np.ndarray) -> None:
    if group not in chosen and all(held[d] + n <= limit[d] for d, n in sizes[group].items()):
      chosen.add(group)
      for d, n in sizes[group].items():
        held[d] += n

  rarest_first = np.argsort(available, kind='stable').tolist()
  for c in rarest_first:
    for group in in_order[c]:
      if held[c] >= target[c]:
        break
      hold_if_within(group, target)
  for c in rarest_first:
    images = {group: sizes[group][c] for group in in_order[c]}
    for group in sorted(in_order[c], key=images.__getitem__):
      if held[c] or not target[c]:
        break
      hold_if_within(group, available - 1)
  return sorted(chosen)


def _check_fraction(name: str, fraction: float) -> None:
  """Raises UserError unless 0 <= fraction < 1."""
  if not 0 <= fraction < 1:
    raise UserError(f'{name} in [0, 1)', f'{fraction}', 'set the share to hold out, such as 0.1')


def _check_every_class(labels: np.ndarray, class_names: tuple[str, ...], where: str) -> np.ndarray:
  """Images of each class, [C] int64; UserError with the names of classes that have none."""
  counts = class_counts(labels, len(class_names))
  if empty := [class_names[c] for c in np.flatnonzero(counts == 0)]:
    raise UserError(
      f'images of every class {where}',
      f'none of {_some(empty)}',
      'add images of it that no group ties to the test part, or remove it; of a slice in '
      'data.train_split take a larger one',
    )
  return counts


def _some(names: list[str]) -> str:
  """Names with commas; of many the first few."""
  return ', '.join(names[:NAMED]) + (f' and {len(names) - NAMED} more' if names[NAMED:] else '')


def _no_test(test_fraction: float) -> UserError:
  """The error for an empty test part."""
  if not test_fraction:
    do = 'set data.test_fraction above 0, or use a source with a test set'
    return UserError('test images', 'none with data.test_fraction 0', do)
  return UserError(
    'images that can be held out for the test',
    'none: every class has one image, or one group of images that stay together, as copies do',
    'add images, or correct the groups in data.group_column',
  )


def _drawn_test() -> UserError:
  """The error for disjoint subsets of a set that the test part is drawn from."""
  return UserError(
    'a test part of its own with data.disjoint_subsets: one that is drawn has images of other '
    'subsets',
    'data.test_fraction or data.folds',
    'set --config.data.disjoint_subsets=0, or use data with a test part',
  )


def _unusable(path: str | os.PathLike, found: str) -> UserError:
  """The error for a split file that cannot be used."""
  return UserError(
    f'a file that Splits.save wrote at {path}',
    found,
    'correct the path, or delete the file to split again',
  )
