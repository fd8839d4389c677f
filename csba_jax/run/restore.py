"""A run taken up again from its workdir: config, data, model and one of its states."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import ml_collections
from jax import Array

from csba_jax import config as config_lib
from csba_jax.data import augment, pipeline, sampling
from csba_jax.errors import UserError
from csba_jax.methods import optimizers
from csba_jax.models import registry
from csba_jax.run import state as state_lib
from csba_jax.run.checkpoint import Checkpoints
from csba_jax.run.records import Progress
from csba_jax.run.schedule import Plan
from csba_jax.run.state import TrainState
from csba_jax.run.workdir import read_config, read_result
from csba_jax.runtime import sharding
from csba_jax.runtime.progress import say

PyTree = Any
STATISTICS_BATCHES = 50  # a momentum of 0.9 forgets the start to 0.5 %


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
  """A run at one of its checkpoints."""

  workdir: Path
  config: ml_collections.ConfigDict
  data: pipeline.Data
  model: nn.Module
  state: TrainState


def take_up(
  workdir: str,
  which: str = 'best',
  data_dir: str | None = None,
  data: pipeline.Data | None = None,
  layout: sharding.Layout | None = None,
) -> Trained:
  """Reads a run; writes nothing.

  Args:
    workdir: folder of a run.
    which: 'best' (by validation macro-F1; the last one without validation), 'latest', a step, or
      'init', the untrained net of the run's seed with the statistics of its BatchNorms as
      STATISTICS_BATCHES training batches leave them.
    data_dir: takes the place of the run's config.data.dir, if the data has moved.
    data: the run's data, where it has been read already.
    layout: where its state is put; None: whole on each of config.parallel.devices.

  Raises:
    UserError: no run or no such checkpoint there, one that is damaged or of another architecture,
      or data that has changed.
  """
  config = config_of(workdir)
  folder = Path(workdir).expanduser()
  if data_dir is not None:
    config.data.dir = data_dir
  data = data or pipeline.load(config, say)
  pipeline.check_splits(data.splits, folder / 'splits.npz')
  model = registry.build(config.model, len(data.class_names), data.image_shape)
  tx, _ = optimizers.build(config, total_steps=1)
  averages = config.train.ema_decay > 0
  layout = layout or sharding.for_evaluation(config)
  if which == 'init' and config.stage.method != 'none':
    raise UserError(
      'a first stage for --checkpoint=init',
      f'a second stage in {folder}, which begins with the net of {config.stage.source}',
      f'name --workdir={config.stage.source}',
    )
  if which == 'init':
    state = layout.place_state(state_lib.create(model, tx, data.image_shape, config.seed))
    state = state.replace(batch_stats=estimate_statistics(model, state, data, config))
    return Trained(folder, config, data, model, state)
  like = layout.like(state_lib.shapes(model, tx, data.image_shape, averages))
  with Checkpoints(_checkpoints_of(folder), read_only=True, warn=say) as checkpoints:
    step = _find_step(checkpoints, folder, which, like)
    state, _ = checkpoints.restore(step, like)
  return Trained(folder, config, data, model, state)


def config_of(workdir: str) -> ml_collections.ConfigDict:
  """The checked config of a run; UserError if there is none, or not of this version."""
  config = ml_collections.ConfigDict(read_config(workdir))
  config_lib.check(config)
  return config


def estimate_statistics(
  model: nn.Module, state: TrainState, data: pipeline.Data, config: ml_collections.ConfigDict
) -> PyTree:
  """Running statistics of a net that stays as it is, over the batches of a run's first steps."""
  stats, layout = state.batch_stats, sharding.Layout.of(state)
  if not jax.tree.leaves(stats):
    return stats
  plan = Plan.of(config, len(data.train))
  stream = sampling.Stream.of(
    config.sampler, data.train.labels, config.train.batch_size, plan.total, config.seed
  )
  for step in range(STATISTICS_BATCHES):
    index = stream.positions(step)
    images = layout.batch_of(lambda rows, index=index: data.train.images[index[rows]], len(index))
    stats = _statistics_step(model, state.params, stats, images, layout)
    sharding.one_at_a_time(stats)
  return stats


@functools.partial(jax.jit, static_argnames=('model', 'layout'))
def _statistics_step(
  model: nn.Module, params: PyTree, stats: PyTree, images: Array, layout: sharding.Layout
) -> PyTree:
  variables = layout.gather({'params': params, 'batch_stats': stats})
  _, updated = model.apply(variables, augment.scale(images), train=True, mutable=['batch_stats'])
  return layout.gather(updated['batch_stats'])


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
    raise UserError(
      f'--checkpoint=best, latest, init or one of {known}', which, 'name one of these'
    )
  return int(which)
