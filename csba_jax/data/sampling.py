"""Index streams: which examples a training step sees, a pure function of (seed, step)."""

import functools

import numpy as np

from csba_jax.errors import UserError
from csba_jax.longtail import permutation


def batch_positions(seed: int, step: int, n: int, batch_size: int) -> np.ndarray:
  """Positions of an instance-balanced batch:  stream[step * B : (step + 1) * B].

  The stream is the concatenation over epochs e = 0, 1, ... of permutation((seed, 'train', e), n),
  so every example comes exactly once an epoch, and a batch may straddle two epochs. To resume is
  to ask for the next step.

  Args:
    seed: of the order.
    step: of the batch, from 0.
    n: examples in the training part.
    batch_size: B, from 1 to n.

  Returns:
    [B] int32, positions in the training part (not indices of the source).

  Raises:
    UserError: a batch of less than one example, or larger than the data.
  """
  if not 1 <= batch_size <= n:
    raise UserError(
      f'a batch of 1 to {n} images',
      f'batch_size {batch_size}' + (', a batch larger than the data' if batch_size > n else ''),
      'set train.batch_size to a number in that range',
    )
  epoch, offset = divmod(step * batch_size, n)
  order = _epoch_order(seed, epoch, n)[offset : offset + batch_size]
  missing = batch_size - len(order)
  if missing:
    order = np.concatenate([order, _epoch_order(seed, epoch + 1, n)[:missing]])
  return order.astype(np.int32)


@functools.lru_cache(maxsize=2)  # a straddling batch needs two epochs, nothing needs three
def _epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
  """The permutation of one epoch, [n] int64; callers copy it, because the cache keeps it."""
  return permutation((seed, 'train', epoch), n)
