"""One process at a time, where several have the same to do in one folder."""

import contextlib
import fcntl
import pathlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def alone(path: pathlib.Path, waiting: str, log: Callable[[str], None]) -> Iterator[bool]:
  """Holds a lock on a file; yields whether it does: a network drive may have no locks.

  Args:
    path: of the file, which is made and stays.
    waiting: the line to log if another process has the lock.
    log: called with one line.

  Raises:
    OSError: the file cannot be made.
  """
  with path.open('ab') as file:
    held = True
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      log(waiting)
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
      held = False
    yield held
