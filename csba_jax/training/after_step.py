"""What follows a step: measurements, the log line, validation and checkpoint, in one visible table.

`run_due` does what is due at a step, in the order of TASKS. Checkpoints keep the names of the tasks
that are done at their step, so that a run that was stopped between two tasks goes on with the next.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from csba_jax.measure import evaluate, snapshots
from csba_jax.measure import probe as probe_lib
from csba_jax.methods import metrics
from csba_jax.run import restore
from csba_jax.run.net import Metadata, Net
from csba_jax.run.records import Records
from csba_jax.run.schedule import Plan
from csba_jax.run.state import TrainState
from csba_jax.runtime.progress import TrainingBar
from csba_jax.runtime.signals import StopRequest
from csba_jax.training.job import Job
from csba_jax.training.surgery import Measurement

# The training loss of a net is measured against a level only where the mean loss of the log line is
# at most this many times the level: the measurement reads every training image.
NEAR = 2.0


class Stopwatch:
  """Time of training alone since the last log line: it stands still while tasks are done."""

  def __init__(self, step: int):
    self._since: float | None = None  # when it started to run; None: it stands still
    self.restart(step)

  def restart(self, step: int) -> None:
    """Sets it to 0 at this step; it goes on running, or standing still, as before."""
    self._first, self._seconds = step, 0.0
    if self._since is not None:
      self._since = time.monotonic()

  def stop(self) -> None:
    """Lets it stand still."""
    self._seconds, self._since = self.seconds(), None

  def start(self) -> None:
    """Lets it run."""
    self._seconds, self._since = self.seconds(), time.monotonic()

  def seconds(self) -> float:
    """Seconds that it has run since `restart`."""
    running = 0.0 if self._since is None else time.monotonic() - self._since
    return self._seconds + running

  def steps_per_second(self, step: int) -> float:
    """Mean rate from the step of `restart` to this one."""
    return (step - self._first) / max(self.seconds(), 1e-9)


@dataclasses.dataclass
class Context:
  """What the tasks of a run share."""

  job: Job
  records: Records
  stop: StopRequest
  bar: TrainingBar
  stopwatch: Stopwatch
  probe: probe_lib.Probe | None  # where the run measures conflict every so many steps
  surgery: Measurement | None = None  # where surgery measures between steps
  state: TrainState | None = None  # after the last task that was done
  score: float | None = None  # of the validation at this step, for the checkpoint of this step

  @classmethod
  def of(cls, job: Job, records: Records, stop: StopRequest, bar: TrainingBar) -> 'Context':
    """The context for the step that the records have reached."""
    probe = surgery = None
    if job.plan.diagnose_every or job.plan.surgery_every:
      net = Net.of_shapes(job.program.model, Metadata.of(job.data, job.config.model))
    if job.plan.diagnose_every:
      probe = probe_lib.of_config(net, job.config, job.data, job.layout)
    if job.plan.surgery_every:
      assert job.program.surgery is not None  # whose plan measures has one
      surgery = Measurement(job.program.surgery, net, job.config, job.data, job.layout)
    return cls(job, records, stop, bar, Stopwatch(records.progress.step), probe, surgery)

  @property
  def step(self) -> int:
    """Number of steps that are done."""
    return self.records.progress.step

  @property
  def epoch(self) -> float:
    """Number of epochs that are done."""
    return self.job.plan.epoch(self.step)

  def images_per_second(self) -> float:
    """Training images a second since the last log line."""
    return self.job.batch_size * self.stopwatch.steps_per_second(self.step)


class Task(NamedTuple):
  """A row of TASKS."""

  name: str  # checkpoints keep this name: another one would be done again in a resumed run
  is_due: Callable[[Plan, int], object]  # (plan, step) -> true where it follows this step
  do: Callable[[Context, TrainState], TrainState | None]  # a state that takes the place, or None


def _measure_probe(context: Context, state: TrainState) -> None:
  """Conflict on a fixed sample of training images, or on training batches."""
  began = time.monotonic()
  assert context.probe is not None  # whose plan diagnoses has one
  conflict = context.probe.measure(state)
  context.records.diagnostics_line(context.epoch, conflict, time.monotonic() - began)


def _measure_surgery(context: Context, state: TrainState) -> TrainState:
  """New weights of gradient surgery, for the steps to come."""
  began = time.monotonic()
  assert context.surgery is not None  # whose plan measures for it has one
  state, record = context.surgery.renew(state)
  context.records.surgery_line(context.epoch, record, time.monotonic() - began)
  return state


def _measure_snapshots(context: Context, state: TrainState) -> None:
  """Snapshots at fixed fractions of the run."""
  names = context.job.plan.snapshots_at(context.step)
  record_snapshots(
    context.job, context.records, context.stop, state, _settled(context, state), names
  )


def _measure_levels(context: Context, state: TrainState) -> None:
  """Snapshots where the training loss first reaches a level, each level once.

  The loss that counts is that of the net which is measured, over every training image. It is not
  the mean loss of the log line, whose batches are augmented and weighted and come from many steps;
  that mean only decides whether the loss is measured at all: see NEAR.
  """
  progress, job = context.records.progress, context.job
  if not job.plan.levels_at(float(np.mean(progress.losses)) / NEAR, progress.levels):
    return
  settled = _settled(context, state)
  loss = snapshots.training_loss(settled, job.config, job.data, context.stop.check)
  if reached := job.plan.levels_at(loss, progress.levels):
    record_snapshots(job, context.records, context.stop, state, settled, reached)
    progress.levels += reached


def _write_line(context: Context, state: TrainState) -> None:
  """Means over the steps since the last log line."""
  del state
  timing = {
    'train_seconds': context.stopwatch.seconds(),
    'images_per_second': context.images_per_second(),
  }
  learning_rate = float(context.job.program.schedule(context.step - 1))
  context.records.training_line(context.epoch, learning_rate, timing)
  context.stopwatch.restart(context.step)


def _validate(context: Context, state: TrainState) -> None:
  """Score on the validation part; in a run without one the last step is the best.

  The score is macro-F1 with the shares that the classes had in the source, before the long tail was
  cut: the shares of the test part. Where every image of the source is kept, this is macro-F1 up to
  the rounding of the split.
  """
  job, records = context.job, context.records
  if not len(job.data.val):
    records.progress.best_step = records.progress.step
    return
  began = time.monotonic()
  sums = evaluate.evaluate(job.net(state), job.data.val, job.batch_size, context.stop.check)
  summary = metrics.summarise(sums, job.data.class_counts)
  context.score = metrics.macro_f1_at(sums.counts, job.data.source_counts)
  records.validation_line(context.epoch, summary, context.score, time.monotonic() - began)
  context.bar.validated(context.score)


def _save(context: Context, state: TrainState) -> None:
  """A checkpoint, with the score of this step if it has one."""
  context.records.save(state, context.score)


# The order matters. Everything that reads `progress` comes before the task that changes it:
# - 'levels' reads the losses since the last log line, which 'line' clears.
# - 'validation' gives 'checkpoint' the score of this step, and decides which step is the best.
# - 'checkpoint' saves the state together with all that the tasks before it have changed, so that a
#   run that resumes from it repeats none of them. A task after it would be repeated.
# - 'surgery' changes the state that 'checkpoint' saves.
# The lines of one step stand in metrics.jsonl in this order too.
TASKS = (
  Task('diagnosis', Plan.diagnoses_at, _measure_probe),
  Task('snapshots', Plan.snapshots_at, _measure_snapshots),
  Task('levels', Plan.logs_at, _measure_levels),
  Task('surgery', Plan.surgery_at, _measure_surgery),
  Task('line', Plan.logs_at, _write_line),
  Task('validation', Plan.evaluates_at, _validate),
  Task('checkpoint', Plan.saves_at, _save),
)


def run_due(context: Context, state: TrainState) -> TrainState:
  """Does the tasks that are due at this step and not done yet, in the order of TASKS.

  Returns:
    The state to go on with.

  Raises:
    Stopped: after a request to stop; the task in progress counts as not done. `context.state` is
      the state after those before it.
  """
  context.state = state
  context.stopwatch.stop()
  context.score = None
  done = context.records.progress.done
  for task in TASKS:
    if task.name in done or not task.is_due(context.job.plan, context.step):
      continue
    done.append(task.name)  # before it is done: a checkpoint that saves this list is itself in it
    try:
      context.state = state = task.do(context, state) or state
    except BaseException:
      done.remove(task.name)
      raise
  context.stopwatch.start()
  return state


def record_snapshots(
  job: Job,
  records: Records,
  stop: StopRequest,
  state: TrainState,
  net: Net,
  names: Sequence[str],
) -> None:
  """Measures conflict and branch similarity of a state once, and records them under every name.

  `net` is the net of the state as it is evaluated, with the statistics to measure it with.
  """
  began, epoch = time.monotonic(), job.plan.epoch(records.progress.step)
  at, known = records.measured
  known = known if at == net.step else {}
  found = snapshots.snapshot(
    net, job.net_in_training(state), job.config, job.data, stop.check, known
  )
  records.measured = net.step, found
  for name in names:
    records.snapshot_line(name, epoch, found, time.monotonic() - began)


def _settled(context: Context, state: TrainState) -> Net:
  """The net that a snapshot measures: with renewed statistics of BatchNorm.

  The running ones lag behind a net that changes: early in a run the loss with them can be many
  times the loss of the batches.
  """
  job = context.job
  return restore.renew_statistics(job.net(state), job.config, job.data)
