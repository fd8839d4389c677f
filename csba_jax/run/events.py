"""TensorBoard events without TensorFlow, and without the threads that lose a full disk's error."""

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path


class EventFile:
  """A new event file in a folder; what a call writes is on disk when it returns.

  Args:
    folder: of the run's events; made where it is absent.
    step: of the run; TensorBoard hides what earlier files say about later steps.

  Raises:
    OSError: the file cannot be written, here or in `scalars`.
  """

  def __init__(self, folder: Path, step: int):
    from tensorboardX.record_writer import RecordWriter  # imports torch where that is installed

    folder.mkdir(exist_ok=True)
    name = f'events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}'
    self._writer = RecordWriter(str(folder / name))
    self._write(file_version='brain.Event:2')
    self._write(step=step, session_log={'status': 1})  # START

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """One point in each curve."""
    points = [{'tag': tag, 'simple_value': value} for tag, value in values.items()]
    self._write(step=step, summary={'value': points})

  def close(self) -> None:
    """Closes the file; errors were reported when they occurred."""
    with contextlib.suppress(OSError):
      self._writer.close()

  def _write(self, **fields: object) -> None:
    from tensorboardX.proto.event_pb2 import Event

    self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())
    self._writer.flush()
