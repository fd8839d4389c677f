"""A study: every run of a grid once, in worker processes, each a line of results.jsonl.

Started again, a study does what is missing. A run that fails, or ends its process, is recorded with
its error and does not stop the others; the next start tries it again. A study that was killed can
be started again at once: the workers that it leaves behind stop by themselves, and the new start
waits for them.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import ml_collections

from csba_jax import config as config_lib
from csba_jax.data import pipeline
from csba_jax.errors import UserError
from csba_jax.files import expanded
from csba_jax.run.workdir import InUse, commit, lock_file, versions
from csba_jax.runtime import huge_pages, jax_setup, numerics
from csba_jax.runtime.progress import say
from csba_jax.runtime.signals import StopRequest
from csba_jax.study import grid, planned, results, store, study_json, tuning

SCHEMA = store.SCHEMA
LEFT = 'left'  # status of a run that another process works on: neither done nor failed
ORPHAN_SECONDS = 120.0  # for a worker of a study that was killed to save its run and to end
SHAPES_KEPT = 4  # whose compiled programs a worker keeps: hundreds of megabytes each


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a study ended: its runs by what has become of them."""

  done: int
  failed: int
  missing: int  # not begun, stopped on the way, or left to another process


def run_study(
  study: ml_collections.ConfigDict,
  workdir: str,
  stop: StopRequest,
  shard: str = '0/1',
  jobs: int = 1,
  keep_runs: bool = False,
  command: str = '',
) -> Outcome:
  """Does the runs of a study's shard that have no line yet.

  Args:
    study: see `grid.default`.
    workdir: folder of the study; shards on different machines may have one each.
    stop: asks to save the runs under way and to leave.
    shard: 'i/n', the i-th of n parts, counted from 0.
    jobs: worker processes, which share the cores; one where there is an accelerator.
    keep_runs: keep the workdirs of finished runs, under workdir/runs.
    command: how it was started, for the report.

  Raises:
    UserError: a config that cannot be run, an outcome that its data do not have, a folder of
      another study, or one that is in use.
  """
  index, number = grid.parse_shard(shard)
  if jobs < 1:
    raise UserError('--jobs of at least 1', str(jobs), 'set it to the number of cores, at most')
  folder = expanded(workdir).absolute()
  runs = planned.all_runs(study)
  at_ends = tuning.at_ends(study)
  mine = grid.shard(runs, index, number)
  name = 'results.jsonl' if number == 1 else f'results-{index:03d}-of-{number:03d}.jsonl'
  with lock_file(folder, f'.{name}.lock'):
    finished = _finished(folder, folder / name)
    _check_outcome(study, finished)
    study_json.claim(folder, study, command, number, at_ends)
    missing = [run for run in mine if not _is_among(finished, run, folder)]
    idle = _idle_cores(jobs, study.threads, len(missing))
    for words in [*planned.too_few_seeds(study, runs), *at_ends, *idle]:
      say(words)
    say(f'{len(mine)} runs, {len(mine) - len(missing)} of them done; {jobs} at a time')
    about = {
      'schema': SCHEMA,
      'study': study.name,
      'config_sha256': grid.digest(study),
      'versions': versions(),
      'commit': commit(),
    }
    place = _Place(folder, study.test, keep_runs, study.threads)
    write = _Writer(folder / name, about, len(missing), place)
    _work_off(missing, place, jobs, stop, write)
    with contextlib.suppress(OSError):  # of runs that failed, or are kept
      (folder / 'runs').rmdir()
  left = len(missing) - write.done - write.failed
  return Outcome(len(mine) - len(missing) + write.done, write.failed, left)


def _finished(folder: Path, own: Path) -> dict[Any, results.Record]:
  """Study, config and result of each finished run in the folder, by its axes and by its name.

  Of every file of results there; a damaged line of `own` is repaired.
  """
  if note := store.repair(own):
    say(note)
  found: dict[Any, results.Record] = {}
  for path in sorted(folder.glob('results*.jsonl')):
    records, notes = store.load(path)
    for note in notes:
      say(note)
    for record in records:
      if record['status'] == 'done':
        kept = {key: record[key] for key in ('study', 'config', 'result')}
        found[record['run']] = found[frozenset(record['axes'].items())] = kept
  return found


def _is_among(finished: Mapping[Any, results.Record], run: grid.Run, folder: Path) -> bool:
  """Whether a run is finished: a name says only what varies, and an axis may have grown.

  Raises:
    UserError: one of its axes or its name is, with another config.
  """
  there = finished.get(frozenset(run.axes.items())) or finished.get(run.name)
  if there is None:
    return False
  before, now = map(config_lib.completed, (there['config'], grid.placeless(run.config)))
  if different := config_lib.differences(before, now):
    raise UserError(
      f'the config that run {run.name} in {folder} was finished with',
      '; '.join(different),
      'name another --workdir, or set these fields as they were',
    )
  return True


def _check_outcome(
  study: ml_collections.ConfigDict, finished: Mapping[Any, results.Record]
) -> None:
  """UserError for the F1 of a class that there is not, before a run is spent on it."""
  if not study.test or not study.outcome.startswith('f1:'):
    return
  own = (record for record in finished.values() if record['study'] == study.name)
  if (record := next(own, None)) is not None:
    names = record['result']['class_names']
  else:
    names = pipeline.open_sources(study.base.data)[0].class_names  # decodes nothing
  if study.outcome[3:] not in names:
    raise UserError(
      f'an outcome f1:CLASS with a class of the data ({", ".join(names)})',
      repr(study.outcome),
      'set --config.outcome=..., and correct study.json if it is there',
    )


class _Writer:
  """Appends the lines of finished runs, clears their folders and says how far the study is."""

  def __init__(self, path: Path, about: dict[str, Any], total: int, place: '_Place'):
    self._path, self._about, self._total, self._place = path, about, total, place
    self._began = time.monotonic()
    self.done = self.failed = 0

  def __call__(self, run: grid.Run, found: dict[str, Any]) -> None:
    """`found`: status, seconds, device, and what `collect` has or the error."""
    if found['status'] == LEFT:
      say(f'{run.name}  left for the next start: {found["error"]}')
      return
    config = grid.placeless(run.config)
    record = self._about | {'run': run.name, 'axes': dict(run.axes), 'config': config} | found
    if note := store.append(self._path, record):
      say(note)
    failed = found['status'] == 'failed'
    if not failed:  # and not before its line is on disk
      self._place.clear(run.name)
    self.failed, self.done = self.failed + failed, self.done + (not failed)
    past = self.done + self.failed
    left = (time.monotonic() - self._began) / past * (self._total - past)
    how = f'failed: {found["error"]}' if failed else _score(found['result'])
    say(
      f'{past}/{self._total}  {run.name}  {how}  {found["seconds"]:.0f} s; '
      f'{self.failed} failed, {_duration(left)} left'
    )


def _score(result: dict[str, Any]) -> str:
  name = 'macro_f1' if 'macro_f1' in result else 'validation_macro_f1'
  value = result[name]
  return f'{name.replace("_", " ")} ' + ('-' if value is None else f'{value:.3f}')


def _duration(seconds: float) -> str:
  return f'{seconds / 60:.0f} min' if seconds >= 120 else f'{seconds:.0f} s'


@dataclasses.dataclass(frozen=True)
class _Place:
  """Where workers work, and what they keep."""

  folder: Path
  test: bool
  keep_runs: bool
  threads: int  # of XLA in each worker

  def workdir(self, name: str) -> Path:
    """Folder of a run."""
    return self.folder / 'runs' / name

  def log(self, name: str) -> Path:
    """What a run says on the way."""
    return self.folder / 'runs' / f'{name}.log'

  def clear(self, name: str) -> None:
    """Removes the folder of a finished run, unless it is to be kept."""
    if not self.keep_runs:
      shutil.rmtree(self.workdir(name), ignore_errors=True)
      self.log(name).unlink(missing_ok=True)


@dataclasses.dataclass
class _Worker:
  """A process that does one run after the other."""

  process: BaseProcess
  connection: Connection
  run: grid.Run | None = None
  began: float = 0.0

  @classmethod
  def start(cls, place: _Place, cores: Sequence[int]) -> '_Worker':
    huge_pages.ask_for()  # the process reads it when it starts
    context = multiprocessing.get_context('spawn')  # JAX does not survive a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, place, cores), daemon=True)
    process.start()
    theirs.close()
    return cls(process, ours)

  def give(self, run: grid.Run) -> None:
    self.run, self.began = run, time.monotonic()
    self.connection.send((run.name, run.shape, run.config.to_dict()))

  def take(self) -> dict[str, Any] | None:
    """What became of the run: its record, or a failure if the process died; None if it stopped."""
    try:
      found = self.connection.recv()
      if found is None:
        self.process.join()
      return found
    except (EOFError, OSError):
      self.process.join()
      code = self.process.exitcode
      assert code is not None  # it has ended
      how = f'signal {signal.Signals(-code).name}' if code < 0 else f'exit code {code}'
      return self.failure(f'its process ended with {how}')

  def failure(self, words: str) -> dict[str, Any]:
    """The record of a run that failed."""
    return _failure(words, time.monotonic() - self.began)


def _work_off(
  runs: Sequence[grid.Run],
  place: _Place,
  jobs: int,
  stop: StopRequest,
  write: Callable[[grid.Run, dict[str, Any]], None],
) -> None:
  """Gives every worker one run after the other, of the shape it knows as long as there are any."""
  todo = list(runs)
  cores = _share_cores(jobs)
  workers = [_Worker.start(place, cores[i]) for i in range(min(jobs, len(todo)))]
  told = False

  def go_on(i: int) -> bool:
    """Whether worker i, or a new one in its place, has got a run."""
    while todo and not stop.requested:
      if not workers[i].process.is_alive():
        workers[i] = _Worker.start(place, cores[i])
      try:
        return _feed(workers[i], workers, todo)
      except OSError:  # it died between two runs
        workers[i].process.join()
    return False

  try:
    busy = [i for i in range(len(workers)) if go_on(i)]
    while busy:
      ready = wait([workers[i].connection for i in busy], timeout=0.5)
      if stop.requested and not told:
        told = True
        say('stopping: the runs under way are saved; start the study again to finish them')
        for i in busy:
          with contextlib.suppress(ProcessLookupError):
            pid = workers[i].process.pid
            assert pid is not None  # it was started
            os.kill(pid, signal.SIGTERM)
      for i in [i for i in busy if workers[i].connection in ready]:
        found = workers[i].take()
        ended = not workers[i].process.is_alive()
        done = found is not None and found['status'] == 'done'  # and only then was told
        if done or not (told and ended):
          run = workers[i].run
          assert run is not None  # it is busy
          write(run, found or workers[i].failure('its process alone was told to stop'))
        if not go_on(i):
          busy.remove(i)
  finally:
    for worker in workers:
      worker.connection.close()
      worker.process.join(timeout=60)
      worker.process.kill()


def _feed(worker: _Worker, workers: Sequence[_Worker], todo: list[grid.Run]) -> bool:
  """Gives the next run, if there is one: of the shape that the worker knows, else of a new one.

  OSError if the worker is gone; the run stays among those to do.
  """
  if not todo:
    return False
  before, known = worker.run, worker.run and worker.run.shape
  others = {other.run.shape for other in workers if other.run and other is not worker}
  run = min(todo, key=lambda run: (run.shape != known, run.shape in others))  # of equals the first
  todo.remove(run)
  try:
    worker.give(run)
  except OSError:
    worker.run = before
    todo.insert(0, run)
    raise
  return True


def _share_cores(jobs: int) -> list[list[int]]:
  """Cores of each worker: as even as can be; all of them where workers are more than cores."""
  if not hasattr(os, 'sched_getaffinity'):
    return [[] for _ in range(jobs)]
  cores = sorted(os.sched_getaffinity(0))
  if jobs > len(cores):
    return [cores for _ in range(jobs)]
  return [cores[i::jobs] for i in range(jobs)]


def _idle_cores(jobs: int, threads: int, runs: int) -> list[str]:
  """Advice where the workers of a study leave cores without work, a line; else none."""
  cores, best = numerics.cores(), numerics.cores() // threads
  if jobs * threads >= cores or min(best, runs) <= jobs:
    return []
  why = f'each run computes in {threads} of {cores} cores, so that --jobs does not change numbers'
  return [f'{why}; --jobs={min(best, runs)} uses the others too']


def _serve(connection: Connection, place: _Place, cores: Sequence[int]) -> None:
  """The main function of a worker: does what it is sent until the other side hangs up."""
  import jax  # not above: the first process does without it

  signal.signal(signal.SIGINT, signal.SIG_IGN)  # between runs; in a run it stops the run
  threading.Thread(target=_end_with_parent, daemon=True).start()
  if cores:
    os.sched_setaffinity(0, cores)  # before JAX counts them for its threads
  with contextlib.suppress(EOFError, BrokenPipeError):
    shapes: set[str] = set()
    while True:
      name, shape, config = connection.recv()
      if not shapes:  # later it would have no effect: JAX has started
        jax_setup.prepare(config['deterministic'], place.threads)
      if shape not in shapes and len(shapes) == SHAPES_KEPT:
        jax.clear_caches()
        shapes.clear()
      shapes.add(shape)
      found = do_run(name, ml_collections.ConfigDict(config), place)
      connection.send(found)
      if found is None:  # stopped
        return


def _end_with_parent() -> None:
  """Stops the run under way when the first process is gone, however it went."""
  parent = multiprocessing.parent_process()
  assert parent is not None  # this is a worker
  parent.join()
  os.kill(os.getpid(), signal.SIGTERM)


def do_run(name: str, config: ml_collections.ConfigDict, place: _Place) -> dict[str, Any] | None:
  """Trains one run in a folder of its own and collects it; None if it was stopped.

  What it says on the way goes to its log. Where another process is still at work in its folder, a
  worker of a study that was killed, it waits for ORPHAN_SECONDS, then leaves the run to it.
  """
  from csba_jax.runtime import backend
  from csba_jax.study import collect
  from csba_jax.training import loop  # here, because the first process only waits

  workdir, log = place.workdir(name), place.log(name)
  began = time.monotonic()
  try:
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with (
      StopRequest(patient=True) as stop,
      open(log, 'a', encoding='utf-8', errors='backslashreplace') as file,
      contextlib.redirect_stderr(file),
    ):
      try:
        with lock_file(workdir, '.lock', ORPHAN_SECONDS):
          pass  # no other process works in it
        backend.start()
        if loop.train_and_evaluate(config, str(workdir), stop) is None:
          return None
        found = collect.collect(workdir, place.test)
      except Exception:
        traceback.print_exc(file=file)
        raise
  except Exception as error:  # whatever it is, the other runs go on
    words = str(error) if isinstance(error, UserError) else f'{type(error).__name__}: {error}'
    status = LEFT if isinstance(error, InUse) else 'failed'
    return _failure(words, time.monotonic() - began, status)
  return found | {
    'status': 'done',
    'seconds': round(time.monotonic() - began, 2),
    'device': collect.hardware(),
    'numerics': numerics.record(found['result']['timing']['devices']),
  }


def _failure(words: str, seconds: float, status: str = 'failed') -> dict[str, Any]:
  words = ' '.join(words.split())
  return {'status': status, 'error': words, 'seconds': round(seconds, 2), 'device': None}
