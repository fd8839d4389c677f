"""Augmentation on the device: (key, images) -> images, uint8 [N, H, W, C] -> the same."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

Augment = Callable[[Array, Array], Array]


def random_crop(key: Array, images: Array, padding: int) -> Array:
  """Pads with `padding` zeros on every side and cuts the old size out anew for each image."""
  n, h, w, _ = images.shape
  padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  top, left = jax.random.randint(key, (2, n), 0, 2 * padding + 1)
  rows = top[:, None] + jnp.arange(h)[None]
  columns = left[:, None] + jnp.arange(w)[None]
  return padded[jnp.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def random_flip(key: Array, images: Array) -> Array:
  """Mirrors each image left to right with probability 1/2."""
  flip = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
  return jnp.where(flip, images[:, :, ::-1], images)


def build(crop_padding: int, flip: bool) -> Augment:
  """Crop, then flip, each where it is switched on."""

  def augment(key: Array, images: Array) -> Array:
    crop_key, flip_key = jax.random.split(key)
    if crop_padding:
      images = random_crop(crop_key, images, crop_padding)
    if flip:
      images = random_flip(flip_key, images)
    return images

  return augment


def scale(images: Array) -> Array:
  """uint8 0..255 -> float32 -1..1; no statistics of the data: the first norm learns them."""
  return images.astype(jnp.float32) / 127.5 - 1
