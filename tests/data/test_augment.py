"""Crops and flips against loops over pixels with the same random numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csba_jax.data import augment


def images(n=6, height=5, width=7, channels=3):
  rng = np.random.default_rng(0)
  return rng.integers(1, 256, (n, height, width, channels), dtype=np.uint8)


def crop_reference(batch, top, left, padding):
  """Pixel by pixel: what lies outside the image is 0."""
  n, height, width, _ = batch.shape
  result = np.zeros_like(batch)
  for i in range(n):
    for y in range(height):
      for x in range(width):
        row, column = y + top[i] - padding, x + left[i] - padding
        if 0 <= row < height and 0 <= column < width:
          result[i, y, x] = batch[i, row, column]
  return result


@pytest.mark.parametrize('padding', [1, 2, 4, 9])
def test_crop_equals_a_loop(padding):
  key, batch = jax.random.key(padding), images()
  top, left = np.asarray(jax.random.randint(key, (2, len(batch)), 0, 2 * padding + 1))
  found = augment.random_crop(key, batch, padding)
  assert found.dtype == jnp.uint8
  np.testing.assert_array_equal(found, crop_reference(batch, top, left, padding))


def test_crop_offsets_are_uniform_and_their_own_for_each_image_and_axis():
  # one bright pixel in the middle shows where every crop was cut
  batch = np.zeros((600, 5, 5, 1), np.uint8)
  batch[:, 2, 2] = 1
  found = np.asarray(augment.random_crop(jax.random.key(0), batch, 1))
  assert (found.sum((1, 2, 3)) == 1).all()
  _, rows, columns, _ = np.nonzero(found)
  seen = np.histogram2d(rows, columns, bins=[[1, 2, 3, 4]] * 2)[0]  # nine offsets, 67 each
  assert seen.sum() == 600
  assert seen.min() > 35
  assert seen.max() < 110


def test_flip_mirrors_about_half_of_the_images_exactly():
  batch = images(n=400)
  found = np.asarray(augment.random_flip(jax.random.key(0), batch))
  mirrored = (found == batch[:, :, ::-1]).all((1, 2, 3))
  kept = (found == batch).all((1, 2, 3))
  assert (mirrored ^ kept).all()
  assert 150 < mirrored.sum() < 250  # five standard deviations of a fair coin
  assert found.dtype == np.uint8


def test_off_is_the_identity():
  batch = images()
  found = augment.build(0, False)(jax.random.key(0), batch)
  assert found is batch


@pytest.mark.parametrize(('padding', 'flip'), [(2, False), (0, True), (2, True)])
def test_build_does_what_is_switched_on(padding, flip):
  batch = images(n=32)
  crop_key, flip_key = jax.random.split(jax.random.key(3))
  expected = batch
  if padding:
    top, left = np.asarray(jax.random.randint(crop_key, (2, 32), 0, 2 * padding + 1))
    expected = crop_reference(expected, top, left, padding)
  if flip:
    mirror = np.asarray(jax.random.bernoulli(flip_key, shape=(32, 1, 1, 1)))
    expected = np.where(mirror, expected[:, :, ::-1], expected)
  found = augment.build(padding, flip)(jax.random.key(3), batch)
  assert found.dtype == jnp.uint8
  np.testing.assert_array_equal(found, expected)


def test_a_key_decides_everything():
  augment_fn, batch = jax.jit(augment.build(2, True)), images(n=32)
  a, b, c = (np.asarray(augment_fn(jax.random.key(seed), batch)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(a, b)
  assert (a != c).any()


def test_scale():
  found = augment.scale(np.array([0, 51, 255], np.uint8))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, [-1.0, -0.6, 1.0], rtol=1e-6)
  assert (float(found[0]), float(found[2])) == (-1.0, 1.0)
