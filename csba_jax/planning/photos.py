"""A run on a folder of photos: a recipe with settings that follow from an audit of the folder."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from csba_jax import config as config_lib
from csba_jax.data import audit as audit_lib
from csba_jax.data.audit import Audit
from csba_jax.errors import UserError
from csba_jax.files import expanded
from csba_jax.models import pretrained
from csba_jax.planning import choices
from csba_jax.report.audit import content, page
from csba_jax.run.workdir import read_config
from csba_jax.runtime import numerics

FIELDS = ('data.source', 'data.dir')  # which --data sets
_GPU_PLUGINS = ('jax_cuda12_plugin', 'jax_cuda13_plugin')


def check(
  config: ml_collections.ConfigDict,
  given: Mapping[str, Any],
  folder: str,
  workdir: str | os.PathLike | None,
) -> None:
  """Raises UserError for what can be known to be wrong before a photo is read.

  Args:
    config: the recipe, with what the user has set.
    given: {field: value} that the user has set.
    folder: of photos.
    workdir: of the run; None if nothing is written.
  """
  if not folder:
    raise UserError('--data=FOLDER', 'an empty name', 'name the folder of photos')
  if set_twice := [field for field in FIELDS if field in given]:
    raise UserError(
      f'{set_twice[0]} set by --data', 'it set twice', f'remove --config.{set_twice[0]}'
    )
  config_lib.check(config)
  if given.get('model.init') and 'model.name' not in given:
    pretrained.recognise(given['model.init'])
  if workdir is not None:
    audit_lib.check_outside(folder, workdir)


def resume(
  config: ml_collections.ConfigDict,
  given: Mapping[str, Any],
  folder: str,
  workdir: str | os.PathLike | None,
) -> ml_collections.ConfigDict | None:
  """The config of the run that a workdir holds, with what is given; None where none has begun.

  Raises:
    UserError: the run is of another folder.
  """
  if workdir is None or not (expanded(workdir) / 'config.json').exists():
    return None
  kept = config_lib.flatten(read_config(workdir))
  if kept.get('data.dir') != _absolute(folder):
    raise UserError(
      f'the photos that {workdir} was started with: {kept.get("data.dir")}',
      folder,
      'name another --workdir',
    )
  known = {k: v for k, v in kept.items() if k in config_lib.flatten(config)}
  return _updated(config, known | dict(given))


def configure(
  config: ml_collections.ConfigDict,
  given: Mapping[str, Any],
  audit: Audit,
  workdir: str | os.PathLike | None,
  minutes: float,
) -> tuple[ml_collections.ConfigDict, str]:
  """(the recipe with settings for a folder of photos, what was found and chosen as text).

  The files of the audit are written into the workdir.

  Args:
    config: the recipe, with what the user has set.
    given: {field: value} that the user has set.
    audit: of the folder.
    workdir: of the run; None writes nothing.
    minutes: that training may take.

  Raises:
    UserError: a class without a photo to train on, too few photos, or no room in the workdir.
  """
  where = 'WORKDIR' if workdir is None else expanded(workdir).absolute()
  paths = _absolute(audit.folder), str(Path(where, audit_lib.COPIES_FILE))
  weights = given.get('model.init')
  model = (given.get('model.name') or pretrained.recognise(weights)) if weights else None
  found = choices.choose(audit, config, given, hardware(), minutes, *paths, model)
  lines = [content.describe(audit), '', 'settings (set --config.FIELD=VALUE to change one):']
  lines += [f'  {choice.field}={choice.value}: {choice.reason}' for choice in found]
  unwritten = () if workdir is not None else ('data.manifest', 'data.group_column')
  values = {choice.field: choice.value for choice in found if choice.field not in unwritten}
  chosen = _updated(config, values)
  config_lib.check(chosen)
  if workdir is not None:
    lines += ['', *(f'written: {path}' for path in page.write(audit, Path(where)))]
  return chosen, '\n'.join(lines)


def _updated(
  config: ml_collections.ConfigDict, values: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.update_from_flattened_dict(dict(values))
  return config.lock()


def _absolute(folder: str) -> str:
  return str(expanded(folder).absolute())


def hardware() -> choices.Hardware:
  """The NVIDIA GPUs of this host if JAX can use them, else the cores that this process may use.

  It does not start JAX, whose settings depend on the run's. CUDA_VISIBLE_DEVICES and JAX_PLATFORMS
  count; a limit of a container does not. Other accelerators are not looked for.
  """
  gpus = 0
  plugin = any(map(importlib.util.find_spec, _GPU_PLUGINS))
  if plugin and os.environ.get('JAX_PLATFORMS') != 'cpu':
    gpus = len([path for path in Path('/dev').glob('nvidia*') if path.name[6:].isdigit()])
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    if visible is not None:
      gpus = len([x for x in visible.split(',') if x.strip() and not x.strip().startswith('-')])
  return choices.Hardware(numerics.cores(), gpus)
