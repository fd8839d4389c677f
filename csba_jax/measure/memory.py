"""Whether a device holds what a run wants to have measured: said before its first step."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from csba_jax.errors import UserError
from csba_jax.gradients.gram import LayerFn, Layers

PyTree = Any


def shapes(model: nn.Module, image_shape: tuple[int, int, int]) -> PyTree:
  """The parameters of a model, as shapes."""
  image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), image)['params']


def check_probe(
  params: PyTree,
  head: str,
  images: int,
  classes: int,
  folds: int,
  image_shape: tuple[int, int, int],
  devices: int,
  available: int,
  layer_fn: LayerFn | None = None,
) -> tuple[int, int]:
  """Rows (class, fold) of a probe's batch and its images a row, the same on every device.

  Raises:
    UserError: what one of the devices would hold exceeds its `available` bytes.
  """
  rows, depth = classes * folds, -(-images // folds)
  depth = -(-depth // devices) * devices
  held = rows * depth // devices * int(np.prod(image_shape))
  if held > available:
    each = f'{depth // devices} images of each of {folds} folds of {classes} classes'
    raise UserError(
      f"a device's share of the probe within its {available / 1e9:.1f} GB",
      f'{held / 1e9:.1f} GB: {each}',
      'set --config.diagnostics.images to fewer, or use more devices',
    )
  layers = Layers.of(params, layer_fn, head)
  try:
    layers.check_room(jax.tree.leaves(params), rows, available, devices, every_gram=True)
  except UserError as error:
    raise UserError(
      f'{error.expected}, for a probe of {folds} folds of {classes} classes',
      error.found,
      'set --config.diagnostics.every=0 and measure the trained net: csba-diagnose --layers=REGEX, '
      'without its head',
    ) from error
  return rows, depth


def check_snapshots(params: PyTree, head: str, classes: int, devices: int, available: int) -> None:
  """Raises UserError where a snapshot exceeds a device: a row a class, layers pass by pass."""
  layers = Layers.of(params, None, head)
  try:
    layers.check_room(jax.tree.leaves(params), classes, available, devices)
  except UserError as error:
    raise UserError(
      f'{error.expected}, for snapshots of {classes} classes',
      error.found,
      "set --config.diagnostics.snapshots='' and --config.diagnostics.loss_levels='' and measure "
      'the trained net: csba-diagnose --exact --layers=REGEX, without this layer',
    ) from error
