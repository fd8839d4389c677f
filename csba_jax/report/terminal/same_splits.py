"""Which finished runs can be compared: those that were tested on the same images."""

from collections.abc import Mapping
from typing import Any

from csba_jax import config as config_lib
from csba_jax.errors import UserError
from csba_jax.run.workdir import read_config


def check(results: Mapping[str, Mapping[str, Any]]) -> None:
  """Raises UserError unless all runs have the same splits of the same images.

  Args:
    results: content of result.json by workdir.
  """
  _check(results, ('splits_sha256', 'source_sha256', 'content_sha256'))


def check_images(results: Mapping[str, Mapping[str, Any]]) -> None:
  """Raises UserError unless all runs have the same images, split in any way."""
  _check(results, ('source_sha256', 'content_sha256'))


def _check(results: Mapping[str, Mapping[str, Any]], fields: tuple[str, ...]) -> None:
  """Raises UserError where a field differs; earlier versions did not write all of them."""
  known = {name: [r[name] for r in results.values() if r.get(name)] for name in fields}
  groups: dict[tuple[str, ...], list[str]] = {}
  for path, result in results.items():
    key = tuple(result.get(name) or (known[name] or [''])[0] for name in fields)
    groups.setdefault(key, []).append(path)
  if len(groups) == 1:
    return
  first, *others = groups.values()
  kinds = [', '.join(first), *(f'{", ".join(g)} ({_why(first[0], g[0])})' for g in others)]
  pairs = [group for group in groups.values() if len(group) > 1]
  options = [f'compare those of one kind: csba-report --workdirs={",".join(g)}' for g in pairs]
  options += [
    f'train {others[0][0]} anew with the data fields of {first[0]}',
    'train each net with the same seeds, which csba-report pairs',
  ]
  raise UserError(
    'runs on the same splits, so that differences come from the nets and not from the test images',
    f'{len(groups)} different ones: {"; ".join(kinds)}',
    ', or '.join(options),
  )


def _why(there: str, here: str) -> str:
  """The data fields in which two runs differ."""
  found = config_lib.differences(read_config(there), read_config(here))
  fields = [line for line in found if line.startswith('data.')]
  return '; '.join(fields) or 'other images: names, labels or the content of files'
