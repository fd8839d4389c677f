"""Photos that look the same: hashes against imagehash, the search against all pairs."""

import io
import itertools

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from csba_jax.data import near_copies
from csba_jax.data.near_copies import Looks


def bits_apart(one, two):
  return int(np.bitwise_count(one ^ two))


def all_pairs(hashes, distance):
  """The reference: every pair is compared."""
  apart = np.bitwise_count(hashes[:, None] ^ hashes[None])
  return np.argwhere(np.triu(apart <= distance, 1))


def crowd(seed, n=400):
  """Distinct hashes [n], of which many are a few bits from another one."""
  rng = np.random.default_rng(seed)
  found = rng.integers(0, 2**64, n, dtype=np.uint64)
  for i in range(n // 2, n):
    flipped = rng.choice(64, rng.integers(1, 17), replace=False)
    found[i] = found[rng.integers(0, i)] ^ np.uint64(sum(1 << int(bit) for bit in flipped))
  return rng.permutation(np.unique(found))


@pytest.mark.parametrize('distance', range(14))
def test_the_search_finds_what_comparing_all_pairs_finds(distance):
  hashes = crowd(distance)
  expected = all_pairs(hashes, distance)
  assert len(expected) > 20 or distance < 3
  np.testing.assert_array_equal(near_copies.hash_pairs(hashes, distance), expected)


def test_the_search_in_small_blocks(monkeypatch):
  hashes = crowd(0)
  monkeypatch.setattr(near_copies, 'CANDIDATES', 3)
  np.testing.assert_array_equal(near_copies.hash_pairs(hashes, 8), all_pairs(hashes, 8))


@pytest.mark.parametrize('n', [0, 1])
def test_without_two_photos_there_is_no_pair(n):
  looks = Looks(np.zeros(n, np.uint64), np.zeros((n, 1024), np.uint8))
  assert near_copies.groups(looks).tolist() == [0] * n


@pytest.mark.parametrize('distance', [-1, 14])
def test_a_distance_out_of_range(distance):
  with pytest.raises(ValueError, match='distance from 0 to 13'):
    near_copies.hash_pairs(np.zeros(2, np.uint64), distance)


def test_the_hash_is_that_of_imagehash(scene):
  scenes = [scene(seed) for seed in range(6)]
  expected = [imagehash.phash(Image.fromarray(image)) for image in scenes]
  found = [near_copies.look(image)[0] for image in scenes]
  for i in range(6):
    assert int(str(expected[i]), 16) == int(found[i])
    for j in range(6):
      assert bits_apart(found[i], found[j]) == expected[i] - expected[j]


def test_a_grey_image_looks_like_its_colours(scene):
  grey = scene(0)[..., :1]
  one, two = near_copies.look(grey), near_copies.look(np.repeat(grey, 3, axis=-1))
  assert one[0] == two[0]
  np.testing.assert_array_equal(one[1], two[1])


def compressed(photo):
  file = io.BytesIO()
  photo.save(file, 'JPEG', quality=40)
  return Image.open(file)


CHANGES = {
  'smaller': lambda photo: photo.resize((60, 60), Image.Resampling.BICUBIC),
  'compressed': compressed,
  'brighter': lambda photo: ImageEnhance.Brightness(photo).enhance(1.3),
  'less contrast': lambda photo: ImageEnhance.Contrast(photo).enhance(0.6),
  'cropped': lambda photo: photo.crop((1, 1, 95, 95)),
  'grey': lambda photo: photo.convert('L').convert('RGB'),
}


def looks_of(images):
  found = [near_copies.look(image) for image in images]
  return Looks(np.asarray([f[0] for f in found]), np.stack([f[1] for f in found]))


@pytest.mark.parametrize('change', CHANGES)
def test_a_changed_photo_is_found_and_no_other(change, scene):
  images = [scene(seed) for seed in range(40)]
  changed = [np.asarray(CHANGES[change](Image.fromarray(image)).convert('RGB')) for image in images]
  found = near_copies.groups(looks_of(images + changed)).tolist()
  assert len(set(found[:40])) == len(set(found[40:])) == 40
  together = sum(one == two for one, two in zip(found[:40], found[40:], strict=True))
  assert len(set(found)) == 80 - together  # no other pair is in one group
  assert together == 40 or (change == 'cropped' and together >= 36)


def test_likeness_is_the_correlation():
  rng = np.random.default_rng(0)
  base = rng.integers(0, 256, 1024)
  small = [base, *(base * (1 - a) + a * rng.integers(0, 256, 1024) for a in (0.1, 0.3, 0.5, 0.7))]
  small = np.clip(np.stack(small), 0, 255).astype(np.uint8)
  pairs = np.argwhere(np.triu(np.ones((5, 5)), 1))
  expected = np.corrcoef(small)[pairs[:, 0], pairs[:, 1]]
  assert len(np.unique(expected > 0.9)) == 2
  for likeness in (0.5, 0.9):
    found = near_copies.alike(small, pairs, likeness)
    np.testing.assert_array_equal(found, expected >= likeness)


def test_photos_of_one_colour(scene):
  small = np.stack([np.full(1024, value, np.uint8) for value in (0, 1, 90)])
  small = np.concatenate([small, scene(0, 32)[..., 0].reshape(1, -1)])
  pairs = np.asarray([[0, 1], [0, 2], [0, 3]])
  assert near_copies.alike(small, pairs, 0.9).tolist() == [True, False, False]


def all_groups(looks):
  """The reference: components of the graph of all pairs, by merging."""
  near = [
    (i, j)
    for i, j in itertools.combinations(range(len(looks.hashes)), 2)
    if bits_apart(looks.hashes[i], looks.hashes[j]) <= 8
  ]
  alike = near_copies.alike(looks.thumbnails, np.asarray(near).reshape(-1, 2), 0.9)
  group = list(range(len(looks.hashes)))
  for (i, j), same in zip(near, alike, strict=True):
    if same:
      group = [group[i] if g == group[j] else g for g in group]
  return [group.index(g) for g in group]


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('compared', [1, 7, 4096])
def test_groups_are_those_of_all_pairs(seed, compared, monkeypatch):
  """Distinct hashes; thumbnails of a few scenes with noise, so that some near pairs are unlike."""
  monkeypatch.setattr(near_copies, 'COMPARED', compared)
  rng = np.random.default_rng(seed)
  hashes = crowd(seed, 120)
  scenes = rng.integers(0, 256, (4, 1024))
  noise = rng.normal(0, 20, (len(hashes), 1024))
  small = np.clip(scenes[rng.integers(0, 4, len(hashes))] + noise, 0, 255).astype(np.uint8)
  looks = Looks(hashes, small)
  found, expected = near_copies.groups(looks).tolist(), all_groups(looks)
  assert [found.index(g) for g in found] == expected
  assert len(set(expected)) < len(expected)


@pytest.mark.parametrize('bits', [0, 4])
def test_many_photos_of_one_scene_cost_few_comparisons(bits, monkeypatch):
  """As frames of a camera that does not move would: not every pair of them is compared."""
  rng, compared = np.random.default_rng(0), []
  hashes = np.zeros(3000, np.uint64)
  for _ in range(bits):
    hashes ^= np.uint64(1) << rng.integers(0, 64, 3000).astype(np.uint64)
  real = near_copies.alike

  def alike(thumbnails, pairs, likeness):
    compared.append(len(pairs))
    return real(thumbnails, pairs, likeness)

  monkeypatch.setattr(near_copies, 'alike', alike)
  looks = Looks(hashes, np.zeros((3000, 1024), np.uint8))
  assert len(set(near_copies.groups(looks).tolist())) == 1
  assert sum(compared) < 200_000  # of 4.5 million pairs


def test_copies_of_unlike_photos_with_like_hashes_are_none():
  rng = np.random.default_rng(0)
  looks = Looks(np.arange(2, dtype=np.uint64), rng.integers(0, 256, (2, 1024)).astype(np.uint8))
  assert near_copies.hash_pairs(looks.hashes, 8).tolist() == [[0, 1]]
  assert near_copies.groups(looks).tolist() == [0, 1]
