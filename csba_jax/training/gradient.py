"""The gradient of a step as one replaceable part: its type, and the ordinary one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array

from csba_jax.gradients.batch_sums import Batch, ForwardFn

PyTree = Any


class Gradient(NamedTuple):
  """What a `GradientFn` returns."""

  loss: Array  # that the step reports
  direction: PyTree  # that the optimiser takes for the gradient; a tree like params
  auxiliary: PyTree  # of the forward pass
  kept: PyTree  # for the next step, in TrainState.surgery
  shown: dict[str, Array]  # means of it stand in the log line


# (forward, params, batch, what the last step kept, key) -> Gradient
GradientFn = Callable[[ForwardFn, PyTree, Batch, PyTree, Array], Gradient]


def gradient_of_the_mean(
  forward: ForwardFn, params: PyTree, batch: Batch, kept: PyTree, key: Array
) -> Gradient:
  """The ordinary gradient of a step: of the mean loss (1/N) sum_i l_i over the batch.

  Another `GradientFn` may take its place (`make_step`), such as those of
  `csba_jax.training.surgery`. One that is made of class gradients of coupled images calls
  `forward` once, through `csba_jax.gradients.pullback.losses_and_pullback`.

  Args:
    forward: (params, batch) -> losses [N] and the auxiliary output of the same forward pass.
    params: tree of float arrays.
    batch: as `forward` takes it, with 'label' [N]; mixed batches also hold 'partner_label' and
      'share'.
    kept: TrainState.surgery; stays as it is.
    key: of the step; not used.
  """
  del key

  def mean_loss(params: PyTree) -> tuple[Array, PyTree]:
    per_example, auxiliary = forward(params, batch)
    return per_example.mean(), auxiliary

  (loss, auxiliary), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
  return Gradient(loss, grads, auxiliary, kept, {})
