"""Augmentation on the device: (key, images) -> images, uint8 [N, H, W, C] -> the same."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
from jax import Array

from csba_jax.data import policy

Augment = Callable[[Array, Array], Array]


def random_crop(key: Array, images: Array, padding: int) -> Array:
  """Pads every side with `padding` zeros and crops each image to its old size, at random."""
  n, *shape = images.shape
  padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  top, left = jax.random.randint(key, (2, n), 0, 2 * padding + 1)

  def cut(image: Array, row: Array, column: Array) -> Array:
    return jax.lax.dynamic_slice(image, (row, column, 0), shape)

  return jax.vmap(cut)(padded, top, left)  # not with index arrays: a mesh would gather all images


def random_flip(key: Array, images: Array) -> Array:
  """Mirrors each image left to right with probability 1/2."""
  flip = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
  return jnp.where(flip, images[:, :, ::-1], images)


def cutout(key: Array, images: Array, side: int) -> Array:
  """Greys out a square around a random pixel of each image (DeVries & Taylor 2017).

  The part of the square outside the image is cut off. The official code fills with 0 after
  normalisation; here that is grey 128 (0.004 as the input of a net). The official code makes an odd
  side one pixel shorter; we do not.
  """
  n, h, w, _ = images.shape
  row_key, column_key = jax.random.split(key)

  def covered(key: Array, size: int) -> Array:
    first = jax.random.randint(key, (n, 1), 0, size) - side // 2
    position = jnp.arange(size)[None]
    return (first <= position) & (position < first + side)

  square = covered(row_key, h)[:, :, None] & covered(column_key, w)[:, None, :]
  return jnp.where(square[..., None], jnp.uint8(policy.FILL), images)


def build(augment: ml_collections.ConfigDict) -> Augment:
  """Crop, flip, policy and cutout, as far as config.augment switches them on.

  Raises:
    UserError: unknown policy.
  """
  padding, flip, side = augment.crop_padding, augment.flip, augment.cutout
  apply_policy = policy.build(augment)

  def augmented(key: Array, images: Array) -> Array:
    crop_key, flip_key, policy_key, cutout_key = jax.random.split(key, 4)
    if padding:
      images = random_crop(crop_key, images, padding)
    if flip:
      images = random_flip(flip_key, images)
    images = apply_policy(policy_key, images)
    if side:
      images = cutout(cutout_key, images, side)
    return images

  return augmented
