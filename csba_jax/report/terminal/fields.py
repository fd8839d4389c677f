"""The fields of a config as text: name, value, what it is, and which values it takes."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from csba_jax import config as config_lib
from csba_jax import fields as fields_lib
from csba_jax.errors import shown
from csba_jax.study import grid
from csba_jax.training import preflight

WIDTH = 16  # of the column of values; a longer one moves what follows it
NOTE = '* differs from the default'


def of_run(config: ml_collections.ConfigDict | None) -> str:
  """Every field of a run's config, one a line: its value in `config`, or its default."""
  defaults = config_lib.flatten(config_lib.default())
  values = defaults if config is None else config_lib.flatten(config)
  return _table(defaults, values, fields_lib.FIELDS, preflight.choices())


def of_study(study: ml_collections.ConfigDict | None) -> str:
  """Every field of a study's config, then those of its `base`."""
  defaults = {name: value for name, value in grid.default().items() if name != 'base'}
  values = defaults if study is None else {name: study[name] for name in study if name != 'base'}
  ranges = {field: wanted for field, (wanted, _) in grid.RANGES.items()}
  own = _table(defaults, values, grid.FIELDS, ranges)
  base = None if study is None else study.base
  return f'{own}\n\nOf all runs, --config.base.FIELD:\n{of_run(base)}'


def _table(
  defaults: Mapping[str, Any],
  values: Mapping[str, Any],
  what: Mapping[str, str],
  ranges: Mapping[str, str],
) -> str:
  rows = []
  for field in dict.fromkeys([*what, *defaults, *values]):  # in the order of the table
    value = values.get(field, 'missing')
    changed = field not in defaults or value != defaults[field]
    text = f'{shown(value, 200)}{"*" if changed else ""}'
    takes = ranges.get(field) or ('True or False' if isinstance(value, bool) else '')
    line = f'{what.get(field, "a field that nothing reads")}{f" [{takes}]" if takes else ""}'
    rows.append((field, text, line))
  widths = [max(len(row[0]) for row in rows), WIDTH]
  lines = [f'{name:<{widths[0]}}  {value:<{widths[1]}}  {line}' for name, value, line in rows]
  return '\n'.join([*lines, NOTE] if any(row[1].endswith('*') for row in rows) else lines)
