"""Training, read top to bottom: what a run is, the loop that owns I/O, and what follows a step."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import optax
from jax import Array

from csba_jax import config as config_lib
from csba_jax.data import mixing, pipeline, sampling
from csba_jax.measure import diagnose
from csba_jax.measure.evaluate import evaluate
from csba_jax.methods import losses, metrics, optimizers, second_stages
from csba_jax.models import registry
from csba_jax.run import net as net_lib
from csba_jax.run import state as state_lib
from csba_jax.run.net import Metadata, Net
from csba_jax.run.records import TESTED, Records
from csba_jax.run.schedule import Plan, training_stream
from csba_jax.run.state import TrainState
from csba_jax.run.workdir import Workdir, writing_to
from csba_jax.runtime import backend, distributed, sharding
from csba_jax.runtime.progress import TrainingBar, say
from csba_jax.runtime.signals import Stopped, StopRequest
from csba_jax.training import start_second_stage
from csba_jax.training.feed import Inputs
from csba_jax.training.step import StepFn, compiled_steps, make_step

NEAR = 2.0  # a line's loss over a level: from there on the loss that is measured is looked at
# parts of a config that no compiled step knows
_NOT_COMPILED = ('seed', 'data', 'diagnostics', 'parallel')


class Program(NamedTuple):
  """What is compiled for a run, and for all runs that differ in seeds and images alone."""

  model: nn.Module
  tx: optax.GradientTransformation
  schedule: optax.Schedule  # learning rate by step
  step_fn: StepFn


@functools.lru_cache(maxsize=4)  # functions are equal to themselves alone: jit would compile anew
def _program(
  config: ml_collections.FrozenConfigDict,
  image_shape: tuple[int, int, int],
  class_counts: tuple[int, ...],
  total_steps: int,
  layout: sharding.Layout,
) -> Program:
  model = registry.build(config.model, len(class_counts), image_shape)
  tx, schedule = optimizers.build(config, total_steps)
  step_fn = make_step(config, model, tx, np.array(class_counts), total_steps, layout)
  return Program(model, tx, schedule, step_fn)


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """All of a run that is fixed before its first step."""

  config: ml_collections.ConfigDict
  data: pipeline.Data
  plan: Plan
  program: Program
  layout: sharding.Layout
  key: Array  # of all that is random on the device
  streams: Mapping[str, sampling.Stream]  # where the positions of `train_steps` come from

  @classmethod
  def of(cls, config: ml_collections.ConfigDict, data: pipeline.Data) -> 'Job':
    """The run that a config makes of its data; UserError if it cannot be run."""
    second_stages.check_source(config.stage)
    plan = Plan.of(config, len(data.train))
    layout = sharding.layout(config)
    decisive = {name: config[name] for name in config if name not in _NOT_COMPILED}
    program = _program(
      ml_collections.FrozenConfigDict(decisive),
      data.image_shape,
      losses.counts_that_matter(config, data.class_counts),
      plan.total,
      layout,
    )
    diagnose.check_room(Net.of_shapes(program.model, Metadata.of(data)), config, layout.devices)
    own = training_stream(config, data.train.labels)
    partner = mixing.partners(config.mixing, own)
    streams = {'own': own} | ({'partner': partner} if partner else {})
    key = layout.place(jax.random.key(config.seed))
    return cls(config, data, plan, program, layout, key, streams)

  @property
  def batch_size(self) -> int:
    """Images a step."""
    return self.config.train.batch_size

  def net(self, state: TrainState) -> Net:
    """The net of a state, as it is evaluated."""
    metadata, tau = Metadata.of(self.data), self.config.loss.post_hoc_tau
    return Net.of(self.program.model, state, metadata, tau)

  def begin(self, resumes: bool = False) -> tuple[TrainState, dict[str, Any]]:
    """The state before the first step, and what result.json says of where it comes from.

    With `resumes` the state only lends its shape to a checkpoint, and no first stage is needed.
    """
    config = self.config
    averages = config.train.ema_decay > 0
    model, tx, *_ = self.program
    state = state_lib.create(model, tx, self.data.image_shape, config.seed, averages)
    state = self.layout.place_state(state)
    if config.stage.method == 'none' or resumes:
      return state, {}
    state, about = start_second_stage.start(model, state, config, self.data)
    return self.layout.place_state(state), {'stage': about}


def train_and_evaluate(
  config: ml_collections.ConfigDict, workdir: str, stop: StopRequest
) -> dict[str, Any] | None:
  """Trains, selects on the validation part, evaluates the test set once: result.json.

  Killed at any moment and started again, it goes on from the last checkpoint and ends as if
  nothing had happened, on CPU to the bit. Where there are several processes each of them calls it,
  with the same arguments; the first one writes the records.

  Args:
    config: see csba_jax.config.
    workdir: folder of this run and of no other, which all processes see.
    stop: asks the run to save and leave. Entered here, if it is not already, once there is
      something to save: until then a signal does what it did before.

  Returns:
    The content of result.json, or None when stopped; a finished run returns it at once.
  """
  config_lib.check(config)
  distributed.check_equal('config', config_lib.flatten(config))
  with Workdir(workdir, config.to_dict()) as folder, contextlib.ExitStack() as stack:
    if (result := folder.result()) is not None:
      say(f'{folder.path} is finished: nothing to do')
      return result
    started = time.monotonic()
    say(f'loading {config.data.source} {config.data.name or config.data.dir}'.rstrip())
    job, initial, origin = distributed.together(lambda: _prepare(config, folder))
    if distributed.count() > 1:
      distributed.check_equal('data', job.data.sha256(), 'give every host the same files')
    distributed.together(lambda: _claim(folder, job.data))
    with Records(folder) as records:
      state = records.resume(initial, origin)
      stack.enter_context(stop)
      try:
        stop.check()  # a signal to one of several processes has waited for this
        say('compiling')
        state = run_steps(job, state, records, stop)
        say(f'evaluating the test set at step {records.progress.best_step}')
        best = records.best(state)
        after_training(job, best, records, stop)
        sums = evaluate(job.net(best), job.data.test, job.batch_size, stop.check)
      except Stopped:
        if folder.has_checkpoints():
          say(f'stopped at step {records.progress.step}: saved, start again to go on')
        else:
          say('stopped before the first step: start again to begin')
        return None
    data = job.data
    folder.write_result(
      metrics.summarise(sums, data.class_counts)
      | records.progress.origin
      | {
        'checkpoint_step': records.progress.best_step,
        'validation_macro_f1': records.progress.best_score,  # see `validate`
        'post_hoc_tau': config.loss.post_hoc_tau,
        'class_names': list(data.class_names),
        'class_counts': data.class_counts.tolist(),
        'parameters': sum(x.size for x in jax.tree.leaves(state.params)),
        'splits_sha256': data.splits.sha256,
        'source_sha256': data.splits.source_sha256,
        'unreadable_images': data.skipped,
        'timing': {
          'seconds': time.monotonic() - started,  # of the process that finished the run
          'device': jax.devices()[0].device_kind,
          'devices': job.layout.devices,
          'processes': distributed.count(),
        },
      }
    )
    return folder.result()  # as anyone reads it: null for what is undefined


def _prepare(
  config: ml_collections.ConfigDict, folder: Workdir
) -> tuple[Job, TrainState, dict[str, Any]]:
  """All that can go wrong before the first step."""
  data = pipeline.load(config, say)
  say(describe(data))
  job = Job.of(config, data)
  initial, origin = job.begin(resumes=folder.has_checkpoints())
  return job, initial, origin


def _claim(folder: Workdir, data: pipeline.Data) -> None:
  """Makes the folder this run's, once every process is ready."""
  keep_splits(folder, data)
  net_lib.keep(folder, Metadata.of(data))
  for difference in folder.begin():
    say(f'not as when this run began, so that its end may differ: {difference}')


def run_steps(job: Job, state: TrainState, records: Records, stop: StopRequest) -> TrainState:
  """Steps and what follows them, from where `records` stands to the end.

  Raises:
    Stopped: after a request, once the state is saved with what is still to be done at its step.
  """
  steps, after = compiled_steps(), AfterStep(job, records, stop)
  with (
    Inputs(job.data.train, job.streams, job.layout, job.plan.total, records) as inputs,
    TrainingBar(job.plan.total, records.progress.step) as bar,
  ):
    longest = min(inputs.longest, backend.steps_per_dispatch(job.plan.log_every))
    try:
      after.run(state, bar)  # what a stop had left undone, or comes before the first step
      for first, last in job.plan.segments(records.progress.step):
        after.begin(first)
        for start, end in job.plan.dispatches(first, last, longest):
          state, found = steps(
            state,
            inputs.data,
            inputs.take(start, end),
            job.key,
            step_fn=job.program.step_fn,
            layout=job.layout,
          )
          records.add(end, **jax.device_get(found))
          bar.update(end, records.progress.losses[-1], after.rate())
          after.run(state, bar)
          stop.check()
    except Stopped:
      records.save(state)
      records.wait()
      raise
  records.wait()
  return state


def after_training(job: Job, best: TrainState, records: Records, stop: StopRequest) -> None:
  """The snapshot TESTED of a run that measures snapshots: the net whose test metrics are reported.

  With the running statistics that it is tested with. A run that is stopped here measures it anew.
  """
  if job.plan.snapshots:
    began, epoch = time.monotonic(), job.plan.epoch(records.progress.step)
    found = diagnose.snapshot(job.net(best), job.config, job.data, stop.check)
    records.snapshot_line(TESTED, epoch, found, time.monotonic() - began)


class AfterStep:
  """What follows a step: diagnosis, snapshots, the log line, validation and checkpoint, in order.

  Each is done once a step: what is done is kept in the checkpoints, so that a run that was stopped
  in between goes on with the next.
  """

  def __init__(self, job: Job, records: Records, stop: StopRequest):
    self._job, self._records, self._stop = job, records, stop
    self._probe = None
    if job.plan.diagnose_every:
      net = Net.of_shapes(job.program.model, Metadata.of(job.data))
      self._probe = diagnose.Probe(net, job.config, job.data, job.layout)
    self._score: float | None = None  # of the validation at this step
    self.begin(records.progress.step)

  def begin(self, step: int) -> None:
    """Starts the clock of a stretch between log lines."""
    self._first, self._began, self._spent = step, time.monotonic(), 0.0

  def rate(self) -> float:
    """Training images a second since `begin`."""
    images = self._job.batch_size * (self._records.progress.step - self._first)
    return images / max(self._seconds(), 1e-9)

  def _seconds(self) -> float:
    """Spent on training alone since `begin`."""
    return time.monotonic() - self._began - self._spent

  def run(self, state: TrainState, bar: TrainingBar) -> None:
    """All that is due at the step that the records stand at; raises Stopped in between."""
    plan, step = self._job.plan, self._records.progress.step
    timing = {'train_seconds': self._seconds(), 'images_per_second': self.rate()}
    if plan.diagnoses_at(step):
      self._once('diagnosis', lambda: self._diagnose(state))
    if snapshots := plan.snapshots_at(step):
      self._once('snapshots', lambda: self._measure(self._settled(state), snapshots))
    if plan.logs_at(step):
      self._once('levels', lambda: self._measure_levels(state))
      self._once('line', lambda: self._line(timing))
    self._score = None
    if plan.evaluates_at(step):
      self._once('validation', lambda: self._validate(state))
      bar.validated(self._score)
    done = self._records.progress.done
    if plan.saves_at(step) and 'checkpoint' not in done:  # again, it would be without its score
      done.append('checkpoint')
      self._records.save(state, self._score)

  def _once(self, task: str, do: Callable[[], object]) -> None:
    done = self._records.progress.done
    if task in done:
      return
    began = time.monotonic()
    do()
    self._spent += time.monotonic() - began
    done.append(task)

  @property
  def _epoch(self) -> float:
    return self._job.plan.epoch(self._records.progress.step)

  def _diagnose(self, state: TrainState) -> None:
    began = time.monotonic()
    conflict = self._probe.measure(state)
    self._records.diagnostics_line(self._epoch, conflict, time.monotonic() - began)

  def _settled(self, state: TrainState) -> Net:
    job = self._job
    return diagnose.settled(job.net(state), job.config, job.data)

  def _measure(self, settled: Net, names: Sequence[str]) -> None:
    """Conflict and decoupling at a snapshot of the run, recorded under its names."""
    began, job = time.monotonic(), self._job
    found = diagnose.snapshot(settled, job.config, job.data, self._stop.check)
    for name in names:
      self._records.snapshot_line(name, self._epoch, found, time.monotonic() - began)

  def _measure_levels(self, state: TrainState) -> None:
    """Snapshots at levels of the training loss, each reached once, by the net that is measured.

    Its loss is not that of the line, whose batches are augmented, weighted and of several steps: it
    is looked at where the line is within NEAR times a level.
    """
    progress, job = self._records.progress, self._job
    if not job.plan.levels_at(np.mean(progress.losses) / NEAR, progress.levels):
      return
    settled = self._settled(state)
    loss = diagnose.training_loss(settled, job.config, job.data, self._stop.check)
    if reached := job.plan.levels_at(loss, progress.levels):
      self._measure(settled, reached)
      progress.levels += reached

  def _line(self, timing: dict[str, float]) -> None:
    rate = self._job.program.schedule(self._records.progress.step - 1)
    self._records.training_line(self._epoch, float(rate), timing)

  def _validate(self, state: TrainState) -> None:
    """Score of the validation part, recorded; without one the last step is the best.

    Macro-F1 with the class shares that the source had before its tail was cut: what the test part
    is like. Where every image is kept it is macro-F1 up to the rounding of the split.
    """
    job, records = self._job, self._records
    if not len(job.data.val):
      records.progress.best_step = records.progress.step
      return
    began = time.monotonic()
    sums = evaluate(job.net(state), job.data.val, job.batch_size, self._stop.check)
    summary = metrics.summarise(sums, job.data.class_counts)
    self._score = metrics.macro_f1_at(sums.counts, job.data.source_counts)
    records.validation_line(self._epoch, summary, self._score, time.monotonic() - began)


def keep_splits(folder: Workdir, data: pipeline.Data) -> None:
  """splits.npz of the run, written once; a run that goes on must have the data it had."""
  path = folder.file('splits.npz')
  if not distributed.is_first():
    return  # all have the same data, and this one may look while the first one writes
  if path.exists():
    pipeline.check_splits(data.splits, path)
  else:
    with writing_to(folder.path):
      data.splits.save(path)


def describe(data: pipeline.Data) -> str:
  """One line about the data of a run."""
  counts = ' '.join(str(n) for n in data.class_counts)
  sizes = f'{len(data.train)} training, {len(data.val)} validation, {len(data.test)} test images'
  return f'{sizes} of {len(data.class_names)} classes; training images by class: {counts}'
