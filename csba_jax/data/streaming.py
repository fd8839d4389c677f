"""Training batches of data that does not fit in memory: Grain reads them ahead in threads."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from csba_jax.data.pipeline import Part
from csba_jax.data.sampling import Stream
from csba_jax.errors import UserError
from csba_jax.runtime import backend

Batch = dict[str, np.ndarray]


class Feed:
  """Iterates over the batches of a run, one a step; a context manager, which closes it.

  A batch holds 'image' uint8 [n, H, W, ch] and 'label' int32 [n]. If the streams have a 'partner'
  it also holds 'partner_image' and 'partner_label'. The images are exactly
  `part.images[streams['own'].positions(step)[rows]]`, for any number of threads. No other images
  are read.

  Args:
    part: the training images.
    streams: 'own' for the batches, and 'partner' for the images to mix with them.
    rows: [n] int, the rows of the global batch that belong to this process.
    start: the first step.
    total_steps: steps of the run.
    threads: threads that read; with 0 the caller's thread reads when it asks for a batch.

  Attributes:
    ahead: number of batches that are read ahead; a dispatch of at most so many need not wait.
  """

  def __init__(
    self,
    part: Part,
    streams: Mapping[str, Stream],
    rows: np.ndarray,
    start: int,
    total_steps: int,
    threads: int = backend.READING_THREADS,
  ):
    import grain  # here, because it takes half a second, and most runs have their data in memory

    self._grain, self._total_steps = grain, total_steps
    self._part, self._streams, self._rows = part, dict(streams), np.asarray(rows)
    self.ahead = batches_ahead(part, len(self._rows) * len(self._streams))
    steps = grain.MapDataset.range(total_steps).map(self._batch)
    options = grain.ReadOptions(
      num_threads=min(threads, self.ahead), prefetch_buffer_size=self.ahead
    )
    self._batches = iter(steps.to_iter_dataset(options))
    grain.experimental.set_next_index(self._batches, start)

  @property
  def step(self) -> int:
    """The step of the next batch."""
    return self._grain.experimental.get_next_index(self._batches)

  def __iter__(self) -> 'Feed':
    return self

  def __next__(self) -> Batch:
    return next(self._batches)

  def take(self, steps: int) -> Batch:
    """The next batches, stacked for one dispatch: leaves [steps, n, ...]."""
    if self.step + steps > self._total_steps:
      raise ValueError(f'{steps} steps from {self.step} of {self._total_steps}')
    first = next(self)
    if steps == 1:  # no copy
      return {name: values[None] for name, values in first.items()}
    found = {name: np.empty((steps, *x.shape), x.dtype) for name, x in first.items()}
    for i in range(steps):
      for name, values in (next(self) if i else first).items():
        found[name][i] = values
    return found

  def state(self) -> dict[str, Any]:
    """The state for a checkpoint, as JSON; the same in every process."""
    return {'step': self.step, 'grain': self._batches.get_state()}

  def restore(self, state: Mapping[str, Any]) -> None:
    """Sets a state that `state` returned.

    Raises:
      UserError: it is no such state, or one of another step than the next one.
    """
    here = self.step
    try:
      step = state['step']
      self._batches.set_state(state['grain'])
      found = f'one of step {step}, with {dict(state["grain"])}'
      fits = step == self.step == here
    except (KeyError, IndexError, TypeError, ValueError) as error:
      found, fits = f'{state!r} ({type(error).__name__}: {error})', False
    if not fits:
      raise UserError(
        f'a checkpoint with the state of the input at step {here}',
        found,
        'delete this checkpoint to use the one before it, or use another --workdir',
      )

  def close(self) -> None:
    """Ends the threads after their current reads; there are no batches afterwards."""
    self._batches.close()

  def __enter__(self) -> 'Feed':
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()

  def _batch(self, step: int) -> Batch:
    batch = {}
    for name, stream in self._streams.items():
      prefix = '' if name == 'own' else f'{name}_'
      positions = stream.positions(step)[self._rows]
      batch[f'{prefix}image'] = self._part.images[positions]
      batch[f'{prefix}label'] = self._part.labels[positions]
    return batch


def batches_ahead(part: Part, images: int) -> int:
  """The largest number of batches of `images` images that wait in memory."""
  size = images * math.prod(part.images.shape[1:])
  return max(2, min(64, backend.READ_AHEAD_BYTES // max(1, size)))
