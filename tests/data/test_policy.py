"""Every operation against Pillow, and the draws against their probabilities."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from csba_jax import config as config_lib
from csba_jax.data import policy
from csba_jax.errors import UserError

OPERATIONS = (*policy.RANDAUGMENT_OPS, 'invert')
STRENGTHS = ((0, 10), (1, 10), (3, 10), (7, 10), (9, 10), (14, 30), (30, 30))
GEOMETRIC = ('shear_x', 'shear_y', 'translate_x', 'translate_y', 'rotate')
BLENDS = ('brightness', 'contrast', 'color', 'sharpness')
SHAPES = ((32, 32, 3), (32, 32, 1), (14, 19, 3))


def pictures(height, width, channels):
  """Noise, smooth, narrow, one level, two levels, nearly all one level."""
  rng = np.random.default_rng(height * width)
  noise = rng.integers(0, 256, (height, width, channels))
  y, x = np.mgrid[:height, :width]
  waves = [127 + 90 * np.sin(x / (3 + c) + y / 5) + 30 * np.cos(y / (2 + c)) for c in range(3)]
  smooth = np.stack(waves, -1)[..., :channels]
  narrow = 90 + noise % 23
  spike = np.full_like(noise, 17)
  spike[height // 2, width // 2] = 201
  found = (noise, smooth, narrow, np.full_like(noise, 77), 40 + 150 * (noise > 99), spike)
  return np.stack(found).clip(0, 255).astype(np.uint8)


def pillow(name, strength, sign, pixels):
  """The operation by Pillow; strength 0..1 of the paper's range."""
  image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
  fill = 128 if image.mode == 'L' else (128, 128, 128)
  below = 1e-9  # 0.7 * 10 is a hair below 7

  def affine(*coefficients):
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, fillcolor=fill)

  result = {
    'identity': lambda: image,
    'shear_x': lambda: affine(1, sign * 0.3 * strength, 0, 0, 1, 0),
    'shear_y': lambda: affine(1, 0, 0, sign * 0.3 * strength, 1, 0),
    'translate_x': lambda: affine(
      1, 0, sign * int(image.width * 10 / 32 * strength + below), 0, 1, 0
    ),
    'translate_y': lambda: affine(
      1, 0, 0, 0, 1, sign * int(image.height * 10 / 32 * strength + below)
    ),
    'rotate': lambda: image.rotate(sign * int(30 * strength + below), fillcolor=fill),
    'auto_contrast': lambda: ImageOps.autocontrast(image),
    'equalize': lambda: ImageOps.equalize(image),
    'invert': lambda: ImageOps.invert(image),
    'solarize': lambda: ImageOps.solarize(image, 256 - int(256 * strength + below)),
    'posterize': lambda: ImageOps.posterize(image, 8 - int(4 * strength + below)),
    'brightness': lambda: ImageEnhance.Brightness(image).enhance(0.1 + 1.8 * strength),
    'contrast': lambda: ImageEnhance.Contrast(image).enhance(0.1 + 1.8 * strength),
    'color': lambda: ImageEnhance.Color(image).enhance(0.1 + 1.8 * strength),
    'sharpness': lambda: ImageEnhance.Sharpness(image).enhance(0.1 + 1.8 * strength),
  }[name]()
  return np.asarray(result).reshape(pixels.shape)


@pytest.fixture(scope='module', params=SHAPES, ids=str)
def applied(request):
  """{operation: (found, expected, images)} at every strength, sign and picture, from one call."""
  height, width, channels = request.param
  table = policy.rows([(o, *s) for o in OPERATIONS for s in STRENGTHS], height, width)
  images = pictures(height, width, channels)
  cases = [(r, t, i) for r in range(len(table.table)) for t in (0, 1) for i in range(len(images))]
  row, turned, which = np.array(cases).T
  batch = images[which]
  run = jax.jit(lambda row, turned, batch: policy.apply(table, row, turned, batch))
  found = np.asarray(run(row, turned.astype(bool), batch))
  assert found.dtype == np.uint8
  expected = []
  for r, t, i in cases:
    magnitude, scale = STRENGTHS[r % len(STRENGTHS)]
    name = OPERATIONS[r // len(STRENGTHS)]
    expected.append(pillow(name, magnitude / scale, 1 - 2 * t, images[i]))
  expected, name = np.stack(expected), np.array(OPERATIONS)[row // len(STRENGTHS)]
  return {o: (found[name == o], expected[name == o], batch[name == o]) for o in OPERATIONS}


@pytest.mark.seconds
@pytest.mark.parametrize('name', sorted(set(OPERATIONS) - {'auto_contrast', *BLENDS}))
def test_operation_is_pillows_to_the_bit(applied, name):
  found, expected, images = applied[name]
  np.testing.assert_array_equal(found, expected)
  assert (name == 'identity') == (found == images).all()


@pytest.mark.parametrize('name', BLENDS)
def test_blend_is_pillows_up_to_a_rounding_in_float32(applied, name):
  found, expected, images = applied[name]
  off = np.abs(found.astype(int) - expected)
  assert off.max() <= 1
  assert (off > 0).mean() < 1e-3
  assert (found == images).all() == (name == 'color' and images.shape[-1] == 1)


def test_auto_contrast_is_the_floor_that_pillows_float64_may_miss_by_one(applied):
  found, expected, images = applied['auto_contrast']
  low, high = (f(images.astype(int), (1, 2), keepdims=True) for f in (np.min, np.max))
  numerator, width = 255 * (images - low), np.maximum(high - low, 1)
  exact = np.where(high > low, numerator // width, images)
  np.testing.assert_array_equal(found, exact)
  missed = found != expected
  assert (numerator[missed] % np.broadcast_to(width, images.shape)[missed] == 0).all()
  np.testing.assert_array_equal(found[missed], expected[missed] + 1)


def test_a_turned_sign_is_another_image_for_geometric_operations_only():
  table = policy.rows([(o, 7, 10) for o in OPERATIONS], 32, 32)
  turned = (table.affine[:, 0] != table.affine[:, 1]).any(-1)
  assert {o for o, t in zip(OPERATIONS, turned, strict=True) if t} == set(GEOMETRIC)


def test_a_coordinate_of_the_largest_image_fits_into_32_bits():
  table = policy.rows([(o, 30, 30) for o in OPERATIONS], 256, 256)
  reach = np.abs(table.affine.astype(np.int64)) @ np.kron(np.eye(2, dtype=int), [255, 255, 1]).T
  assert reach.max() < 2**31


def section(name, **fields):
  augment = config_lib.default().augment
  augment.update(policy=name, **fields)
  return augment


def drawn(name, n, **fields):
  """(operations of the policy, the rows drawn for n images [steps, n])."""
  operations, draw = policy.POLICIES[name](section(name, **fields))
  return operations, np.asarray(draw(jax.random.key(5), n))


def test_autoaugments_table_is_the_papers():
  # uses, sum of probabilities in tenths and sum of magnitudes of each operation in table 7
  sums = {}
  for name, p, m in (entry for pair in policy.AUTOAUGMENT_CIFAR10 for entry in pair):
    uses, tenths, magnitudes = sums.get(name, (0, 0, 0))
    sums[name] = (uses + 1, tenths + round(10 * p), magnitudes + m)
  assert len(policy.AUTOAUGMENT_CIFAR10) == 25
  assert sums == {
    'invert': (3, 2, 13),
    'contrast': (2, 8, 13),
    'rotate': (1, 7, 2),
    'translate_x': (2, 8, 17),
    'sharpness': (5, 28, 24),
    'shear_y': (2, 7, 15),
    'translate_y': (5, 34, 39),
    'auto_contrast': (7, 50, 26),
    'equalize': (9, 47, 41),
    'posterize': (1, 3, 7),
    'color': (5, 29, 27),
    'brightness': (4, 23, 25),
    'solarize': (4, 19, 18),
  }


def test_autoaugment_draws_each_pair_equally_and_each_operation_with_its_probability():
  n = 100_000
  operations, found = drawn('autoaugment', n)
  assert found.shape == (2, n)
  for step in range(2):
    counts = np.bincount(found[step], minlength=len(operations))
    for i, pair in enumerate(policy.AUTOAUGMENT_CIFAR10):
      name, chance, magnitude = pair[step]
      row = 1 + 2 * i + step
      assert operations[row] == (name, magnitude, 10)
      share = chance / 25
      deviation = np.sqrt(n * share * (1 - share))
      assert abs(counts[row] - n * share) <= 5 * deviation, (i, name)
      counts[row] = 0
    assert counts[1:].sum() == 0  # nothing of the other step
  assert operations[0][0] == 'identity'
  # both happen independently: 0.9 and 0.7 of the pair of two translations
  both = ((found[0] == 43) & (found[1] == 44)).mean()
  assert abs(both * 25 - 0.63) < 0.05


def test_randaugment_draws_operations_equally_for_each_image_and_step():
  n = 28_000
  operations, found = drawn('randaugment', n, randaugment_ops=3, randaugment_magnitude=11)
  assert found.shape == (3, n)
  assert operations == [(name, 11, 30) for name in policy.RANDAUGMENT_OPS]
  for step in found:
    counts = np.bincount(step, minlength=14)
    assert len(counts) == 14
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000)
  pairs = np.bincount(found[0] * 14 + found[1], minlength=196)  # with replacement, independent
  assert np.abs(pairs - n / 196).max() < 6 * np.sqrt(n / 196)


def some_images(n, channels=3):
  rng = np.random.default_rng(1)
  return rng.integers(0, 256, (n, 12, 12, channels), dtype=np.uint8)


@pytest.mark.seconds
@pytest.mark.parametrize(('name', 'channels'), [('autoaugment', 3), ('randaugment', 1)])
def test_policy_is_pure_and_runs_in_a_compiled_scan(name, channels):
  batch = some_images(24, channels)
  run = policy.build(section(name))
  keys = jax.random.split(jax.random.key(0), 3)

  @jax.jit
  def scanned(keys, batch):
    return jax.lax.scan(lambda _, key: (None, run(key, batch)), None, keys)[1]

  found = np.asarray(scanned(keys, batch))
  assert (found.shape, found.dtype) == ((3, *batch.shape), np.uint8)
  compiled = jax.jit(run)
  for key, images in zip(keys, found, strict=True):
    np.testing.assert_array_equal(compiled(key, batch), images)
  assert (found[0] != found[1]).any()


def test_equal_images_are_drawn_differently():
  batch = np.repeat(some_images(1), 60, 0)
  found = np.asarray(jax.jit(policy.build(section('randaugment')))(jax.random.key(0), batch))
  different = len(np.unique(found.reshape(60, -1), axis=0))
  assert different > 45


def test_policy_is_its_operations_one_after_the_other():
  augment = section('randaugment', randaugment_ops=2, randaugment_magnitude=12)
  batch, key = some_images(16), jax.random.key(9)
  draw_key, sign_key = jax.random.split(key)
  operations, draw = policy.randaugment(augment)
  steps = np.asarray(draw(draw_key, 16))
  turned = np.asarray(jax.random.bernoulli(sign_key, shape=(2, 16)))
  expected = []
  for i, image in enumerate(batch):
    for step in range(2):
      name = operations[steps[step, i]][0]
      image = pillow(name, 12 / 30, 1 - 2 * int(turned[step, i]), image)
    expected.append(image)
  found = np.asarray(jax.jit(policy.build(augment))(key, batch))
  wrong = np.abs(found.astype(int) - np.stack(expected)) > 2  # levels that two blends may miss
  assert wrong.mean() < 1e-3


def test_unknown_policy_is_one_line():
  augment = ml_collections.ConfigDict({'policy': 'trivial'})
  with pytest.raises(UserError) as error:
    policy.build(augment)
  assert str(error.value) == (
    "expected augment.policy among none, autoaugment, randaugment; found 'trivial'; "
    'to fix it: set --config.augment.policy'
  )


def test_none_draws_nothing():
  batch = jnp.asarray(some_images(2))
  assert policy.build(section('none'))(jax.random.key(0), batch) is batch
