"""Optimisers and learning rates by step, in visible tables; norms and biases have no decay."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from csba_jax.config import step_at
from csba_jax.errors import UserError
from csba_jax.methods import second_stages
from csba_jax.models import pretrained

PyTree = Any
UNDECAYED = ('bias', 'scale')


def cosine(learning_rate: float, warmup_fraction: float, total_steps: int) -> optax.Schedule:
  """Linear from 0 to the peak over the warm-up, then half a cosine to 0 at `total_steps`."""
  warmup = round(warmup_fraction * total_steps)
  rest = optax.cosine_decay_schedule(learning_rate, max(1, total_steps - warmup))
  return _after_warmup(warmup, learning_rate, rest)


def steps(learning_rate: float, warmup_fraction: float, total_steps: int) -> optax.Schedule:
  """Linear from 0 to the peak over the warm-up; divided by 100 at 80 % and at 90 % of the run.

  As in the code of LDAM-DRW (Cao et al. 2019), which drops at epochs 160 and 180 of 200. Its
  warm-up rises once an epoch, ours at every step.
  """
  warmup = round(warmup_fraction * total_steps)
  drops = {round(share * total_steps) - warmup: 0.01 for share in (0.8, 0.9)}
  return _after_warmup(
    warmup, learning_rate, optax.piecewise_constant_schedule(learning_rate, drops)
  )


def _after_warmup(warmup: int, learning_rate: float, rest: optax.Schedule) -> optax.Schedule:
  return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup), rest], [warmup])


# (peak, warm-up as a share of the run, number of steps) -> learning rate by step
SCHEDULES: dict[str, Callable[[float, float, int], optax.Schedule]] = {
  'cosine': cosine,
  'steps': steps,
}


def decay_mask(params: PyTree) -> PyTree:
  """True where weight decay applies: to all parameters but those called `bias` or `scale`."""
  return jax.tree.map_with_path(lambda path, _: path[-1].key not in UNDECAYED, params)


def sgd(
  learning_rate: optax.Schedule, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
  """v <- momentum v + g + decay w;  w <- w - lr (g + decay w + momentum v).

  SGD with Nesterov's momentum, as torch.optim.SGD(nesterov=True).
  """
  return optax.chain(
    optax.add_decayed_weights(weight_decay, decay_mask),
    optax.sgd(learning_rate, momentum=momentum, nesterov=True),
  )


def adamw(
  learning_rate: optax.Schedule, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
  """Adam with decoupled weight decay (Loshchilov & Hutter 2019); b1 is `momentum`, b2 0.999."""
  return optax.adamw(learning_rate, b1=momentum, weight_decay=weight_decay, mask=decay_mask)


# (learning rate by step, momentum, weight decay) -> transformation
OPTIMIZERS: dict[str, Callable[[optax.Schedule, float, float], optax.GradientTransformation]] = {
  'sgd': sgd,
  'adamw': adamw,
}


def build(
  config: ml_collections.ConfigDict, total_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The optimiser that config.train describes, and its learning rate by step.

  A second stage updates only the parameters that it trains; weight decay does not move the others.

  Raises:
    UserError: unknown names.
  """
  train = config.train
  for field, table in (('optimizer', OPTIMIZERS), ('schedule', SCHEDULES)):
    if train[field] not in table:
      raise UserError(
        f'train.{field} among {", ".join(table)}', repr(train[field]), f'set --config.train.{field}'
      )
  schedule = SCHEDULES[train.schedule]
  learning_rate = schedule(train.learning_rate, train.warmup_fraction, total_steps)

  def make(rate: optax.Schedule) -> optax.GradientTransformation:
    return OPTIMIZERS[train.optimizer](rate, train.momentum, train.weight_decay)

  tx = make(learning_rate)
  _check_pretrained(config)
  if (train.pretrained_rate, train.frozen) != (1, 0):
    tx = _slower(make, tx, learning_rate, config, total_steps)
  stage = second_stages.find(config.stage, config.model.head)
  if config.stage.method != 'none':
    tx = _only(stage.trains, tx)
  return tx, learning_rate


def _check_pretrained(config: ml_collections.ConfigDict) -> None:
  train = config.train
  if (train.pretrained_rate, train.frozen) != (1, 0) and not config.model.init:
    raise UserError(
      'train.pretrained_rate=1 and train.frozen=0 without model.init',
      f'{train.pretrained_rate:g} and {train.frozen:g}',
      'set --config.model.init, or remove both',
    )


def _slower(
  make: Callable[[optax.Schedule], optax.GradientTransformation],
  tx: optax.GradientTransformation,
  learning_rate: optax.Schedule,
  config: ml_collections.ConfigDict,
  total_steps: int,
) -> optax.GradientTransformation:
  """`tx` for fresh parameters; those of model.init wait, and then move at a lower rate.

  While they wait they do not move, and they have no gradient (`training.step`).
  """
  train = config.train
  first = step_at(train.frozen, total_steps)

  def rate(step: Any) -> Any:
    return jnp.where(step < first, 0.0, train.pretrained_rate * learning_rate(step))

  def labels(params: PyTree) -> PyTree:
    fresh = second_stages.matches(pretrained.FRESH, params)
    return jax.tree.map(lambda found: 'fresh' if found else 'pretrained', fresh)

  return optax.partition({'fresh': tx, 'pretrained': make(rate)}, labels)


def _only(pattern: str | None, tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """`tx` for parameters in whose names the regular expression is found; no update of the others."""

  def labels(params: PyTree) -> PyTree:
    return jax.tree.map(
      lambda found: 'train' if found else 'keep', second_stages.matches(pattern, params)
    )

  return optax.partition({'train': tx, 'keep': optax.set_to_zero()}, labels)
