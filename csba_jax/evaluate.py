"""Evaluation: every example once, sums on the device, ratios on the host."""

import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import ml_collections
from jax import Array

from csba_jax import config as config_lib
from csba_jax import metrics, optimizers, train_state
from csba_jax.checkpoint import Checkpoints
from csba_jax.data import augment, pipeline
from csba_jax.errors import UserError
from csba_jax.metrics import Confusion
from csba_jax.models import registry
from csba_jax.progress import say
from csba_jax.records import Progress
from csba_jax.train_state import TrainState
from csba_jax.workdir import read_config, read_result


@functools.partial(jax.jit, static_argnames='model')
def eval_step(
  model: nn.Module, state: TrainState, images: Array, labels: Array, mask: Array
) -> Confusion:
  """Sums over a batch with running BatchNorm statistics; images uint8, padding has mask False."""
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  logits = model.apply(variables, augment.scale(images), train=False)
  return Confusion.from_logits(logits, labels, mask)


def evaluate(
  model: nn.Module, state: TrainState, part: pipeline.Part, batch_size: int
) -> Confusion:
  """Sums over a whole, not empty part of the data, on the host."""
  batches = pipeline.eval_batches(part, batch_size)
  sums = [eval_step(model, state, *batch).to_host() for batch in batches]
  return functools.reduce(Confusion.merge, sums)


def evaluate_run(
  workdir: str, which: str = 'best', split: str = 'test', data_dir: str | None = None
) -> dict[str, Any]:
  """The metrics of a checkpoint of a run, as in result.json; writes nothing.

  Args:
    workdir: folder of a run.
    which: 'best' (by validation macro-F1; the last one without validation), 'latest' or a step.
    split: 'test' or 'val'.
    data_dir: takes the place of the run's config.data.dir, if the data has moved.

  Raises:
    UserError: no run or no such checkpoint there, a damaged one, or data that has changed.
  """
  config = ml_collections.ConfigDict(read_config(workdir))
  config_lib.check(config)
  workdir = Path(workdir).expanduser()
  if data_dir is not None:
    config.data.dir = data_dir
  data = pipeline.load(config, say)
  pipeline.check_splits(data.splits, workdir / 'splits.npz')
  part = data.val if split == 'val' else data.test
  if not len(part):
    raise UserError(f'a {split} part with images', 'none in this run', 'use --split=test')
  model = registry.build(config.model, len(data.class_names), data.image_shape)
  tx, _ = optimizers.build(config.train, total_steps=1)
  like = train_state.shapes(model, tx, data.image_shape)
  with Checkpoints(_checkpoints_of(workdir), read_only=True) as checkpoints:
    step = _find_step(checkpoints, workdir, which, like)
    state, _ = checkpoints.restore(step, like)
  sums = evaluate(model, state, part, config.train.batch_size)
  return metrics.summarise(sums, data.class_counts) | {
    'checkpoint_step': step,
    'class_names': list(data.class_names),
    'class_counts': data.class_counts.tolist(),
  }


def _checkpoints_of(workdir: Path) -> Path:
  directory = workdir / 'checkpoints'
  if not directory.is_dir():
    raise UserError(f'a run with checkpoints in {workdir}', 'none', 'train it with csba-train')
  return directory


def _find_step(checkpoints: Checkpoints, workdir: Path, which: str, like: TrainState) -> int:
  steps = checkpoints.steps()
  if not steps:
    raise UserError('a saved checkpoint', 'none yet', 'let csba-train save one')
  if which == 'latest':
    return steps[-1]
  if which == 'best' and (workdir / 'result.json').exists():
    return read_result(workdir)['checkpoint_step']
  if which == 'best':
    progress = Progress(**checkpoints.restore(steps[-1], like)[1])
    return steps[-1] if progress.best_score is None else progress.best_step
  if not which.isdigit() or int(which) not in steps:
    known = ', '.join(str(step) for step in steps)
    raise UserError(f'--checkpoint=best, latest or one of {known}', which, 'name one of these')
  return int(which)
