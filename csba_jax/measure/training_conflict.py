"""The conflict of the gradient that training takes: of training batches, in training mode.

With BatchNorm this differs from the conflict of the net as it is evaluated (`diagnose`), even in
signs: training differentiates through the statistics of its batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from jax import Array
from jax.tree_util import Partial

from csba_jax.data import augment, pipeline
from csba_jax.errors import UserError
from csba_jax.gradients import estimate
from csba_jax.gradients.batch_estimate import batch_conflict
from csba_jax.gradients.conflict import Conflict
from csba_jax.measure import diagnose
from csba_jax.methods import losses, second_stages
from csba_jax.run import restore
from csba_jax.run.net import Net
from csba_jax.run.schedule import training_stream
from csba_jax.runtime import distributed
from csba_jax.runtime.progress import say


@dataclasses.dataclass(frozen=True)
class Batches:
  """The training batches that a measurement takes."""

  number: int = 64  # at least 2
  seed: int = 0


def of_run(
  run: restore.Run,
  which: str,
  batches: Batches,
  layers: str | None = None,
  tick: estimate.Tick = estimate.no_tick,
) -> Conflict:
  """`measure` of a run: of the parameters that training moves, also where averages are kept.

  Args:
    run: see `restore.load_run`.
    which: the checkpoint of the run that it is.
    batches: as in `measure`.
    layers: as in `measure`.
    tick: as in `measure`.
  """
  net = run.net
  if run.config.train.ema_decay and which != 'init':
    state = restore.load_state(str(run.workdir), which)
    net = Net.of(net.model, state.replace(averages={}), net.metadata)
  return measure(net, run.config, run.data, batches, layers, tick)


def measure(
  net: Net,
  config: ml_collections.ConfigDict,
  data: pipeline.Data,
  batches: Batches,
  layers: str | None = None,
  tick: estimate.Tick = estimate.no_tick,
) -> Conflict:
  """The conflict of a net's training at its step, see `csba_jax.gradients.batch_conflict`.

  Batches are drawn and augmented as the run draws and augments those of this step, with other
  random numbers. The net runs as in training: with the statistics of each batch, or with its
  running ones in a second stage that keeps them. Images are not mixed, and the loss has no class
  weights; sampler and class weights enter through the prior, see `diagnose.objective_prior`.

  Args:
    net: with the parameters that training moves (`restore.load_state`), not their averages.
    config: of its run.
    data: of its run.
    batches: how many to take, and the seed.
    layers: as in `diagnose.diagnose_run`.
    tick: called with (images done, images in all).

  Raises:
    UserError: fewer than two batches, several processes, a stage without training, or as in
      `diagnose.diagnose_run`.
  """
  if distributed.count() > 1:
    raise UserError(
      'one process for the conflict of training batches',
      f'{distributed.count()}',
      'start csba-diagnose once, with --distributed=off',
    )
  if second_stages.find(config.stage, config.model.head).trains is None:
    raise UserError(
      'a run that trains, for the conflict of its training',
      f'stage.method={config.stage.method}',
      'use --statistics=frozen',
    )
  layer_fn = None if layers is None else diagnose.choose_layers(layers, net.params)
  size, classes = config.train.batch_size, net.num_classes
  say(f'{batches.number} batches of {size} images; a forward and {classes} backward passes of each')
  about = {'target': 'training batches', 'seed': batches.seed, 'layers': layers or ''}
  found = batch_conflict(
    Partial(_losses_of(net, config), net.batch_stats),
    net.params,
    [_draw(net, config, data, batches.seed, k) for k in range(batches.number)],
    num_classes=net.num_classes,
    layer_fn=layer_fn,
    head=net.model.head,
    tick=tick,
    **diagnose.describe_net(net, config, data, about),
  )
  order = diagnose.from_input_to_output(net.model, net.metadata.image_shape)
  return found.take([layer for layer in order if layer in found.layers])


def _draw(
  net: Net, config: ml_collections.ConfigDict, data: pipeline.Data, seed: int, k: int
) -> dict[str, Array]:
  """Batch k: an own stream for each, so that the batches are independent of one another."""
  stream = training_stream(config, data.train.labels)
  stream = dataclasses.replace(stream, purpose=f'conflict {seed} {k}')
  index = stream.positions(net.step)
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), net.step), k)
  frozen = ml_collections.FrozenConfigDict(config.augment.to_dict())
  images = _augmented(frozen)(key, np.asarray(data.train.images[index]))
  return {'image': net.metadata.preprocessing(images), 'label': data.train.labels[index]}


@functools.lru_cache(maxsize=4)
def _augmented(config: ml_collections.FrozenConfigDict) -> Callable[[Array, Array], Array]:
  return jax.jit(augment.build(config))


def _losses_of(net: Net, config: ml_collections.ConfigDict) -> Callable[..., Array]:
  """(batch_stats, params, batch) -> losses [N] of a net in training."""
  parts = {
    'loss': config.loss.to_dict(),
    'model': config.model.to_dict(),
    'stage': config.stage.to_dict(),
  }
  counts = losses.counts_that_matter(config, net.metadata.class_counts)
  return _cached_losses(ml_collections.FrozenConfigDict(parts), counts, net.model)


@functools.lru_cache(maxsize=4)  # jit compiles anew for a function that is not the same object
def _cached_losses(
  config: ml_collections.FrozenConfigDict, class_counts: tuple[int, ...], model: nn.Module
) -> Callable[..., Array]:
  loss_fn = losses.unweighted(config, np.array(class_counts))
  stage = second_stages.find(config.stage, config.model.head)
  return functools.partial(
    _training_losses, model=model, loss_fn=loss_fn, train=stage.updates_statistics
  )


def _training_losses(
  batch_stats: Any,
  params: Any,
  batch: Mapping[str, Array],
  *,
  model: nn.Module,
  loss_fn: Callable[[Array, Array], Array],
  train: bool,
) -> Array:
  """Losses [N] of augmented images."""
  variables = {'params': params, 'batch_stats': batch_stats}
  logits, _ = model.apply(variables, batch['image'], train=train, mutable=['batch_stats'])
  return loss_fn(logits, batch['label'])
