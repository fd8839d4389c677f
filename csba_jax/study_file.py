"""study.json: what a study was asked for, and the commands that started it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from csba_jax.errors import UserError

NAME = 'study.json'


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
    return study
  except (FileNotFoundError, NotADirectoryError) as error:
    raise UserError(
      f'the folder of a study (csba-study) at {folder}', 'no study.json there', 'mend the path'
    ) from error
  except (OSError, ValueError, TypeError, KeyError) as error:
    raise UserError(
      f'a whole {file}', f'a damaged one ({error})', 'bring it back: csba-study writes it'
    ) from error


def commands(study: Mapping[str, Any]) -> list[str]:
  """Every different command that a study was started with, in order."""
  given = study.get('commands') or [study.get('command')]  # one, in files of the first form
  return list(dict.fromkeys(command for command in given if command))


def all_commands(folder: Path, study: Mapping[str, Any]) -> tuple[str, ...]:
  """Those of the study that tuned for it, if it lies beside it or at its path; then its own."""
  tuned_by = study['config'].get('tuned_by') or ''
  before: list[str] = []
  for path in (folder.absolute().parent / Path(tuned_by).name, Path(tuned_by)) if tuned_by else ():
    if not before and (path / NAME).is_file():
      before = commands(read(path))
  return tuple(dict.fromkeys([*before, *commands(study)]))
