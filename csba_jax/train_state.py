"""Everything that a resumed run needs, and nothing else."""

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
  """The initial state, compiled as one function of the seed."""

  @jax.jit
  def init(key):
    variables = model.init(key, jnp.zeros((1, *image_shape)))
    params = variables['params']
    stats = variables.get('batch_stats', {})
    return TrainState(jnp.zeros((), jnp.int32), params, stats, tx.init(params))

  return init(jax.random.key(seed))
