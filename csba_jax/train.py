"""Training, read top to bottom: one pure step, several a dispatch, and the loop that owns I/O."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import optax
from jax import Array

from csba_jax import backend, diagnose, losses, metrics, optimizers, train_state
from csba_jax import config as config_lib
from csba_jax.data import augment, pipeline, sampling
from csba_jax.evaluate import evaluate
from csba_jax.models import registry
from csba_jax.progress import TrainingBar, say
from csba_jax.records import Records
from csba_jax.signals import StopRequest
from csba_jax.train_state import TrainState
from csba_jax.workdir import Workdir, writing_to

Batch = Mapping[str, Array]
StepFn = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  model: nn.Module,
  tx: optax.GradientTransformation,
  loss_fn: losses.LossFn,
  augment_fn: augment.Augment,
  seed: int,
) -> tuple[TrainState, dict[str, Array]]:
  """One update on the mean loss of a batch of uint8 images and int labels.

  Returns the new state and, of the old parameters, the loss and the gradient's norm.
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step)  # resumable: nothing else is random
  images = augment.scale(augment_fn(key, batch['image']))

  def objective(params):
    variables = {'params': params, 'batch_stats': state.batch_stats}
    logits, updated = model.apply(variables, images, train=True, mutable=['batch_stats'])
    return loss_fn(logits, batch['label']).mean(), updated.get('batch_stats', {})

  (loss, batch_stats), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  new_state = TrainState(state.step + 1, params, batch_stats, opt_state)
  return new_state, {'loss': loss, 'grad_norm': optax.tree.norm(grads)}


def train_steps(
  state: TrainState, data: Batch, indices: Array, *, step_fn: StepFn
) -> tuple[TrainState, dict[str, Array]]:
  """`step_fn` on data[indices[0]], data[indices[1]], ...: all on the device.

  Args:
    state: donated where compiled.
    data: 'image' uint8 [N, H, W, ch] and 'label' int32 [N], on the device.
    indices: [steps, batch] int32 positions in `data`.
    step_fn: (state, batch) -> (state, metrics).

  Returns:
    The state after all steps, and the metrics of each, leaves [steps].
  """

  def one(state, index):
    return step_fn(state, jax.tree.map(lambda x: x[index], dict(data)))

  if indices.shape[0] == 1:
    state, step_metrics = one(state, indices[0])
    return state, jax.tree.map(lambda x: x[None], step_metrics)
  return jax.lax.scan(one, state, indices)


# () -> `train_steps`, compiled for the backend; its state is donated
compiled_steps = backend.jit(train_steps, static_argnames='step_fn', donate_argnames='state')


@dataclasses.dataclass(frozen=True)
class Plan:
  """When things happen, in steps."""

  steps_per_epoch: int
  total: int
  log_every: int
  eval_every: int
  diagnose_every: int  # 0: never

  @classmethod
  def of(cls, config: ml_collections.ConfigDict, images: int) -> 'Plan':
    """The plan of a config for a training set of that many images."""
    train = config.train
    per_epoch = math.ceil(images / train.batch_size)
    return cls(
      per_epoch,
      train.epochs * per_epoch,
      train.log_every,
      train.eval_every * per_epoch,
      config.diagnostics.every,
    )

  def segments(self, start: int) -> Iterator[tuple[int, int]]:
    """(from, to) of the stretches between log lines; a line also ends each epoch."""
    while start < self.total:
      epoch_start = start // self.steps_per_epoch * self.steps_per_epoch
      in_epoch = (start - epoch_start) // self.log_every * self.log_every + self.log_every
      end = epoch_start + min(in_epoch, self.steps_per_epoch)
      yield start, end
      start = end

  def dispatches(self, first: int, last: int, longest: int) -> Iterator[tuple[int, int]]:
    """(from, to) of the calls of a segment; one ends at each step that is diagnosed."""
    while first < last:
      end = min(first + longest, last)
      if self.diagnose_every:
        end = min(end, (first // self.diagnose_every + 1) * self.diagnose_every)
      yield first, end
      first = end

  def diagnoses_at(self, step: int) -> bool:
    """Whether the conflict is measured after step number `step`."""
    return self.diagnose_every > 0 and step % self.diagnose_every == 0

  def epoch(self, step: int) -> float:
    """Epochs done after `step` steps."""
    return step / self.steps_per_epoch

  def evaluates_at(self, step: int) -> bool:
    """Whether a validation and a checkpoint follow step number `step`."""
    return step % self.eval_every == 0 or step == self.total


def make_step(
  config: ml_collections.ConfigDict,
  model: nn.Module,
  tx: optax.GradientTransformation,
  class_counts: np.ndarray,
) -> StepFn:
  """`train_step` with everything static bound: (state, batch) -> (state, metrics)."""
  return functools.partial(
    train_step,
    model=model,
    tx=tx,
    loss_fn=losses.build(config.loss.name, class_counts),
    augment_fn=augment.build(config.augment.crop_padding, config.augment.flip),
    seed=config.seed,
  )


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """All of a run that is fixed before its first step."""

  config: ml_collections.ConfigDict
  data: pipeline.Data
  plan: Plan
  model: nn.Module
  tx: optax.GradientTransformation
  schedule: optax.Schedule  # learning rate by step
  step_fn: StepFn

  @classmethod
  def of(cls, config: ml_collections.ConfigDict, data: pipeline.Data) -> 'Job':
    """The run that a config makes of its data; UserError if it cannot be run."""
    model = registry.build(config.model, len(data.class_names), data.image_shape)
    plan = Plan.of(config, len(data.train))
    tx, schedule = optimizers.build(config.train, plan.total)
    step_fn = make_step(config, model, tx, data.class_counts)
    job = cls(config, data, plan, model, tx, schedule, step_fn)
    job.draw(0, 1)  # a batch larger than the data is found out here
    return job

  @property
  def batch_size(self) -> int:
    """Images a step."""
    return self.config.train.batch_size

  def draw(self, start: int, end: int) -> np.ndarray:
    """Positions of the training images of steps start to end - 1, [end - start, batch_size]."""
    n = len(self.data.train)
    batches = (
      sampling.batch_positions(self.config.seed, step, n, self.batch_size)
      for step in range(start, end)
    )
    return np.stack(list(batches))


def train_and_evaluate(
  config: ml_collections.ConfigDict, workdir: str, stop: StopRequest
) -> dict[str, Any] | None:
  """Trains, selects on the validation part, evaluates the test set once: result.json.

  Killed at any moment and started again, it goes on from the last checkpoint and ends as if
  nothing had happened, on CPU to the bit.

  Args:
    config: see csba_jax.config.
    workdir: folder of this run and of no other.
    stop: asks the run to save and leave.

  Returns:
    The content of result.json, or None when stopped; a finished run returns it at once.
  """
  config_lib.check(config)
  with Workdir(workdir, config.to_dict()) as folder:
    if (result := folder.result()) is not None:
      say(f'{folder.path} is finished: nothing to do')
      return result
    started = time.monotonic()
    say(f'loading {config.data.source} {config.data.name or config.data.dir}'.rstrip())
    data = pipeline.load(config, say)
    say(describe(data))
    job = Job.of(config, data)
    folder.begin()  # all is checked: from here on the folder is this run's
    keep_splits(folder, data)
    say('compiling')
    initial = train_state.create(job.model, job.tx, data.image_shape, config.seed)

    with Records(folder) as records:
      state = run_steps(job, records.resume(initial), records, stop)
      if stop.requested:
        say(f'stopped at step {records.progress.step}: saved, start again to go on')
        return None
      say(f'evaluating the test set at step {records.progress.best_step}')
      sums = evaluate(job.model, records.best(state), data.test, job.batch_size)
    folder.write_result(
      metrics.summarise(sums, data.class_counts)
      | {
        'checkpoint_step': records.progress.best_step,
        'validation_macro_f1': records.progress.best_score,
        'class_names': list(data.class_names),
        'class_counts': data.class_counts.tolist(),
        'parameters': sum(x.size for x in jax.tree.leaves(state.params)),
        'splits_sha256': data.splits.sha256,
        'source_sha256': data.splits.source_sha256,
        'unreadable_images': data.skipped,
        'timing': {
          'seconds': time.monotonic() - started,  # of the process that finished the run
          'device': jax.devices()[0].device_kind,
        },
      }
    )
    return folder.result()  # as anyone reads it: null for what is undefined


def run_steps(job: Job, state: TrainState, records: Records, stop: StopRequest) -> TrainState:
  """Steps, lines, validations and checkpoints from where `records` stands to the end or a stop."""
  train = job.data.train
  on_device = jax.device_put({'image': train.images, 'label': train.labels})
  steps, longest = compiled_steps(), backend.steps_per_dispatch(job.plan.log_every)
  probe = diagnose.Probe(job.config, job.data, job.model) if job.plan.diagnose_every else None
  with TrainingBar(job.plan.total, records.progress.step) as bar:
    for first, last in job.plan.segments(records.progress.step):
      began, spent = time.monotonic(), 0.0
      for start, end in job.plan.dispatches(first, last, longest):
        state, found = steps(state, on_device, job.draw(start, end), step_fn=job.step_fn)
        records.add(end, **jax.device_get(found))
        seconds = time.monotonic() - began - spent
        rate = job.batch_size * (end - first) / seconds
        bar.update(end, records.progress.losses[-1], rate)
        if job.plan.diagnoses_at(end):
          spent += diagnose_step(job, probe, state, records)
        if stop.requested:
          break
      if end == last:
        timing = {'train_seconds': seconds, 'images_per_second': rate}
        records.training_line(job.plan.epoch(last), float(job.schedule(last - 1)), timing)
        if job.plan.evaluates_at(last):
          score = validate(job, state, records)
          bar.validated(score)
          records.save(state, score)
      if stop.requested:
        records.save(state)
        break
  records.wait()
  return state


def validate(job: Job, state: TrainState, records: Records) -> float | None:
  """Macro-F1 on the validation part, recorded; None without one, and the last step is the best."""
  if not len(job.data.val):
    records.progress.best_step = records.progress.step
    return None
  began = time.monotonic()
  sums = evaluate(job.model, state, job.data.val, job.batch_size)
  summary = metrics.summarise(sums, job.data.class_counts)
  epoch = job.plan.epoch(records.progress.step)
  records.validation_line(epoch, summary, time.monotonic() - began)
  return summary['macro_f1']


def diagnose_step(job: Job, probe: diagnose.Probe, state: TrainState, records: Records) -> float:
  """Measures and records the conflict after a step; the seconds that it took."""
  began = time.monotonic()
  conflict = probe.measure(state)
  seconds = time.monotonic() - began
  step = records.progress.step
  records.diagnostics_line(job.plan.epoch(step), conflict, seconds)
  return time.monotonic() - began


def keep_splits(folder: Workdir, data: pipeline.Data) -> None:
  """splits.npz of the run, written once; a run that goes on must have the data it had."""
  path = folder.file('splits.npz')
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
