"""Evaluation: every example once, sums on the device, ratios on the host."""

import functools
from typing import Any

import flax.linen as nn
import jax
from jax import Array

from csba_jax import metrics, trained
from csba_jax.data import augment, pipeline
from csba_jax.errors import UserError
from csba_jax.metrics import Confusion
from csba_jax.train_state import TrainState


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
    which: see `trained.take_up`.
    split: 'test' or 'val'.
    data_dir: see `trained.take_up`.

  Raises:
    UserError: as `trained.take_up`, or a part without images.
  """
  run = trained.take_up(workdir, which, data_dir)
  part = run.data.val if split == 'val' else run.data.test
  if not len(part):
    raise UserError(f'a {split} part with images', 'none in this run', 'use --split=test')
  sums = evaluate(run.model, run.state, part, run.config.train.batch_size)
  return metrics.summarise(sums, run.data.class_counts) | {
    'checkpoint_step': int(run.state.step),
    'class_names': list(run.data.class_names),
    'class_counts': run.data.class_counts.tolist(),
  }
