"""Crops, flips and cutout against loops over pixels with the same random numbers."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import csba_jax
from csba_jax import config as config_lib
from csba_jax.data import augment, policy
from csba_jax.errors import UserError
from csba_jax.run.net import Preprocessing


def images(n=6, height=5, width=7, channels=3):
  rng = np.random.default_rng(0)
  return rng.integers(1, 256, (n, height, width, channels), dtype=np.uint8)


def section(**fields):
  """config.augment with these fields set."""
  found = config_lib.default().augment
  found.update(fields)
  return found


def crop_reference(batch, top, left, padding):
  """Pixel by pixel; pixels outside the image are 0."""
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


def cutout_reference(key, batch, side):
  """Pixel by pixel; 128 in the square whose middle pixel, or the one after it, was drawn."""
  n, height, width, _ = batch.shape
  row_key, column_key = jax.random.split(key)
  rows = np.asarray(jax.random.randint(row_key, (n, 1), 0, height))
  columns = np.asarray(jax.random.randint(column_key, (n, 1), 0, width))
  result = batch.copy()
  for i in range(n):
    for y in range(rows[i, 0] - side // 2, rows[i, 0] - side // 2 + side):
      for x in range(columns[i, 0] - side // 2, columns[i, 0] - side // 2 + side):
        if 0 <= y < height and 0 <= x < width:
          result[i, y, x] = 128
  return result


@pytest.mark.parametrize('side', [1, 2, 3, 4, 5])
def test_cutout_equals_a_loop(side):
  key, batch = jax.random.key(side), images(n=40)
  found = augment.cutout(key, batch, side)
  assert found.dtype == jnp.uint8
  np.testing.assert_array_equal(found, cutout_reference(key, batch, side))


def test_cutouts_middle_is_any_pixel_of_each_image_for_itself():
  batch = np.zeros((3500, 5, 7, 1), np.uint8)
  found = np.asarray(augment.cutout(jax.random.key(0), batch, 1))
  assert (found.sum((1, 2, 3)) == 128).all()
  seen = (found > 0).sum((0, 3))  # 35 places, 100 each
  assert seen.min() > 50
  assert seen.max() < 150


def test_cutout_is_nothing_to_the_net():
  assert abs(float(Preprocessing()(jnp.uint8(policy.FILL)))) < 0.004


def test_off_is_the_identity():
  batch = images()
  found = augment.build(section())(jax.random.key(0), batch)
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
  found = augment.build(section(crop_padding=padding, flip=flip))(jax.random.key(3), batch)
  assert found.dtype == jnp.uint8
  np.testing.assert_array_equal(found, expected)


@pytest.mark.seconds
def test_a_key_decides_everything():
  everything = section(crop_padding=2, flip=True, policy='randaugment', cutout=3)
  everything.randaugment_ops = 1
  augment_fn, batch = jax.jit(augment.build(everything)), images(n=32)
  a, b, c = (np.asarray(augment_fn(jax.random.key(seed), batch)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(a, b)
  assert (a != c).any()


@pytest.mark.seconds
def test_policy_comes_after_crop_and_flip_and_cutout_last():
  batch, key = images(n=32, height=8, width=8), jax.random.key(4)
  crop_key, flip_key, policy_key, cutout_key = jax.random.split(key, 4)
  everything = section(crop_padding=2, flip=True, policy='randaugment', cutout=4)
  everything.randaugment_ops = 1
  expected = augment.random_flip(flip_key, augment.random_crop(crop_key, batch, 2))
  expected = jax.jit(policy.build(everything))(policy_key, expected)
  expected = cutout_reference(cutout_key, np.asarray(expected), 4)
  found = jax.jit(augment.build(everything))(key, batch)
  np.testing.assert_array_equal(found, expected)


def test_a_new_augmentation_leaves_the_draws_of_crop_and_flip():
  batch, key = images(n=32), jax.random.key(6)
  plain = augment.build(section(crop_padding=2, flip=True))(key, batch)
  with_cutout = np.asarray(augment.build(section(crop_padding=2, flip=True, cutout=2))(key, batch))
  kept = with_cutout != 128
  assert 0.7 < kept.mean() < 1
  np.testing.assert_array_equal(with_cutout[kept], np.asarray(plain)[kept])


def test_an_unknown_policy_is_refused_before_there_are_images():
  with pytest.raises(UserError, match="augment.policy among none, .* found 'mixup'"):
    augment.build(section(policy='mixup'))


@pytest.mark.parametrize('module', ['measure/evaluate', 'run/restore', 'measure/diagnose'])
def test_what_measures_never_augments(module):
  tree = ast.parse((Path(csba_jax.__file__).parent / f'{module}.py').read_text())
  used = {
    node.attr
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute) and getattr(node.value, 'id', None) == 'augment'
  }
  assert not used


def test_a_square_larger_than_the_images_is_one_line():
  config = config_lib.default()
  config.data.image_size, config.augment.cutout = 32, 32
  config_lib.check(config)
  config.augment.cutout = 33
  with pytest.raises(UserError) as error:
    config_lib.check(config)
  assert str(error.value) == (
    'expected augment.cutout of at most data.image_size = 32 pixels; found 33; '
    'to fix it: set --config.augment.cutout=...'
  )


def test_scale():
  found = Preprocessing()(np.array([0, 51, 255], np.uint8))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, [-1.0, -0.6, 1.0], rtol=1e-6)
  assert (float(found[0]), float(found[2])) == (-1.0, 1.0)
