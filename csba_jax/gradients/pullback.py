"""From weights over the examples of a batch to one gradient: the backward pass under a name."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

PyTree = Any


def losses_and_pullback(
  losses_fn: Callable[[PyTree], tuple[Array, PyTree]], params: PyTree
) -> tuple[Array, Callable[[Array], PyTree], PyTree]:
  """Losses l_i of one forward pass, and its pullback w -> sum_i w_i grad l_i.

  Each call of the pullback is one backward pass through the same forward pass. So the gradients of
  all classes, and a direction that is chosen from their Gram, need one forward pass together:
  w_i = 1 / n_c for the examples of class c, and 0 for the others, gives the gradient of class c.

  Args:
    losses_fn: params -> (losses [N], auxiliary output), such as the new statistics of BatchNorm.
    params: tree of float arrays.

  Returns:
    The losses [N]; the pullback, weights [N] -> a tree like params; the auxiliary output.

  Example:
    >>> import jax.numpy as jnp
    >>> x, y = jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0])
    >>> losses, pullback, _ = losses_and_pullback(lambda w: ((x * w - y) ** 2 / 2, None), 1.0)
    >>> losses, pullback(jnp.array([1.0, 0.5]))  # x (x w - y) = 1 and 2
    (Array([0.5, 0.5], dtype=float32), Array(2., dtype=float32, weak_type=True))
  """
  losses, backward, auxiliary = jax.vjp(losses_fn, params, has_aux=True)

  def pullback(weights: Array) -> PyTree:
    return backward(weights.astype(losses.dtype))[0]

  return losses, pullback, auxiliary
