"""SIGTERM and Ctrl-C become a request that a loop answers at its next safe moment."""

import signal
import types

EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}  # 75 = EX_TEMPFAIL: start me again


class Stopped(Exception):
  """Leaves a loop that nothing was saved of, after a StopRequest."""


class StopRequest:
  """`requested` turns True on the first SIGTERM or SIGINT; a second one ends the process at once.

  A `patient` one takes any number of them: for a process that another one watches over, where both
  may be told by the same hand.

  Use as a context manager in the main thread; `exit_code` is what to leave with.
  """

  def __init__(self, patient: bool = False):
    self._patient = patient
    self._signal: int | None = None
    self._previous = {}

  def __enter__(self) -> 'StopRequest':
    self._previous = {number: signal.signal(number, self._receive) for number in EXIT_CODES}
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
    """Raises Stopped if a signal has come: for work that is done as a whole or not at all."""
    if self.requested:
      raise Stopped

  @property
  def exit_code(self) -> int:
    """Exit code for the signal that came; 0 if none did."""
    return EXIT_CODES.get(self._signal, 0)
