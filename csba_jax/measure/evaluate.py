"""Evaluation: every example once, sums on the device, ratios on the host."""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax import Array

from csba_jax.data import augment, pipeline
from csba_jax.errors import UserError
from csba_jax.methods import losses, metrics
from csba_jax.methods.metrics import Confusion
from csba_jax.run import restore
from csba_jax.run.state import TrainState
from csba_jax.runtime import sharding
from csba_jax.runtime.signals import StopRequest


@functools.partial(jax.jit, static_argnames=('model', 'layout'))
def eval_step(
  model: nn.Module,
  state: TrainState,
  shift: Array,
  images: Array,
  labels: Array,
  mask: Array,
  *,
  layout: sharding.Layout,
) -> Confusion:
  """Sums over a batch with running BatchNorm statistics; images uint8, padding has mask False.

  `shift` [C] is added to the logits, see `losses.post_hoc_shift`.
  """
  variables = layout.gather(state.variables())
  logits = model.apply(variables, augment.scale(images), train=False)
  return layout.gather(Confusion.from_logits(logits + shift[None], labels, mask))


def evaluate(
  model: nn.Module,
  state: TrainState,
  part: pipeline.Part,
  batch_size: int,
  shift: np.ndarray,
  tick: Callable[[], None] = lambda: None,
) -> Confusion:
  """Sums over a whole, not empty part of the data, on the host; `shift` [C]: see `eval_step`.

  On the devices where the state is; `tick` is called before each batch, and may raise.
  """
  layout, sums = sharding.Layout.of(state), []
  shift = layout.place(shift)
  for batch in pipeline.eval_batches(part, batch_size, layout):
    tick()
    sums.append(eval_step(model, state, shift, *batch, layout=layout).to_host())
  return functools.reduce(Confusion.merge, sums)


def evaluate_run(
  workdir: str,
  which: str = 'best',
  split: str = 'test',
  data_dir: str | None = None,
  post_hoc_tau: float | None = None,
  stop: StopRequest | None = None,
) -> dict[str, Any]:
  """The metrics of a checkpoint of a run, as in result.json; writes nothing.

  Args:
    workdir: folder of a run.
    which: see `trained.take_up`.
    split: 'test' or 'val'.
    data_dir: see `trained.take_up`.
    post_hoc_tau: takes the place of the run's loss.post_hoc_tau; choose it on 'val'.
    stop: entered once the run is read, and asked before each batch.

  Raises:
    Stopped: after a signal.
    UserError: as `trained.take_up`, a part without images, or a tau that is no finite number >= 0.
  """
  if post_hoc_tau is not None and not 0 <= post_hoc_tau < math.inf:
    raise UserError('a finite tau >= 0', str(post_hoc_tau), 'set --post_hoc_tau=1')
  run = restore.take_up(workdir, which, data_dir)
  part = run.data.val if split == 'val' else run.data.test
  if not len(part):
    raise UserError(f'a {split} part with images', 'none in this run', 'use --split=test')
  tau = run.config.loss.post_hoc_tau if post_hoc_tau is None else post_hoc_tau
  shift = losses.post_hoc_shift(tau, run.data.class_counts)
  with contextlib.ExitStack() as stack:
    tick = stack.enter_context(stop).check if stop else lambda: None
    sums = evaluate(run.model, run.state, part, run.config.train.batch_size, shift, tick)
  return metrics.summarise(sums, run.data.class_counts) | {
    'checkpoint_step': int(run.state.step),
    'post_hoc_tau': tau,
    'class_names': list(run.data.class_names),
    'class_counts': run.data.class_counts.tolist(),
  }
