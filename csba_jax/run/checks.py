"""What the numbers of a finished run must fulfil: they come from files that anyone can edit.

Each function raises ValueError with the field and what is wrong with it. Fields that are absent are
not looked at: a study that tunes keeps few of them, and earlier versions wrote fewer.
"""

import math
from collections.abc import Mapping
from typing import Any

MEANS = ('macro_f1', 'accuracy', 'balanced_accuracy', 'expected_calibration_error')
SHARES = (*MEANS, 'validation_macro_f1')  # the last is null in a run without validation
COUNTS = ('examples', 'classes_without_examples', 'checkpoint_step', 'parameters')
TEXTS = ('splits_sha256', 'source_sha256')
LATER_TEXTS = ('content_sha256',)  # absent in results of earlier versions
TOLERANCE = 1e-6  # of rounding, above 1
# What is reported of each run.
REPORTED: dict[str, tuple[str, ...]] = dict.fromkeys((*MEANS, *TEXTS), ())
REPORTED |= dict.fromkeys(('class_names', 'class_counts', 'checkpoint_step'), ())
REPORTED |= {'per_class': ('precision', 'recall', 'f1', 'support')}
REPORTED |= {'group_accuracy': ('many', 'medium', 'few')}


def check_whole(result: Any) -> None:
  """Raises ValueError for the content of a result.json that cannot be one, or lacks something."""
  check_result(result)
  for name, inner in REPORTED.items():
    if name not in result:
      raise ValueError(f'no {name!r} in it')
    if missing := [key for key in inner if key not in result[name]]:
      raise ValueError(f'no {missing[0]!r} in its {name}')


def check_result(result: Any) -> None:
  """Raises ValueError where what a result has cannot be that of a run."""
  result = _object(result, 'result')
  for name in SHARES:
    _share(result.get(name), name)
  for name in COUNTS:
    if name in result:
      _count(result[name], name)
  for name in ('loss', 'post_hoc_tau'):
    _number(result.get(name), name)
  for name in (*TEXTS, *LATER_TEXTS):
    if name in result and not isinstance(result[name], str):
      raise ValueError(f'{name} is {_shown(result[name])} and no text')
  for name, value in _object(result.get('group_accuracy', {}), 'group_accuracy').items():
    _share(value, f'group_accuracy.{name}')
  _object(result.get('timing', {}), 'timing')
  classes = _check_classes(result)
  _check_per_class(result, classes)
  if 'confusion_matrix' in result:
    _check_confusion(result, classes)
  _check_defined(result)


def _check_classes(result: Mapping[str, Any]) -> int | None:
  """The number of classes, if the record tells it."""
  if 'class_names' in result:
    names = _list(result['class_names'], 'class_names')
    if not all(isinstance(name, str) for name in names):
      raise ValueError('class_names has an entry that is no text')
  counts = result.get('class_counts', [])
  for i, count in enumerate(_list(counts, 'class_counts')):
    _count(count, f'class_counts[{i}]')
  found = {len(result[name]) for name in ('class_names', 'class_counts') if name in result}
  if len(found) > 1:
    raise ValueError(f'{len(names)} class_names and {len(counts)} class_counts')
  return found.pop() if found else None


def _check_per_class(result: Mapping[str, Any], classes: int | None) -> None:
  table = _object(result.get('per_class', {}), 'per_class')
  for name, values in table.items():
    values = _list(values, f'per_class.{name}')
    if classes is not None and len(values) != classes:
      raise ValueError(f'per_class.{name} has {len(values)} entries for {classes} classes')
    check = _count if name == 'support' else _share
    for i, value in enumerate(values):
      check(value, f'per_class.{name}[{i}]')
  absent = [not n for n in table.get('support', ())]
  for name in ('recall', 'f1'):
    if 'support' in table and [value is None for value in table.get(name, ())] != absent:
      raise ValueError(f'per_class.{name} is null for other classes than those without images')
  if 'examples' in result and 'support' in table and sum(table['support']) != result['examples']:
    found = sum(table['support'])
    raise ValueError(f'per_class.support adds up to {found}, examples is {result["examples"]}')


def _check_confusion(result: Mapping[str, Any], classes: int | None) -> None:
  rows = _list(result['confusion_matrix'], 'confusion_matrix')
  for i, row in enumerate(rows):
    for j, count in enumerate(_list(row, f'confusion_matrix[{i}]')):
      _count(count, f'confusion_matrix[{i}][{j}]')
  size = len(rows) if classes is None else classes
  if [len(row) for row in rows] != [size] * size:
    raise ValueError(f'confusion_matrix is not {size} x {size}')
  support = result.get('per_class', {}).get('support')
  if support is not None and [sum(row) for row in rows] != support:
    raise ValueError('the rows of confusion_matrix do not add up to per_class.support')


def _check_defined(result: Mapping[str, Any]) -> None:
  """What is null only in an evaluation without images."""
  for name in MEANS:
    if name in result and result[name] is None and result.get('examples'):
      raise ValueError(f'{name} is null for {result["examples"]} examples')


def check_record(record: Mapping[str, Any]) -> None:
  """Raises ValueError for a line of results.jsonl whose parts cannot be those of a run."""
  for name in ('study', 'run', 'config_sha256'):
    if not isinstance(record[name], str):
      raise ValueError(f'{name} is {_shown(record[name])} and no text')
  axes = _object(record['axes'], 'axes')
  for name, value in axes.items():
    if not isinstance(value, str | int | float) or isinstance(value, bool):
      raise ValueError(f'axes.{name} is {_shown(value)}')
  for name in ('variant', 'split'):
    if not isinstance(axes[name], str):
      raise ValueError(f'axes.{name} is {_shown(axes[name])} and no text')
  for name in ('repeat', 'fold', 'seed'):
    _count(axes[name], f'axes.{name}')
  for name, value in _object(record['versions'], 'versions').items():
    if not isinstance(value, str):
      raise ValueError(f'versions.{name} is {_shown(value)} and no text')
  for name in ('config', 'numerics'):
    _object(record.get(name) or {}, name)
  for name in ('commit', 'device', 'error'):
    if not isinstance(record.get(name) or '', str):
      raise ValueError(f'{name} is {_shown(record[name])} and no text')
  if 'seconds' in record:
    _number(record['seconds'], 'seconds')
  if record['status'] == 'done':
    check_result(record['result'])
    _check_conflict(record)
    for i, entry in enumerate(_list(record.get('branches') or [], 'branches')):
      _check_moment(entry, f'branches[{i}]')


def _check_conflict(record: Mapping[str, Any]) -> None:
  """Measurements of conflict; their Grams are packed, C (C + 1) / 2 numbers each."""
  classes = len(record['result'].get('class_counts') or ()) or None
  for i, entry in enumerate(_list(record.get('conflict') or [], 'conflict')):
    name = f'conflict[{i}]'
    _check_moment(entry, name)
    for key in ('losses', 'counts', 'prior'):
      values = _list(entry.get(key, []), f'{name}.{key}')
      for value in values:
        _number(value, f'{name}.{key}')
      if key in entry and classes and len(values) != classes:
        raise ValueError(f'{name}.{key} has {len(values)} entries for {classes} classes')
    for scope, packed in _object(entry.get('grams') or {}, f'{name}.grams').items():
      for value in _list(packed, f'{name}.grams.{scope}'):
        _number(value, f'{name}.grams.{scope}')
      if classes and len(packed) != classes * (classes + 1) // 2:
        raise ValueError(f'{name}.grams.{scope} has {len(packed)} numbers for {classes} classes')
    for scope, summary in _object(entry.get('scopes') or {}, f'{name}.scopes').items():
      for key, value in _object(summary, f'{name}.scopes.{scope}').items():
        _number(value, f'{name}.scopes.{scope}.{key}')


def _check_moment(entry: Any, name: str) -> None:
  _object(entry, name)
  for key in ('at', 'part'):
    if not isinstance(entry.get(key), str):
      raise ValueError(f'{name}.{key} is {_shown(entry.get(key))} and no text')
  _count(entry.get('step', 0), f'{name}.step')
  _number(entry.get('loss'), f'{name}.loss')


def _share(value: Any, name: str) -> None:
  _number(value, name)
  if value is not None and not 0 <= value <= 1 + TOLERANCE:
    raise ValueError(f'{name} {_shown(value)} is not within 0 and 1')


def _count(value: Any, name: str) -> None:
  if type(value) is not int or not 0 <= value < 2**63:
    raise ValueError(f'{name} is {_shown(value)} and no count')


def _number(value: Any, name: str) -> None:
  """Of a finite number, or null, which stands for NaN."""
  if value is None:
    return
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise ValueError(f'{name} is {_shown(value)} and no number')
  if abs(value) > 1e300 or not math.isfinite(value):
    raise ValueError(f'{name} is {_shown(value)} and no finite number')


def _object(value: Any, name: str) -> Mapping[str, Any]:
  if not isinstance(value, Mapping):
    raise ValueError(f'{name} is {_shown(value)} and no object')
  return value


def _list(value: Any, name: str) -> list[Any]:
  if not isinstance(value, list):
    raise ValueError(f'{name} is {_shown(value)} and no list')
  return value


def _shown(value: Any) -> str:
  """The value in a few characters; an integer may have more digits than Python prints."""
  if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 100:
    return 'an integer of many digits'
  text = (
    repr(value) if value is None or isinstance(value, str | int | float) else type(value).__name__
  )
  return text if len(text) <= 40 else f'{text[:37]}...'
