"""What a user sees of a long run: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from csba_jax.runtime import console, distributed

PLAIN_SECONDS = 10.0  # between two plain lines, at least


class TrainingBar:
  """Progress of a run with loss, validation macro-F1, images/s and time left. A context manager."""

  def __init__(
    self,
    total: int,
    start: int,
    clock: Callable[[], float] = time.monotonic,
    stream: TextIO | None = None,
  ):
    self._total, self._start = total, start
    self._clock = clock
    self._stream = stream or console.standard_error()
    self._started = clock()
    self._last_line = float('-inf')
    self._validation = '-'
    self._bar = None
    self._quiet = not distributed.is_first()
    if self._stream.isatty() and not self._quiet:
      self._bar = Progress(
        TextColumn('step {task.completed}/{task.total}'),
        BarColumn(),
        TextColumn('{task.description}'),
        TimeRemainingColumn(),
        console=Console(file=self._stream),
      )
      self._task = self._bar.add_task('', total=total, completed=start)

  def __enter__(self) -> 'TrainingBar':
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *exc_info: object) -> None:
    if self._bar:
      self._bar.stop()

  def update(self, step: int, loss: float, images_per_second: float) -> None:
    """Shows the state after `step` steps; plain lines come every PLAIN_SECONDS and at the end."""
    text = f'loss {loss:.4f}  val macro-F1 {self._validation}  {images_per_second:.0f} images/s'
    if self._bar:
      self._bar.update(self._task, completed=step, description=text)
      return
    now = self._clock()
    if self._quiet or (now - self._last_line < PLAIN_SECONDS and step < self._total):
      return
    self._last_line = now
    left = (now - self._started) / max(1, step - self._start) * (self._total - step)
    print(f'step {step}/{self._total}  {text}  {left:.0f} s left', file=self._stream, flush=True)

  def validated(self, macro_f1: float | None) -> None:
    """Shows this validation macro-F1 from the next update on; None in a run without validation."""
    self._validation = '-' if macro_f1 is None else f'{macro_f1:.3f}'


class WorkBar:
  """Progress of a pass over images. A context manager; its `update` is the callback of the pass.

  Every update calls `check`, which may raise to end the pass.
  """

  def __init__(
    self,
    check: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
    stream: TextIO | None = None,
  ):
    self._check = check
    self._clock, self._stream = clock, stream or console.standard_error()
    self._started = self._last_line = clock()
    self._bar = None
    self._quiet = not distributed.is_first()
    if self._stream.isatty() and not self._quiet:
      self._bar = Progress(
        TextColumn('{task.completed}/{task.total} images'),
        BarColumn(),
        TimeRemainingColumn(),
        console=Console(file=self._stream),
      )
      self._task = self._bar.add_task('')

  def __enter__(self) -> 'WorkBar':
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *exc_info: object) -> None:
    if self._bar:
      self._bar.stop()

  def update(self, done: int, total: int) -> None:
    """Shows the progress; plain lines come every PLAIN_SECONDS."""
    self._check()
    if self._bar:
      self._bar.update(self._task, completed=done, total=total)
      return
    now = self._clock()
    if now - self._last_line >= PLAIN_SECONDS and not self._quiet:
      self._last_line = now
      left = (now - self._started) / done * (total - done)
      print(f'{done}/{total} images  {left:.0f} s left', file=self._stream, flush=True)


def say(text: str) -> None:
  """One line for the user on standard error, from the first process of a run."""
  if distributed.is_first():
    print(text, file=console.standard_error(), flush=True)
