"""Byte-identical images: which ones there are, in one group, and in one line."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from csba_jax.data.cache import NAMED, ImageArrays


@dataclasses.dataclass(frozen=True)
class Copies:
  """The byte-identical images of a source.

  Attributes:
    group_of: [N] int64, equal for byte-identical images, numbered in order of the first of each.
    sets: the images of each group of two or more, ascending; ordered by the first of them.
  """

  group_of: np.ndarray
  sets: tuple[tuple[int, ...], ...]


def find(sums: np.ndarray) -> Copies:
  """The images with equal content sums, [N, 32] uint8."""
  rows = np.ascontiguousarray(sums).view(np.dtype((np.void, sums.shape[1])))[:, 0]
  group_of = _numbered(np.unique(rows, return_inverse=True)[1])
  sizes = np.bincount(group_of)
  (among,) = np.nonzero(sizes[group_of] > 1)
  sets: dict[int, list[int]] = {}
  for i, group in zip(among.tolist(), group_of[among].tolist(), strict=True):
    sets.setdefault(group, []).append(i)
  return Copies(group_of, tuple(map(tuple, sets.values())))


def joined(copies: Copies, groups: np.ndarray | None) -> np.ndarray | None:
  """Groups [N] int64 in which also copies are together; as they were where there are no copies.

  Groups that share a copy become one. The numbers are in order of the first image of each.
  """
  if not copies.sets:
    return groups
  if groups is None:
    return copies.group_of
  import scipy.sparse  # here: few runs need it
  from scipy.sparse import csgraph

  ids = np.unique(groups, return_inverse=True)[1]
  nodes = int(ids.max()) + 1
  # a graph of groups and sets of copies, with an edge for each image
  edges = (np.ones(len(ids), bool), (ids, nodes + copies.group_of))
  size = nodes + int(copies.group_of.max()) + 1
  graph = scipy.sparse.coo_array(edges, (size, size))
  return _numbered(csgraph.connected_components(graph, directed=False)[1][ids])


def lines(
  copies: Copies,
  images: ImageArrays,
  test_images: ImageArrays | None,
  together: bool,
  part_of: Sequence[str] | None = None,
) -> list[str]:
  """What to say of copies at the start: their number and the first, and labels to check.

  Args:
    copies: those of `images`.
    images: of the source that is split.
    test_images: of a separate test set, whose images cannot be moved.
    together: whether copies are kept in one group.
    part_of: the part that the source gives each image; copies in several parts stay there.
  """
  said = []
  if copies.sets:
    first, second = (images.names[i] for i in copies.sets[0][:2])
    more = sum(map(len, copies.sets)) - len(copies.sets)
    kept = 'all copies of an image stay on one side of every split'
    if part_of is not None:
      kept = 'each stays in the part that the folder gives it'
    elif not together:
      kept = 'data.group_copies=False does not keep them on one side of a split'
    said.append(
      f'byte-identical copies of other images: {more}, such as {second} of {first}; {kept}'
    )
  said += _labels_to_check(copies, images)
  if part_of is not None:
    said += _in_several_parts(copies, images, part_of)
  if test_images:
    said += _in_both(images, test_images)
  return said


def _labels_to_check(copies: Copies, images: ImageArrays) -> list[str]:
  """Names of identical images that have several labels."""
  several = [s for s in copies.sets if len(set(images.labels[list(s)].tolist())) > 1]
  if not several:
    return []
  said = [f'sets of identical images in different classes: {len(several)}; check their labels:']
  said += [f'  {" = ".join(images.names[i] for i in found)}' for found in several[:NAMED]]
  return said + ([f'  and {len(several) - NAMED} more'] if len(several) > NAMED else [])


def _in_several_parts(copies: Copies, images: ImageArrays, part_of: Sequence[str]) -> list[str]:
  """Says how many images of the test part, and of val, are copies of training images."""
  said = []
  for part in ('test', 'val'):
    found = [
      (i, s)
      for s in copies.sets
      if any(part_of[j] == 'train' for j in s)
      for i in s
      if part_of[i] == part
    ]
    if found:
      i, same = found[0]
      other = next(images.names[j] for j in same if part_of[j] == 'train')
      said.append(
        f'{part} images that are copies of training images: {len(found)}, such as '
        f'{images.names[i]} of {other}; its scores are too good: move them out of one part'
      )
  return said


def _in_both(images: ImageArrays, test_images: ImageArrays) -> list[str]:
  """Says how many images of a separate test set are among the others."""
  name_of = {s.tobytes(): name for s, name in zip(images.sums, images.names, strict=True)}
  pairs = zip(test_images.sums, test_images.names, strict=True)
  both = [(name, name_of[s.tobytes()]) for s, name in pairs if s.tobytes() in name_of]
  if not both:
    return []
  name, other = both[0]
  return [
    f'test images that are byte-identical to one outside the test set: {len(both)} of '
    f'{len(test_images.names)}, such as {name} to {other}'
  ]


def _numbered(groups: np.ndarray) -> np.ndarray:
  """The same groups, [N] int64, numbered in order of the first image of each."""
  _, first, ids = np.unique(groups, return_index=True, return_inverse=True)
  rank = np.empty(len(first), np.int64)
  rank[np.argsort(first)] = np.arange(len(first))
  return rank[ids]
