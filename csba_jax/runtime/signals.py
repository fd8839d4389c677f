"""SIGTERM and Ctrl-C become a request that a loop answers at its next safe moment."""

import os
import signal
import threading
import types

from csba_jax.runtime import distributed

EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}  # 75 = EX_TEMPFAIL: start me again


def leave_when_told() -> None:
  """A signal ends the process with its code at once: while there is nothing to save, or no more.

  Until another handler takes it. Also while the main thread is in a call that lets no handler of
  Python run, such as waiting for the other processes or compiling. In the main thread, once.
  """
  for number in EXIT_CODES:
    signal.signal(number, _leave)
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # where Python notes a signal at once
  threading.Thread(target=_watch, args=[reader], daemon=True).start()


def _leave(number: int, frame: types.FrameType | None = None) -> None:
  del frame
  os._exit(EXIT_CODES[number])


def _watch(reader: int) -> None:
  """Reads the numbers of the signals that have come."""
  while True:
    for number in os.read(reader, 1):
      if number in EXIT_CODES and signal.getsignal(number) is _leave:
        _leave(number)


class Stopped(Exception):
  """Leaves a loop that nothing was saved of, after a StopRequest."""


class StopRequest:
  """`requested` turns True on the first SIGTERM or SIGINT; a second one ends the process at once.

  A `patient` one takes any number of them: for a process that another one watches over, where both
  may be told by the same hand.

  Where a run has several processes, JAX's preemption service takes SIGTERM (or the platform's
  notice) of any of them; all have to call `check` equally often, and it raises in all of them at
  the same call.

  Use as a context manager in the main thread, as often as one likes: entered already, it stays as
  it is. `exit_code` is what to leave with.
  """

  def __init__(self, patient: bool = False):
    self._patient = patient
    self._signal: int | None = None
    self._passed_on: int | None = None
    self._previous = {}
    self._entered = 0
    self._calls = 0

  def __enter__(self) -> 'StopRequest':
    self._entered += 1
    if self._entered > 1:
      return self
    if distributed.count() > 1:
      handlers = {signal.SIGINT: self._pass_on}
    else:
      handlers = dict.fromkeys(EXIT_CODES, self._receive)
    self._previous = {number: signal.signal(number, f) for number, f in handlers.items()}
    return self

  def __exit__(self, *exc_info) -> None:
    self._entered -= 1
    if self._entered:
      return
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _receive(self, number: int, frame: types.FrameType | None) -> None:
    del frame
    self._signal = number
    if not self._patient:
      signal.signal(number, signal.SIG_DFL)

  def _pass_on(self, number: int, frame: types.FrameType | None) -> None:
    """Ctrl-C in one of several processes, whose preemption service knows SIGTERM alone."""
    del frame
    self._passed_on = number
    os.kill(os.getpid(), signal.SIGTERM)

  @property
  def requested(self) -> bool:
    """Whether a signal has come."""
    return self._signal is not None

  def check(self) -> None:
    """Raises Stopped if a signal has come to this process or, at the same call, to another one."""
    if distributed.count() > 1:
      from jax.experimental import multihost_utils

      self._calls += 1
      if multihost_utils.reached_preemption_sync_point(self._calls):
        passed_on = distributed.gather(str(self._passed_on or ''))
        self._signal = signal.SIGINT if any(passed_on) else signal.SIGTERM
    if self.requested:
      raise Stopped

  @property
  def exit_code(self) -> int:
    """Exit code for the signal that came; 0 if none did."""
    return EXIT_CODES.get(self._signal, 0)
