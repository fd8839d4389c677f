"""Standard streams of a command: what cannot be shown must not end a run.

Standard error may be closed, a pipe without a reader, or a file on a full disk.
"""

import atexit
import functools
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO, cast


class Forgiving:
  """A text stream that drops what cannot be written, and keeps the first error.

  Args:
    stream: the stream behind it; None drops everything.
  """

  def __init__(self, stream: TextIO | None):
    self._stream = stream
    self.error: Exception | None = None

  def write(self, text: str) -> int:
    """Writes the text if it can; characters that the encoding lacks become escapes."""
    if self._stream is not None:
      try:
        try:
          self._stream.write(text)
        except UnicodeEncodeError as error:
          known = text.encode(error.encoding, 'backslashreplace').decode(error.encoding)
          self._stream.write(known)
      except (OSError, ValueError) as error:  # ValueError: it was closed
        self.error = self.error or error
    return len(text)

  def flush(self) -> None:
    """Flushes the stream if it can."""
    if self._stream is not None:
      try:
        self._stream.flush()
      except (OSError, ValueError) as error:
        self.error = self.error or error

  def isatty(self) -> bool:
    """Whether a terminal shows it."""
    return self._stream is not None and not self._stream.closed and self._stream.isatty()

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


def standard_error() -> TextIO:
  """The standard error of this moment, behind a stream that never raises."""
  found: Any = sys.stderr
  return cast(TextIO, found if isinstance(found, Forgiving) else Forgiving(found))


def secure(command: str) -> Callable[[], None]:
  """Lets no standard stream end a command, which calls it before all else.

  What is written to a closed standard error, or to one without room, is lost. A result that
  cannot be written to standard output is one line and exit code 1, once the command is done.

  Returns:
    What is called then. Call it before an end that Python does not notice (os._exit).
  """
  for number in range(3):
    _fill(number)
  output, sys.stderr = Forgiving(sys.stdout), standard_error()
  sys.stdout = cast(TextIO, output)
  report = functools.partial(_report, command, output)
  atexit.register(report)  # the first that is registered is called last
  return report


def _fill(number: int) -> None:
  """Opens the null device where a standard stream is closed: no file of the run takes its place."""
  try:
    os.fstat(number)
  except OSError:
    os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number


def _report(command: str, output: Forgiving) -> None:
  output.flush()
  if output.error is None:
    return
  if not isinstance(output.error, BrokenPipeError):  # the reader of a pipe knows why it left
    words = getattr(output.error, 'strerror', None) or output.error
    print(
      f'{command}: expected a standard output with room for the result; found {words}; to fix it: '
      'send it elsewhere and start the same command again',
      file=sys.stderr,
      flush=True,
    )
  os._exit(1)
