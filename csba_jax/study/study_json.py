"""study.json: what a study was asked for, and the commands that started it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from csba_jax import config as config_lib
from csba_jax.errors import UserError
from csba_jax.files import write_atomically
from csba_jax.run.workdir import commit, lock_file, versions, writing_to
from csba_jax.study import grid

NAME = 'study.json'
LOCK_SECONDS = 60.0  # until a shard that starts gives up on another one
# of a study that has begun; the rest are axes, which may grow
FIXED: tuple[str, ...] = ('base', 'name', 'test', 'tuned_by', 'outcome', 'pairs')
FIXED += ('method_pairs', 'subsets', 'margin', 'smallest_effect', 'threads')


def claim(
  folder: Path,
  study: ml_collections.ConfigDict,
  command: str = '',
  shards: int = 1,
  rates_at_ends: Sequence[str] = (),
) -> None:
  """Writes study.json, which makes the folder this study's; one shard after the other.

  Args:
    shards: how many share the study; only a study that is not shared may grow.
    rates_at_ends: see `tuning.at_ends`.

  Raises:
    UserError: another study's folder, or other shards have other axes.
  """
  config = json.loads(json.dumps(study.to_dict())) | {'base': grid.placeless(study.base)}
  commands = [command]
  with lock_file(folder, f'.{NAME}.lock', LOCK_SECONDS):
    if (folder / NAME).exists():
      before = read(folder)
      _check_same(folder, before['config'], config, shards)
      commands = [*_commands(before), command]
    record = {'name': study.name, 'config': config, 'commands': list(dict.fromkeys(commands))}
    record |= {'rates_at_ends': list(rates_at_ends)} if rates_at_ends else {}
    record |= {'versions': versions(), 'commit': commit()}
    text = json.dumps(record, indent=1) + '\n'
    with writing_to(folder):
      write_atomically(folder / NAME, lambda file: file.write(text.encode()))


def _check_same(
  folder: Path, there: Mapping[str, Any], here: Mapping[str, Any], shards: int
) -> None:
  """UserError unless both configs are of one study; fields that came later had their default."""
  there = json.loads(json.dumps(grid.default().to_dict())) | there
  old, new = (config_lib.completed(config['base']) for config in (there, here))
  different = [f'base.{words}' for words in config_lib.differences(old, new)]
  old, new = ({key: config[key] for key in FIXED if key != 'base'} for config in (there, here))
  if different := different + config_lib.differences(old, new):
    raise UserError(
      f'the study that {folder} was started with',
      '; '.join(different),
      'name another --workdir, or set these fields as they were',
    )
  old, new = ({key: config[key] for key in config if key not in FIXED} for config in (there, here))
  if shards > 1 and (different := config_lib.differences(old, new)):
    raise UserError(
      f'the axes that other shards in {folder} have',
      '; '.join(different),
      'give all shards the same axes; to let the study grow, start it once without --shard',
    )


def read(folder: Path) -> dict[str, Any]:
  """The content of study.json in a study's folder; UserError without a whole one."""
  file = folder / NAME
  try:
    study = json.loads(file.read_text(encoding='utf-8'))
    lacking = [
      key for key in ('outcome', 'margin', 'smallest_effect') if key not in study['config']
    ]
    if lacking or 'name' not in study:
      raise ValueError(f'no {", ".join(lacking) or "name"} in it')
    if wrong := _mistyped(study):
      raise ValueError(f'{wrong} is of another type')
    return study
  except (FileNotFoundError, NotADirectoryError) as error:
    raise UserError(
      f'the folder of a study (csba-study) at {folder}', 'no study.json there', 'correct the path'
    ) from error
  except (OSError, ValueError, TypeError, KeyError) as error:
    raise UserError(
      f'a whole {file}',
      f'a damaged one ({error})',
      'restore it from a copy, or remove it and start csba-study again',
    ) from error


def _mistyped(study: Mapping[str, Any]) -> str:
  """The first field whose type is not that of a study; '' where all are."""
  like = grid.default().to_dict()
  for field, value in study['config'].items():
    kind = type(like.get(field, value))
    kinds = {tuple: (list, tuple), float: (float, int)}.get(kind, (kind,))
    if type(value) not in kinds or (
      field == 'base' and not _fits(value, config_lib.default().to_dict())
    ):
      return f'config.{field}'
  texts = [study['name'], *study.get('commands', []), *study.get('rates_at_ends', [])]
  if not all(isinstance(text, str) for text in [*texts, study.get('command', '')]):
    return 'a name or a command'
  return ''


def _fits(config: Any, like: Any) -> bool:
  """Whether the fields of a run's config have the types of the default, where both have them."""
  if isinstance(like, dict):
    return isinstance(config, dict) and all(_fits(config[k], like[k]) for k in config if k in like)
  kinds = str if isinstance(like, str) else int | float
  return isinstance(config, kinds)


def _commands(study: Mapping[str, Any]) -> list[str]:
  """Every different command that a study was started with, in order."""
  given = study.get('commands') or [study.get('command')]  # one, in files of the first form
  return list(dict.fromkeys(command for command in given if command))


def all_commands(folder: Path, study: Mapping[str, Any]) -> tuple[str, ...]:
  """Those of the study that tuned for it, if it lies beside it or at its path; then its own."""
  tuned_by = study['config'].get('tuned_by') or ''
  before: list[str] = []
  for path in (folder.absolute().parent / Path(tuned_by).name, Path(tuned_by)) if tuned_by else ():
    if not before and (path / NAME).is_file():
      before = _commands(read(path))
  return tuple(dict.fromkeys([*before, *_commands(study)]))
