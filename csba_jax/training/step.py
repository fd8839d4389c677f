"""What one call of the compiled program does: a pure step, and several of them in a row."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import optax
from jax import Array

from csba_jax.data import augment, mixing
from csba_jax.methods import losses, second_stages
from csba_jax.run import state as state_lib
from csba_jax.run.net import Preprocessing
from csba_jax.run.state import TrainState
from csba_jax.runtime import backend, sharding

Batch = Mapping[str, Array]
StepFn = Callable[[TrainState, Batch, Array], tuple[TrainState, dict[str, Array]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
  """What a step does, all that is static of it."""

  model: nn.Module
  tx: optax.GradientTransformation
  loss_fn: losses.LossFn
  augment_fn: augment.Augment
  mix_fn: mixing.MixFn
  stage: second_stages.Stage
  ema_decay: float  # 0: no moving averages
  layout: sharding.Layout
  preprocessing: Preprocessing


def train_step(
  state: TrainState, batch: Batch, key: Array, *, recipe: Recipe
) -> tuple[TrainState, dict[str, Array]]:
  """One update on the mean loss of a batch of uint8 images and int labels.

  A second stage keeps the statistics of the norms as they are, and has gradients only for what it
  trains. `key` is the run's; with the number of the step it decides all that is random.

  Returns:
    The new state and, of the old parameters, the loss and the norm of the gradient.
  """
  key = jax.random.fold_in(key, state.step)
  batch = recipe.mix_fn(jax.random.fold_in(key, _MIX), _augmented(recipe, key, batch), state.step)
  first = recipe.stage is second_stages.STAGES['none']
  trained = second_stages.matches(recipe.stage.trains, state.params)
  whole = recipe.layout.gather(state.params)

  def objective(params):
    params = jax.tree.map(lambda x, on: x if on else jax.lax.stop_gradient(x), params, trained)
    variables = {'params': params, 'batch_stats': state.batch_stats}
    logits, updated = recipe.model.apply(
      variables, batch['image'], train=first, mutable=['batch_stats']
    )
    loss = losses.mixed(recipe.loss_fn, logits, batch, state.step).mean()
    return loss, updated.get('batch_stats', state.batch_stats)

  (loss, batch_stats), grads = jax.value_and_grad(objective, has_aux=True)(whole)
  grads = recipe.layout.scatter(grads)
  updates, opt_state = recipe.tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  state = state.replace(params=params, batch_stats=batch_stats, opt_state=opt_state)
  if recipe.ema_decay:
    averages = state_lib.move_averages(state.averages, state, recipe.ema_decay)
    state = state.replace(averages=averages)
  return state.replace(step=state.step + 1), {'loss': loss, 'grad_norm': optax.tree.norm(grads)}


_MIX, _PARTNER = 1 << 16, 1 << 17  # a step's keys beside those that the augmentation splits off


def _augmented(recipe: Recipe, key: Array, batch: Batch) -> Batch:
  """The batch with float images, augmented; partners of a stream of their own likewise."""
  found = {
    'image': recipe.preprocessing(recipe.augment_fn(key, batch['image'])),
    'label': batch['label'],
  }
  if 'partner_image' in batch:
    partner = recipe.augment_fn(jax.random.fold_in(key, _PARTNER), batch['partner_image'])
    found |= {
      'partner_image': recipe.preprocessing(partner),
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
  """`step_fn` on one batch after the other, in one program.

  Args:
    state: donated where compiled.
    data: 'image' uint8 [N, H, W, ch] and 'label' int32 [N], all of them on every device; {} where
      the inputs are the images themselves.
    inputs: leaves [steps, batch, ...], split along the batch. With data the positions in it, int32:
      'own' of the batches, and 'partner' of the images to mix with them where those have a stream
      of their own; without, the batches as `step_fn` takes them.
    key: of the run.
    step_fn: (state, batch, key) -> (state, metrics).
    layout: where everything lies.

  Returns:
    The state after all steps, and the metrics of each, leaves [steps].
  """

  def one(state, chosen):
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


# () -> `train_steps`, compiled for the backend; its state is donated
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
) -> StepFn:
  """`train_step` with everything static bound: (state, batch, key) -> (state, metrics).

  Raises:
    UserError: unknown names in the config's tables, or parts that do not go together.
  """
  recipe = Recipe(
    model=model,
    tx=tx,
    loss_fn=losses.build(config, class_counts, total_steps),
    augment_fn=augment.build(config.augment),
    mix_fn=mixing.build(config.mixing, class_counts, total_steps),
    stage=second_stages.find(config.stage, config.model.head),
    ema_decay=config.train.ema_decay,
    layout=layout,
    preprocessing=Preprocessing(),
  )
  return functools.partial(train_step, recipe=recipe)
