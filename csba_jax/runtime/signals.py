"""Turns SIGTERM and Ctrl-C into a request that a loop answers at its next safe point."""

import os
import signal
import threading
import types
from collections.abc import Callable

from csba_jax.runtime import distributed

# 75 is EX_TEMPFAIL: start again
EXIT_CODES: dict[int, int] = {signal.SIGTERM: 75, signal.SIGINT: 130}
Handler = Callable[[int, types.FrameType | None], object] | int | None  # of a signal


def leave_when_told() -> None:
  """Lets SIGTERM and SIGINT end the process at once, with the exit code of the signal.

  Use it while there is nothing to save: at start-up, and after the result is written. It holds
  until another handler is installed. The process ends even if its main thread is in a call that
  runs no Python handlers, such as compiling or waiting for other processes. Call it once, in the
  main thread.
  """
  for number in EXIT_CODES:
    signal.signal(number, _leave)
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # Python writes each signal there at once
  threading.Thread(target=_watch, args=[reader], daemon=True).start()


def _leave(number: int, frame: types.FrameType | None = None) -> None:
  del frame
  os._exit(EXIT_CODES[number])


def _watch(reader: int) -> None:
  """Reads the numbers of signals as they arrive."""
  while True:
    for number in os.read(reader, 1):
      if number in EXIT_CODES and signal.getsignal(number) is _leave:
        _leave(number, None)


class Stopped(Exception):
  """Leaves a loop after a StopRequest; whoever catches it saves what has to be saved."""


class StopRequest:
  """`requested` becomes True on the first SIGTERM or SIGINT; a second one ends the process at once.

  With `patient`, further signals change nothing. Use it for a child process whose parent forwards
  signals: a Ctrl-C in a terminal reaches both.

  In a run of several processes JAX's preemption service takes SIGTERM, or the platform's notice, to
  any of them. All of them must call `check` equally often. It raises in all of them at the same
  call.

  Use it as a context manager in the main thread. Entering it again, inside, changes nothing.
  `exit_code` is the code to exit with.
  """

  def __init__(self, patient: bool = False):
    self._patient = patient
    self._signal: int | None = None
    self._passed_on: int | None = None
    self._previous: dict[int, Handler] = {}
    self._entered = 0
    self._calls = 0

  def __enter__(self) -> 'StopRequest':
    self._entered += 1
    if self._entered > 1:
      return self
    handlers: dict[int, Handler]
    if distributed.count() > 1:
      handlers = {signal.SIGINT: self._pass_on}
    else:
      handlers = dict.fromkeys(EXIT_CODES, self._receive)
    self._previous = {number: signal.signal(number, f) for number, f in handlers.items()}
    return self

  def __exit__(self, *exc_info: object) -> None:
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
    """Turns Ctrl-C into SIGTERM, the only signal that JAX's preemption service knows."""
    del frame
    self._passed_on = number
    os.kill(os.getpid(), signal.SIGTERM)

  @property
  def requested(self) -> bool:
    """Whether a signal has arrived."""
    return self._signal is not None

  def check(self) -> None:
    """Raises Stopped if a signal has reached this process or, by this call, another one."""
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
    """Exit code of the signal that arrived; 0 if none did."""
    return 0 if self._signal is None else EXIT_CODES.get(self._signal, 0)
