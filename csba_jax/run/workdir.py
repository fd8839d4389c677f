"""The folder of a run: one config, one process at a time, and only complete files."""

import contextlib
import errno
import fcntl
import functools
import importlib.metadata
import json
import math
import os
import platform
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

import csba_jax
from csba_jax import config as config_lib
from csba_jax.errors import UserError
from csba_jax.files import expanded, write_atomically
from csba_jax.run import checks
from csba_jax.runtime import distributed, numerics
from csba_jax.runtime.progress import say

_DECISIVE = ('JAX_', 'XLA_', 'LIBTPU_', 'CUDA_VISIBLE', 'NVIDIA_TF32', 'NCCL_', 'OMP_NUM')
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'scipy')
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # the file system has no locks
LOCK_POLL = 0.1  # seconds between two attempts to take a lock


class InUse(UserError):
  """Another process uses the folder."""


class Workdir:
  """The folder with all files of a run.

  config.json, net.json, splits.npz, metrics.jsonl, result.json, checkpoints/ and tensorboard/.

  Use it as a context manager: it holds a lock, which the system releases when the process ends in
  any way. Where a run has several processes, all of them open the folder. The first process holds
  the lock and writes; in the others, the functions that write do nothing.

  Raises:
    UserError: the folder cannot be written, belongs to another config, is in use, or is not the
      same folder for all processes.
  """

  def __init__(self, path: str | os.PathLike, config: Mapping[str, Any]):
    self.path = expanded(path).absolute()
    self._config = config
    self._stack = contextlib.ExitStack()  # holds the lock
    self._mark = secrets.token_hex(8)

  def __enter__(self) -> 'Workdir':
    with contextlib.ExitStack() as stack:
      distributed.together(lambda: self._lock(stack))
      distributed.together(self._check_shared)
      distributed.together(self._claim)
      self._stack = stack.pop_all()
    return self

  def _lock(self, stack: contextlib.ExitStack) -> None:
    if distributed.is_first():
      stack.enter_context(lock_file(self.path, '.lock'))
      with writing_to(self.path):
        self.file('.lock').write_text(self._mark)

  def _check_shared(self) -> None:
    """Raises UserError in a process that does not see what the first one wrote."""
    mark = distributed.broadcast(self._mark)
    try:
      found = self.file('.lock').read_text()
    except OSError:
      found = ''
    if found != mark:
      raise UserError(
        f'a --workdir that all processes share: what the first one wrote to {self.path}',
        f'another folder, or none, on {platform.node()}',
        'name a folder of a file system that every host has mounted',
      )

  def __exit__(self, *exc_info: object) -> None:
    self._stack.close()

  def _claim(self) -> None:
    if self.file('config.json').exists():
      here = config_lib.completed(self._config)
      if different := config_lib.differences(read_config(self.path), here):
        raise UserError(
          f'the config that {self.path} was started with',
          '; '.join(different),
          'name another --workdir, or set these fields to their old values',
        )

  def begin(self, devices: int = 1) -> list[str]:
    """Writes config.json; from then on the folder belongs to this config.

    Args:
      devices: among which the run divides its batches.

    Returns:
      Where config.json exists: what decides the last bits of the numbers and differs, packages
      and `numerics.record`, as 'name: THERE there, HERE here'. What it does not name is left out.
    """
    if self.file('config.json').exists():
      before = _read_record(self.path)
      there = before.get('versions', {})
      here = {package: version for package, version in versions().items() if package in there}
      found = config_lib.differences(there, here)
      return found + numerics.differences(before.get('numerics', {}), numerics.record(devices))
    record = {'config': dict(self._config), 'versions': versions(), 'commit': commit()}
    record |= {'numerics': numerics.record(devices), 'environment': environment()}
    self.write_json('config.json', record)
    return []

  def file(self, name: str) -> Path:
    """Path of a file in the workdir."""
    return self.path / name

  def write(self, name: str, fill: Callable[[BinaryIO], object]) -> None:
    """Writes a file as a whole or not at all: `fill(binary file)`, then a rename."""
    if distributed.is_first():
      with writing_to(self.path):
        write_atomically(self.file(name), fill)

  def has_checkpoints(self) -> bool:
    """Whether there is a finished checkpoint, damaged or not."""
    folder = self.file('checkpoints')
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())

  def result(self) -> dict[str, Any] | None:
    """result.json, or None while the run is not finished."""
    return read_result(self.path) if self.file('result.json').exists() else None

  def write_result(self, result: Mapping[str, Any]) -> None:
    """Writes result.json, the last file of a run."""
    self.write_json('result.json', result)

  def write_json(self, name: str, record: Mapping[str, Any]) -> None:
    """Writes a JSON file; NaN becomes null."""
    self.write(name, lambda file: file.write((strict_json(record, indent=2) + '\n').encode()))

  def metrics_length(self) -> int:
    """Bytes in metrics.jsonl; a checkpoint stores the number, see `rewind_metrics`."""
    path = self.file('metrics.jsonl')
    return path.stat().st_size if path.exists() else 0

  def rewind_metrics(self, length: int) -> None:
    """Cuts metrics.jsonl to its length at a checkpoint: the later lines will be written again."""
    if not distributed.is_first():
      return
    if self.metrics_length() < length:
      raise UserError(
        f'{length} bytes in {self.file("metrics.jsonl")}, as at the last checkpoint',
        f'{self.metrics_length()}',
        'restore the file from a backup, or name another --workdir',
      )
    with writing_to(self.path), open(self.file('metrics.jsonl'), 'ab') as file:
      file.truncate(length)

  def append_metrics(self, record: Mapping[str, Any]) -> None:
    """Adds one line to metrics.jsonl; it is on disk on return."""
    if not distributed.is_first():
      return
    with writing_to(self.path), open(self.file('metrics.jsonl'), 'ab') as file:
      file.write((strict_json(record) + '\n').encode())
      file.flush()
      os.fsync(file.fileno())


@contextlib.contextmanager
def lock_file(folder: Path, name: str, seconds: float = 0.0) -> Iterator[None]:
  """Makes the folder and holds a lock in it; the system releases it when the process ends.

  A folder that it made and that holds nothing else at the end is removed again, with the parents
  that it made: an error before a run begins leaves nothing behind.

  Args:
    folder: is made where it is absent.
    name: of the lock file.
    seconds: to wait for another process that holds the lock.

  Raises:
    InUse: another process still holds the lock.
    UserError: the folder cannot be made or written.
  """
  with writing_to(folder):
    if folder.exists() and not folder.is_dir():
      raise UserError('a folder as --workdir', f'the file {folder}', 'name another workdir')
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / name, 'w')  # noqa: SIM115
  deadline = time.monotonic() + seconds
  with file:
    while not _locked(file, folder):
      if time.monotonic() >= deadline:
        raise InUse(
          'one process for each workdir',
          f'another process at work in {folder}',
          'wait for that process, end it, or name another --workdir',
        )
      time.sleep(LOCK_POLL)
    try:
      yield
    finally:
      _remove_unused(made, folder / name)


def _remove_unused(made: list[Path], lock: Path) -> None:
  """Removes folders that hold nothing but the lock, from the inside out."""
  with contextlib.suppress(OSError):  # it is gone, or something is in it: then it is of use
    if made and [path.name for path in made[0].iterdir()] == [lock.name]:
      lock.unlink()
      for folder in made:
        folder.rmdir()


def _locked(file: IO, folder: Path) -> bool:
  """Whether this process now has the lock of an open file, or the file system has no locks."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True
  except OSError as error:
    if error.errno in (errno.EAGAIN, errno.EACCES):
      return False
    if error.errno not in _NO_LOCKS:
      raise
    say(
      f'{folder} is on a file system without locks ({error.strerror}): make sure that no other '
      'process uses it'
    )
    return True


def read_config(path: str | os.PathLike) -> dict[str, Any]:
  """The resolved config in a workdir's config.json; UserError where there is no valid one.

  Fields that are newer than the run have their defaults.
  """
  return config_lib.completed(_read_record(Path(path))['config'])


def threads_of(path: str | os.PathLike) -> int | None:
  """How many threads XLA had when the run in a workdir began; None where nobody knows."""
  if not (expanded(path) / 'config.json').exists():
    return None
  found = _read_record(Path(path)).get('numerics', {}).get('threads')
  return found if isinstance(found, int) and found > 0 else None


def _read_record(path: Path) -> dict[str, Any]:
  """The content of config.json, its parts of the right types."""
  file = path / 'config.json'
  record = read_json(file, 'a workdir made by csba-train', 'config')
  like = {'config': config_lib.default().to_dict(), 'versions': {}, 'numerics': {}}
  if wrong := _misshapen(like, record):
    raise damaged(file, wrong)
  return record


def _misshapen(like: Mapping[str, Any], found: Mapping[str, Any], prefix: str = '') -> str:
  """The first field that is a section in one of the two and a value in the other; '' if none is."""
  for key in like.keys() & found.keys():
    section = isinstance(like[key], dict)
    if section != isinstance(found[key], dict):
      return f'{prefix}{key} is {"no" if section else "a"} section'
    if section and (words := _misshapen(like[key], found[key], f'{prefix}{key}.')):
      return words
  return ''


def read_result(path: str | os.PathLike) -> dict[str, Any]:
  """The content of a finished run's result.json; UserError where there is no valid one."""
  folder = expanded(path)
  if (folder / 'config.json').exists() and not (folder / 'result.json').exists():
    raise UserError(
      f'a finished run in {path}',
      'a run that goes on or was stopped: no result.json there',
      'wait for it or start it again; csba-evaluate --checkpoint=latest shows how far it is',
    )
  expected = 'a finished run (csba-train ends with result.json)'
  file = folder / 'result.json'
  record = read_json(file, expected, 'splits_sha256')
  try:
    checks.check_whole(record)
  except ValueError as error:
    raise damaged(file, str(error)) from error
  return record


def read_json(file: Path, expected: str, key: str) -> dict[str, Any]:
  """The JSON object in a file; UserError where there is none, or none with this key."""
  file = expanded(file)
  try:
    record = json.loads(file.read_text(encoding='utf-8'))
    if not isinstance(record, dict) or key not in record:
      raise ValueError(f'no {key!r} in it')
    return record
  except (FileNotFoundError, NotADirectoryError) as error:
    raise UserError(
      f'{expected} in {file.parent}', f'no {file.name} there', 'correct the path'
    ) from error
  except (OSError, ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
    raise damaged(file, str(error)) from error


def damaged(file: Path, why: str) -> UserError:
  """The error for a file of a run that is not as it was written."""
  return UserError(
    f'a whole {file}', f'a damaged one ({why})', 'start the run again in another --workdir'
  )


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
  """Turns errors such as a full disk or a read-only folder into a UserError."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f'a workdir with room that can be written at {path}',
      error.strerror or str(error),
      'free space or name another --workdir; started again, a run goes on from its last checkpoint',
    ) from error


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that the numbers depend on."""
  return {'python': platform.python_version(), 'csba_jax': csba_jax.__version__} | {
    package: importlib.metadata.version(package) for package in PACKAGES
  }


def environment() -> dict[str, Any]:
  """What else numbers or speed may depend on: settings of JAX and XLA, and all packages."""
  return {
    'variables': {k: v for k, v in sorted(os.environ.items()) if k.startswith(_DECISIVE)},
    'packages': dict(_packages()),
    'system': platform.platform(),
  }


@functools.cache  # reading them takes half a second, and a study's worker begins many runs
def _packages() -> tuple[tuple[str, str], ...]:
  """Name and version of every package that this process can import, by name."""
  packages = importlib.metadata.distributions()
  found = {package.name: package.version for package in packages if package.name}
  return tuple(sorted(found.items(), key=lambda pair: pair[0].lower()))


def commit() -> str | None:
  """Git commit of this source tree, with '+changes' where files differ; None outside git."""
  git = ['git', '-C', str(Path(__file__).parent)]
  try:
    head = subprocess.run([*git, 'rev-parse', 'HEAD'], capture_output=True, text=True, check=True)
    status = subprocess.run(
      [*git, 'status', '--porcelain', '--untracked-files=no'],
      capture_output=True,
      text=True,
      check=True,
    )
  except (OSError, subprocess.CalledProcessError):
    return None
  return head.stdout.strip() + ('+changes' if status.stdout.strip() else '')


def strict_json(record: Mapping[str, Any], indent: int | None = None) -> str:
  """Strict JSON: NumPy values as Python's; NaN and infinity, which JSON lacks, become null."""
  return json.dumps(_finite(record), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {str(key): _finite(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(item) for item in value]
  if isinstance(value, np.ndarray | np.generic):
    return _finite(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
