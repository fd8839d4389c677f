"""Parameter counts, and the width at which a net has as many parameters as another."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from csba_jax.models import attention as attn


def parameter_count(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
  """Number of parameters, computed from shapes: nothing is allocated."""
  image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)['params']
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


def at_width(
  make_model: Callable[[Sequence[int], str], nn.Module],
  channels: Sequence[int],
  attention: str,
  width: float,
  image_shape: tuple[int, int, int],
  tuned: Sequence[int],
) -> nn.Module:
  """The net at a width; for `none_wide`, widened until it has as many parameters as `csba`.

  Args:
    make_model: (channels, attention) -> the net.
    channels: numbers of channels at width 1.
    attention: a name of `attention.with_gate`. One with `parameters_of` gives a net without
      attention, whose parameter count is that of the other row within 1 %.
    width: multiplies every number of channels, which stays at least 1.
    image_shape: (height, width, channels) of the images.
    tuned: positions in `channels` that may be tuned to meet the parameter count; those that add the
      fewest parameters come last.
  """
  other = attn.find(attention)[0].parameters_of
  if other is not None:
    return make_model(_widen(make_model, channels, other, width, image_shape, tuned), 'none')
  return make_model(_scaled(channels, width), attention)


def _scaled(channels: Sequence[int], width: float) -> tuple[int, ...]:
  return tuple(max(1, round(width * number)) for number in channels)


def _widen(
  make_model: Callable[[Sequence[int], str], nn.Module],
  channels: Sequence[int],
  other: str,
  width: float,
  image_shape: tuple[int, int, int],
  tuned: Sequence[int],
) -> tuple[int, ...]:
  """Channels of a net without attention that has the parameter count of `other` at `width`.

  The number of parameters grows about as width squared. First all channels are scaled alike; then
  single numbers of channels make up the difference that is left.
  """

  def count(candidate: Sequence[int], attention: str = 'none') -> int:
    return parameter_count(make_model(candidate, attention), image_shape)

  target = count(_scaled(channels, width), other)
  plain = count(_scaled(channels, width))
  found = list(_scaled(channels, width * (target / plain) ** 0.5))
  for position in tuned:  # from coarse to fine
    wider = found.copy()
    wider[position] += 1
    now = count(found)
    more = round((target - now) / (count(wider) - now))
    found[position] = max(1, found[position] + more)
  return tuple(found)
