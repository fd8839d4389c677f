"""Training batches of data that is too large for memory: read ahead in threads, through Grain."""

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
  """The batches of a run, step after step: an iterator, and a context manager that closes it.

  A batch holds 'image' uint8 [n, H, W, ch] and 'label' int32 [n], and 'partner_image' and
  'partner_label' where the streams have a 'partner'. It is what gathering
  `part.images[streams['own'].positions(step)[rows]]` gives, to the bit, whatever the number of
  threads; only these images are read.

  Args:
    part: the training images.
    streams: 'own' of the batches, and 'partner' of the images to mix with them.
    rows: [n] int, those of the global batch that this process takes.
    start: the first step.
    total_steps: of the run.
    threads: that read; 0 reads in the caller's, when a batch is asked for.

  Attributes:
    ahead: how many batches are read ahead; a dispatch that takes no more finds them in memory.
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
    import grain  # not above: it takes half a second, and most runs have their data in memory

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
    """Of the next batch."""
    return self._grain.experimental.get_next_index(self._batches)

  def __iter__(self) -> 'Feed':
    return self

  def __next__(self) -> Batch:
    return next(self._batches)

  def take(self, steps: int) -> Batch:
    """The next batches on a new leading axis, [steps, n, ...]: what one dispatch of them takes."""
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
    """What a checkpoint keeps of it, as JSON; the same in every process."""
    return {'step': self.step, 'grain': self._batches.get_state()}

  def restore(self, state: Mapping[str, Any]) -> None:
    """Goes on from a state that `state` gave.

    Raises:
      UserError: a state of another step than the one it stands at, or none at all.
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
        'delete this checkpoint, so that the one before is taken, or train in another --workdir',
      )

  def close(self) -> None:
    """Ends the threads once they have read what they are at; no batch comes afterwards."""
    self._batches.close()

  def __enter__(self) -> 'Feed':
    return self

  def __exit__(self, *exc_info) -> None:
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
  """How many batches of so many images of a part wait in memory, at most."""
  size = images * math.prod(part.images.shape[1:])
  return max(2, min(64, backend.READ_AHEAD_BYTES // max(1, size)))
