"""What a workdir holds, read again: a net that needs no data, or a run with its data."""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from jax import Array

from csba_jax import config as config_lib
from csba_jax.data import pipeline
from csba_jax.errors import UserError
from csba_jax.files import expanded
from csba_jax.methods import optimizers, second_stages, surgery
from csba_jax.models import registry
from csba_jax.run import net as net_lib
from csba_jax.run import state as state_lib
from csba_jax.run.checkpoint import Checkpoints
from csba_jax.run.net import Metadata, Net, Preprocessing
from csba_jax.run.records import Progress
from csba_jax.run.schedule import training_stream
from csba_jax.run.state import TrainState
from csba_jax.run.workdir import read_config, read_result
from csba_jax.runtime import sharding
from csba_jax.runtime.progress import say

PyTree = Any
BEING_REMOVED_SECONDS = 1.0  # for a run that goes on to remove a checkpoint that looks damaged
STATISTICS_BATCHES = (
  50  # after that many, a momentum of 0.9 has forgotten all but 0.5 % of the start
)


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """A run at one of its checkpoints: the net, and the config and the data that it comes from."""

  workdir: Path
  net: Net
  config: ml_collections.ConfigDict
  data: pipeline.Data


def load_net(workdir: str, which: str = 'best', layout: sharding.Layout | None = None) -> Net:
  """The net of a run, from its workdir alone: the training data may be elsewhere or gone.

  Its predictions are those that csba-evaluate counts.

  Args:
    workdir: folder of a run.
    which: 'best' (by validation macro-F1; the last one without validation), 'latest', or a step.
    layout: devices to put the net on; None: whole on each of config.parallel.devices.

  Raises:
    UserError: there is no run, no such checkpoint, or one that is damaged or of another
      architecture; or 'init', which needs data.
  """
  config, folder = config_of(workdir), expanded(workdir)
  if which == 'init':
    raise UserError(
      'a checkpoint that needs no data: best, latest or a step',
      'init, whose statistics may be those of training batches',
      'use load_run, which reads the data',
    )
  return _load_net(folder, config, net_lib.find(folder, config), which, layout)


def load_run(
  workdir: str,
  which: str = 'best',
  data_dir: str | None = None,
  data: pipeline.Data | None = None,
  layout: sharding.Layout | None = None,
) -> Run:
  """The net of a run with the run's config and data; writes nothing.

  Args:
    workdir: folder of a run.
    which: as in `load_net`; or 'init', the untrained net of the run's seed, whose BatchNorms have
      the statistics of the first STATISTICS_BATCHES training batches, or those of model.init where
      they never change.
    data_dir: replaces the run's config.data.dir where the data has moved.
    data: the run's data, where they have been read already.
    layout: as in `load_net`.

  Raises:
    UserError: as in `load_net`; or the data are absent or have changed.
  """
  config, folder = config_of(workdir), expanded(workdir)
  if data_dir is not None:
    config.data.dir = data_dir
  if which != 'init':
    _check_named(folder, which)  # before the data is decoded
  data = data or pipeline.load(config, say)
  pipeline.check_splits(data, folder / 'splits.npz')
  # A run from before net.json has its metadata from the data.
  metadata = (
    net_lib.read(folder) if (folder / net_lib.FILE).exists() else Metadata.of(data, config.model)
  )
  if which != 'init':
    net = _load_net(folder, config, metadata, which, layout)
  elif config.stage.method == 'none':
    net = renew_statistics(_initial_net(config, metadata, layout), config, data)
  else:
    raise UserError(
      'a first stage for --checkpoint=init',
      f'a second stage in {folder}, which begins with the net of {config.stage.source}',
      f'set --workdir={config.stage.source}',
    )
  return Run(folder, net, config, data)


def load_state(
  workdir: str, which: str = 'best', layout: sharding.Layout | None = None
) -> TrainState:
  """All of a training state that a checkpoint keeps; arguments and errors as in `load_net`."""
  config, folder = config_of(workdir), expanded(workdir)
  return _load_state(folder, config, net_lib.find(folder, config), which, layout)[1]


def shapes_of(workdir: str) -> TrainState:
  """Shapes and dtypes of a run's training state, without its data or a checkpoint.

  Raises:
    UserError: there is no run, or it names no classes (see `csba_jax.run.net.find`).
  """
  config, folder = config_of(workdir), expanded(workdir)
  return _shapes(config, net_lib.find(folder, config))[1]


def config_of(workdir: str | Path) -> ml_collections.ConfigDict:
  """The checked config of a run; UserError if there is none, or not of this version."""
  config = ml_collections.ConfigDict(read_config(workdir))
  config_lib.check(config)
  return config


def renew_statistics(net: Net, config: ml_collections.ConfigDict, data: pipeline.Data) -> Net:
  """The net with running statistics of the batches of the run's first STATISTICS_BATCHES steps.

  Its parameters stay as they are. Where training never changes its statistics, these stay too.
  """
  stats, layout = net.batch_stats, net.layout
  if not (jax.tree.leaves(stats) and second_stages.updates_statistics(config)):
    return net
  stream, images = training_stream(config, data.train.labels), data.train.images

  def read(index: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return images[index[rows]]

  for step in range(STATISTICS_BATCHES):
    index = stream.positions(step)
    batch = layout.batch_of(functools.partial(read, index), len(index))
    stats = _statistics_step(
      net.model, net.metadata.preprocessing, net.params, stats, batch, layout
    )
    sharding.one_at_a_time(stats)
  return net.replace(batch_stats=stats)


@functools.partial(jax.jit, static_argnames=('model', 'preprocessing', 'layout'))
def _statistics_step(
  model: nn.Module,
  preprocessing: Preprocessing,
  params: PyTree,
  stats: PyTree,
  images: Array,
  layout: sharding.Layout,
) -> PyTree:
  variables = layout.gather({'params': params, 'batch_stats': stats})
  _, updated = model.apply(variables, preprocessing(images), train=True, mutable=['batch_stats'])
  return layout.gather(updated['batch_stats'])


def _load_net(
  folder: Path,
  config: ml_collections.ConfigDict,
  metadata: Metadata,
  which: str,
  layout: sharding.Layout | None,
) -> Net:
  model, state = _load_state(folder, config, metadata, which, layout)
  return Net.of(model, state, metadata, config.loss.post_hoc_tau)


def _load_state(
  folder: Path,
  config: ml_collections.ConfigDict,
  metadata: Metadata,
  which: str,
  layout: sharding.Layout | None,
) -> tuple[nn.Module, TrainState]:
  layout = layout or sharding.for_evaluation(config)
  model, shapes = _shapes(config, metadata)
  like = layout.like(shapes)
  _check_named(folder, which)
  with Checkpoints(_checkpoints_of(folder), read_only=True, warn=say) as checkpoints:
    validates = config.data.val_fraction > 0 or config.data.source == 'image_folder'
    step = _find_step(checkpoints, folder, which, like, validates)
    return model, _restore(checkpoints, step, folder, like)[0]


def _shapes(config: ml_collections.ConfigDict, metadata: Metadata) -> tuple[nn.Module, TrainState]:
  model = _model_of(config, metadata)
  tx, _ = optimizers.build(config, total_steps=1)
  state = state_lib.shapes(model, tx, metadata.image_shape, config.train.ema_decay > 0)
  return model, state.replace(surgery=surgery.initial(config, len(metadata.class_names)))


def _initial_net(
  config: ml_collections.ConfigDict, metadata: Metadata, layout: sharding.Layout | None
) -> Net:
  """The net of a run's seed before its first step, with the statistics that a model begins with."""
  model = _model_of(config, metadata)
  tx, _ = optimizers.build(config, total_steps=1)
  state = state_lib.create(model, tx, metadata.image_shape, config.seed)
  state = state_lib.with_pretrained(state, config.model)
  state = (layout or sharding.for_evaluation(config)).place_state(state)
  return Net.of(model, state, metadata, config.loss.post_hoc_tau)


def _model_of(config: ml_collections.ConfigDict, metadata: Metadata) -> nn.Module:
  return registry.build(config.model, len(metadata.class_names), metadata.image_shape)


def _checkpoints_of(workdir: Path) -> Path:
  directory = workdir / 'checkpoints'
  if not directory.is_dir():
    raise UserError(
      f'a run with checkpoints in {workdir}',
      'none yet',
      'wait until csba-train has saved one, or start it again if it was stopped',
    )
  return directory


def _check_named(workdir: Path, which: str) -> None:
  """Raises UserError for a checkpoint that cannot be there; looks at names of folders alone."""
  steps = sorted(int(p.name) for p in _checkpoints_of(workdir).iterdir() if p.name.isdigit())
  if not steps:
    raise UserError(
      f'a saved checkpoint in {workdir}', 'none yet', 'wait until csba-train has saved one'
    )
  if which not in ('best', 'latest') and not (which.isdecimal() and int(which) in steps):
    known = ', '.join(map(str, steps))
    raise UserError(
      f'--checkpoint=best, latest, init or one of {known}', which, 'set it to one of these'
    )


def _find_step(
  checkpoints: Checkpoints, workdir: Path, which: str, like: TrainState, validates: bool
) -> int:
  """The step of the checkpoint that `which` names; `validates`: whether the run has validations."""
  steps = checkpoints.steps()
  if which == 'latest':
    return steps[-1]
  if which != 'best':
    return int(which)
  if (workdir / 'result.json').exists():
    return read_result(workdir)['checkpoint_step']
  progress = Progress.of(_restore(checkpoints, steps[-1], workdir, like)[1])
  if progress.best_step == 0 and validates:
    raise UserError(
      f'a checkpoint that was validated in {workdir}, for --checkpoint=best',
      f'no validation up to step {steps[-1]}, in a run that is not finished',
      'wait for the first validation, or set --checkpoint=latest',
    )
  return steps[-1] if progress.best_score is None else progress.best_step


def _restore(
  checkpoints: Checkpoints, step: int, workdir: Path, like: TrainState
) -> tuple[TrainState, dict[str, Any]]:
  """checkpoints.restore; UserError where a run that goes on has removed it in the meantime."""
  try:
    saved, meta = checkpoints.restore(step, like.saved())
    return TrainState.of_saved(saved), meta
  except UserError as error:
    directory = _checkpoints_of(workdir)
    if not (workdir / 'result.json').exists():
      time.sleep(BEING_REMOVED_SECONDS)
    if (directory / str(step)).is_dir():
      raise
    left = ', '.join(path.name for path in directory.iterdir() if path.name.isdigit())
    raise UserError(
      f'checkpoint {step} in {workdir}',
      f'that the run, which goes on, has replaced it by {left}',
      'give the command again, or wait until the run is finished',
    ) from error
