"""The conflict of a run: of a trained net from its workdir, and of a net in training."""

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
from csba_jax.data import augment, pipeline, sampling
from csba_jax.errors import UserError
from csba_jax.gradients import estimate, flow, plots
from csba_jax.gradients.conflict import Conflict, shares
from csba_jax.gradients.gram import Layers, layer_name, parameter_names
from csba_jax.gradients.per_class import group_grams
from csba_jax.measure import branch_similarity, memory
from csba_jax.methods import losses
from csba_jax.models import registry
from csba_jax.run import restore
from csba_jax.run.schedule import Plan
from csba_jax.run.state import TrainState
from csba_jax.run.workdir import writing_to
from csba_jax.runtime import backend, sharding
from csba_jax.runtime.progress import say

FOLDS = 4  # of each class in the probe of a run in training


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Which images a diagnosis looks at; see `estimate.estimated_conflict`."""

  exact: bool = False  # all of them, and nothing below counts
  target: str = 'train'
  images: int = 64  # of each class
  folds: int = 8
  seed: int = 0


def diagnose_run(
  run: restore.Trained,
  sampling: Sampling,
  layers: str | None = None,
  tick: estimate.Tick = estimate.no_tick,
) -> Conflict:
  """The conflict of a run's net over its training part, under the run's own loss.

  The net is the one that is evaluated: moving averages where the run keeps them. Class gradients
  are of the loss without class weights; what sampler and weights make of a class in the run's
  objective is its prior. Layers that a second stage holds fixed are measured too.

  Args:
    run: see `trained.take_up`.
    sampling: which images.
    layers: regular expression; parameters whose names it does not find are left out of everything.
    tick: told (images done, images in all).

  Raises:
    UserError: `layers` that finds nothing or is no regular expression, and what `estimate` raises.
  """
  layer_fn = None if layers is None else _choose(layers, run.state.params)
  say(_describe_work(run, sampling, layer_fn))
  found = _measure(
    run.config,
    run.data,
    run.model,
    run.state,
    run.data.train,
    sampling,
    layer_fn=layer_fn,
    tick=tick,
    about={'layers': layers or ''},
  )
  order = _from_input_to_output(run.model, run.data.image_shape)
  return found.take([layer for layer in order if layer in found.layers])


def snapshot(
  config: ml_collections.ConfigDict,
  data: pipeline.Data,
  model: nn.Module,
  state: TrainState,
  check: Callable[[], None] = lambda: None,
) -> dict[str, tuple[Conflict, dict[str, Any]]]:
  """Conflict and decoupling of a net over every image of its parts.

  With the parameters that are evaluated and the statistics that the state has: see `settled`.
  `check` is called now and then, and may raise.

  Returns:
    {'train': (conflict, `decoupling.measure`), 'val': likewise if the run has a validation part}.
  """
  found = {}
  for name, part in (('train', data.train), ('val', data.val)):
    if len(part):
      about = {'target': f'{name}, exact'}
      conflict = _measure(
        config,
        data,
        model,
        state,
        part,
        Sampling(exact=True),
        tick=lambda *_: check(),
        about=about,
      )
      branches = branch_similarity.measure(
        model, state, part, len(data.class_names), config.train.batch_size, check
      )
      found[name] = conflict, branches
  return found


def settled(
  config: ml_collections.ConfigDict, data: pipeline.Data, model: nn.Module, state: TrainState
) -> TrainState:
  """A net in training as its snapshots measure it: averages where it has them, statistics renewed.

  The running statistics of BatchNorm lag behind a net that changes: early in a run its loss with
  them can be many times that of its batches. They are estimated anew over training batches, as
  `trained.take_up` does for an untrained net. A second stage keeps those it has.
  """
  state = state.averaged()
  if config.stage.method != 'none':
    return state
  return state.replace(batch_stats=restore.estimate_statistics(model, state, data, config))


def training_loss(
  config: ml_collections.ConfigDict,
  data: pipeline.Data,
  model: nn.Module,
  state: TrainState,
  check: Callable[[], None] = lambda: None,
) -> float:
  """Mean loss over every training image, as `snapshot` measures it: no class weights, no mixing."""
  state = state.averaged()
  layout, total = sharding.Layout.of(state), 0.0
  losses_fn = Partial(_losses_of(config, data.class_counts, model), state.batch_stats)
  for images, labels, mask in pipeline.eval_batches(data.train, config.train.batch_size, layout):
    check()
    total += float(_loss_sum(losses_fn, state.params, images, labels, mask, layout=layout))
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
  config: ml_collections.ConfigDict,
  data: pipeline.Data,
  model: nn.Module,
  state: TrainState,
  part: pipeline.Part,
  sampling: Sampling,
  *,
  layer_fn: Callable[[str], str | None] | None = None,
  tick: estimate.Tick = estimate.no_tick,
  about: Mapping[str, Any],
) -> Conflict:
  """The conflict of the net as it is evaluated over a part of its run's data."""
  state, layout = state.averaged(), sharding.Layout.of(state)
  losses_fn = Partial(_losses_of(config, data.class_counts, model), state.batch_stats)
  images = {'image': part.images, 'label': part.labels}
  common = {
    'num_classes': len(data.class_names),
    'layer_fn': layer_fn,
    'head': model.head,
    'per_example': True,  # by construction: running statistics, nothing at random
    'tick': tick,
    'mesh': layout.mesh,
    'class_names': data.class_names,
    'class_counts': data.class_counts,
    'prior': objective_prior(config, data, int(state.step)),
    'about': _about(config, int(state.step)) | about,
  }
  if sampling.exact:
    return estimate.exact_conflict(losses_fn, state.params, images, **common)
  chosen = {k: v for k, v in dataclasses.asdict(sampling).items() if k != 'exact'}
  return estimate.estimated_conflict(losses_fn, state.params, images, **common, **chosen)


def common_layers(
  config: ml_collections.ConfigDict, num_classes: int, image_shape: tuple[int, int, int]
) -> list[str]:
  """Layers that a net has in common with the same net without attention, but for its head."""
  plain = config.model.copy_and_resolve_references()
  plain.attention = 'none'
  model = registry.build(plain, num_classes, image_shape)
  names = _from_input_to_output(model, image_shape)
  return [name for name in names if not re.search(model.head, f'{name}/')]


def objective_prior(
  config: ml_collections.ConfigDict, data: pipeline.Data, step: int
) -> np.ndarray:
  """pi_c ~ p_c w_c: what class c weighs in a run's objective at a step.   [C], sum 1

  p_c is how often its sampler draws the class, w_c its weight, each from its start on. Mixing is
  left out: a mixed image is of no class.
  """
  plan = Plan.of(config, len(data.train))
  stream = sampling.Stream.of(
    config.sampler, data.train.labels, config.train.batch_size, plan.total, config.seed
  )
  weights = np.ones(len(data.class_counts))
  if step >= step_at(config.loss.weights_start, plan.total):
    weights = losses.class_weights(config, data.class_counts)
  return shares(stream.class_probabilities(step) * weights)


class Probe:
  """A fixed sample of the training part, and the conflict of a net in training on it.

  Of the parameters that the optimiser moves, also where averages of them are kept.

  Class-stacked by (class, fold) and drawn with replacement, for an unbiased estimate; the whole
  measurement is one compiled step.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    data: pipeline.Data,
    model: nn.Module,
    layout: sharding.Layout,
  ):
    self._layout = layout
    self._config, self._data, self._model = config, data, model
    self._losses = _losses_of(config, data.class_counts, model)
    self._order = _from_input_to_output(model, data.image_shape)
    images, classes = config.diagnostics.images, len(data.class_names)
    params = memory.shapes(model, data.image_shape)
    sizes = (images, classes, FOLDS, data.image_shape, layout.devices)
    rows, depth = memory.check_probe(params, model.head, *sizes, backend.device_bytes())
    train = {'image': data.train.images, 'label': data.train.labels}
    index, self._sizes = estimate.draw_folds(train, classes, 'train', images, FOLDS, config.seed)
    index = np.pad(index, ((0, 0), (0, 0), (0, depth - index.shape[2])))
    filled = np.arange(depth) < self._sizes[:, :, None]
    own = layout.rows(depth)
    index, filled = (x[..., own].reshape(rows, -1) for x in (index, filled))
    batch = {name: np.asarray(values[index]) for name, values in train.items()}
    self._batch = layout.place_rows(batch | {'mask': filled}, depth, axis=1)

  def measure(self, state: TrainState) -> Conflict:
    """The conflict at a state, whose running statistics are taken as they are."""
    layers = Layers.of(state.params, None, self._model.head)
    losses_fn = Partial(self._losses, state.batch_stats)
    sums, loss_sums = jax.device_get(
      _probe_grams()(
        losses_fn, state.params, self._batch, layers=layers, mesh=self._layout.grams_mesh
      )
    )
    counts = self._data.class_counts
    about = {'target': 'train', 'folds': FOLDS, 'images': self._config.diagnostics.images}
    names = {
      'class_names': self._data.class_names,
      'class_counts': counts,
      'prior': objective_prior(self._config, self._data, int(state.step)),
      'about': about | _about(self._config, int(state.step)),
    }
    found = estimate.from_folds(layers, sums, loss_sums, self._sizes, counts, names)
    return found.take(self._order)


_probe_grams = backend.jit(group_grams, static_argnames=('layers', 'max_bytes', 'mesh'))


def check_room(
  config: ml_collections.ConfigDict, data: pipeline.Data, model: nn.Module, devices: int
) -> None:
  """Raises UserError where what config.diagnostics wants of a run exceeds one of its devices."""
  wanted, classes = config.diagnostics, len(data.class_names)
  params, available = memory.shapes(model, data.image_shape), backend.device_bytes()
  if wanted.every:
    sizes = (wanted.images, classes, FOLDS, data.image_shape, devices)
    memory.check_probe(params, model.head, *sizes, available)
  if wanted.snapshots or wanted.loss_levels:
    memory.check_snapshots(params, model.head, classes, devices, available)


def lower_probe(
  config: ml_collections.ConfigDict,
  model: nn.Module,
  state: TrainState,
  class_counts: np.ndarray,
  image_shape: tuple[int, int, int],
  layout: sharding.Layout,
  available: int,
  one_row: bool = False,
  folds: int = FOLDS,
  layer_fn: Callable[[str], str | None] | None = None,
) -> jax.stages.Lowered:
  """The compiled step of a `Probe`, before it is compiled; nothing is allocated.

  Of a state as shapes, with shardings; with `one_row` for the first (class, fold) alone, in as many
  passes. UserError where a device with `available` bytes cannot hold it.
  """
  classes, devices = len(class_counts), layout.devices
  images, head = config.diagnostics.images, model.head
  sizes = (images, classes, folds, image_shape, devices)
  rows, depth = memory.check_probe(state.params, head, *sizes, available, layer_fn)
  max_bytes = backend.CLASS_GRADIENT_BYTES
  if one_row:
    rows, max_bytes = 1, max_bytes // rows

  def of(dtype, *shape):
    return jax.ShapeDtypeStruct((rows, depth, *shape), dtype, sharding=layout.split(1))

  batch = {'image': of(np.uint8, *image_shape), 'label': of(np.int32), 'mask': of(np.bool_)}
  return _probe_grams().lower(
    Partial(_losses_of(config, class_counts, model), state.batch_stats),
    state.params,
    batch,
    layers=Layers.of(state.params, layer_fn, head),
    max_bytes=max_bytes,
    mesh=layout.grams_mesh,
  )


def save(conflict: Conflict, workdir: Path) -> list[Path]:
  """Writes a diagnosis into workdir/conflict: npz, and PNGs of it and of the run's snapshots."""
  folder = workdir / 'conflict'
  about = conflict.about
  marks = [f'step{about["step"]:06d}', about['target'].replace(', ', '_')]
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
  loss_fn: Callable[[Array, Array], Array],
) -> Array:
  """Losses [N] of uint8 images with frozen BatchNorm statistics, neither augmented nor mixed."""
  variables = {'params': params, 'batch_stats': batch_stats}
  logits = model.apply(variables, augment.scale(batch['image']), train=False)
  return loss_fn(logits, batch['label'])


def _losses_of(
  config: ml_collections.ConfigDict, class_counts: np.ndarray, model: nn.Module
) -> Callable[..., Array]:
  parts = {'loss': config.loss.to_dict(), 'model': config.model.to_dict()}
  counts = losses.counts_that_matter(config, class_counts)
  return _cached_losses(ml_collections.FrozenConfigDict(parts), counts, model)


@functools.lru_cache(maxsize=4)  # a function is equal to itself alone: jit would compile anew
def _cached_losses(
  config: ml_collections.FrozenConfigDict, class_counts: tuple[int, ...], model: nn.Module
) -> Callable[..., Array]:
  loss_fn = losses.unweighted(config, np.array(class_counts))
  return functools.partial(_model_losses, model=model, loss_fn=loss_fn)


def _from_input_to_output(model: nn.Module, image_shape: tuple[int, int, int]) -> list[str]:
  """Names of layers in the order in which the model makes them; trees are sorted by name."""
  made: list[str] = []

  def init(key):
    params = model.init(key, jnp.zeros((1, *image_shape)))['params']
    made.extend(dict.fromkeys(layer_name('/'.join(path)) for path in flatten_dict(params)))

  jax.eval_shape(init, jax.random.key(0))
  return made


def _about(config: ml_collections.ConfigDict, step: int) -> dict[str, Any]:
  return {
    'step': step,
    'loss': config.loss.name,
    'model': config.model.name,
    'attention': config.model.attention,
    'layers': '',
  }


def _describe_work(
  run: restore.Trained, sampling: Sampling, layer_fn: Callable[[str], str | None] | None
) -> str:
  """One line: the gradients that are held at once, and how many images have to be gone through."""
  rows = len(run.data.class_names) * (1 if sampling.exact else sampling.folds)
  leaves, limit = jax.tree.leaves(run.state.params), backend.CLASS_GRADIENT_BYTES
  layers = Layers.of(run.state.params, layer_fn, run.model.head)
  sizes, passes = layers.class_gradient_bytes(leaves, rows), layers.passes(leaves, rows, limit)
  largest = max(sum(sizes[layer] for layer in group) for group in passes)
  images = 'every training image' if sampling.exact else f'{sampling.images} images of each class'
  return (
    f'{rows} gradients of {images}, {largest / 2**20:.0f} MiB at a time in {len(passes)} pass'
    + ('es' if len(passes) > 1 else '')
  )


def _choose(layers: str, params: Any) -> Callable[[str], str | None]:
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
