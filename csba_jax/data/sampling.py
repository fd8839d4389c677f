"""Index streams: which examples a training step sees, as a pure function of (seed, step)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import ml_collections
import numpy as np

from csba_jax.config import step_at
from csba_jax.data import random_draws
from csba_jax.errors import UserError


def instance(counts: np.ndarray, progress: float) -> np.ndarray:
  """p_c = n_c / N: every image is equally frequent."""
  del progress
  return counts / counts.sum()


def class_balanced(counts: np.ndarray, progress: float) -> np.ndarray:
  """p_c = 1 / C: every class is equally frequent."""
  del progress
  return np.full(len(counts), 1 / len(counts))


def square_root(counts: np.ndarray, progress: float) -> np.ndarray:
  """p_c = sqrt(n_c) / sum_d sqrt(n_d)."""
  del progress
  return np.sqrt(counts) / np.sqrt(counts).sum()


def progressive(counts: np.ndarray, progress: float) -> np.ndarray:
  """p_c = (1 - t) n_c / N + t / C: from instance-balanced to class-balanced as t goes to 1.

  Kang et al. 2020 change the progress t once an epoch; here it changes at every step.
  """
  return (1 - progress) * instance(counts, 0) + progress * class_balanced(counts, 0)


def reversed_frequency(counts: np.ndarray, progress: float) -> np.ndarray:
  """p_c = (1 / n_c) / sum_d 1 / n_d: the rarest class is most frequent.

  BBN, Zhou et al. 2020.
  """
  del progress
  return (1 / counts) / (1 / counts).sum()


# (images of each class [C] float64, progress 0 <= t <= 1) -> probability of each class [C];
# the first four come from Kang et al. 2020
SAMPLERS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
  'instance': instance,
  'class': class_balanced,
  'square_root': square_root,
  'progressive': progressive,
  'reversed': reversed_frequency,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
  """Positions of the training images of every batch, as a pure function of (seed, step).

  `instance` takes every image once an epoch, in a new order each time: see `batch_positions`. Every
  other sampler draws with replacement: first a class, then one of its images.
  """

  name: str  # a row of SAMPLERS
  first: int  # the first step that samples so; steps before it take `instance` (deferred)
  labels: np.ndarray  # [N] of the training part
  batch_size: int
  total_steps: int
  seed: int
  purpose: str = 'train'  # streams of different purposes are independent

  @classmethod
  def of(
    cls,
    sampler: ml_collections.ConfigDict,
    labels: np.ndarray,
    batch_size: int,
    total_steps: int,
    seed: int,
  ) -> 'Stream':
    """The stream that config.sampler describes.

    Raises:
      UserError: an unknown name, a start without a sampler, a batch that the data cannot fill.
    """
    if sampler.name not in SAMPLERS:
      raise UserError(
        f'sampler.name among {", ".join(SAMPLERS)}', repr(sampler.name), 'set --config.sampler.name'
      )
    if sampler.start > 0 and sampler.name == 'instance':
      raise UserError(
        'a sampler to defer with sampler.start',
        f'start {sampler.start} and sampler instance, which is what comes before the start',
        'set --config.sampler.name=class, or remove sampler.start',
      )
    _check_batch(batch_size, len(labels))
    first = step_at(sampler.start, total_steps)
    return cls(sampler.name, first, labels, batch_size, total_steps, seed)

  def class_probabilities(self, step: int) -> np.ndarray:
    """Probabilities of the classes in the batch of a step, [C], sum 1."""
    name = self.name if step >= self.first else 'instance'
    progress = min(1.0, step / max(1, self.total_steps))
    return SAMPLERS[name](self._by_class[1].astype(np.float64), progress)

  def positions(self, step: int) -> np.ndarray:
    """Positions in the training part of the batch of a step, [batch_size] int32."""
    if self.name == 'instance' or step < self.first:
      return batch_positions(self.seed, step, len(self.labels), self.batch_size, self.purpose)
    members, counts, first = self._by_class
    edges = np.cumsum(self.class_probabilities(step))
    words = (self.seed, self.purpose, self.name, step)
    uniform, place = random_draws.uniforms(words, 2 * self.batch_size).reshape(2, -1)
    # without the last edge: rounding may leave it below 1, and a draw beyond it is the last class
    classes = np.searchsorted(edges[:-1], uniform, side='right')
    within = (place * counts[classes]).astype(np.int64)
    return members[first[classes] + within].astype(np.int32)

  @functools.cached_property
  def _by_class(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions sorted by class [N], images of each class [C], the start of each class [C]."""
    counts = np.bincount(self.labels)
    members = np.argsort(self.labels, kind='stable')
    return members, counts, np.cumsum(counts) - counts


def draw(streams: Mapping[str, Stream], start: int, end: int) -> dict[str, np.ndarray]:
  """Positions of the training images of steps start to end - 1, [end - start, batch_size] each."""
  return {
    name: np.stack([stream.positions(step) for step in range(start, end)])
    for name, stream in streams.items()
  }


def batch_positions(
  seed: int, step: int, n: int, batch_size: int, purpose: str = 'train'
) -> np.ndarray:
  """Positions of an instance-balanced batch:  stream[step * B : (step + 1) * B].

  The stream is the concatenation of permutation((seed, purpose, e), n) over epochs e = 0, 1, ...
  So every example comes exactly once an epoch, and a batch may span the end of one epoch and the
  start of the next. A resumed run simply asks for its next step.

  Args:
    seed: of the order.
    step: of the batch, from 0.
    n: number of examples in the training part.
    batch_size: B, from 1 to n.
    purpose: streams of different purposes are independent.

  Returns:
    [B] int32, positions in the training part (not indices of the source).

  Raises:
    UserError: the batch is smaller than one example, or larger than the data.
  """
  _check_batch(batch_size, n)
  epoch, offset = divmod(step * batch_size, n)
  order = _epoch_order(seed, purpose, epoch, n)[offset : offset + batch_size]
  missing = batch_size - len(order)
  if missing:
    order = np.concatenate([order, _epoch_order(seed, purpose, epoch + 1, n)[:missing]])
  return order.astype(np.int32)


@functools.lru_cache(maxsize=2)  # a batch spans two epochs at most
def _epoch_order(seed: int, purpose: str, epoch: int, n: int) -> np.ndarray:
  """The permutation of one epoch, [n] int64. Callers copy it, because the cache keeps it."""
  return random_draws.permutation((seed, purpose, epoch), n)


def _check_batch(batch_size: int, n: int) -> None:
  if not 1 <= batch_size <= n:
    raise UserError(
      f'a batch of 1 to {n} images',
      f'batch_size {batch_size}' + (', a batch larger than the data' if batch_size > n else ''),
      'set train.batch_size to a number in that range',
    )
