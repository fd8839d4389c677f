"""What training steps read: positions in data on the devices, or batches streamed from disk."""

from collections.abc import Mapping

from jax import Array

from csba_jax.data import pipeline, sampling, streaming
from csba_jax.run.records import Records
from csba_jax.runtime import sharding


class Inputs:
  """The inputs of the steps of a run, from the step where its records are. A context manager.

  Data in memory: every device holds all of it, `data`, and a step gets positions in it. Streamed
  data stays on disk: a step gets its images, and each process reads its own rows of them in
  advance. The position in the stream is part of every checkpoint.
  """

  def __init__(
    self,
    part: pipeline.Part,
    streams: Mapping[str, sampling.Stream],
    layout: sharding.Layout,
    total_steps: int,
    records: Records,
  ):
    self._streams, self._layout, self._records = streams, layout, records
    self._feed: streaming.Feed | None = None
    self.data: Mapping[str, Array] = {}
    self.longest = total_steps or 1  # steps in one call of `take` at most; equal in all processes
    if part.streamed:
      start = records.progress.step
      rows = layout.rows(self._batch_size)
      self.longest = streaming.batches_ahead(part, self._batch_size * len(streams))
      self._feed = streaming.Feed(part, streams, rows, start, total_steps)
      if records.progress.input is not None:
        self._feed.restore(records.progress.input)
    else:
      self.data = layout.place({'image': part.images, 'label': part.labels})

  def __enter__(self) -> 'Inputs':
    return self

  def __exit__(self, *exc_info: object) -> None:
    if self._feed:
      self._feed.close()

  @property
  def _batch_size(self) -> int:
    return self._streams['own'].batch_size

  def take(self, start: int, end: int) -> Mapping[str, Array]:
    """Inputs of steps start to end - 1, leaves [end - start, batch, ...]; each step only once."""
    if self._feed is None:
      # the run may have streamed its data before it was stopped: forget that stream's position
      self._records.progress.input = None
      return self._layout.place_batch(sampling.draw(self._streams, start, end), axis=1)
    batches = self._feed.take(end - start)
    self._records.progress.input = self._feed.state()
    return self._layout.place_rows(batches, self._batch_size, axis=1)
