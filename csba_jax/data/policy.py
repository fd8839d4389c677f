"""AutoAugment and RandAugment on the device: (key, images) -> images, uint8 [N, H, W, ch].

With a branch for each operation, every image would compute all of them. So each operation is a row
of numbers, and one program serves all rows. It has three stages: an affine gather of pixels, a
table [256] for each channel, and a blend with a degenerate image. A stage that an operation does
not use leaves the image unchanged.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import Array

from csba_jax.errors import UserError

Operation = tuple[str, int, int]  # name, magnitude, largest magnitude of its range

# Grey of pixels that a geometric operation moves in. The authors' code uses the mean of the data.
FILL = 128

# 25 sub-policies of two (operation, probability, magnitude) each: Cubuk et al. 2019, table 7
AUTOAUGMENT_CIFAR10 = (
  (('invert', 0.1, 7), ('contrast', 0.2, 6)),
  (('rotate', 0.7, 2), ('translate_x', 0.3, 9)),
  (('sharpness', 0.8, 1), ('sharpness', 0.9, 3)),
  (('shear_y', 0.5, 8), ('translate_y', 0.7, 9)),
  (('auto_contrast', 0.5, 8), ('equalize', 0.9, 2)),
  (('shear_y', 0.2, 7), ('posterize', 0.3, 7)),
  (('color', 0.4, 3), ('brightness', 0.6, 7)),
  (('sharpness', 0.3, 9), ('brightness', 0.7, 9)),
  (('equalize', 0.6, 5), ('equalize', 0.5, 1)),
  (('contrast', 0.6, 7), ('sharpness', 0.6, 5)),
  (('color', 0.7, 7), ('translate_x', 0.5, 8)),
  (('equalize', 0.3, 7), ('auto_contrast', 0.4, 8)),
  (('translate_y', 0.4, 3), ('sharpness', 0.2, 6)),
  (('brightness', 0.9, 6), ('color', 0.2, 8)),
  (('solarize', 0.5, 2), ('invert', 0.0, 3)),
  (('equalize', 0.2, 0), ('auto_contrast', 0.6, 0)),
  (('equalize', 0.2, 8), ('equalize', 0.6, 4)),
  (('color', 0.9, 9), ('equalize', 0.6, 6)),
  (('auto_contrast', 0.8, 4), ('solarize', 0.2, 8)),
  (('brightness', 0.1, 3), ('color', 0.7, 0)),
  (('solarize', 0.4, 5), ('auto_contrast', 0.9, 3)),
  (('translate_y', 0.9, 9), ('translate_y', 0.7, 9)),
  (('auto_contrast', 0.9, 2), ('solarize', 0.8, 3)),
  (('equalize', 0.8, 8), ('invert', 0.1, 3)),
  (('translate_y', 0.7, 9), ('auto_contrast', 0.9, 1)),
)

# Cubuk et al. 2020, section 3: no inversion
RANDAUGMENT_OPS = (
  'identity',
  'auto_contrast',
  'equalize',
  'rotate',
  'solarize',
  'color',
  'posterize',
  'contrast',
  'brightness',
  'sharpness',
  'shear_x',
  'shear_y',
  'translate_x',
  'translate_y',
)

_DATA_TABLES = ('auto_contrast', 'equalize')  # their tables depend on the image
_ENHANCERS = ('brightness', 'contrast', 'color', 'sharpness')


class Rows(NamedTuple):
  """Operations as numbers, one row each, for images of one size: leaves [K, ...]."""

  affine: np.ndarray  # int32 [K, 2, 6]: the map, and the map of the opposite sign
  table: np.ndarray  # uint8 [K, 256], for tables that do not depend on the image
  data_table: np.ndarray  # int32 [K]: 1 + index in _DATA_TABLES; 0 for `table`
  enhancer: np.ndarray  # int32 [K]: 1 + index in _ENHANCERS; 0 for none
  factor: np.ndarray  # float32 [K]: 0 = the degenerate image, 1 = the image


def rows(operations: list[Operation], height: int, width: int) -> Rows:
  """Rows of (operation, magnitude, scale); magnitude / scale, 0..1, is the strength in its range.

  The ranges are those of Cubuk et al. 2019, table 6, as in their code for CIFAR: shear 0.3,
  translate 10 of 32 pixels, rotate 30 degrees, solarize from 256 down to 0, posterize from 8 bits
  down to 4, enhancers 0.1 to 1.9. Pixels, degrees, levels and bits are rounded towards no effect.
  Other code differs: in theirs posterize keeps 0 to 4 bits; in torchvision enhancers are 1 - m to
  1 + m with a random sign. We follow the paper.
  """
  made = [_row(name, m, scale, height, width) for name, m, scale in operations]
  return Rows(*(np.stack(column) for column in zip(*made, strict=True)))


def _row(name: str, magnitude: int, scale: int, height: int, width: int) -> tuple:
  """One row of `Rows`."""
  table, levels = np.arange(256), 256 * magnitude // scale
  if name == 'invert':
    table = 255 - table
  elif name == 'solarize':
    table = np.where(table < 256 - levels, table, 255 - table)
  elif name == 'posterize':
    table = table & ~(2 ** (4 * magnitude // scale) - 1)
  affine = [_affine(name, sign, magnitude, scale, height, width) for sign in (1, -1)]
  return (
    np.asarray(affine, np.int32),
    table.astype(np.uint8),
    np.int32(_DATA_TABLES.index(name) + 1 if name in _DATA_TABLES else 0),
    np.int32(_ENHANCERS.index(name) + 1 if name in _ENHANCERS else 0),
    np.float32(0.1 + 1.8 * magnitude / scale if name in _ENHANCERS else 1.0),
  )


def _affine(name: str, sign: int, magnitude: int, scale: int, height: int, width: int) -> list[int]:
  """(a, b, c, d, e, f) of source x = a x + b y + c, y = d x + e y + f, in units of 2**-16 pixel.

  Rounded as in Pillow's nearest neighbour, so that a source position halfway gives the same pixel.
  """
  a, b, c, d, e, f = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0
  if name == 'shear_x':
    b = sign * 0.3 * magnitude / scale
  elif name == 'shear_y':
    d = sign * 0.3 * magnitude / scale
  elif name == 'translate_x':
    c = sign * (10 * width * magnitude // (32 * scale))
  elif name == 'translate_y':
    f = sign * (10 * height * magnitude // (32 * scale))
  elif name == 'rotate':
    angle = -np.deg2rad(sign * (30 * magnitude // scale))  # counter-clockwise for a positive sign
    a, b, d, e = np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)
    c, f = (width - a * width - b * height) / 2, (height - d * width - e * height) / 2
  centred = (a, b, c + (a + b) / 2, d, e, f + (d + e) / 2)  # from pixel centre to pixel centre
  return [int(np.floor(65536 * x + 0.5)) for x in centred]


def apply(table: Rows, row: Array, turned: Array, images: Array) -> Array:
  """Applies to each image the operation of its row.

  Args:
    table: the operations.
    row: int [N], a row of `table` for each image.
    turned: bool [N], whether a geometric operation has the opposite sign.
    images: uint8 [N, H, W, ch]; 'color' does not change images of one channel.

  Returns:
    uint8 [N, H, W, ch]: what Pillow gives. One level of difference is possible where a blend rounds
    in float32, and where auto-contrast hits a whole level (Pillow's float64 may fall just below
    it).
  """
  n = images.shape[0]
  coefficients = jnp.asarray(table.affine)[row, turned.astype(int)]
  images = _gather(coefficients, images)
  enhancer = jnp.asarray(table.enhancer)[row]
  images = _look_up(jnp.asarray(table.table)[row], jnp.asarray(table.data_table)[row], images)
  factor = jnp.asarray(table.factor)[row].reshape(n, 1, 1, 1)
  return _blend(_degenerate(enhancer, images), images, factor)


def _gather(coefficients: Array, images: Array) -> Array:
  """Takes each pixel from its nearest source pixel, FILL outside.   [N, 6], [N, H, W, ch]"""
  n, h, w, _ = images.shape
  a, b, c, d, e, f = coefficients.T.reshape(6, n, 1, 1)
  y, x = jnp.arange(h).reshape(1, h, 1), jnp.arange(w).reshape(1, 1, w)
  column, row = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16
  inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
  pixel = jnp.where(inside, row * w + column, 0).reshape(n, h * w, 1)
  found = jnp.take_along_axis(images.reshape(n, h * w, -1), pixel, 1, mode='promise_in_bounds')
  return jnp.where(inside[..., None], found.reshape(images.shape), jnp.uint8(FILL))


def _look_up(tables: Array, data_table: Array, images: Array) -> Array:
  """Maps levels through the table of each image; 1 and 2 in `data_table` replace tables[n]."""
  n, h, w, channels = images.shape
  kind = data_table.reshape(n, 1, 1)
  pixels = images.reshape(n, h * w, channels).astype(jnp.int32)
  low, high = pixels.min(1)[..., None], pixels.max(1)[..., None]  # [N, ch, 1]
  chosen = jnp.where(kind == 1, _auto_contrast(low, high), tables[:, None].astype(jnp.int32))
  chosen = jnp.where(kind == 2, _equalize(pixels, high), chosen).astype(jnp.uint8)
  chosen = chosen.swapaxes(1, 2)  # by image: with flat tables a mesh would gather all images
  found = jnp.take_along_axis(chosen, pixels, 1, mode='promise_in_bounds')
  return found.reshape(images.shape)


def _auto_contrast(low: Array, high: Array) -> Array:
  """floor(255 (v - low) / (high - low)); unchanged if low = high.   -> [N, ch, 256]"""
  level, width = jnp.arange(256).reshape(1, 1, 256), high - low
  stretched = jax.lax.div(255 * jnp.clip(level - low, 0, width), jnp.maximum(width, 1))
  return jnp.where(width > 0, stretched, level)


def _equalize(pixels: Array, high: Array) -> Array:
  """(pixels below v + step // 2) // step, step = pixels below the highest level // 255.

  Unchanged where step is 0.   [N, P, ch] int, [N, ch, 1] -> [N, ch, 256]
  """
  count, level = pixels.shape[1], jnp.arange(256).reshape(1, 1, 256)
  histogram = jax.vmap(jax.vmap(_histogram, in_axes=1))(pixels)
  step = (count - jnp.where(level == high, histogram, 0).sum(-1, keepdims=True)) // 255
  below = jnp.cumsum(histogram, -1) - histogram
  spread = jnp.minimum(jax.lax.div(below + step // 2, jnp.maximum(step, 1)), 255)
  return jnp.where(step > 0, spread, level)


def _histogram(pixels: Array) -> Array:
  """How many pixels have each level.   [P] int -> [256]"""
  return jnp.zeros(256, jnp.int32).at[pixels].add(1)


def _degenerate(enhancer: Array, images: Array) -> Array:
  """The images to blend with: black (brightness), mean grey (contrast), grey (color), smooth."""
  n, h, w, channels = images.shape
  wide = images.astype(jnp.int32)
  grey = wide if channels == 1 else _grey(wide)
  mean = (2 * grey.sum((1, 2, 3), keepdims=True) + h * w) // (2 * h * w)
  kinds = (jnp.zeros_like(mean), mean, grey, _smooth(wide))
  result = wide  # without an enhancer: a blend with itself
  for kind, image in enumerate(kinds, start=1):
    result = jnp.where((enhancer == kind).reshape(n, 1, 1, 1), image, result)
  return result


def _grey(images: Array) -> Array:
  """Pillow's luma (ITU-R 601-2).   [N, H, W, 3] int -> [N, H, W, 1]"""
  red, green, blue = jnp.split(images, 3, axis=-1)
  return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _smooth(images: Array) -> Array:
  """Pillow's SMOOTH: 5 for the pixel and 1 for each neighbour, over 13; the border unchanged."""
  h, w = images.shape[1:3]
  rows_of_3 = images[:, :-2] + images[:, 1:-1] + images[:, 2:]
  box = rows_of_3[:, :, :-2] + rows_of_3[:, :, 1:-1] + rows_of_3[:, :, 2:]
  inner = (2 * (box + 4 * images[:, 1:-1, 1:-1]) + 13) // 26
  border = np.ones((1, h, w, 1), bool)
  border[:, 1:-1, 1:-1] = False
  return jnp.where(border, images, jnp.pad(inner, ((0, 0), (1, 1), (1, 1), (0, 0))))


def _blend(degenerate: Array, images: Array, factor: Array) -> Array:
  """degenerate + factor (image - degenerate), clipped to 0..255, rounded down."""
  wide = images.astype(jnp.int32)
  mixed = degenerate + factor * (wide - degenerate)
  return jnp.clip(mixed, 0, 255).astype(jnp.uint8)


# (key, n) -> int [steps, n]: the operations of each of n images, one after the other
Draw = Callable[[Array, int], Array]


def none(augment: ml_collections.ConfigDict) -> tuple[list[Operation], Draw]:
  """No operation."""
  del augment
  return [('identity', 0, 1)], lambda key, n: jnp.zeros((0, n), jnp.int32)


def autoaugment(augment: ml_collections.ConfigDict) -> tuple[list[Operation], Draw]:
  """Draws one of 25 sub-policies for each image; each has two operations with probabilities.

  It is the policy of Cubuk et al. 2019 for CIFAR-10; magnitudes are tenths of the range.
  """
  del augment  # it has nothing to set
  pairs = np.array([[p for _, p, _ in pair] for pair in AUTOAUGMENT_CIFAR10], np.float32)
  operations = [(name, m, 10) for pair in AUTOAUGMENT_CIFAR10 for name, _, m in pair]

  def draw(key: Array, n: int) -> Array:
    pair_key, chance_key = jax.random.split(key)
    pair = jax.random.randint(pair_key, (n,), 0, len(pairs))
    happens = jax.random.uniform(chance_key, (2, n)) < jnp.asarray(pairs)[pair].T
    return jnp.where(happens, 1 + 2 * pair[None] + jnp.arange(2)[:, None], 0)

  return [('identity', 0, 10), *operations], draw


def randaugment(augment: ml_collections.ConfigDict) -> tuple[list[Operation], Draw]:
  """Draws `randaugment_ops` operations for each image, with replacement, at one magnitude.

  Cubuk et al. 2020; the magnitude is in thirtieths of the range.
  """
  steps = augment.randaugment_ops
  operations = [(name, augment.randaugment_magnitude, 30) for name in RANDAUGMENT_OPS]
  return operations, lambda key, n: jax.random.randint(key, (steps, n), 0, len(operations))


POLICIES = {'none': none, 'autoaugment': autoaugment, 'randaugment': randaugment}


def build(augment: ml_collections.ConfigDict) -> Callable[[Array, Array], Array]:
  """The policy of config.augment: (key, images uint8 [N, H, W, ch]) -> images of the same shape.

  Each image draws its own operations. A geometric operation has either sign with probability 1/2.
  """
  if augment.policy not in POLICIES:
    raise UserError(
      f'augment.policy among {", ".join(POLICIES)}',
      repr(augment.policy),
      'set --config.augment.policy',
    )
  operations, draw = POLICIES[augment.policy](augment)

  def policy(key: Array, images: Array) -> Array:
    n, height, width, _ = images.shape
    table = rows(operations, height, width)
    draw_key, sign_key = jax.random.split(key)
    steps = draw(draw_key, n)
    turned = jax.random.bernoulli(sign_key, shape=steps.shape)
    for step in range(len(steps)):
      images = apply(table, steps[step], turned[step], images)
    return images

  return policy
