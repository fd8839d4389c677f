"""The training state: everything that a resumed run needs on the devices."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import struct
from jax import Array

from csba_jax.models import pretrained

PyTree = object


class TrainState(struct.PyTreeNode):
  """The state after `step` updates. It holds no random key: keys follow from seed and step."""

  step: Array  # int32 scalar
  params: PyTree  # float32
  batch_stats: PyTree  # running mean and variance, float32
  opt_state: optax.OptState
  averages: PyTree  # moving averages {'params', 'batch_stats'}; {} where none are kept
  # what gradient surgery keeps from step to step, see csba_jax.methods.surgery; {} without it
  surgery: dict[str, Any] = dataclasses.field(default_factory=dict)

  def variables(self) -> PyTree:
    """{'params', 'batch_stats'} for evaluation: the moving averages where they are kept."""
    return self.averages or {'params': self.params, 'batch_stats': self.batch_stats}

  def saved(self) -> dict[str, PyTree]:
    """What a checkpoint holds: {field: value}. Without surgery, as before there was any."""
    found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return found if self.surgery else {k: v for k, v in found.items() if k != 'surgery'}

  @classmethod
  def of_saved(cls, saved: Mapping[str, PyTree]) -> 'TrainState':
    """The state that `saved` came from."""
    return cls(**saved)


def move_averages(averages: PyTree, state: TrainState, decay: float) -> PyTree:
  """a <- d a + (1 - d) x for parameters and statistics x, d = min(decay, (1 + t) / (10 + t)).

  t = state.step is the number of updates so far. The factor that grows with t makes the average
  forget the initial weights, as in TensorFlow's ExponentialMovingAverage.
  """
  t = state.step.astype(jnp.float32)
  share = 1 - jnp.minimum(decay, (1 + t) / (10 + t))
  new = {'params': state.params, 'batch_stats': state.batch_stats}
  return optax.incremental_update(new, averages, share)


def create(
  model: nn.Module,
  tx: optax.GradientTransformation,
  image_shape: tuple[int, int, int],
  seed: int,
  averages: bool = False,
) -> TrainState:
  """The initial state, a function of the seed; with `averages`, it keeps moving averages."""
  return _compiled_initial(model, tx, image_shape, averages, jax.random.key(seed))


def with_pretrained(state: TrainState, model: ml_collections.ConfigDict) -> TrainState:
  """An initial state with the weights of config.model.init in it; as it is where there are none.

  Raises:
    UserError: see `pretrained.load`.
  """
  if not model.init:
    return state
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  found = pretrained.load(model.name, model.init, variables)
  averages = jax.tree.map(jnp.copy, found) if state.averages else {}
  return state.replace(averages=averages, **found)


def shapes(
  model: nn.Module,
  tx: optax.GradientTransformation,
  image_shape: tuple[int, int, int],
  averages: bool = False,
) -> TrainState:
  """Shapes and dtypes of `create`; nothing is compiled or allocated."""
  return jax.eval_shape(
    functools.partial(_initial, model, tx, image_shape, averages), jax.random.key(0)
  )


def _initial(
  model: nn.Module,
  tx: optax.GradientTransformation,
  image_shape: tuple[int, int, int],
  averages: bool,
  key: Array,
) -> TrainState:
  variables = model.init(key, jnp.zeros((1, *image_shape)))
  params = variables['params']
  stats = variables.get('batch_stats', {})
  kept = {'params': params, 'batch_stats': stats} if averages else {}
  return TrainState(jnp.zeros((), jnp.int32), params, stats, tx.init(params), kept)


# Low optimisation for a program that runs once: it gives the same bits in 6.6 s instead of 14.4 s
# on two CPU cores. Nearly all of that is the compilation of one random generator for each kernel.
# Do not use level 0: with jaxlib 0.10.2 it gives NaN gradients in other programs.
_compiled_initial = jax.jit(
  _initial,
  static_argnums=(0, 1, 2, 3),
  compiler_options={'xla_backend_optimization_level': 1},
)
