"""The conflict of a net in training every so many steps, and the room that measurements need."""

from collections.abc import Callable

import jax
import ml_collections
import numpy as np
from jax import Array
from jax.tree_util import Partial

from csba_jax.data import pipeline
from csba_jax.gradients import batch_estimate, estimate
from csba_jax.gradients.conflict import Conflict
from csba_jax.gradients.gram import Layers
from csba_jax.gradients.per_class import group_grams
from csba_jax.measure import diagnose, memory, training_conflict
from csba_jax.measure.training_conflict import Batches
from csba_jax.run.net import Net
from csba_jax.run.state import TrainState
from csba_jax.runtime import backend, sharding

FOLDS = 4  # of each class, in a probe of images


def of_config(
  net: Net,
  config: ml_collections.ConfigDict,
  data: pipeline.Data,
  layout: sharding.Layout,
  layers: str | None = None,
  redraws: bool = False,
) -> 'Probe':
  """The probe of a run, as `training_conflict.choose` says for `diagnostics.statistics`.

  Args:
    net: of the run; its variables may be shapes.
    config: of the run.
    data: of the run.
    layout: devices that share the work.
    layers: as in `diagnose.diagnose_run`.
    redraws: whether a probe of images draws new ones at every measurement. Batches are new always.

  Raises:
    UserError: what it needs does not fit into the memory of a device.
  """
  kind = training_conflict.choose(config.diagnostics.statistics, net, config)
  if kind == 'batch':
    return BatchProbe(net, config, data, layers)
  return ImageProbe(net, config, data, layout, layers, redraws)


class BatchProbe:
  """The conflict of the gradient that training takes, from batches of its step.

  It measures the parameters that the optimiser moves, also where moving averages are kept.
  """

  def __init__(
    self,
    net: Net,
    config: ml_collections.ConfigDict,
    data: pipeline.Data,
    layers: str | None = None,
  ):
    layer_fn = None if layers is None else diagnose.choose_layers(layers, net.params)
    memory.check_batches(net, config.diagnostics.batches, backend.device_bytes(), layer_fn)
    self._net, self._config, self._data, self._layers = net, config, data, layers

  def measure(self, state: TrainState) -> Conflict:
    """The conflict at a state; see `training_conflict.measure`."""
    net = Net.of(self._net.model, state.replace(averages={}), self._net.metadata)
    batches = Batches(self._config.diagnostics.batches, self._config.seed)
    data = self._data
    return training_conflict.measure(net, self._config, data, data.train, batches, self._layers)


class ImageProbe:
  """A sample of the training part, and the conflict of a net in training on it.

  It measures the parameters that the optimiser moves, also where moving averages are kept.

  The sample is an array with one row of images for each pair (class, fold). It is drawn with
  replacement, for an unbiased Gram. The whole measurement is one compiled step.

  Args:
    net: of the run; its variables may be shapes.
    config: of the run.
    data: of the run.
    layout: devices that share the sample.
    layers: as in `of_config`.
    redraws: whether each measurement draws a sample of its own; else all have the same.

  Raises:
    UserError: the sample does not fit into the memory of a device.
  """

  def __init__(
    self,
    net: Net,
    config: ml_collections.ConfigDict,
    data: pipeline.Data,
    layout: sharding.Layout,
    layers: str | None = None,
    redraws: bool = False,
  ):
    self._net, self._config, self._data, self._layout = net, config, data, layout
    self._losses = diagnose.losses_of(net, config)
    self._order = diagnose.from_input_to_output(net.model, net.metadata.image_shape)
    self._layers = None if layers is None else diagnose.choose_layers(layers, net.params)
    images, devices, available = config.diagnostics.images, layout.devices, backend.device_bytes()
    self._shape = memory.check_probe(net, images, FOLDS, devices, available, self._layers)
    self._sample = None if redraws else self._draw(config.seed)

  def _draw(self, seed: int | tuple[int, int]) -> tuple[dict[str, Array], np.ndarray]:
    """The sample on the devices, rows [R, n, ...], and the sizes of the folds."""
    (rows, depth), train = self._shape, self._data.train
    examples = {'image': train.images, 'label': train.labels}
    classes, images = self._net.num_classes, self._config.diagnostics.images
    index, sizes = estimate.draw_folds(examples, classes, 'train', images, FOLDS, seed)
    index = np.pad(index, ((0, 0), (0, 0), (0, depth - index.shape[2])))
    filled = np.arange(depth) < sizes[:, :, None]
    own = self._layout.rows(depth)
    index, filled = (x[..., own].reshape(rows, -1) for x in (index, filled))
    batch = {name: np.asarray(values[index]) for name, values in examples.items()}
    return self._layout.place_rows(batch | {'mask': filled}, depth, axis=1), sizes

  def measure(self, state: TrainState) -> Conflict:
    """The conflict at a state, with the running statistics that the state has."""
    net = Net.of(self._net.model, state.replace(averages={}), self._net.metadata)
    layers = Layers.of(net.params, self._layers, net.model.head)
    losses_fn = Partial(self._losses, net.batch_stats)
    batch, sizes = self._sample or self._draw((self._config.seed, net.step))
    sums, loss_sums = jax.device_get(
      _probe_grams()(losses_fn, net.params, batch, layers=layers, mesh=self._layout.grams_mesh)
    )
    about = {
      'target': 'train',
      'statistics': diagnose.statistics_of(net, in_training=False),
      'folds': FOLDS,
      'images': self._config.diagnostics.images,
    }
    names = diagnose.describe_net(net, self._config, self._data, about)
    counts = net.metadata.class_counts
    found = estimate.from_folds(layers, sums, loss_sums, sizes, counts, names)
    return found.take([layer for layer in self._order if layer in found.layers])


_probe_grams = backend.jit(group_grams, static_argnames=('layers', 'max_bytes', 'mesh'))


Probe = ImageProbe | BatchProbe


def check_room(
  net: Net, config: ml_collections.ConfigDict, devices: int, layers: str | None = None
) -> None:
  """Raises UserError where a device cannot hold the measurements of config.diagnostics.

  Args:
    net: variables may be shapes.
    config: of the run.
    devices: that share the images.
    layers: as in `of_config`.
  """
  wanted, available = config.diagnostics, backend.device_bytes()
  layer_fn = None if layers is None else diagnose.choose_layers(layers, net.params)
  measures = wanted.every or wanted.snapshots or wanted.loss_levels
  if measures and training_conflict.choose(wanted.statistics, net, config) == 'batch':
    memory.check_batches(net, wanted.batches, available, layer_fn)
    return
  if wanted.every:
    memory.check_probe(net, wanted.images, FOLDS, devices, available, layer_fn)
  if wanted.snapshots or wanted.loss_levels:
    memory.check_snapshots(net, devices, available)


def lower_images(
  net: Net,
  config: ml_collections.ConfigDict,
  layout: sharding.Layout,
  available: int,
  one_row: bool = False,
  folds: int = FOLDS,
  layer_fn: Callable[[str], str | None] | None = None,
) -> jax.stages.Lowered:
  """The step of an `ImageProbe` before it is compiled; nothing is allocated.

  Args:
    net: variables are shapes with shardings.
    config: of the run.
    layout: devices that share the sample.
    available: bytes of one device.
    one_row: lower the first (class, fold) alone, in as many passes as all of them need.
    folds: of each class.
    layer_fn: as in `class_grams`.

  Raises:
    UserError: a device cannot hold the step.
  """
  images, devices, shape = config.diagnostics.images, layout.devices, net.metadata.image_shape
  rows, depth = memory.check_probe(net, images, folds, devices, available, layer_fn)
  max_bytes = backend.CLASS_GRADIENT_BYTES
  if one_row:
    rows, max_bytes = 1, max_bytes // rows

  def of(dtype: type[np.generic], *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, depth, *shape), dtype, sharding=layout.split(1))

  batch = {'image': of(np.uint8, *shape), 'label': of(np.int32), 'mask': of(np.bool_)}
  return _probe_grams().lower(
    Partial(diagnose.losses_of(net, config), net.batch_stats),
    net.params,
    batch,
    layers=Layers.of(net.params, layer_fn, net.model.head),
    max_bytes=max_bytes,
    mesh=layout.grams_mesh,
  )


def lower_batch(
  net: Net,
  config: ml_collections.ConfigDict,
  layout: sharding.Layout,
  available: int,
  classes: int | None = None,
  layer_fn: Callable[[str], str | None] | None = None,
) -> jax.stages.Lowered:
  """The class gradients of one batch of a `BatchProbe` before they are compiled.

  Of those layers that the first pass over the layers takes.

  Args:
    net: variables are shapes with shardings.
    config: of the run.
    layout: devices that share the images.
    available: bytes of one device.
    classes: lower so many of them alone.
    layer_fn: as in `class_grams`.

  Raises:
    UserError: a device cannot hold the class gradients of all batches.
  """
  number = config.diagnostics.batches
  memory.check_batches(net, number, available, layer_fn)
  layers, leaves = Layers.of(net.params, layer_fn, net.model.head), jax.tree.leaves(net.params)
  first, *_ = layers.passes(leaves, number * net.num_classes, backend.CLASS_GRADIENT_BYTES)
  size, mesh = config.train.batch_size, layout.grams_mesh
  batch = {
    'image': jax.ShapeDtypeStruct((size, *net.metadata.image_shape), np.float32),
    'label': jax.ShapeDtypeStruct((size,), np.int32),
    'mask': jax.ShapeDtypeStruct((size,), np.bool_),
  }
  if mesh is not None:
    placed = batch_estimate.shardings(batch, mesh)
    batch = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed[name])
      for name, x in batch.items()
    }
  return batch_estimate.compiled_sums().lower(
    Partial(training_conflict.losses_of(net, config), net.batch_stats),
    net.params,
    batch,
    num_classes=classes or net.num_classes,
    wanted=tuple(i for layer in first for i in layers.members[layer]),
    mesh=mesh,
  )
