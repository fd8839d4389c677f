"""The conflict of the gradient that training takes: of training batches, in training mode.

With BatchNorm this differs from the conflict of the net as it is evaluated (`diagnose`), even in
signs: training differentiates through the statistics of its batch. So there are two kinds of
measurement, `batch` and `frozen`, and `choose` says which one a net has by default.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
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
from csba_jax.runtime.progress import say


@dataclasses.dataclass(frozen=True)
class Batches:
  """The training batches that a measurement takes."""

  number: int = 64  # at least 2
  seed: int = 0


def choose(asked: str, net: Net, config: ml_collections.ConfigDict) -> str:
  """'batch' or 'frozen': the statistics of BatchNorm that the conflict is measured with.

  'auto' is `batch` where training takes the statistics of its batches: a net with BatchNorm, which
  does not keep the statistics that it has (`second_stages.updates_statistics`). Elsewhere both
  would measure the same loss, and `frozen` costs less and can take every image. While pretrained
  weights still wait, `batch` measures what training will take when they move.

  Args:
    asked: 'auto', 'batch' or 'frozen'.
    net: variables may be shapes.
    config: of its run.

  Raises:
    UserError: batches are asked for, of a second stage without training.
  """
  stage = second_stages.find(config.stage, config.model.head)
  if asked == 'batch' and stage.trains is None:
    raise UserError(
      'a run that trains, for the conflict of its training batches',
      f'stage.method={config.stage.method}',
      'set --statistics=frozen, in a run --config.diagnostics.statistics=frozen',
    )
  if asked != 'auto':
    return asked
  coupled = stage.trains is not None and second_stages.updates_statistics(config)
  return 'batch' if coupled and jax.tree.leaves(net.batch_stats) else 'frozen'


def of_run(
  run: restore.Run,
  which: str,
  batches: Batches,
  layers: str | None = None,
  tick: estimate.Tick = estimate.no_tick,
) -> Conflict:
  """`measure` of a run's training part, and of the parameters that training moves.

  Where the run keeps moving averages, these parameters are not the ones that are evaluated.

  Args:
    run: see `restore.load_run`.
    which: the checkpoint of the run that it is.
    batches: as in `measure`.
    layers: as in `measure`.
    tick: as in `measure`.

  Raises:
    UserError: as in `measure`.
  """
  net, size = run.net, run.config.train.batch_size
  if run.config.train.ema_decay and which != 'init':
    state = restore.load_state(str(run.workdir), which, net.layout)
    net = Net.of(net.model, state.replace(averages={}), net.metadata)
  of_each = f'a forward and {net.num_classes} backward passes of each'
  say(f'{batches.number} training batches of {size} images; {of_each}')
  return measure(net, run.config, run.data, run.data.train, batches, layers, tick)


def measure(
  net: Net,
  config: ml_collections.ConfigDict,
  data: pipeline.Data,
  part: pipeline.Part,
  batches: Batches,
  layers: str | None = None,
  tick: estimate.Tick = estimate.no_tick,
) -> Conflict:
  """The conflict of a net's training at its step, see `csba_jax.gradients.batch_conflict`.

  Batches are drawn and augmented as the run draws and augments those of this step, with other
  random numbers. The net runs as in training: with the statistics of each batch, or with its
  running ones where training never changes them (`second_stages.updates_statistics`). Images are
  not mixed, and the loss has no class weights; sampler and class weights enter through the prior,
  see `diagnose.objective_prior`. Batches of another part than the training part have every image
  equally often, whatever the sampler, and at most as many images as the part.

  Args:
    net: with the parameters that training moves (`restore.load_state`), not their averages.
    config: of its run.
    data: of its run.
    part: of the data, which the batches are drawn from.
    batches: how many to take, and the seed.
    layers: as in `diagnose.diagnose_run`.
    tick: called with (images done, images in all).

  Raises:
    UserError: fewer than two batches, or as in `diagnose.diagnose_run`.
  """
  layer_fn = None if layers is None else diagnose.choose_layers(layers, net.params)
  name = 'training' if part is data.train else 'validation'
  about = {
    'target': f'{name} batches',
    'statistics': diagnose.statistics_of(net, second_stages.updates_statistics(config)),
    'seed': batches.seed,
    'layers': layers or '',
  }
  found = batch_conflict(
    Partial(losses_of(net, config), net.batch_stats),
    net.params,
    _Drawn(net, config, data, part, batches),
    num_classes=net.num_classes,
    layer_fn=layer_fn,
    head=net.model.head,
    tick=tick,
    mesh=net.layout.grams_mesh,
    **diagnose.describe_net(net, config, data, about),
  )
  order = diagnose.from_input_to_output(net.model, net.metadata.image_shape)
  return found.take([layer for layer in order if layer in found.layers])


class _Drawn(Sequence[dict[str, Array]]):
  """The batches of a measurement; each is drawn when it is asked for.

  Each has a stream of its own, so that batches are independent of one another.
  """

  def __init__(
    self,
    net: Net,
    config: ml_collections.ConfigDict,
    data: pipeline.Data,
    part: pipeline.Part,
    batches: Batches,
  ):
    self._net, self._part, self._batches = net, part, batches
    stream = training_stream(config, data.train.labels)
    if part is not data.train:
      size = min(stream.batch_size, len(part))
      stream = dataclasses.replace(stream, name='instance', labels=part.labels, batch_size=size)
    self._stream = stream
    self._augment = _augmented(ml_collections.FrozenConfigDict(config.augment.to_dict()))

  def __len__(self) -> int:
    return self._batches.number

  def __getitem__(self, k: Any) -> Any:
    if not 0 <= k < len(self):
      raise IndexError(k)
    seed, step = self._batches.seed, self._net.step
    index = dataclasses.replace(self._stream, purpose=f'conflict {seed} {k}').positions(step)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), k)
    images = self._augment(key, np.asarray(self._part.images[index]))
    return {
      'image': np.asarray(self._net.metadata.preprocessing(images)),
      'label': self._part.labels[index],
    }


@functools.lru_cache(maxsize=4)
def _augmented(config: ml_collections.FrozenConfigDict) -> Callable[[Array, Array], Array]:
  return jax.jit(augment.build(config))


def losses_of(net: Net, config: ml_collections.ConfigDict) -> Callable[..., Array]:
  """(batch_stats, params, batch) -> losses [N] of a net in training."""
  parts = {'loss': config.loss.to_dict(), 'model': config.model.to_dict()}
  counts = losses.counts_that_matter(config, net.metadata.class_counts)
  train = second_stages.updates_statistics(config)
  return _cached_losses(ml_collections.FrozenConfigDict(parts), counts, net.model, train)


@functools.lru_cache(maxsize=4)  # jit compiles anew for a function that is not the same object
def _cached_losses(
  config: ml_collections.FrozenConfigDict,
  class_counts: tuple[int, ...],
  model: nn.Module,
  train: bool,
) -> Callable[..., Array]:
  loss_fn = losses.unweighted(config, np.array(class_counts))
  return functools.partial(_training_losses, model=model, loss_fn=loss_fn, train=train)


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
