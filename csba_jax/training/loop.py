"""Training, from top to bottom: a run from its config to result.json, and the loop over its steps.

What a run is: `job`. What a step does: `step`. What follows a step: `after_step`.
"""

import contextlib
import functools
import time
from typing import Any

import jax
import ml_collections

from csba_jax import config as config_lib
from csba_jax.data import pipeline
from csba_jax.data.class_counts import by_frequency
from csba_jax.measure import calibration, evaluate
from csba_jax.methods import metrics
from csba_jax.methods.metrics import Confusion
from csba_jax.models import pretrained
from csba_jax.run import net as net_lib
from csba_jax.run.net import Metadata
from csba_jax.run.records import TESTED, Records
from csba_jax.run.state import TrainState
from csba_jax.run.workdir import Workdir, writing_to
from csba_jax.runtime import backend, distributed
from csba_jax.runtime.progress import TrainingBar, say
from csba_jax.runtime.signals import Stopped, StopRequest
from csba_jax.training import after_step, preflight, surgery
from csba_jax.training.feed import Inputs
from csba_jax.training.job import Job
from csba_jax.training.step import compiled_steps

MOST_CLASSES = 20  # whose training images one line gives; of more, those of the two ends


def train_and_evaluate(
  config: ml_collections.ConfigDict, workdir: str, stop: StopRequest
) -> dict[str, Any] | None:
  """Trains, selects a step on the validation part, evaluates the test set once: result.json.

  A run that is killed at any time and started again goes on from its last checkpoint. It ends as if
  nothing had happened, on CPU to the bit if `csba_jax.runtime.numerics.record` is as it was. Where
  a run has several processes, each of them calls this with the same arguments, and the first one
  writes the records.

  Args:
    config: see csba_jax.config.
    workdir: folder of this run and of no other; all processes see it.
    stop: asks the run to save and leave. It is entered here, if it is not already, once there is
      something to save; until then signals have their former effect.

  Returns:
    The content of result.json, at once where the run is finished already; None when stopped.
  """
  preflight.check(config)
  preflight.check_devices(config)
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
    distributed.together(lambda: _claim(folder, job))
    with Records(folder) as records:
      state = records.resume(initial, origin)
      stack.enter_context(stop)
      try:
        stop.check()  # where there are several processes, a signal to one has waited for this
        say('compiling')
        state = run_steps(job, state, records, stop)
        say(f'evaluating the test set at step {records.progress.best_step}')
        best = records.best(state)
        if job.plan.snapshots:  # of the net that is tested; a run that stops here measures it anew
          after_step.record_snapshots(job, records, stop, best, job.net(best), [TESTED])
        sums = evaluate.evaluate(job.net(best), job.data.test, job.batch_size, stop.check)
        _keep_validation(job, folder, best, stop)
      except Stopped:
        if folder.has_checkpoints():
          say(f'stopped at step {records.progress.step}: saved, start again to go on')
        else:
          say('stopped before the first step: start again to begin')
        return None
    folder.write_result(_result(job, records, state, sums, time.monotonic() - started))
    return folder.result()  # as every reader gets it: null for what is undefined


def _keep_validation(job: Job, folder: Workdir, best: TrainState, stop: StopRequest) -> None:
  """Writes the validation logits of the tested net, with which csba-predict calibrates it."""
  if len(job.data.val):
    found = evaluate.validate(job.net(best), job.data.val, job.batch_size, stop.check)
    folder.write(calibration.FILE, lambda file: file.write(found.to_bytes()))


def run_steps(job: Job, state: TrainState, records: Records, stop: StopRequest) -> TrainState:
  """The steps of a run and what follows each, from where `records` stands to the end.

  Raises:
    Stopped: after a request, once the state is saved, with the tasks that its step still has to do.
  """
  steps = compiled_steps()
  with (
    Inputs(job.data.train, job.streams, job.layout, job.plan.total, records) as inputs,
    TrainingBar(job.plan.total, records.progress.step) as bar,
  ):
    context = after_step.Context.of(job, records, stop, bar)
    longest = min(inputs.longest, backend.steps_per_dispatch(job.plan.log_every))
    try:
      state = after_step.run_due(context, state)  # before the first step, or left undone by a stop
      for first, last in job.plan.segments(records.progress.step):
        for start, end in job.plan.dispatches(first, last, longest):
          state, found = steps(
            state,
            inputs.data,
            inputs.take(start, end),
            job.key,
            step_fn=job.step_fn(start),
            layout=job.layout,
          )
          records.add(end, **jax.device_get(found))
          bar.update(end, records.progress.losses[-1], context.images_per_second())
          state = after_step.run_due(context, state)
          stop.check()
    except Stopped:
      assert context.state is not None  # nothing stops before the tasks of the first step
      records.save(context.state)
      records.wait()
      raise
  records.wait()
  return state


def _prepare(
  config: ml_collections.ConfigDict, folder: Workdir
) -> tuple[Job, TrainState, dict[str, Any]]:
  """All that can go wrong before the first step."""
  if config.model.init and not folder.has_checkpoints():
    pretrained.find(config.model.init)  # before an image is decoded
  data = pipeline.load(config, say, functools.partial(preflight.check_counts, config))
  say(_about_data(data))
  job = Job.of(config, data)
  initial, origin = job.begin(resumes=folder.has_checkpoints())
  return job, initial, origin


def _about_data(data: pipeline.Data) -> str:
  order = by_frequency(data.class_counts)
  shown = [f'{data.class_names[c]} {data.class_counts[c]}' for c in order]
  counts = ', '.join(shown) if len(shown) <= MOST_CLASSES else f'{shown[0]} to {shown[-1]}'
  sizes = f'{len(data.train)} training, {len(data.val)} validation, {len(data.test)} test images'
  return f'{sizes} of {len(data.class_names)} classes; training images by class: {counts}'


def _claim(folder: Workdir, job: Job) -> None:
  """Gives the folder to this run, once every process is ready."""
  _keep_splits(folder, job.data)
  net_lib.keep(folder, Metadata.of(job.data, job.config.model))
  if changed := folder.begin(job.layout.devices):
    say(
      'this has changed since the run began, so it may end otherwise than without a stop: '
      + '; '.join(changed)
    )


def _keep_splits(folder: Workdir, data: pipeline.Data) -> None:
  """Writes splits.npz of the run once; a run that goes on must have the same data."""
  path = folder.file('splits.npz')
  if not distributed.is_first():
    return  # all processes have the same data, and the first one may be writing just now
  if path.exists():
    pipeline.check_splits(data, path)
  else:
    with writing_to(folder.path):
      data.splits.save(path)


def _result(
  job: Job, records: Records, state: TrainState, sums: Confusion, seconds: float
) -> dict[str, Any]:
  """The content of result.json; `seconds` are those of the process that finishes the run."""
  data, progress = job.data, records.progress
  found = metrics.summarise(sums, data.class_counts) | progress.origin
  if about := surgery.summary(state):
    found |= {'surgery': about}
  return found | {
    'checkpoint_step': progress.best_step,
    'validation_macro_f1': progress.best_score,  # with the class shares of the source: after_step
    'post_hoc_tau': job.config.loss.post_hoc_tau,
    'class_names': list(data.class_names),
    'class_counts': data.class_counts.tolist(),
    'parameters': sum(x.size for x in jax.tree.leaves(state.params)),
    'splits_sha256': data.splits.sha256,
    'source_sha256': data.splits.source_sha256,
    'content_sha256': data.splits.content_sha256,
    'unreadable_images': data.skipped,
    'timing': {
      'seconds': seconds,
      'device': jax.devices()[0].device_kind,
      'devices': job.layout.devices,
      'processes': distributed.count(),
    },
  }
