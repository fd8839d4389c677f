"""SHA-256 of the files of a source: a file is read once, and again only when it has changed."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from csba_jax.data import locks
from csba_jax.data.sources import digest, disk_error
from csba_jax.files import write_atomically

State = tuple[int, int, int, int]  # inode, bytes, time of change of content, and of anything
Kept = dict[bytes, tuple[State, bytes]]  # path: (state when it was read, SHA-256)
NO_FILE: State = (-1, -1, -1, -1)
UNREAD = bytes(32)  # in place of the sum of a file that cannot be read
BLOCK = 1000  # files that are handed to the threads at a time
# Clocks of file systems are coarse, up to 2 s: a file that changed so shortly before it was read
# may change once more and look the same. Its sum is not kept.
SETTLED_NS = 2 * 10**9


@dataclasses.dataclass(frozen=True)
class FileSums:
  """Content sums of files.

  Attributes:
    files: N paths.
    states: of each file, before it was read.
    sums: SHA-256 of each; UNREAD for one that cannot be read.
  """

  files: Sequence[pathlib.Path]
  states: tuple[State, ...]
  sums: tuple[bytes, ...]

  def changed(self) -> list[pathlib.Path]:
    """The files that are others by now."""
    return [f for f, before in zip(self.files, self.states, strict=True) if _state(f) != before]


def read(files: Sequence[pathlib.Path], root: pathlib.Path, log: Callable[[str], None]) -> FileSums:
  """The sums of files. Those of unchanged files come from ROOT/sums-FOLDER.npz.

  A file is unchanged if its path, inode, length and both times (mtime and ctime) are. The ctime is
  set by the system at every change, also by `cp -p` and `touch`. Several processes read one after
  the other, so that the first one reads for all. With $CSBA_VERIFY_CACHE every file is read.

  Args:
    files: paths; none is allowed.
    root: folder of the caches.
    log: called with one line at a time: progress, and one warning if the sums cannot be kept.

  Raises:
    UserError: a disk that fails.
  """
  if not files:
    return FileSums((), (), ())
  paths = [os.fsencode(os.path.abspath(file)) for file in files]
  kept_in = root / f'sums-{digest([os.path.commonpath([min(paths), max(paths)])])[:16]}.npz'
  states = tuple(map(_state, files))
  everything = bool(os.environ.get('CSBA_VERIFY_CACHE'))

  def known() -> Kept:
    kept = {} if everything else _load(kept_in)
    return {p: kept[p] for p, s in zip(paths, states, strict=True) if p in kept and kept[p][0] == s}

  found = known()
  if len(found) < len(files):
    with contextlib.ExitStack() as stack:
      with contextlib.suppress(OSError):  # a folder that cannot be written: each reads for itself
        root.mkdir(parents=True, exist_ok=True)
        waiting = f'waiting for another process that reads the files of {files[0].parent.parent}'
        stack.enter_context(locks.alone(kept_in.with_name(f'.{kept_in.name}.lock'), waiting, log))
        found = known()
      settled = time.time_ns() - SETTLED_NS
      new = _read_all([f for f, p in zip(files, paths, strict=True) if p not in found], log)
      _keep(kept_in, {p: pair for p, pair in new.items() if pair[0][3] < settled}, log)
      found |= new
  pairs = [found[path] for path in paths]
  return FileSums(files, tuple(state for state, _ in pairs), tuple(sum_ for _, sum_ in pairs))


def _state(file: pathlib.Path) -> State:
  """What tells that a file has changed; NO_FILE for a broken link."""
  try:
    found = os.stat(file)
  except (FileNotFoundError, PermissionError):
    return NO_FILE
  except OSError as error:
    raise disk_error(file, error) from error
  # an inode may take 64 bits, of which an int64 holds 63
  return found.st_ino & (2**63 - 1), found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read_all(files: Sequence[pathlib.Path], log: Callable[[str], None]) -> Kept:
  """State and sum of every file, which are read in a few threads."""
  found: Kept = {}
  last = time.monotonic()
  with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
    for start in range(0, len(files), BLOCK):
      block = files[start : start + BLOCK]
      for file, pair in zip(block, pool.map(_read, block), strict=True):
        found[os.fsencode(os.path.abspath(file))] = pair
        if time.monotonic() - last >= 5:
          last = time.monotonic()
          log(f'read {len(found)} of {len(files)} files, to tell later whether they have changed')
  return found


def _read(file: pathlib.Path) -> tuple[State, bytes]:
  """(state before reading, SHA-256) of one file."""
  state = _state(file)
  try:
    with file.open('rb') as opened:
      return state, hashlib.file_digest(opened, 'sha256').digest()
  except (FileNotFoundError, PermissionError):
    return state, UNREAD
  except OSError as error:
    raise disk_error(file, error) from error


def _load(path: pathlib.Path) -> Kept:
  """The sums that are kept in a file; none if there is no such file, or a damaged one."""
  try:
    with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
      paths = arrays['paths'].tobytes().split(b'\0')
      states, sums = arrays['states'].astype(np.int64), arrays['sums'].astype(np.uint8)
    rows = zip(paths, map(tuple, states.tolist()), sums, strict=True)
    return {path: (state, sum_.tobytes()) for path, state, sum_ in rows}
  except Exception:  # a damaged zip fails in a dozen ways; then all files are read
    return {}


def _keep(path: pathlib.Path, new: Kept, log: Callable[[str], None]) -> None:
  """Adds sums to those that are kept, and drops those of files that are gone."""
  new = {p: pair for p, pair in new.items() if pair[1] != UNREAD}
  if not new:
    return
  kept = {p: pair for p, pair in _load(path).items() if os.path.lexists(p)} | new
  paths = np.frombuffer(b'\0'.join(kept), np.uint8)
  states = np.array([state for state, _ in kept.values()], np.int64)
  sums = np.frombuffer(b''.join(sum_ for _, sum_ in kept.values()), np.uint8).reshape(-1, 32)
  try:
    write_atomically(path, lambda file: np.savez(file, paths=paths, states=states, sums=sums))
  except OSError as error:
    log(f'no file sums at {path} ({error}): the files will be read in every run')
