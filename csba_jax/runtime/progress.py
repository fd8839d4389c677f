"""What a user sees of a long run: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from csba_jax.runtime import console, distributed

PLAIN_SECONDS = 10.0  # between two plain lines, at least
MEASURED_SECONDS = 2.0  # of work, at least, before an estimate of the time left is shown


class TimeLeft:
  """Seconds that are left of some work, from the rate of the updates that compiled nothing.

  An update that does a number of steps for the first time may have compiled the program for it: a
  first step of 20 s among steps of 20 ms says nothing about the others. So it does not count.
  """

  def __init__(self, done: int, clock: Callable[[], float]):
    self._done, self._clock = done, clock
    self._last = clock()
    self._known: set[int] = set()  # numbers of steps of an update
    self._steps, self._seconds = 0, 0.0
    self._compiled = False  # something else since the last update

  def compiled(self) -> None:
    """Says that something else was compiled since the last update."""
    self._compiled = True

  def update(self, done: int, total: int) -> float | None:
    """What is left after `done` of `total` steps; None while that is not known."""
    now, steps = self._clock(), done - self._done
    if steps in self._known and not self._compiled:
      self._steps, self._seconds = self._steps + steps, self._seconds + now - self._last
    self._known.add(steps)
    self._compiled = False
    self._done, self._last = done, now
    if done >= total:
      return 0.0
    if self._seconds < MEASURED_SECONDS or not self._steps:
      return None
    return self._seconds / self._steps * (total - done)


class TrainingBar:
  """Progress of a run with loss, validation macro-F1, images/s and time left. A context manager."""

  def __init__(
    self,
    total: int,
    start: int,
    clock: Callable[[], float] = time.monotonic,
    stream: TextIO | None = None,
  ):
    self._total = total
    self._clock = clock
    self._stream = stream or console.standard_error()
    self._left = TimeLeft(start, clock)
    self._last_line = float('-inf')
    self._validation, self._validated = '-', False
    self._bar = None
    self._quiet = not distributed.is_first()
    if self._stream.isatty() and not self._quiet:
      self._bar = Progress(
        TextColumn('step {task.completed}/{task.total}'),
        BarColumn(),
        TextColumn('{task.description}'),
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
    text += _in_words(self._left.update(step, self._total))
    if self._bar:
      self._bar.update(self._task, completed=step, description=text)
      return
    now = self._clock()
    if self._quiet or (now - self._last_line < PLAIN_SECONDS and step < self._total):
      return
    self._last_line = now
    print(f'step {step}/{self._total}  {text}', file=self._stream, flush=True)

  def validated(self, macro_f1: float | None) -> None:
    """Shows this validation macro-F1 from the next update on; None in a run without validation."""
    if not self._validated:  # the first one compiles
      self._left.compiled()
    self._validated = True
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
    self._last_line = clock()
    self._left = TimeLeft(0, clock)
    self._bar = None
    self._quiet = not distributed.is_first()
    if self._stream.isatty() and not self._quiet:
      self._bar = Progress(
        TextColumn('{task.completed}/{task.total} images'),
        BarColumn(),
        TextColumn('{task.description}'),
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
    left = _in_words(self._left.update(done, total))
    if self._bar:
      self._bar.update(self._task, completed=done, total=total, description=left)
      return
    now = self._clock()
    if now - self._last_line >= PLAIN_SECONDS and not self._quiet:
      self._last_line = now
      print(f'{done}/{total} images{left}', file=self._stream, flush=True)


def _in_words(seconds: float | None) -> str:
  return '' if seconds is None else f'  {seconds:.0f} s left'


def say(text: str) -> None:
  """One line for the user on standard error, from the first process of a run."""
  if distributed.is_first():
    print(text, file=console.standard_error(), flush=True)
