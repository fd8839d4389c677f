"""Asynchronous checkpoints of pytrees with orbax: the latest two and the best, each complete.

Orbax makes a checkpoint appear as a whole or not at all, but it does not notice every byte that
changes afterwards. So the SHA-256 sums of its files are written to `<directory>-sums/` just before
it appears, and they are compared before it is read. Several processes save and read together; the
first process manages the folders.
"""

import errno
import functools
import hashlib
import json
import logging as python_logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from jax import Array
from orbax.checkpoint import checkpoint_managers

from csba_jax.errors import TryAgain, UserError
from csba_jax.files import write_atomically
from csba_jax.runtime import distributed

PyTree = Any
# Orbax logs its errors with tracebacks, once in each of its threads, and raises the first as well.
logging.get_absl_logger().addFilter(lambda record: '/orbax/' not in record.pathname)


def _not_of_orbax(record: python_logging.LogRecord) -> bool:
  """False for asyncio's report of a write of orbax that failed after another one had.

  The first failure ends the save and is raised. Nobody waits for the others any more, so asyncio
  logs each when it is collected: with orbax in its traceback, or, where the error comes from
  tensorstore and has no traceback, in the name of the file.
  """
  return 'orbax' not in python_logging.Formatter().format(record)


python_logging.getLogger('asyncio').addFilter(_not_of_orbax)


def _ignoring_closed_loops(report: Callable[[Any], Any]) -> Callable[[Any], Any]:
  """A `sys.unraisablehook` like `report`, silent about files that are written after a failed save.

  The first write that fails ends the event loop of the save. Writes that end afterwards find it
  closed. Then tensorstore, from C++, prints a traceback for each.
  """

  def hook(unraisable: Any) -> None:
    trace = unraisable.exc_traceback
    from_cpp = trace is not None and trace.tb_frame.f_code.co_name == 'call_soon_threadsafe'
    if not (from_cpp and str(unraisable.exc_value) == 'Event loop is closed'):
      report(unraisable)

  return hook


sys.unraisablehook = _ignoring_closed_loops(sys.unraisablehook)

# Files that orbax writes again after the sums are taken. The first name is private to orbax; it was
# read in orbax-checkpoint 0.12.8.
_WRITTEN_LATER = ('_CHECKPOINT_METADATA', ocp.path.atomicity_types.COMMIT_SUCCESS_FILE)


class Checkpoints:
  """Numbered checkpoints in one folder: a pytree, a JSON-able `meta` and an optional score each.

  It keeps the latest two (the older one in case the newer is damaged) and the one with the highest
  score; of equal scores, the latest. Use it as a context manager: its exit finishes the last save.

  Args:
    directory: of the checkpoints; made where it is absent.
    read_only: writes nothing, so that a run may go on in the same folder.
    warn: called with a message about each damaged checkpoint.

  Raises:
    UserError: the folder cannot be made or read, or every score in it is damaged.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    read_only: bool = False,
    warn: Callable[[str], None] = logging.warning,
  ):
    policy = checkpoint_managers
    self._directory = Path(directory).absolute()
    self._warn = warn
    self._read_only = read_only
    self._last_saved: int | None = None
    options = ocp.CheckpointManagerOptions(
      save_decision_policy=policy.FixedIntervalPolicy(1),
      preservation_policy=policy.AnyPreservationPolicy(
        [
          policy.LatestN(2),
          policy.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False),
        ]
      ),
      best_fn=_score,  # without it, best_step() would be the latest step without a warning
      best_mode='max',
      read_only=read_only,
      async_options=ocp.AsyncOptions(post_finalization_callback=self._keep_sums),
    )
    if not read_only:
      self._guard(lambda: self._directory.mkdir(parents=True, exist_ok=True))
      distributed.together(lambda: self._guard(self._drop_unfinished))
      distributed.together(self._leave_out_damaged_scores)
    self._manager = self._guard(lambda: ocp.CheckpointManager(self._directory, options=options))

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
    try:
      if exc_type is None:
        self.wait()
      self._guard(self._manager.close)
    except UserError:
      if exc_type is None:  # otherwise the first error says more
        raise

  def steps(self) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, tree: PyTree, meta: dict[str, Any], score: float | None = None) -> None:
    """Starts to save; on return the tree may be donated. Does nothing for the last step again.

    A step that an earlier process saved is saved again: more has been done at that step since.

    Raises:
      UserError: this save or the one before it could not be written.
    """
    if step == self._last_saved:
      return
    self.wait()
    if step in self.steps():
      self._guard(lambda: self._manager.delete(step))
    # After the deletion: if the process dies during it, the sums show that the rest is damaged.
    if distributed.is_first():
      self._guard(lambda: self._sums(step).unlink(missing_ok=True))
    self._last_saved = step
    # A copy, because on CPU orbax reads the buffers while the next step already overwrites them.
    tree = _copy(tree)
    args = ocp.args.Composite(state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta))
    # Orbax keeps the best and warns at each save without metrics: no score is lower than any.
    metrics = {'score': -math.inf if score is None else score}
    self._guard(lambda: self._manager.save(step, args=args, metrics=metrics))

  def wait(self) -> None:
    """Returns when all saves are on disk; raises UserError where one failed."""
    self._guard(self._manager.wait_until_finished)
    if distributed.is_first() and not self._read_only:
      self._guard(self._drop_sums)

  def _guard(self, action: Callable[[], Any]) -> Any:
    try:
      return action()
    except Exception as error:
      if distributed.lost_another(error):
        raise
      # Orbax waits by the clock of the system: one that is set forward ends the wait at once.
      alone = distributed.count() == 1
      kind = TryAgain if alone and isinstance(error, TimeoutError) else UserError
      # of a save that failed, coroutines are left; Python says so of each one when it ends
      warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)
      words = f'{type(error).__name__}: {" ".join(str(error).split())}'
      full = os.strerror(errno.ENOSPC)
      raise kind(
        f'checkpoints to be read and written in {self._directory}',
        full if full in words else words[:300],
        'remove the cause (if the disk is full, free space) and start again: the run goes on from '
        'the last whole checkpoint',
      ) from error

  def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """(tree, meta) saved at `step`; `like` gives structure, shapes, dtypes and shardings.

    The number of devices and processes that saved it does not matter. A leaf without a sharding is
    put on one device.

    Raises:
      UserError: the checkpoint is damaged, or has other shapes.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def target_of(x: Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, 'sharding', None) or here)

    target = jax.tree.map(target_of, like)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore())
    distributed.together(functools.partial(self._check_sums, step))
    try:
      restored = self._manager.restore(step, args=args)
    except Exception as error:
      if distributed.lost_another(error):
        raise
      raise UserError(
        f'a whole checkpoint at step {step} in {self._directory}',
        f'one that is damaged or of another architecture ({" ".join(str(error).split())[:200]})',
        f'use another of {self.steps()}',
      ) from error
    return restored.state, restored.meta

  def restore_latest(self, like: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
    """The newest checkpoint that can be read, or None where there is none at all.

    A damaged one is reported to `warn` and moved to `<directory>-damaged/`, so that its step can be
    saved again; but only after an older one has been read.

    Raises:
      UserError: there are checkpoints, but none can be read.
    """
    damaged = []
    for step in reversed(self.steps()):
      try:
        found = self.restore(step, like)
      except UserError as error:
        damaged.append((step, error))
        continue
      for newer, problem in damaged:
        self._set_aside(newer, str(problem))
      distributed.wait()
      self._manager.reload()
      return found
    if damaged:
      raise UserError(
        f'a checkpoint in {self._directory} that can be read',
        f'{len(damaged)} that cannot, the newest because: {damaged[0][1]}',
        'use the code and packages of config.json, or train in another --workdir',
      )
    return None

  def _drop_unfinished(self) -> None:
    """Deletes what killed processes were saving; orbax deletes only what this version began."""
    if distributed.is_first():
      for path in ocp.path.step.all_temporary_paths(self._directory):
        shutil.rmtree(path.get())

  def _leave_out_damaged_scores(self) -> None:
    """Sets aside checkpoints with an unreadable score; with them orbax would not open the folder.

    Raises:
      UserError: no checkpoint has a readable score.
    """
    if not distributed.is_first():
      return
    steps = {int(path.name) for path in self._directory.glob('*') if path.name.isdigit()}
    damaged = {}
    for step in steps:
      file = self._directory / str(step) / 'metrics' / 'metrics'
      try:
        _score(json.loads(file.read_text())) if file.exists() else None
      except (OSError, ValueError, KeyError, TypeError) as error:
        damaged[step] = f'{file} is unreadable ({error})'
    if damaged and damaged.keys() == steps:
      raise UserError(
        f'a checkpoint in {self._directory} that can be read',
        damaged[max(damaged)],
        'train in another --workdir',
      )
    for step, reason in damaged.items():
      self._set_aside(step, reason)

  def _sums(self, step: int) -> Path:
    return self._directory.with_name(f'{self._directory.name}-sums') / f'{step}.json'

  def _keep_sums(self) -> None:
    """Writes the sums of the checkpoint that is being saved; orbax calls it before that appears.

    It runs in a thread of the first process, when every file is written. A process that is killed
    after the sums leaves the sums of an absent checkpoint, which the next save replaces.
    """
    step = self._last_saved
    assert step is not None  # since a save is over
    [unfinished] = [
      Path(path.get())
      for path in ocp.path.step.all_temporary_paths(self._directory)
      if path.get_final().name == str(step)
    ]
    self._sums(step).parent.mkdir(exist_ok=True)
    record = json.dumps(_sha256_of_files(unfinished), indent=1)
    write_atomically(self._sums(step), lambda file: file.write(record.encode()))

  def _drop_sums(self) -> None:
    """Deletes the sums of deleted checkpoints, and unfinished files of a killed process."""
    kept = {str(step) for step in self.steps()}
    for path in self._sums(0).parent.glob('*'):
      if path.stem not in kept:
        path.unlink(missing_ok=True)

  def _check_sums(self, step: int) -> None:
    """Raises UserError where a file has changed; warns where there are no sums to compare with."""
    if not distributed.is_first():
      return
    try:
      expected = json.loads(self._sums(step).read_text())
      if not isinstance(expected, dict):
        raise ValueError(f'a {type(expected).__name__} in place of an object')
    except (OSError, ValueError) as error:  # deleted, damaged, or of an older version
      reason = ' '.join(str(error).split())
      self._warn(f'checkpoint {step} is read unchecked, without its sums: {reason}')
      return
    found = _sha256_of_files(self._directory / str(step))
    wrong = [name for name in sorted(expected) if found.get(name) != expected[name]]
    if wrong:
      what = 'missing' if wrong[0] not in found else 'not as it was saved'
      raise UserError(
        f'a whole checkpoint at step {step} in {self._directory}',
        f'one that is damaged: {wrong[0]} is {what}',
        f'use another of {self.steps()}',
      )

  def _set_aside(self, step: int, reason: str) -> None:
    if not distributed.is_first():
      return
    self._warn(f'checkpoint {step} is damaged, going back to the one before: {reason}')
    damaged = self._directory.with_name(f'{self._directory.name}-damaged')
    damaged.mkdir(exist_ok=True)
    shutil.rmtree(damaged / str(step), ignore_errors=True)  # from an earlier accident
    (self._directory / str(step)).rename(damaged / str(step))


@jax.jit
def _copy(tree: PyTree) -> PyTree:
  """The tree in new buffers on the same devices."""
  return jax.tree.map(jnp.copy, tree)


def _sha256_of_files(folder: Path) -> dict[str, str]:
  found = {}
  for path in sorted(folder.rglob('*')):
    if path.is_file() and path.name not in _WRITTEN_LATER:
      with path.open('rb') as file:
        found[str(path.relative_to(folder))] = hashlib.file_digest(file, 'sha256').hexdigest()
  return found


def _score(metrics: dict[str, float]) -> float:
  return metrics['score']
