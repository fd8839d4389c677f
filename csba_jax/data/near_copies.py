"""Photos that look the same: a perceptual hash of each, and a search for pairs of like hashes.

A hash is that of `imagehash.phash`: 64 bits, the signs of the lowest frequencies of a grey image
against their median. It hardly changes when a photo is scaled, compressed or brightened, and mostly
little when one or two percent of its edges are cut off. Two photos are near copies if their hashes
differ in at most DISTANCE bits and their grey thumbnails correlate by at least LIKENESS. Mirrored
and turned copies are not found.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

DISTANCE = 8  # bits of 64 in which the hashes of near copies differ at most
LIKENESS = 0.9  # correlation of their thumbnails, at least
SIDE = 32  # of a thumbnail
FLAT = 2.0  # standard deviation, of 0 to 255, below which a thumbnail shows nothing
BITS = 64
CANDIDATES = 2**22  # pairs of hashes that are compared at a time
COMPARED = 2**12  # pairs of thumbnails


@dataclasses.dataclass(frozen=True)
class Looks:
  """What photos look like.

  Attributes:
    hashes: [N] uint64.
    thumbnails: [N, SIDE * SIDE] uint8, grey.
  """

  hashes: np.ndarray
  thumbnails: np.ndarray


def look(image: np.ndarray) -> tuple[np.uint64, np.ndarray]:
  """(hash, thumbnail [SIDE * SIDE] uint8) of an image, uint8 [H, W, 3] or [H, W, 1]."""
  import imagehash  # here: it is slow to import, and few programs need it
  from PIL import Image

  grey = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0]).convert('L')
  bits = np.packbits(imagehash.phash(grey).hash.reshape(-1))
  small = grey.resize((SIDE, SIDE), Image.Resampling.BOX)
  return bits.view('>u8')[0].astype(np.uint64), np.asarray(small).reshape(-1)


def groups(looks: Looks, distance: int = DISTANCE, likeness: float = LIKENESS) -> np.ndarray:
  """Numbers [N], equal for photos that a chain of near copies connects.

  Photos that are in one group already are not compared again, and of photos with the same hash
  only neighbours are, so that frames of one scene do not cost a comparison for each pair.

  Args:
    looks: of N photos.
    distance: of their hashes at most, 0 to 13.
    likeness: of their thumbnails at least.
  """
  hashes, first, of_hash = np.unique(looks.hashes, return_index=True, return_inverse=True)
  order = np.argsort(of_hash, kind='stable')
  same = of_hash[order][1:] == of_hash[order][:-1]
  group_of = np.arange(len(looks.hashes))
  chain = np.stack([order[:-1][same], order[1:][same]], axis=1)
  near = (first[found] for found in _near(hashes, distance))
  for found in itertools.chain([chain], near):
    for begin in range(0, len(found), COMPARED):
      some = found[begin : begin + COMPARED]
      some = some[group_of[some[:, 0]] != group_of[some[:, 1]]]
      group_of = connected(group_of, some[alike(looks.thumbnails, some, likeness)])
  return group_of


def connected(group_of: np.ndarray, pairs: np.ndarray) -> np.ndarray:
  """Groups [N] in which also the photos of each pair, [P, 2], are together."""
  if not len(pairs):
    return group_of
  import scipy.sparse
  from scipy.sparse import csgraph

  n = int(group_of.max()) + 1
  edges = group_of[pairs[:, 0]], group_of[pairs[:, 1]]
  graph = scipy.sparse.coo_array((np.ones(len(pairs), bool), edges), (n, n))
  return csgraph.connected_components(graph, directed=False)[1][group_of]


def hash_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
  """All pairs of distinct hashes, [N] uint64, that differ in at most so many bits: [P, 2] int64.

  Args:
    hashes: distinct.
    distance: 0 to 13: at most 7 bands, which have 9 bits each.
  """
  found = [np.sort(pairs, axis=1) for pairs in _near(hashes, distance)]
  return np.unique(np.concatenate([np.empty((0, 2), np.int64), *found]), axis=0)


def _near(hashes: np.ndarray, distance: int) -> Iterator[np.ndarray]:
  """The pairs of `hash_pairs`, block by block, each up to once for each band.

  The bits are cut into bands. If two hashes differ in d bits and there are more than d / 2 bands,
  they differ in at most one bit in one of the bands. So all pairs are found among those that agree
  in a band, or would with one bit of it flipped. (Multi-index hashing, Norouzi et al., 2012.)
  """
  if not 0 <= distance <= 13:
    raise ValueError(f'distance from 0 to 13, not {distance}')
  bands = distance // 2 + 1
  edges = np.linspace(0, BITS, bands + 1).astype(int)
  for low, high in itertools.pairwise(edges):
    mask = np.uint64((1 << int(high - low)) - 1)
    keys = hashes >> np.uint64(low) & mask
    order = np.argsort(keys, kind='stable')
    ordered = keys[order]
    flips = [np.uint64(0)] + [np.uint64(1 << bit) for bit in range(high - low)]
    for flip in flips if distance else flips[:1]:
      start = np.searchsorted(ordered, ordered ^ flip, 'left')
      end = np.searchsorted(ordered, ordered ^ flip, 'right')
      if not flip:
        start = np.arange(1, len(ordered) + 1)  # each with those after it
      else:
        end = np.where(ordered & flip, start, end)  # each pair of keys once
      for left, right in _blocks(start, end):
        i, j = order[left], order[right]
        near = np.bitwise_count(hashes[i] ^ hashes[j]) <= distance
        if near.any():
          yield np.stack([i[near], j[near]], axis=1)


def _blocks(start: np.ndarray, end: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """(i, j) for all i and start[i] <= j < end[i], CANDIDATES at a time or the pairs of one i."""
  number = end - start
  total = np.cumsum(number)
  begin = 0
  while begin < len(number):
    before = total[begin - 1] if begin else 0
    stop = max(int(np.searchsorted(total, before + CANDIDATES, 'right')), begin + 1)
    sizes = number[begin:stop]
    left = np.repeat(np.arange(begin, stop), sizes)
    within = np.arange(len(left)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    yield left, np.repeat(start[begin:stop], sizes) + within
    begin = stop


def alike(thumbnails: np.ndarray, found: np.ndarray, likeness: float) -> np.ndarray:
  """Whether the thumbnails of each pair, [P, 2], correlate by at least `likeness`: [P] bool.

  A thumbnail of one grey level correlates with nothing: two such ones are alike if their levels
  differ by less than FLAT.
  """
  result = np.zeros(len(found), bool)
  for begin in range(0, len(found), 2**14):
    one, two = (thumbnails[found[begin : begin + 2**14, k]].astype(np.float32) for k in (0, 1))
    means = one.mean(1), two.mean(1)
    one, two = one - means[0][:, None], two - means[1][:, None]
    spreads = np.sqrt((one**2).mean(1)), np.sqrt((two**2).mean(1))
    flat = np.maximum(*spreads) < FLAT
    product = np.maximum(spreads[0] * spreads[1], np.finfo(np.float32).tiny)
    similar = (one * two).mean(1) >= likeness * product
    same = np.abs(means[0] - means[1]) < FLAT
    result[begin : begin + 2**14] = np.where(flat, same, similar & (np.minimum(*spreads) >= FLAT))
  return result
