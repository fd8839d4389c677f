"""The class-gradient conflict of a run: of a trained net, and of a net in training."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array
from jax.tree_util import Partial

from csba_jax.config import step_at
from csba_jax.data import pipeline
from csba_jax.errors import UserError
from csba_jax.gradients import estimate, flow, plots
from csba_jax.gradients.conflict import Conflict, shares
from csba_jax.gradients.gram import Layers, layer_name, parameter_names
from csba_jax.gradients.per_class import group_grams
from csba_jax.measure import branch_similarity, memory
from csba_jax.methods import losses
from csba_jax.models import registry
from csba_jax.run import restore
from csba_jax.run.net import Net, Preprocessing
from csba_jax.run.schedule import training_stream
from csba_jax.run.state import TrainState
from csba_jax.run.workdir import writing_to
from csba_jax.runtime import backend, sharding
from csba_jax.runtime.progress import say

FOLDS = 4  # of each class, in the probe of a run in training


@dataclasses.dataclass(frozen=True)
class Sampling:
  """The images that a diagnosis takes; see `estimate.estimated_conflict`."""

  exact: bool = False  # every image; the fields below have no effect
  target: str = 'train'
  images: int = 64  # of each class
  folds: int = 8
  seed: int = 0


def diagnose_run(
  run: restore.Run,
  sample: Sampling,
  layers: str | None = None,
  tick: estimate.Tick = estimate.no_tick,
) -> Conflict:
  """The conflict of a run's net over its training part, under the run's loss.

  The net is the one that is evaluated: moving averages where the run keeps them. Class gradients
  are of the loss without class weights; sampler and class weights enter through the prior, see
  `objective_prior`. Layers that a second stage holds fixed are measured too.

  Args:
    run: see `restore.load_run`.
    sample: which images to take.
    layers: regular expression; parameters whose names it does not find are left out of everything.
    tick: called with (images done, images in all).

  Raises:
    UserError: `layers` finds nothing or is not a regular expression; and what `estimate` raises.
  """
  layer_fn = None if layers is None else choose_layers(layers, run.net.params)
  say(_describe_work(run.net, sample, layer_fn))
  found = _measure(
    run.net,
    run.config,
    run.data,
    run.data.train,
    sample,
    layer_fn=layer_fn,
    tick=tick,
    about={'layers': layers or ''},
  )
  order = from_input_to_output(run.net.model, run.net.metadata.image_shape)
  return found.take([layer for layer in order if layer in found.layers])


def snapshot(
  net: Net,
  config: ml_collections.ConfigDict,
  data: pipeline.Data,
  check: Callable[[], None] = lambda: None,
) -> dict[str, tuple[Conflict, dict[str, Any]]]:
  """The conflict and the branch similarity of a net over every image of its parts.

  With the variables that the net has; see `settled` for a net in training.

  Args:
    net: to measure.
    config: of its run.
    data: of its run.
    check: called now and then; may raise.

  Returns:
    {'train': (conflict, `branch_similarity.measure`)}, and 'val' likewise where the run has a
    validation part.
  """
  found = {}
  for name, part in (('train', data.train), ('val', data.val)):
    if len(part):
      about, sample = {'target': f'{name}, exact'}, Sampling(exact=True)
      conflict = _measure(net, config, data, part, sample, tick=lambda *_: check(), about=about)
      branches = branch_similarity.measure(net, part, config.train.batch_size, check)
      found[name] = conflict, branches
  return found


def settled(net: Net, config: ml_collections.ConfigDict, data: pipeline.Data) -> Net:
  """A net in training as its snapshots measure it: with renewed BatchNorm statistics.

  The running statistics of BatchNorm lag behind a net that changes: early in a run the loss with
  them can be many times the loss of the batches. `restore.renew_statistics` estimates them again
  from training batches. A second stage keeps the statistics that it has.
  """
  return restore.renew_statistics(net, config, data) if config.stage.method == 'none' else net


def training_loss(
  net: Net,
  config: ml_collections.ConfigDict,
  data: pipeline.Data,
  check: Callable[[], None] = lambda: None,
) -> float:
  """Mean loss over every training image, as `snapshot` measures it: no class weights, no mixing."""
  layout, total = net.layout, 0.0
  losses_fn = Partial(_losses_of(net, config), net.batch_stats)
  for images, labels, mask in pipeline.eval_batches(data.train, config.train.batch_size, layout):
    check()
    total += float(_loss_sum(losses_fn, net.params, images, labels, mask, layout=layout))
  return total / len(data.train)


@functools.partial(jax.jit, static_argnames='layout')
def _loss_sum(
  losses_fn: Partial,
  params: Any,
  images: Array,
  labels: Array,
  mask: Array,
  *,
  layout: sharding.Layout,
) -> Array:
  losses_fn, params = layout.gather((losses_fn, params))
  found = losses_fn(params, {'image': images, 'label': labels})
  return layout.gather(jnp.where(mask, found, 0).sum())


def _measure(
  net: Net,
  config: ml_collections.ConfigDict,
  data: pipeline.Data,
  part: pipeline.Part,
  sample: Sampling,
  *,
  layer_fn: Callable[[str], str | None] | None = None,
  tick: estimate.Tick = estimate.no_tick,
  about: Mapping[str, Any],
) -> Conflict:
  """The conflict of a net over a part of its run's data."""
  losses_fn = Partial(_losses_of(net, config), net.batch_stats)
  images = {'image': part.images, 'label': part.labels}
  common = describe_net(net, config, data, about) | {
    'num_classes': net.num_classes,
    'layer_fn': layer_fn,
    'head': net.model.head,
    'per_example': True,  # by construction: running statistics, nothing random
    'tick': tick,
    'mesh': net.layout.mesh,
  }
  if sample.exact:
    return estimate.exact_conflict(losses_fn, net.params, images, **common)
  chosen = {k: v for k, v in dataclasses.asdict(sample).items() if k != 'exact'}
  return estimate.estimated_conflict(losses_fn, net.params, images, **common, **chosen)


def describe_net(
  net: Net, config: ml_collections.ConfigDict, data: pipeline.Data, about: Mapping[str, Any]
) -> dict[str, Any]:
  """What a result says about the net that it belongs to."""
  return {
    'class_names': net.metadata.class_names,
    'class_counts': net.metadata.class_counts,
    'prior': objective_prior(config, data, net.step),
    'about': {
      'step': net.step,
      'loss': config.loss.name,
      'model': config.model.name,
      'attention': config.model.attention,
      'layers': '',
      **about,
    },
  }


def common_layers(
  config: ml_collections.ConfigDict, num_classes: int, image_shape: tuple[int, int, int]
) -> list[str]:
  """Layers that a net and the same net without attention both have, except the head."""
  plain = config.model.copy_and_resolve_references()
  plain.attention = 'none'
  model = registry.build(plain, num_classes, image_shape)
  names = from_input_to_output(model, image_shape)
  return [name for name in names if not re.search(model.head, f'{name}/')]


def objective_prior(
  config: ml_collections.ConfigDict, data: pipeline.Data, step: int
) -> np.ndarray:
  """pi_c ~ p_c w_c: the weight of class c in a run's objective at a step.   [C], sum 1

  p_c is the probability with which the sampler draws the class and w_c the class weight, each from
  the step on at which it starts. Mixing is left out: a mixed image belongs to no single class.
  """
  stream = training_stream(config, data.train.labels)
  weights = np.ones(len(data.class_counts))
  if step >= step_at(config.loss.weights_start, stream.total_steps):
    weights = losses.class_weights(config, data.class_counts)
  return shares(stream.class_probabilities(step) * weights)


class Probe:
  """A fixed sample of the training part, and the conflict of a net in training on it.

  It measures the parameters that the optimiser moves, also where moving averages are kept.

  The sample is an array with one row of images for each pair (class, fold). It is drawn with
  replacement, for an unbiased Gram. The whole measurement is one compiled step.

  Args:
    net: of the run; its variables may be shapes.
    config: of the run.
    data: of the run.
    layout: devices that share the sample.

  Raises:
    UserError: the sample does not fit into the memory of a device.
  """

  def __init__(
    self,
    net: Net,
    config: ml_collections.ConfigDict,
    data: pipeline.Data,
    layout: sharding.Layout,
  ):
    self._net, self._config, self._data, self._layout = net, config, data, layout
    self._losses = _losses_of(net, config)
    self._order = from_input_to_output(net.model, net.metadata.image_shape)
    images, classes = config.diagnostics.images, net.num_classes
    available = backend.device_bytes()
    rows, depth = memory.check_probe(net, images, FOLDS, layout.devices, available)
    train = {'image': data.train.images, 'label': data.train.labels}
    index, self._sizes = estimate.draw_folds(train, classes, 'train', images, FOLDS, config.seed)
    index = np.pad(index, ((0, 0), (0, 0), (0, depth - index.shape[2])))
    filled = np.arange(depth) < self._sizes[:, :, None]
    own = layout.rows(depth)
    index, filled = (x[..., own].reshape(rows, -1) for x in (index, filled))
    batch = {name: np.asarray(values[index]) for name, values in train.items()}
    self._batch = layout.place_rows(batch | {'mask': filled}, depth, axis=1)

  def measure(self, state: TrainState) -> Conflict:
    """The conflict at a state, with the running statistics that the state has."""
    net = Net.of(self._net.model, state.replace(averages={}), self._net.metadata)
    layers = Layers.of(net.params, None, net.model.head)
    losses_fn = Partial(self._losses, net.batch_stats)
    sums, loss_sums = jax.device_get(
      _probe_grams()(
        losses_fn, net.params, self._batch, layers=layers, mesh=self._layout.grams_mesh
      )
    )
    about = {'target': 'train', 'folds': FOLDS, 'images': self._config.diagnostics.images}
    names = describe_net(net, self._config, self._data, about)
    counts = net.metadata.class_counts
    found = estimate.from_folds(layers, sums, loss_sums, self._sizes, counts, names)
    return found.take(self._order)


_probe_grams = backend.jit(group_grams, static_argnames=('layers', 'max_bytes', 'mesh'))


def check_room(net: Net, config: ml_collections.ConfigDict, devices: int) -> None:
  """Raises UserError where a device cannot hold the measurements of config.diagnostics.

  Args:
    net: variables may be shapes.
    config: of the run.
    devices: that share the images.
  """
  wanted, available = config.diagnostics, backend.device_bytes()
  if wanted.every:
    memory.check_probe(net, wanted.images, FOLDS, devices, available)
  if wanted.snapshots or wanted.loss_levels:
    memory.check_snapshots(net, devices, available)


def lower_probe(
  net: Net,
  config: ml_collections.ConfigDict,
  layout: sharding.Layout,
  available: int,
  one_row: bool = False,
  folds: int = FOLDS,
  layer_fn: Callable[[str], str | None] | None = None,
) -> jax.stages.Lowered:
  """The step of a `Probe` before it is compiled; nothing is allocated.

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
    Partial(_losses_of(net, config), net.batch_stats),
    net.params,
    batch,
    layers=Layers.of(net.params, layer_fn, net.model.head),
    max_bytes=max_bytes,
    mesh=layout.grams_mesh,
  )


def save(conflict: Conflict, workdir: Path) -> list[Path]:
  """Writes a diagnosis to workdir/conflict: an npz, and PNGs of it and of the run's probes."""
  folder = workdir / 'conflict'
  about = conflict.about
  marks = [f'step{about["step"]:06d}', re.sub(r'\W+', '_', about['target'])]
  if about['layers']:
    marks.append(re.sub(r'\W+', '-', about['layers']).strip('-'))
  stem = '_'.join(marks)
  pictures = {
    f'{stem}_shared.png': lambda path: plots.heat_map(conflict, path),
    f'{stem}_layers.png': lambda path: plots.layers(conflict, path),
    f'{stem}_flow.png': lambda path: plots.gradient_flow(conflict, flow.flow(conflict), path),
  }
  snapshots = [Conflict.load(path) for path in sorted(folder.glob('step*_probe.npz'))]
  if snapshots:
    steps, flows = flow.over_training(snapshots)
    pictures['over_training.png'] = lambda path: plots.over_training(steps, flows, snapshots, path)
  with writing_to(folder):
    folder.mkdir(parents=True, exist_ok=True)
    conflict.save(folder / f'{stem}.npz')
    for name, draw in pictures.items():
      draw(folder / name)
  return [folder / name for name in (f'{stem}.npz', *pictures)]


def _model_losses(
  batch_stats: Any,
  params: Any,
  batch: Any,
  *,
  model: nn.Module,
  preprocessing: Preprocessing,
  loss_fn: Callable[[Array, Array], Array],
) -> Array:
  """Losses [N] of uint8 images, running BatchNorm statistics; no augmentation, no mixing."""
  variables = {'params': params, 'batch_stats': batch_stats}
  logits = model.apply(variables, preprocessing(batch['image']), train=False)
  return loss_fn(logits, batch['label'])


def _losses_of(net: Net, config: ml_collections.ConfigDict) -> Callable[..., Array]:
  """(batch_stats, params, batch) -> losses [N] of a net under the loss of its run."""
  parts = {'loss': config.loss.to_dict(), 'model': config.model.to_dict()}
  counts = losses.counts_that_matter(config, net.metadata.class_counts)
  frozen = ml_collections.FrozenConfigDict(parts)
  return _cached_losses(frozen, counts, net.model, net.metadata.preprocessing)


@functools.lru_cache(maxsize=4)  # jit compiles anew for a function that is not the same object
def _cached_losses(
  config: ml_collections.FrozenConfigDict,
  class_counts: tuple[int, ...],
  model: nn.Module,
  preprocessing: Preprocessing,
) -> Callable[..., Array]:
  loss_fn = losses.unweighted(config, np.array(class_counts))
  return functools.partial(_model_losses, model=model, preprocessing=preprocessing, loss_fn=loss_fn)


def from_input_to_output(model: nn.Module, image_shape: tuple[int, int, int]) -> list[str]:
  """Names of layers in the order in which the model makes them; a tree sorts them by name."""
  made: list[str] = []

  def init(key: Array) -> None:
    params = model.init(key, jnp.zeros((1, *image_shape)))['params']
    made.extend(dict.fromkeys(layer_name('/'.join(path)) for path in flatten_dict(params)))

  jax.eval_shape(init, jax.random.key(0))
  return made


def _describe_work(net: Net, sample: Sampling, layer_fn: Callable[[str], str | None] | None) -> str:
  """One line: the gradients that are held at a time, and the images to go through."""
  rows = net.num_classes * (1 if sample.exact else sample.folds)
  leaves, limit = jax.tree.leaves(net.params), backend.CLASS_GRADIENT_BYTES
  layers = Layers.of(net.params, layer_fn, net.model.head)
  sizes, passes = layers.class_gradient_bytes(leaves, rows), layers.passes(leaves, rows, limit)
  largest = max(sum(sizes[layer] for layer in group) for group in passes)
  images = 'every training image' if sample.exact else f'{sample.images} images of each class'
  return (
    f'{rows} gradients of {images}, {largest / 2**20:.0f} MiB at a time in {len(passes)} pass'
    + ('es' if len(passes) > 1 else '')
  )


def choose_layers(layers: str, params: Any) -> Callable[[str], str | None]:
  """A layer_fn for the parameters that a regular expression finds."""
  try:
    pattern = re.compile(layers)
  except re.error as error:
    raise UserError(
      '--layers, a regular expression', f'{layers!r}: {error}', 'correct it'
    ) from error
  names = parameter_names(params)
  if not any(pattern.search(name) for name in names):
    raise UserError(
      '--layers that finds parameters',
      f'{layers!r}, which finds none of {", ".join(names[:4])}, ...',
      'correct the regular expression',
    )
  return lambda name: layer_name(name) if pattern.search(name) else None
