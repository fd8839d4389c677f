"""Everything that a resumed run needs, and nothing else."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

PyTree = object


class TrainState(struct.PyTreeNode):
  """The state after `step` updates. Random keys need no place: they follow from seed and step."""

  step: Array  # int32 scalar
  params: PyTree  # float32
  batch_stats: PyTree  # running mean and variance, float32
  opt_state: optax.OptState


def create(
  model: nn.Module, tx: optax.GradientTransformation, image_shape: tuple[int, int, int], seed: int
) -> TrainState:
  """The initial state, a function of the seed."""
  # Little optimisation for what runs once: the same bits after 6.6 s in place of 14.4 s on two CPU
  # cores, nearly all of it the compilation of one random generator for each kernel. Never level 0:
  # with jaxlib 0.10.2 it gives NaN gradients elsewhere.
  init = jax.jit(
    functools.partial(_initial, model, tx, image_shape),
    compiler_options={'xla_backend_optimization_level': 1},
  )
  return init(jax.random.key(seed))


def shapes(
  model: nn.Module, tx: optax.GradientTransformation, image_shape: tuple[int, int, int]
) -> TrainState:
  """Shapes and dtypes of `create`; nothing is compiled or allocated."""
  return jax.eval_shape(functools.partial(_initial, model, tx, image_shape), jax.random.key(0))


def _initial(
  model: nn.Module,
  tx: optax.GradientTransformation,
  image_shape: tuple[int, int, int],
  key: Array,
) -> TrainState:
  variables = model.init(key, jnp.zeros((1, *image_shape)))
  params = variables['params']
  stats = variables.get('batch_stats', {})
  return TrainState(jnp.zeros((), jnp.int32), params, stats, tx.init(params))
