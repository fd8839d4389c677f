"""Gradients of the classes of one training batch, inside a compiled step.

The labels are traced, and the number of images of a class changes from batch to batch, so that a
class-stacked batch would need another program for each. Two forms compile once:

- `coupled`: one forward pass, and a backward pass for each class. It is right for every model.
- `independent`: the batch in rows of one class each, one row after the other, for little more than
  the price of one ordinary gradient. It is right where the loss of an image does not depend on the
  rest of its batch.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from csba_jax.gradients import loops
from csba_jax.gradients.pullback import losses_and_pullback
from csba_jax.runtime import backend

PyTree = Any
Batch = Mapping[str, Array]
# (params, batch) -> losses [N], and what else the forward pass gives: the statistics of BatchNorm
ForwardFn = Callable[[PyTree, Batch], tuple[Array, PyTree]]


def coupled(
  forward: ForwardFn, params: PyTree, batch: Batch, num_classes: int
) -> tuple[PyTree, Array, PyTree]:
  """s_c = grad of sum_{i: y_i = c} l_i, from one forward pass and C backward passes.

  Args:
    forward: (params, batch) -> losses [N] and an auxiliary output.
    params: tree of float arrays.
    batch: arrays [N, ...] with 'label' [N].
    num_classes: C.

  Returns:
    s, a tree like params with leaves [C, ...]; the sums of losses [C]; the auxiliary output.
  """
  losses, pullback, auxiliary = losses_and_pullback(lambda params: forward(params, batch), params)
  member = (batch['label'][None] == jnp.arange(num_classes)[:, None]).astype(losses.dtype)
  sums = loops.map_classes(pullback, member, len(losses), present=member.any(1))
  return sums, (member * losses[None]).sum(1), auxiliary


def independent(
  forward: ForwardFn, params: PyTree, batch: Batch, num_classes: int
) -> tuple[PyTree, Array, PyTree]:
  """s_c as in `coupled`, where the loss of an image does not depend on the other images.

  The images are sorted by class and cut into rows of at most `backend.ROW_IMAGES` images, each of
  one class. A loop over the rows that are filled adds up their gradients; its program is that of
  one row. With N images of P classes there are at most (N + P (m - 1)) / m rows of m images.

  Args:
    forward: as in `coupled`; its auxiliary output depends on nothing of the batch.
    params: as in `coupled`.
    batch: as in `coupled`.
    num_classes: as in `coupled`.

  Returns:
    As `coupled`.
  """
  batch = jax.tree.map(jnp.asarray, dict(batch))
  labels = batch['label']
  number = len(labels)
  size = min(backend.ROW_IMAGES, number)
  order, counts = jnp.argsort(labels, stable=True), jnp.bincount(labels, length=num_classes)
  first_image, rows = jnp.cumsum(counts) - counts, -(-counts // size)
  end_row = jnp.cumsum(rows)

  def of_row(row: Array) -> tuple[Array, tuple[PyTree, Array]]:
    """The class of a row, and the sums of its gradients and losses; 0 for a row beyond the last."""
    own = jnp.minimum(jnp.searchsorted(end_row, row, side='right'), num_classes - 1)
    position = (row - (end_row[own] - rows[own])) * size + jnp.arange(size)
    filled = (position < counts[own]) & (row < end_row[-1])
    index = order[jnp.minimum(first_image[own] + position, number - 1)]
    images = {name: values[index] for name, values in batch.items()}

    def total(params: PyTree) -> Array:
      return jnp.where(filled, forward(params, images)[0], 0).sum()

    loss, grads = jax.value_and_grad(total)(params)
    return own, (grads, loss)

  most = (number + min(num_classes, number) * (size - 1)) // size
  sums, losses = loops.sum_rows(of_row, end_row[-1], most, size, num_classes)
  auxiliary = forward(params, {name: values[:size] for name, values in batch.items()})[1]
  return sums, losses, auxiliary
