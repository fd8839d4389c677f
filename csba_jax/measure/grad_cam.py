"""Grad-CAM: where in an image the net sees the class that it predicts."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from csba_jax.run.net import Net, Preprocessing

PyTree = Any


def heat_maps(net: Net, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """relu(sum_k a_k A_k), divided by its maximum (Selvaraju et al. 2017).

  A_k are the maps of the last layer that has any, and a_k is the mean over space of the gradient of
  the class's logit with respect to A_k. Of a transformer, A are the tokens before the pooling, on
  their grid. The map has the resolution of that layer. It says where evidence for the class was
  found, and not that this is the reason of the prediction.

  Args:
    net: is used as it is evaluated.
    images: [N, H, W, channels] uint8.
    labels: [N], the class that is looked for in each image.

  Returns:
    [N, h, w] float32 in 0..1; all 0 of an image without evidence.
  """
  name, shape = last_maps(net)
  maps = _maps(
    net.model,
    net.metadata.preprocessing,
    name,
    net.variables,
    jnp.asarray(images),
    jnp.asarray(labels),
    jnp.zeros((len(images), *shape)),
  )
  return np.asarray(maps)


def last_maps(net: Net) -> tuple[str, tuple[int, ...]]:
  """(name, shape without N) of the last top-level layer whose output has a place in the image.

  The shape is (h, w, channels), or (tokens, channels) where the tokens are those of a square grid.
  """
  found: list[tuple[str, tuple[int, ...]]] = []

  def note(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    out = next_fun(*args, **kwargs)
    if context.method_name == '__call__' and len(context.module.path) == 1:
      shape: tuple[int, ...] = getattr(out, 'shape', ())
      square = len(shape) == 3 and math.isqrt(shape[1]) ** 2 == shape[1]
      if (len(shape) == 4 and shape[1] * shape[2] > 1) or (square and shape[1] > 1):
        found.append((context.module.path[0], shape[1:]))
    return out

  def trace(variables: PyTree, images: Array) -> Array:
    with nn.intercept_methods(note):
      return net.model.apply(variables, images, train=False)

  image = jax.ShapeDtypeStruct((2, *net.metadata.image_shape), jnp.float32)
  jax.eval_shape(trace, net.variables, image)
  outside_head = [one for one in found if one[0] not in ('pool', 'head', 'class_gate')]
  return outside_head[-1]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _maps(
  model: nn.Module,
  preprocessing: Preprocessing,
  name: str,
  variables: PyTree,
  images: Array,
  labels: Array,
  zeros: Array,
) -> Array:
  def score(change: Array) -> tuple[Array, Array]:
    """(sum of the logits of the labels, maps) if the maps were changed by so much."""
    kept: list[Array] = []

    def add(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
      out = next_fun(*args, **kwargs)
      if context.method_name == '__call__' and context.module.path == (name,):
        kept.append(out)
        return out + change.astype(out.dtype)
      return out

    with nn.intercept_methods(add):
      logits = model.apply(variables, preprocessing(images), train=False)
    return jnp.take_along_axis(logits, labels[:, None], axis=1).sum(), kept[0]

  slopes, maps = jax.grad(score, has_aux=True)(zeros)
  axes = tuple(range(1, maps.ndim - 1))
  weights = slopes.mean(axes, keepdims=True)
  found = nn.relu((weights * maps.astype(jnp.float32)).sum(-1))
  if found.ndim == 2:  # tokens
    side = math.isqrt(found.shape[1])
    found = found.reshape(len(found), side, side)
  largest = found.max((1, 2), keepdims=True)
  return found / jnp.where(largest > 0, largest, 1)
