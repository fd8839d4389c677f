"""Paths as users write them, and files that are written completely or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from csba_jax.errors import UserError


def expanded(path: str | os.PathLike) -> Path:
  """The path with ~ and ~USER replaced by the home folder.

  Raises:
    UserError: there is no such user, or nobody knows the home folder.
  """
  try:
    return Path(path).expanduser()
  except RuntimeError as error:
    raise UserError(
      f'a home folder for {str(path).split("/", 1)[0]} in the path {path}',
      'no such user' if str(path)[1:2] not in ('', '/') else 'neither $HOME nor an entry of passwd',
      'set HOME, or write the path without ~ (that of the cache: CSBA_CACHE_DIR)',
    ) from error


def write_atomically(path: Path, fill: Callable[[BinaryIO], object]) -> None:
  """Writes a new file and renames it to `path`: a crash leaves the old file or the new one."""
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
  try:
    with os.fdopen(handle, 'wb') as file:
      fill(file)
      file.flush()
      os.fsync(file.fileno())
    os.chmod(temporary, 0o644)  # mkstemp makes files that other users may not read
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(temporary)
    raise


def check_new_folder(flag: str, path: Path) -> None:
  """Raises UserError unless a new folder can be made at `path`."""
  if path.exists():
    raise UserError(f'a new folder for {flag}', f'{path}, which exists', 'name another one')
  if not path.absolute().parent.is_dir():
    raise UserError(f'a folder for {flag}', f'no {path.parent}', 'make the folder first')


def check_new(flag: str, path: Path, suffixes: Sequence[str]) -> None:
  """Raises UserError unless a new file with one of these endings can be made at `path`."""
  if path.suffix not in suffixes:
    named = ' or '.join(f'FILE{suffix}' for suffix in suffixes)
    raise UserError(f'{flag}={named}', str(path), 'give the file such an ending')
  if path.exists():
    raise UserError(f'a new file for {flag}', f'{path}, which exists', 'name another one')
  if not path.absolute().parent.is_dir():
    raise UserError(f'a folder for {flag}', f'no {path.parent}', 'make the folder first')
