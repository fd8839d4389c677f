"""Flags that name a file or a folder which a program makes."""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from csba_jax.files import check_new, check_new_folder, expanded


def file(holder: flags.FlagHolder, endings: Sequence[str]) -> Path | None:
  """The path of a flag, or None where it is not set; UserError if it cannot be made."""
  if not holder.value:
    return None
  check_new(f'--{holder.name}', expanded(holder.value), endings)
  return expanded(holder.value)


def folder(holder: flags.FlagHolder) -> Path | None:
  """The same of a folder."""
  if not holder.value:
    return None
  check_new_folder(f'--{holder.name}', expanded(holder.value))
  return expanded(holder.value)
