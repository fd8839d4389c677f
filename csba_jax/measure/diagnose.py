"""The class-gradient conflict of a trained net, over images of its run's data."""

import dataclasses
import functools
import re
import time
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
from csba_jax.files import expanded
from csba_jax.gradients import estimate, flow, plots
from csba_jax.gradients.conflict import Conflict, shares
from csba_jax.gradients.gram import Layers, layer_name, parameter_names
from csba_jax.methods import losses
from csba_jax.models import registry
from csba_jax.run import net as net_lib
from csba_jax.run import restore
from csba_jax.run.net import Net, Preprocessing
from csba_jax.run.schedule import training_stream
from csba_jax.run.workdir import writing_to
from csba_jax.runtime import backend, distributed
from csba_jax.runtime.progress import say

SECONDS = 60.0  # that the measurement of every image may take where nobody asked for it
ENOUGH_SECONDS = 2.0  # after which the time that is left can be told


@dataclasses.dataclass(frozen=True)
class Sampling:
  """The images that a diagnosis takes; see `estimate.estimated_conflict`."""

  # every image, and the fields below have no effect; None: where it takes at most SECONDS
  exact: bool | None = False
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

  def measured(sample: Sampling, tick: estimate.Tick) -> Conflict:
    say(_describe_work(run.net, sample, layer_fn))
    about, part = {'layers': layers or ''}, run.data.train
    return measure(
      run.net, run.config, run.data, part, sample, layer_fn=layer_fn, tick=tick, about=about
    )

  if sample.exact is None:
    found = _exact_if_quick(measured, sample, tick)
  else:
    found = measured(sample, tick)
  order = from_input_to_output(run.net.model, run.net.metadata.image_shape)
  return found.take([layer for layer in order if layer in found.layers])


class _TooSlow(Exception):
  """Every image would take longer than SECONDS."""


def _exact_if_quick(
  measured: Callable[[Sampling, estimate.Tick], Conflict],
  sample: Sampling,
  tick: estimate.Tick,
  clock: Callable[[], float] = time.monotonic,
) -> Conflict:
  """The conflict of every image where that takes at most SECONDS, else that of a sample.

  The time is estimated from the first calls after the one that compiles. Processes of one run would
  estimate different times, so that several take a sample.
  """
  sampled = dataclasses.replace(sample, exact=False)
  if distributed.count() > 1:
    return measured(sampled, tick)
  first: list[tuple[int, float]] = []

  def watch(done: int, total: int) -> None:
    tick(done, total)
    now = clock()
    first.append((done, now))
    before, since = first[0]
    if done < total and now - since >= ENOUGH_SECONDS:
      rest = (now - since) / (done - before) * (total - done)
      if now - since + rest > SECONDS:
        raise _TooSlow(f'{now - since + rest:.0f}')

  try:
    return measured(dataclasses.replace(sample, exact=True), watch)
  except _TooSlow as error:
    say(f'every image would take about {error} s (--exact): taking a sample')
    return measured(sampled, tick)


def measure(
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
  losses_fn = Partial(losses_of(net, config), net.batch_stats)
  images = {'image': part.images, 'label': part.labels}
  about = {'statistics': statistics_of(net, in_training=False), **about}
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


def statistics_of(net: Net, in_training: bool) -> str:
  """The statistics of BatchNorm that a measurement has: batch or frozen; none without BatchNorm."""
  if not jax.tree.leaves(net.batch_stats):
    return 'none'
  return 'batch' if in_training else 'frozen'


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


def save(conflict: Conflict, workdir: Path) -> list[Path]:
  """Writes a diagnosis to workdir/conflict: an npz, and PNGs of it and of the run's probes."""
  folder = workdir / 'conflict'
  about = conflict.about
  marks = [f'step{about["step"]:06d}', re.sub(r'\W+', '_', about['target'])]
  if 'seed' in about:
    marks.append(f'seed{about["seed"]}')
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


def losses_of(net: Net, config: ml_collections.ConfigDict) -> Callable[..., Array]:
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


@functools.lru_cache(maxsize=4)  # each measurement of a run asks, and tracing takes half a second
def from_input_to_output(model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[str, ...]:
  """Names of layers in the order in which the model makes them; a tree sorts them by name."""
  made: list[str] = []

  def init(key: Array) -> None:
    params = model.init(key, jnp.zeros((1, *image_shape)))['params']
    made.extend(dict.fromkeys(layer_name('/'.join(path)) for path in flatten_dict(params)))

  jax.eval_shape(init, jax.random.key(0))
  return tuple(made)


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


def check_layers(layers: str | None, workdir: str) -> None:
  """Raises the UserError of `choose_layers` before the data of a run is read.

  A run of an earlier version that is not finished tells its number of classes with its data alone:
  of it nothing is checked.
  """
  folder = expanded(workdir)
  known = any((folder / name).exists() for name in (net_lib.FILE, 'result.json'))
  if layers is not None and known:
    choose_layers(layers, restore.shapes_of(workdir).params)


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
