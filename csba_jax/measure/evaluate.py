"""Evaluation: every example once, sums on the device, ratios on the host."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax import Array

from csba_jax.data import pipeline
from csba_jax.errors import UserError
from csba_jax.files import expanded
from csba_jax.gradients import plots
from csba_jax.measure import calibration
from csba_jax.measure.calibration import Validation
from csba_jax.methods import metrics
from csba_jax.methods.metrics import Confusion
from csba_jax.run import restore
from csba_jax.run.net import Net, Preprocessing
from csba_jax.runtime import sharding
from csba_jax.runtime.signals import StopRequest


def evaluate(
  net: Net, part: pipeline.Part, batch_size: int, tick: Callable[[], None] = lambda: None
) -> Confusion:
  """Sums over a part of the data, every image once, on the host; with adjusted logits.

  Args:
    net: is evaluated on the devices where its variables are.
    part: at least one image.
    batch_size: images at a time.
    tick: called before each batch; may raise.
  """
  found = [sums.to_host() for sums, _ in _batches(net, part, batch_size, tick)]
  return functools.reduce(Confusion.merge, found)


def validate(
  net: Net, part: pipeline.Part, batch_size: int, tick: Callable[[], None] = lambda: None
) -> Validation:
  """Adjusted logits and labels of a part; arguments as of `evaluate`, with the same program."""
  return _both(net, part, batch_size, tick)[1]


def _both(
  net: Net, part: pipeline.Part, batch_size: int, tick: Callable[[], None]
) -> tuple[Confusion, Validation]:
  """What `evaluate` and `validate` give."""
  sums, logits = [], []
  for summed, spread in _batches(net, part, batch_size, tick):
    sums.append(summed.to_host())
    whole = net.layout.place(spread)
    sharding.one_at_a_time(whole)
    logits.append(np.asarray(whole))
  found = Validation(np.concatenate(logits)[: len(part)], np.asarray(part.labels, np.int32))
  return functools.reduce(Confusion.merge, sums), found


def _batches(
  net: Net, part: pipeline.Part, batch_size: int, tick: Callable[[], None]
) -> Iterator[tuple[Confusion, Array]]:
  """What eval_step says of each batch."""
  layout = net.layout
  shift = layout.place(net.shift)
  for batch in pipeline.eval_batches(part, batch_size, layout):
    tick()
    yield eval_step(
      net.model, net.metadata.preprocessing, net.variables, shift, *batch, layout=layout
    )


@functools.partial(jax.jit, static_argnames=('model', 'preprocessing', 'layout'))
def eval_step(
  model: nn.Module,
  preprocessing: Preprocessing,
  variables: Any,
  shift: Array,
  images: Array,
  labels: Array,
  mask: Array,
  *,
  layout: sharding.Layout,
) -> tuple[Confusion, Array]:
  """(sums, adjusted logits [N, C]) of a batch of uint8 images; padding has mask False.

  The logits stay where their images are: an evaluation sends its sums alone.
  """
  logits = model.apply(layout.gather(variables), preprocessing(images), train=False) + shift[None]
  return layout.gather(Confusion.from_logits(logits, labels, mask)), layout.spread(logits)


def evaluate_run(
  workdir: str,
  which: str = 'best',
  split: str = 'test',
  data_dir: str | None = None,
  post_hoc_tau: float | None = None,
  stop: StopRequest | None = None,
) -> dict[str, Any]:
  """The metrics of a checkpoint of a run, as in result.json, and 'trust'; writes nothing.

  'trust' is what calibration gives on the test part, see `calibration.Trust`; it is None for other
  parts, for other nets than that whose validation logits the run has kept, and if it kept few.

  Args:
    workdir: folder of a run.
    which: checkpoint, see `restore.load_run`.
    split: 'test' or 'val'.
    data_dir: see `restore.load_run`.
    post_hoc_tau: replaces the run's loss.post_hoc_tau; choose it on 'val'.
    stop: entered once the run is read, and checked before each batch.

  Raises:
    Stopped: after a signal.
    UserError: as in `restore.load_run`; a part without images; or a tau that is not a finite number
      >= 0.
  """
  if post_hoc_tau is not None and not 0 <= post_hoc_tau < math.inf:
    raise UserError('a finite tau >= 0', str(post_hoc_tau), 'set --post_hoc_tau=1')
  data = restore.config_of(workdir).data
  if split == 'val' and not data.val_fraction and data.source != 'image_folder':
    raise _no_part(split)  # before the data is read; a folder may have a part of its own
  run = restore.load_run(workdir, which, data_dir)
  part = run.data.val if split == 'val' else run.data.test
  if not len(part):
    raise _no_part(split)
  net = run.net
  if post_hoc_tau is not None:
    net = dataclasses.replace(net, post_hoc_tau=post_hoc_tau)
  kept = None  # of the net that was tested
  if (split, which, post_hoc_tau) == ('test', 'best', None):
    kept = Validation.load(expanded(workdir), net.num_classes)
  with contextlib.ExitStack() as stack:
    tick = stack.enter_context(stop).check if stop else lambda: None
    batch_size, trust = run.config.train.batch_size, None
    if kept:
      sums, said = _both(net, part, batch_size, tick)
      trust = calibration.trust(said, kept)
    else:
      sums = evaluate(net, part, batch_size, tick)
  return metrics.summarise(sums, net.metadata.class_counts) | {
    'checkpoint_step': net.step,
    'post_hoc_tau': net.post_hoc_tau,
    'class_names': list(net.metadata.class_names),
    'class_counts': net.metadata.class_counts.tolist(),
    'trust': trust,
  }


def _no_part(split: str) -> UserError:
  return UserError(f'a {split} part with images', 'none in this run', 'use --split=test')


def draw_confusion(result: Mapping[str, Any], workdir: str, split: str) -> str:
  """Draws the confusion matrix into a run's folder; returns a line that says where.

  The numbers are known and printed by then. So a folder that cannot be written is no error: the
  line says why there is no picture.

  Args:
    result: of `evaluate_run`.
    workdir: folder of the run.
    split: which part was evaluated.
  """
  tau = f'_tau{result["post_hoc_tau"]:g}' if result['post_hoc_tau'] else ''
  path = Path(workdir) / f'confusion_{split}_step{result["checkpoint_step"]:06d}{tau}.png'
  try:
    plots.confusion(result, path, split)
  except OSError as error:
    return f'the confusion matrix was not drawn: {error}'
  return f'written: {path}'
