"""Training, read top to bottom: one pure step, several a dispatch, and the loop that owns I/O."""

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

from csba_jax import (
  backend,
  diagnose,
  losses,
  metrics,
  optimizers,
  second_stage,
  stages,
  train_state,
)
from csba_jax import config as config_lib
from csba_jax.data import augment, mixing, pipeline, sampling
from csba_jax.evaluate import evaluate
from csba_jax.models import registry
from csba_jax.plan import Plan
from csba_jax.progress import TrainingBar, say
from csba_jax.records import Records
from csba_jax.signals import StopRequest
from csba_jax.train_state import TrainState
from csba_jax.workdir import Workdir, writing_to

Batch = Mapping[str, Array]
StepFn = Callable[[TrainState, Batch, Array], tuple[TrainState, dict[str, Array]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
  """What a step does, all that is static of it."""

  model: nn.Module
  tx: optax.GradientTransformation
  loss_fn: losses.LossFn
  augment_fn: augment.Augment
  mix_fn: mixing.MixFn
  stage: stages.Stage
  ema_decay: float  # 0: no moving averages


def train_step(
  state: TrainState, batch: Batch, key: Array, *, recipe: Recipe
) -> tuple[TrainState, dict[str, Array]]:
  """One update on the mean loss of a batch of uint8 images and int labels.

  A second stage keeps the statistics of the norms as they are, and has gradients only for what it
  trains. `key` is the run's; with the number of the step it decides all that is random.

  Returns:
    The new state and, of the old parameters, the loss and the norm of the gradient.
  """
  key = jax.random.fold_in(key, state.step)
  batch = recipe.mix_fn(jax.random.fold_in(key, _MIX), _augmented(recipe, key, batch), state.step)
  first = recipe.stage is stages.STAGES['none']
  trained = stages.matches(recipe.stage.trains, state.params)

  def objective(params):
    params = jax.tree.map(lambda x, on: x if on else jax.lax.stop_gradient(x), params, trained)
    variables = {'params': params, 'batch_stats': state.batch_stats}
    logits, updated = recipe.model.apply(
      variables, batch['image'], train=first, mutable=['batch_stats']
    )
    loss = losses.mixed(recipe.loss_fn, logits, batch, state.step).mean()
    return loss, updated.get('batch_stats', state.batch_stats)

  (loss, batch_stats), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
  updates, opt_state = recipe.tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  state = state.replace(params=params, batch_stats=batch_stats, opt_state=opt_state)
  if recipe.ema_decay:
    averages = train_state.move_averages(state.averages, state, recipe.ema_decay)
    state = state.replace(averages=averages)
  return state.replace(step=state.step + 1), {'loss': loss, 'grad_norm': optax.tree.norm(grads)}


_MIX, _PARTNER = 1 << 16, 1 << 17  # a step's keys beside those that the augmentation splits off


def _augmented(recipe: Recipe, key: Array, batch: Batch) -> Batch:
  """The batch with float images, augmented; partners of a stream of their own likewise."""
  found = {
    'image': augment.scale(recipe.augment_fn(key, batch['image'])),
    'label': batch['label'],
  }
  if 'partner_image' in batch:
    partner = recipe.augment_fn(jax.random.fold_in(key, _PARTNER), batch['partner_image'])
    found |= {'partner_image': augment.scale(partner), 'partner_label': batch['partner_label']}
  return found


def train_steps(
  state: TrainState, data: Batch, indices: Mapping[str, Array], key: Array, *, step_fn: StepFn
) -> tuple[TrainState, dict[str, Array]]:
  """`step_fn` on the examples of one batch after the other: all on the device.

  Args:
    state: donated where compiled.
    data: 'image' uint8 [N, H, W, ch] and 'label' int32 [N], on the device.
    indices: positions in `data`, [steps, batch] int32: 'own' of the batches, and 'partner' of the
      images to mix with them where those have a stream of their own.
    key: of the run.
    step_fn: (state, batch, key) -> (state, metrics).

  Returns:
    The state after all steps, and the metrics of each, leaves [steps].
  """

  def one(state, index):
    batch = {name: values[index['own']] for name, values in data.items()}
    if 'partner' in index:
      batch |= {f'partner_{name}': values[index['partner']] for name, values in data.items()}
    return step_fn(state, batch, key)

  if indices['own'].shape[0] == 1:
    state, step_metrics = one(state, {name: rows[0] for name, rows in indices.items()})
    return state, jax.tree.map(lambda x: x[None], step_metrics)
  return jax.lax.scan(one, state, indices)


# () -> `train_steps`, compiled for the backend; its state is donated
compiled_steps = backend.jit(train_steps, static_argnames='step_fn', donate_argnames='state')


def make_step(
  config: ml_collections.ConfigDict,
  model: nn.Module,
  tx: optax.GradientTransformation,
  class_counts: np.ndarray,
  total_steps: int,
) -> StepFn:
  """`train_step` with everything static bound: (state, batch, key) -> (state, metrics).

  Raises:
    UserError: unknown names in the config's tables, or parts that do not go together.
  """
  recipe = Recipe(
    model=model,
    tx=tx,
    loss_fn=losses.build(config, class_counts, total_steps),
    augment_fn=augment.build(config.augment),
    mix_fn=mixing.build(config.mixing, class_counts, total_steps),
    stage=stages.find(config.stage, config.model.head),
    ema_decay=config.train.ema_decay,
  )
  return functools.partial(train_step, recipe=recipe)


_NOT_COMPILED = ('seed', 'data', 'diagnostics')  # parts of a config that no compiled step knows


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
) -> Program:
  model = registry.build(config.model, len(class_counts), image_shape)
  tx, schedule = optimizers.build(config, total_steps)
  step_fn = make_step(config, model, tx, np.array(class_counts), total_steps)
  return Program(model, tx, schedule, step_fn)


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """All of a run that is fixed before its first step."""

  config: ml_collections.ConfigDict
  data: pipeline.Data
  plan: Plan
  program: Program
  key: Array  # of all that is random on the device
  streams: Mapping[str, sampling.Stream]  # where the `indices` of `train_steps` come from

  @classmethod
  def of(cls, config: ml_collections.ConfigDict, data: pipeline.Data) -> 'Job':
    """The run that a config makes of its data; UserError if it cannot be run."""
    stages.check_source(config.stage)
    plan = Plan.of(config, len(data.train))
    decisive = {name: config[name] for name in config if name not in _NOT_COMPILED}
    program = _program(
      ml_collections.FrozenConfigDict(decisive),
      data.image_shape,
      losses.counts_that_matter(config, data.class_counts),
      plan.total,
    )
    own = sampling.Stream.of(
      config.sampler, data.train.labels, config.train.batch_size, plan.total, config.seed
    )
    partner = mixing.partners(config.mixing, own)
    streams = {'own': own} | ({'partner': partner} if partner else {})
    return cls(config, data, plan, program, jax.random.key(config.seed), streams)

  @property
  def batch_size(self) -> int:
    """Images a step."""
    return self.config.train.batch_size

  @property
  def shift(self) -> np.ndarray:
    """What evaluation adds to the logits, [C]."""
    return losses.post_hoc_shift(self.config.loss.post_hoc_tau, self.data.class_counts)

  def draw(self, start: int, end: int) -> dict[str, np.ndarray]:
    """Positions of the training images of steps start to end - 1, [end - start, batch_size]."""
    return {
      name: np.stack([stream.positions(step) for step in range(start, end)])
      for name, stream in self.streams.items()
    }

  def begin(self, resumes: bool = False) -> tuple[TrainState, dict[str, Any]]:
    """The state before the first step, and what result.json says of where it comes from.

    With `resumes` the state only lends its shape to a checkpoint, and no first stage is needed.
    """
    config = self.config
    averages = config.train.ema_decay > 0
    model, tx, *_ = self.program
    state = train_state.create(model, tx, self.data.image_shape, config.seed, averages)
    if config.stage.method == 'none' or resumes:
      return state, {}
    state, about = second_stage.start(config, self.data, model, state)
    return state, {'stage': about}


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
    initial, origin = job.begin(resumes=folder.has_checkpoints())
    folder.begin()  # all is checked: from here on the folder is this run's
    keep_splits(folder, data)
    say('compiling')

    with Records(folder) as records:
      state = run_steps(job, records.resume(initial, origin), records, stop)
      if stop.requested:
        say(f'stopped at step {records.progress.step}: saved, start again to go on')
        return None
      say(f'evaluating the test set at step {records.progress.best_step}')
      sums = evaluate(job.program.model, records.best(state), data.test, job.batch_size, job.shift)
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
        },
      }
    )
    return folder.result()  # as anyone reads it: null for what is undefined


def run_steps(job: Job, state: TrainState, records: Records, stop: StopRequest) -> TrainState:
  """Steps, lines, validations and checkpoints from where `records` stands to the end or a stop."""
  train = job.data.train
  on_device = jax.device_put({'image': train.images, 'label': train.labels})
  steps, longest = compiled_steps(), backend.steps_per_dispatch(job.plan.log_every)
  probe = None
  if job.plan.diagnose_every:
    probe = diagnose.Probe(job.config, job.data, job.program.model)
  if not records.resumed:
    measure_moments(job, state, records, job.plan.moments_at(0))
  with TrainingBar(job.plan.total, records.progress.step) as bar:
    for first, last in job.plan.segments(records.progress.step):
      began, spent = time.monotonic(), 0.0
      for start, end in job.plan.dispatches(first, last, longest):
        state, found = steps(
          state, on_device, job.draw(start, end), job.key, step_fn=job.program.step_fn
        )
        records.add(end, **jax.device_get(found))
        seconds = time.monotonic() - began - spent
        rate = job.batch_size * (end - first) / seconds
        bar.update(end, records.progress.losses[-1], rate)
        if job.plan.diagnoses_at(end):
          spent += diagnose_step(job, probe, state, records)
        spent += measure_moments(job, state, records, job.plan.moments_at(end))
        if stop.requested:
          break
      if end == last:
        timing = {'train_seconds': seconds, 'images_per_second': rate}
        reached = job.plan.levels_reached(np.mean(records.progress.losses), records.progress.levels)
        records.progress.levels += reached
        measure_moments(job, state, records, reached)
        records.training_line(job.plan.epoch(last), float(job.program.schedule(last - 1)), timing)
        if job.plan.evaluates_at(last):
          score = validate(job, state, records)
          bar.validated(score)
          records.save(state, score)
      if stop.requested:
        records.save(state)
        break
  if not job.plan.total and not records.resumed:  # a stage that trains nothing
    records.save(state, validate(job, state, records))
  records.wait()
  return state


def validate(job: Job, state: TrainState, records: Records) -> float | None:
  """Score of the validation part, recorded; None without one, and the last step is the best.

  Macro-F1 with the class shares that the source had before its tail was cut: what the test part is
  like. Where every image is kept it is macro-F1 up to the rounding of the split.
  """
  if not len(job.data.val):
    records.progress.best_step = records.progress.step
    return None
  began = time.monotonic()
  sums = evaluate(job.program.model, state, job.data.val, job.batch_size, job.shift)
  summary = metrics.summarise(sums, job.data.class_counts)
  epoch = job.plan.epoch(records.progress.step)
  score = metrics.macro_f1_at(sums.counts, job.data.source_counts)
  records.validation_line(epoch, summary, score, time.monotonic() - began)
  return score


def diagnose_step(job: Job, probe: diagnose.Probe, state: TrainState, records: Records) -> float:
  """Measures and records the conflict after a step; the seconds that it took."""
  began = time.monotonic()
  conflict = probe.measure(state)
  seconds = time.monotonic() - began
  step = records.progress.step
  records.diagnostics_line(job.plan.epoch(step), conflict, seconds)
  return time.monotonic() - began


def measure_moments(job: Job, state: TrainState, records: Records, names: Sequence[str]) -> float:
  """Conflict and decoupling at a moment of the run, recorded under its names; the seconds."""
  began = time.monotonic()
  if names:
    found = diagnose.moment(job.config, job.data, job.program.model, state)
    for name in names:
      epoch = job.plan.epoch(records.progress.step)
      records.moment_line(name, epoch, found, time.monotonic() - began)
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
