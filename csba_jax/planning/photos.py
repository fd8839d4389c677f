"""A run on a folder of photos: an audit of the folder, and a recipe with settings that follow."""

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from csba_jax.data import audit as audit_lib
from csba_jax.errors import UserError
from csba_jax.files import expanded
from csba_jax.planning import choices
from csba_jax.report.audit import content, page

KEPT = 'choices.json'  # in the workdir: a run that goes on keeps its settings, on any machine


def configure(
  config: ml_collections.ConfigDict,
  given: Mapping[str, Any],
  folder: str,
  workdir: str | os.PathLike | None,
  minutes: float,
  tick: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[ml_collections.ConfigDict, str]:
  """(the recipe with settings for a folder of photos, what was found and chosen as text).

  The files of the audit and choices.json are written into the workdir. If choices.json is there,
  its settings are taken, and the folder is not looked at.

  Args:
    config: the recipe, with what the user has set.
    given: {field: value} that the user has set.
    folder: of CLASS/photo files.
    workdir: of the run; None writes nothing.
    minutes: that training may take.
    tick: as of `audit.audit_folder`.

  Raises:
    UserError: a folder that cannot be used, or a workdir of another folder or without room.
  """
  kept = expanded(workdir) / KEPT if workdir else None
  if kept and kept.exists():
    chosen, text = _read(kept, folder), f'settings: those of {kept}'
  else:
    chosen, text = _choose(config, given, folder, workdir, minutes, tick)
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.update_from_flattened_dict({k: v for k, v in chosen.items() if k not in given})
  return config.lock(), text


def _choose(
  config: ml_collections.ConfigDict,
  given: Mapping[str, Any],
  folder: str,
  workdir: str | os.PathLike | None,
  minutes: float,
  tick: Callable[[int, int], None],
) -> tuple[dict[str, Any], str]:
  """({field: value}, text), after an audit, which is written."""
  audit = audit_lib.audit_folder(folder, config.data.layout, tick)
  where = expanded(workdir or '.').absolute()
  paths = _absolute(folder), str(where / audit_lib.COPIES_FILE)
  found = choices.choose(audit, config, given, hardware(), minutes, *paths)
  lines = [content.describe(audit), '', 'settings (set --config.FIELD=VALUE to change one):']
  lines += [f'  {choice.field}={choice.value}: {choice.reason}' for choice in found]
  chosen = {choice.field: choice.value for choice in found}
  if workdir:
    lines += ['', *(f'written: {path}' for path in page.write(audit, where))]
    kept = {'folder': _absolute(folder), 'choices': chosen}
    audit_lib.write_all(where, {KEPT: json.dumps(kept, indent=1) + '\n'})  # last: it says all is
  return chosen, '\n'.join(lines)


def _read(path: Path, folder: str) -> dict[str, Any]:
  """The settings that an earlier start has chosen for this folder."""
  try:
    kept = json.loads(path.read_text('utf-8'))
    chosen, of = dict(kept['choices']), str(kept['folder'])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f'the settings that csba-train --data wrote to {path}', str(error), 'delete the file'
    ) from error
  if of != _absolute(folder):
    raise UserError(
      f'the --data that {path.parent} was started with: {of}', folder, 'name another --workdir'
    )
  return chosen


def _absolute(folder: str) -> str:
  return str(expanded(folder).absolute())


def hardware() -> choices.Hardware:
  """The GPUs of this host if JAX can use them, else the cores that this process may use.

  It does not start JAX, whose settings depend on the run's. CUDA_VISIBLE_DEVICES and JAX_PLATFORMS
  count. TPUs are not looked for.
  """
  gpus = 0
  if importlib.util.find_spec('jax_cuda12_plugin') and os.environ.get('JAX_PLATFORMS') != 'cpu':
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    found = [path for path in Path('/dev').glob('nvidia*') if path.name[6:].isdigit()]
    gpus = len(found if visible is None else [x for x in visible.split(',') if x])
  return choices.Hardware(len(os.sched_getaffinity(0)), gpus)
