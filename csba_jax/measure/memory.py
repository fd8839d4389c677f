"""Checks before the first step of a run that the devices can hold its measurements."""

import jax
import numpy as np

from csba_jax.errors import UserError
from csba_jax.gradients.gram import LayerFn, Layers
from csba_jax.run.net import Net


def check_probe(
  net: Net,
  images: int,
  folds: int,
  devices: int,
  available: int,
  layer_fn: LayerFn | None = None,
) -> tuple[int, int]:
  """The size of a probe's batch, after a check that each device can hold it.

  Args:
    net: variables may be shapes.
    images: of each class.
    folds: of each class.
    devices: that share the images.
    available: bytes of one device.
    layer_fn: as in `class_grams`.

  Returns:
    The number of rows (class, fold), and of images in a row, a multiple of `devices`.

  Raises:
    UserError: a device would hold more than its `available` bytes.
  """
  classes = net.num_classes
  rows, depth = classes * folds, -(-images // folds)
  depth = -(-depth // devices) * devices
  held = rows * depth // devices * int(np.prod(net.metadata.image_shape))
  if held > available:
    each = f'{depth // devices} images of each of {folds} folds of {classes} classes'
    raise UserError(
      f"a device's share of the probe within its {available / 1e9:.1f} GB",
      f'{held / 1e9:.1f} GB: {each}',
      'set --config.diagnostics.images to fewer, or use more devices',
    )
  layers = Layers.of(net.params, layer_fn, net.model.head)
  try:
    layers.check_room(jax.tree.leaves(net.params), rows, available, devices, every_gram=True)
  except UserError as error:
    raise UserError(
      f'{error.expected}, for a probe of {folds} folds of {classes} classes',
      error.found,
      'set --config.diagnostics.every=0 and measure the trained net: csba-diagnose --layers=REGEX, '
      'without its head',
    ) from error
  return rows, depth


def check_batches(net: Net, batches: int, available: int, layer_fn: LayerFn | None = None) -> None:
  """Raises UserError where a device cannot hold one row for each class of each training batch."""
  layers, rows = Layers.of(net.params, layer_fn, net.model.head), batches * net.num_classes
  try:
    layers.check_room(jax.tree.leaves(net.params), rows, available)
  except UserError as error:
    raise UserError(
      f'{error.expected}, for {batches} batches of {net.num_classes} classes',
      error.found,
      'set --config.diagnostics.batches to fewer, or --config.diagnostics.statistics=frozen',
    ) from error


def check_snapshots(net: Net, devices: int, available: int) -> None:
  """Raises UserError where a device cannot hold one row for each class, layers pass by pass."""
  layers, classes = Layers.of(net.params, None, net.model.head), net.num_classes
  try:
    layers.check_room(jax.tree.leaves(net.params), classes, available, devices)
  except UserError as error:
    raise UserError(
      f'{error.expected}, for snapshots of {classes} classes',
      error.found,
      "set --config.diagnostics.snapshots='' and --config.diagnostics.loss_levels='' and measure "
      'the trained net: csba-diagnose --exact --layers=REGEX, without this layer',
    ) from error
