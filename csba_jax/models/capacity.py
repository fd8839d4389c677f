"""How many parameters a net has, and how wide a net must be to have as many as another."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def parameter_count(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
  """Number of parameters, from shapes alone: nothing is allocated."""
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
  """The net at a width; for `none_wide`, as wide as gives it the parameters of `csba`.

  Args:
    make_model: (channels, attention) -> the net.
    channels: at width 1.
    attention: of the net; `none_wide` has none, and the parameter count of `csba` within 1 %.
    width: multiplies every number of channels, which stays at least 1.
    image_shape: (height, width, channels) of the images.
    tuned: positions in `channels` to tune for `none_wide`, those of fewest parameters last.
  """
  if attention == 'none_wide':
    return make_model(_widen(make_model, channels, width, image_shape, tuned), 'none')
  return make_model(_scaled(channels, width), attention)


def _scaled(channels: Sequence[int], width: float) -> tuple[int, ...]:
  return tuple(max(1, round(width * number)) for number in channels)


def _widen(
  make_model: Callable[[Sequence[int], str], nn.Module],
  channels: Sequence[int],
  width: float,
  image_shape: tuple[int, int, int],
  tuned: Sequence[int],
) -> tuple[int, ...]:
  """Channels without attention that give the parameter count of `csba` at `width`.

  Parameters grow about as width squared: one uniform step, then single numbers of channels take up
  what is left.
  """

  def count(candidate, attention='none'):
    return parameter_count(make_model(candidate, attention), image_shape)

  target = count(_scaled(channels, width), 'csba')
  plain = count(_scaled(channels, width))
  found = list(_scaled(channels, width * (target / plain) ** 0.5))
  for position in tuned:  # steps of falling size
    wider = found.copy()
    wider[position] += 1
    now = count(found)
    more = round((target - now) / (count(wider) - now))
    found[position] = max(1, found[position] + more)
  return tuple(found)
