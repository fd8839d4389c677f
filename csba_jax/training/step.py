"""What one call of the compiled program does: one pure step, or several of them in a row."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import optax
from jax import Array

from csba_jax.data import augment, mixing
from csba_jax.gradients.batch_sums import Batch
from csba_jax.methods import losses, second_stages
from csba_jax.methods import surgery as surgery_lib
from csba_jax.models import pretrained
from csba_jax.run import state as state_lib
from csba_jax.run.net import Preprocessing
from csba_jax.run.state import TrainState
from csba_jax.runtime import backend, sharding
from csba_jax.training import surgery
from csba_jax.training.gradient import GradientFn, gradient_of_the_mean

PyTree = Any
StepFn = Callable[[TrainState, Batch, Array], tuple[TrainState, dict[str, Array]]]


@dataclasses.dataclass(frozen=True, eq=False)
class StepParts:
  """The parts of a step: everything about it that is fixed when it is compiled."""

  model: nn.Module
  tx: optax.GradientTransformation
  loss_fn: losses.LossFn
  augment_fn: augment.Augment
  mix_fn: mixing.MixFn
  second_stage: second_stages.SecondStage
  ema_decay: float  # 0: no moving averages
  layout: sharding.Layout
  preprocessing: Preprocessing
  gradient_fn: GradientFn = gradient_of_the_mean
  trains: str = '.'  # of what the second stage trains, the parameters that have a gradient
  updates_statistics: bool = True  # those of BatchNorm


def train_step(
  state: TrainState, batch: Batch, key: Array, *, parts: StepParts
) -> tuple[TrainState, dict[str, Array]]:
  """One update on a batch of uint8 images and int labels.

  A second stage, and a step in which pretrained weights are frozen, have gradients only for what
  they train. In both, BatchNorm runs with the running statistics and leaves them as they are
  (`parts.updates_statistics`). `key` is the key of the run; together with the number of the step it
  decides everything random.

  Returns:
    The new state, and for the old parameters the loss, the norm of the gradient, and what the
    gradient function shows.
  """
  key = jax.random.fold_in(key, state.step)
  batch = parts.mix_fn(jax.random.fold_in(key, _MIX), _augmented(parts, key, batch), state.step)
  trained = jax.tree.map(
    operator.and_,
    second_stages.matches(parts.second_stage.trains, state.params),
    second_stages.matches(parts.trains, state.params),
  )
  whole = parts.layout.gather(state.params)

  def forward(params: PyTree, batch: Batch) -> tuple[Array, PyTree]:
    params = jax.tree.map(lambda x, on: x if on else jax.lax.stop_gradient(x), params, trained)
    variables = {'params': params, 'batch_stats': state.batch_stats}
    logits, updated = parts.model.apply(
      variables,
      batch['image'],
      train=parts.updates_statistics,
      mutable=['batch_stats'],
    )
    per_example = losses.mixed(parts.loss_fn, logits, batch, state.step)
    return per_example, updated.get('batch_stats', {}) if parts.updates_statistics else {}

  found = parts.gradient_fn(forward, whole, batch, state.surgery, jax.random.fold_in(key, _SURGERY))
  grads = parts.layout.scatter(found.direction)
  updates, opt_state = parts.tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  state = state.replace(
    params=params,
    batch_stats=found.auxiliary if parts.updates_statistics else state.batch_stats,
    opt_state=opt_state,
    surgery=found.kept,
  )
  if parts.ema_decay:
    averages = state_lib.move_averages(state.averages, state, parts.ema_decay)
    state = state.replace(averages=averages)
  metrics = {'loss': found.loss, 'grad_norm': optax.tree.norm(grads), **found.shown}
  return state.replace(step=state.step + 1), metrics


# the keys of a step that are not those which the augmentation splits off
_MIX, _PARTNER, _SURGERY = 1 << 16, 1 << 17, 1 << 18


def _augmented(parts: StepParts, key: Array, batch: Batch) -> Batch:
  """The batch with augmented float images; the partners' images too, where they have a stream."""
  found = {
    'image': parts.preprocessing(parts.augment_fn(key, batch['image'])),
    'label': batch['label'],
  }
  if 'partner_image' in batch:
    partner = parts.augment_fn(jax.random.fold_in(key, _PARTNER), batch['partner_image'])
    found |= {
      'partner_image': parts.preprocessing(partner),
      'partner_label': batch['partner_label'],
    }
  return found


def train_steps(
  state: TrainState,
  data: Batch,
  inputs: Mapping[str, Array],
  key: Array,
  *,
  step_fn: StepFn,
  layout: sharding.Layout,
) -> tuple[TrainState, dict[str, Array]]:
  """Several steps in one program: `step_fn` on one batch after the other.

  Args:
    state: before the first step; the compiled program donates it.
    data: 'image' uint8 [N, H, W, ch] and 'label' int32 [N], whole on every device; {} where the
      inputs are the images themselves.
    inputs: leaves [steps, batch, ...], split along the batch. With `data` they are int32 positions
      in it: 'own' for the batches, and 'partner' for the images to mix with them where those have a
      stream of their own. Without `data` they are batches as `step_fn` takes them.
    key: of the run.
    step_fn: (state, batch, key) -> (state, metrics).
    layout: how arrays lie on the devices.

  Returns:
    The state after all steps, and the metrics of each step, leaves [steps].
  """

  def one(state: TrainState, chosen: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
    batch = chosen
    if data:
      batch = {name: values[chosen['own']] for name, values in data.items()}
    if 'partner' in chosen:
      batch |= {f'partner_{name}': values[chosen['partner']] for name, values in data.items()}
    state, found = step_fn(state, layout.spread(batch), key)
    return layout.scatter(state), found

  if len(jax.tree.leaves(inputs)[0]) == 1:
    state, step_metrics = one(state, jax.tree.map(lambda x: x[0], inputs))
    step_metrics = jax.tree.map(lambda x: x[None], step_metrics)
  else:
    state, step_metrics = jax.lax.scan(one, state, inputs)
  return state, layout.gather(step_metrics)


# () -> `train_steps`, compiled for the backend; it donates its state
compiled_steps = backend.jit(
  train_steps, static_argnames=('step_fn', 'layout'), donate_argnames='state'
)


def make_step(
  config: ml_collections.ConfigDict,
  model: nn.Module,
  tx: optax.GradientTransformation,
  class_counts: np.ndarray,
  total_steps: int,
  layout: sharding.Layout,
  gradient_fn: GradientFn | None = None,
  frozen: bool = False,
) -> StepFn:
  """`train_step` with all its parts bound: (state, batch, key) -> (state, metrics).

  Args:
    config: of the run.
    model: of the run.
    tx: its optimiser.
    class_counts: [C] training images.
    total_steps: of the run.
    layout: how arrays lie on the devices.
    gradient_fn: takes the place of the one that config.surgery describes.
    frozen: the step of a run whose weights of model.init do not move yet: they have no gradient,
      and BatchNorm keeps its statistics.

  Raises:
    UserError: unknown names in the config, or parts that do not go together.
  """
  if gradient_fn is None:
    cut = surgery_lib.build(config, class_counts)
    gradient_fn = surgery.gradient_fn(cut, model.head, len(class_counts), layout.devices)
  parts = StepParts(
    model=model,
    tx=tx,
    loss_fn=losses.build(config, class_counts, total_steps),
    augment_fn=augment.build(config.augment),
    mix_fn=mixing.build(config.mixing, class_counts, total_steps),
    second_stage=second_stages.find(config.stage, config.model.head),
    ema_decay=config.train.ema_decay,
    layout=layout,
    preprocessing=Preprocessing.of(config.model),
    gradient_fn=gradient_fn,
    trains=pretrained.FRESH if frozen else '.',
    updates_statistics=not frozen and second_stages.updates_statistics(config),
  )
  return functools.partial(train_step, parts=parts)
