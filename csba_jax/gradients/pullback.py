"""From weights over the examples of a batch to one gradient: the backward pass under a name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from csba_jax.errors import UserError
from csba_jax.gradients.gram import check_params

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

  Raises:
    UserError: losses_fn returns something else, or weights are not [N].

  Example:
    >>> import jax.numpy as jnp
    >>> x, y = jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0])
    >>> losses, pullback, _ = losses_and_pullback(lambda w: ((x * w - y) ** 2 / 2, None), 1.0)
    >>> losses, pullback(jnp.array([1.0, 0.5]))  # x (x w - y) = 1 and 2
    (Array([0.5, 0.5], dtype=float32), Array(2., dtype=float32, weak_type=True))
  """
  check_params(params)
  pair = 'losses_fn(params) -> (losses [N], auxiliary output)'

  def checked(params: PyTree) -> tuple[Array, PyTree]:
    found = losses_fn(params)
    if not isinstance(found, tuple) or len(found) != 2:
      what = f'a tuple of {len(found)}' if isinstance(found, tuple) else type(found).__name__
      raise UserError(pair, what, 'return (losses, None) if there is no auxiliary output')
    losses = found[0]
    if not hasattr(losses, 'dtype') or jnp.ndim(losses) != 1:
      what = f'losses of shape {list(jnp.shape(losses))}' if hasattr(losses, 'dtype') else losses
      raise UserError(pair, str(what), 'leave out the mean: one loss for each example')
    if not jnp.issubdtype(losses.dtype, jnp.floating):
      raise UserError('float losses from losses_fn', str(losses.dtype), 'return losses')
    return found

  losses, backward, auxiliary = jax.vjp(checked, params, has_aux=True)

  def pullback(weights: Array) -> PyTree:
    if jnp.shape(weights) != losses.shape:
      raise UserError(
        f'weights of shape {list(losses.shape)}, one for each example',
        f'shape {list(jnp.shape(weights))}',
        'give each example the weight of its class: weights[labels]',
      )
    return backward(jnp.asarray(weights, losses.dtype))[0]

  return losses, pullback, auxiliary
