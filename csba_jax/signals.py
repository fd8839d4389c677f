"""SIGTERM and Ctrl-C become a request that a loop answers at its next safe moment."""

import os
import signal
import types

from csba_jax import processes

EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}  # 75 = EX_TEMPFAIL: start me again


def leave_on_sigterm() -> None:
  """SIGTERM ends the process with its code at once: while there is nothing to save, or no more."""
  signal.signal(signal.SIGTERM, lambda number, _: os._exit(EXIT_CODES[number]))


class Stopped(Exception):
  """Leaves a loop that nothing was saved of, after a StopRequest."""


class StopRequest:
  """`requested` turns True on the first SIGTERM or SIGINT; a second one ends the process at once.

  A `patient` one takes any number of them: for a process that another one watches over, where both
  may be told by the same hand.

  Where a run has several processes, JAX's preemption service takes SIGTERM (or the platform's
  notice) of any of them; all have to call `check` equally often, and it raises in all of them at
  the same call.

  Use as a context manager in the main thread; `exit_code` is what to leave with.
  """

  def __init__(self, patient: bool = False):
    self._patient = patient
    self._signal: int | None = None
    self._previous = {}
    self._calls = 0

  def __enter__(self) -> 'StopRequest':
    if processes.count() > 1:  # SIGTERM is the preemption service's; Ctrl-C is to mean the same
      handlers = {signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
    else:
      handlers = dict.fromkeys(EXIT_CODES, self._receive)
    self._previous = {number: signal.signal(number, f) for number, f in handlers.items()}
    return self

  def __exit__(self, *exc_info) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _receive(self, number: int, frame: types.FrameType | None) -> None:
    del frame
    self._signal = number
    if not self._patient:
      signal.signal(number, signal.SIG_DFL)

  @property
  def requested(self) -> bool:
    """Whether a signal has come."""
    return self._signal is not None

  def check(self) -> None:
    """Raises Stopped if a signal has come to this process or, at the same call, to another one."""
    if processes.count() > 1:
      from jax.experimental import multihost_utils

      self._calls += 1
      if multihost_utils.reached_preemption_sync_point(self._calls):
        self._signal = signal.SIGTERM
    if self.requested:
      raise Stopped

  @property
  def exit_code(self) -> int:
    """Exit code for the signal that came; 0 if none did."""
    return EXIT_CODES.get(self._signal, 0)
