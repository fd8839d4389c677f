"""Groups of images on the sides of a split: a search for a place in which no side lacks a class."""

from collections.abc import Sequence

import numpy as np

TRIES = 2_000  # moves of a group that one search makes at most
LONGEST = 4  # moves in a row, of which each but the first repairs what the one before it broke


def group_sizes(labels: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, list[dict[int, int]]]:
  """Groups numbered 0..G-1 of each image [N], and for each group {class: images}."""
  ids, group_of = np.unique(np.asarray(groups), return_inverse=True)
  sizes: list[dict[int, int]] = [{} for _ in ids]
  for group, c in zip(group_of.tolist(), labels.tolist(), strict=True):
    sizes[group][c] = sizes[group].get(c, 0) + 1
  return group_of, sizes


def groups_of_classes(labels: np.ndarray, groups: np.ndarray, num_classes: int) -> np.ndarray:
  """How many groups have an image of each class.   [N], [N] -> [C] int64"""
  pairs = np.unique(np.stack([labels, groups]), axis=1)
  return np.bincount(pairs[0], minlength=num_classes)


def absent(labels: np.ndarray, at: np.ndarray, sides: int, num_classes: int) -> np.ndarray:
  """Which class has no image on which side, though it has images.   [N], [N] -> [C, sides] bool"""
  pairs = np.bincount(labels * sides + at, minlength=num_classes * sides)
  images = pairs.reshape(num_classes, sides)
  return (images == 0) & (images.sum(1, keepdims=True) > 0)


def every_class_everywhere(
  labels: np.ndarray, groups: np.ndarray, at: np.ndarray, shares: Sequence[float]
) -> np.ndarray:
  """Moves whole groups between sides until no side lacks a class, if it finds out how.

  For each class that a side lacks, it moves a group with that class there. If this takes the last
  image of a class from the side where the group was, it repairs that in the same way, a few moves
  deep, or takes the move back. So no class is absent that was not absent before. Moves that stay
  near the shares are tried first. Nothing is random: the result depends on the arguments alone.

  Args:
    labels: [N] int >= 0.
    groups: [N] int, equal for images that must stay together; each group is on one side of `at`.
    at: [N] int, the side of each image, 0 to K - 1; it is not changed.
    shares: K numbers, the share of each class that each side should have.

  Returns:
    [N] int64, the side of each image.
  """
  num_classes = int(labels.max()) + 1
  if not absent(labels, at, len(shares), num_classes).any():
    return at
  group_of, sizes = group_sizes(labels, groups)
  search = _Search(sizes, np.bincount(labels), shares)
  for group, side in zip(group_of.tolist(), at.tolist(), strict=True):
    search.at[group] = side
  return search.run()[group_of]


class _Search:
  """The side of every group, and what each side holds of each class."""

  def __init__(self, sizes: list[dict[int, int]], images: np.ndarray, shares: Sequence[float]):
    self.at = [0] * len(sizes)
    self._sizes, self._images, self._shares = sizes, images.tolist(), shares
    self._with: list[list[int]] = [[] for _ in images]
    for group, of_classes in enumerate(sizes):
      for c in of_classes:
        self._with[c].append(group)
    self._moves: list[tuple[int, int]] = []  # (group, the side where it was)
    self._left = TRIES

  def run(self) -> np.ndarray:
    """The side of each group, [G] int64, after the search."""
    self._held = [[0] * len(self._images) for _ in self._shares]
    for group, side in enumerate(self.at):
      self._add(group, side, 1)
    rarest_first = sorted(range(len(self._images)), key=lambda c: (len(self._with[c]), c))
    for c in rarest_first:
      for side in range(len(self._shares)):
        if self._images[c] and not self._held[side][c]:
          for depth in range(1, LONGEST + 1):  # one move if that is enough
            if self._repair(c, side, depth, set()):
              break
    return np.asarray(self.at, np.int64)

  def _repair(self, c: int, side: int, depth: int, moved: set[int]) -> bool:
    """Gives a side an image of class c within `depth` moves and takes no class from another."""
    if not depth:
      return False
    others = [group for group in self._with[c] if self.at[group] != side and group not in moved]
    for group in sorted(others, key=lambda group: (self._cost(group, side), group)):
      if self._left <= 0:
        return False
      self._left -= 1
      before, old = len(self._moves), self.at[group]
      self._move(group, side)
      lost = [d for d in self._sizes[group] if not self._held[old][d]]
      for d in lost:
        if not self._held[old][d] and not self._repair(d, old, depth - 1, moved | {group}):
          break
      # one repair may undo another, so everything is looked at again
      if self._held[side][c] and all(self._held[old][d] for d in lost):
        return True
      self._back(before)
    return False

  def _cost(self, group: int, side: int) -> float:
    """How much farther from the shares a move takes the classes of a group."""
    old, total = self.at[group], 0.0
    for c, n in self._sizes[group].items():
      for where, change in ((old, -n), (side, n)):
        off = self._held[where][c] - self._shares[where] * self._images[c]
        total += ((off + change) ** 2 - off**2) / self._images[c] ** 2
    return total

  def _move(self, group: int, side: int) -> None:
    self._moves.append((group, self.at[group]))
    self._put(group, side)

  def _back(self, before: int) -> None:
    """Undoes moves, the last one first, until as many are left."""
    while len(self._moves) > before:
      self._put(*self._moves.pop())

  def _put(self, group: int, side: int) -> None:
    self._add(group, self.at[group], -1)
    self._add(group, side, 1)
    self.at[group] = side

  def _add(self, group: int, side: int, sign: int) -> None:
    for c, n in self._sizes[group].items():
      self._held[side][c] += sign * n
