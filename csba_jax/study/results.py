"""results.jsonl, the record of a study: one line for each run.

Lines are written completely or not at all, and runs of different origin are refused unless they are
pooled on purpose. A line is a JSON object: schema, study, run, status, axes, config_sha256,
versions, commit, device, seconds, and of a finished run numerics, result, conflict and branches;
null stands for NaN. A unit is what variants are paired by: (split, repeat, fold, seed). A cell is
the value of every other axis but the variant: (axis, value), ....
"""

import dataclasses
import functools
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from csba_jax import config as config_lib
from csba_jax.errors import UserError
from csba_jax.files import expanded
from csba_jax.gradients.conflict import majority_minority
from csba_jax.study import grid, store, study_json

UNIT = store.UNIT
CELL = ('model', 'method', 'imbalance_factor', 'width', 'depth', 'learning_rate', 'split')
OWN = ('seed', 'data.seed', 'data.fold', 'model.attention')  # of a config: of unit and variant
RATE = 'train.learning_rate'
METRICS = ('macro_f1', 'accuracy', 'balanced_accuracy')

Record = Mapping[str, Any]
Unit = tuple[str, int, int, int]
Cell = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
  """The runs of a study, in an order that does not depend on that of the lines."""

  study: Mapping[str, Any]  # study.json
  done: tuple[Record, ...]
  failed: tuple[Record, ...]  # runs that never finished
  notes: tuple[str, ...]  # what a reader of the numbers should know
  commands: tuple[str, ...] = ()  # that made them, those of the tuning first

  def runs(self, at: Cell, variant: str) -> dict[Unit, Record]:
    """The finished runs of a variant in a cell, by unit, in the order of units."""
    return self._index.get((at, variant), {})

  @functools.cached_property
  def folds(self) -> int:
    """How many parts the cross-validation has whose folds are the units; 0 without one."""
    asked = self.study['config'].get('base', {}).get('data', {}).get('folds')
    found = int(asked or max((record['axes']['fold'] for record in self.done), default=0) + 1)
    return found if found > 1 else 0

  @functools.cached_property
  def splits(self) -> tuple[str, ...]:
    """'grouped' and 'naive', or the one that there is."""
    return tuple(sorted({record['axes']['split'] for record in self.done}))

  @functools.cached_property
  def _index(self) -> dict[tuple[Cell, str], dict[Unit, Record]]:
    index: dict[tuple[Cell, str], dict[Unit, Record]] = {}
    for record in self.done:
      index.setdefault((cell(record), record['axes']['variant']), {})[unit(record)] = record
    return index


def read(folder: str | os.PathLike, pool: bool = False) -> Results:
  """The results of a study from study.json and every results*.jsonl in its folder.

  The files of shards and the same in one file (`cat`) are equal. Of several lines of one run the
  latest counts (files in the order of their names), but a finished one before a failed one.

  Args:
    folder: the `--workdir` of the study.
    pool: take runs of different provenance together, with a note for each difference.

  Raises:
    UserError: no study or no run there; a damaged line without a run; finished runs of different
      studies, configs, images or package versions, or variants on different splits (unless pooled);
      two runs of the same axes.
  """
  folder = expanded(folder)
  study, files = study_json.read(folder), sorted(folder.glob('results*.jsonl'))
  notes: list[str] = []
  latest: dict[tuple[str, str], Record] = {}
  for file in files:
    records, found = store.load(file)
    notes += found
    for record in records:
      name = (record['study'], record['run'])
      earlier = latest.get(name)
      if earlier is None or record['status'] == 'done' or earlier['status'] == 'failed':
        latest[name] = record
        if earlier is not None and _differ(earlier, record):
          notes.append(
            f'run {record["run"]} finished more than once with different results: '
            'its latest line counts'
          )
  if not latest:
    raise UserError(
      f'results of csba-study in {folder}',
      'no run in ' + ', '.join(f.name for f in files) if files else 'no results*.jsonl',
      'run csba-study, or correct the path',
    )
  ordered = sorted(latest.values(), key=_order)
  done = tuple(record for record in ordered if record['status'] == 'done')
  notes += study.get('rates_at_ends', ())
  _check_unique(done)
  made = {_place(record) for record in done}  # a run may have finished under another name
  failed = tuple(r for r in ordered if r['status'] == 'failed' and _place(r) not in made)
  commands = study_json.all_commands(folder, study)
  results = Results(study, done, failed, (), commands)
  notes += _provenance(results, folder, pool)
  return dataclasses.replace(results, notes=tuple(dict.fromkeys(notes)))


def unit(record: Record) -> Unit:
  """(split, repeat, fold, seed): what two variants are paired by."""
  return tuple(record['axes'][axis] for axis in UNIT)


def cell(record: Record) -> Cell:
  """Every axis but the variant and those of `unit` alone, as (axis, value)."""
  axes = record['axes']
  others = sorted(axes.keys() - {*CELL, *UNIT, 'variant'})
  return tuple((axis, axes[axis]) for axis in (*CELL, *others) if axis in axes)


def pairs(
  results: Results, at: Cell, treatment: str, control: str
) -> tuple[list[Unit], tuple[str, ...]]:
  """The units that both variants have in a cell, and in words those that only one has.

  A unit in which neither finished is not named: see `Results.failed`.

  Returns:
    Units in order, and such as 'csba without seed 3' or 'none_wide without any run'.
  """
  names = (treatment, control)
  return common_units(results, names, [results.runs(at, name) for name in names])


def common_units(
  results: Results, names: tuple[str, str], sides: Sequence[Mapping[Unit, Record]]
) -> tuple[list[Unit], tuple[str, ...]]:
  """The same of any two sets of runs, treatment first."""
  (treatment, control), (treated, controls) = names, sides
  missing = []
  for name, own, other in ((treatment, treated, controls), (control, controls, treated)):
    lacking = [u for u in other if u not in own]
    if not own:
      missing.append(f'{name} without any run')
    elif lacking:
      missing.append(f'{name} without {", ".join(unit_words(results, u) for u in lacking)}')
  return [u for u in treated if u in controls], tuple(missing)


def unit_words(results: Results, of: Unit) -> str:
  """'seed 3'; of a cross-validation 'fold 1 of repeat 2 (seed 7)', with the split if it has two."""
  split, repeat, fold, seed = of
  if not results.folds:
    return f'seed {seed}'
  where = f' of the {split} split' if len(results.splits) > 1 else ''
  return f'fold {fold} of repeat {repeat}{where} (seed {seed})'


def outcome(record: Record, name: str) -> float:
  """A test metric of a finished run; NaN where it is undefined.

  Args:
    name: macro_f1, accuracy, balanced_accuracy, f1:CLASS; head_f1 or tail_f1, the mean F1 of the
      classes of `majority_minority` that have one; few_shot_accuracy, the mean accuracy of the
      classes of fewer than 20 training images.
  """
  result = record['result']
  if name in METRICS:
    return float('nan') if result[name] is None else float(result[name])
  if name == 'few_shot_accuracy':
    value = (result.get('group_accuracy') or {}).get('few')
    return float('nan') if value is None else float(value)
  f1 = per_class_f1(record)
  if name.startswith('f1:') and name[3:] in result['class_names']:
    return float(f1[result['class_names'].index(name[3:])])
  if name in ('head_f1', 'tail_f1'):
    head, tail = majority_minority(np.array(result['class_counts']))
    values = f1[head if name == 'head_f1' else tail]
    return float(np.nanmean(values)) if not np.isnan(values).all() else float('nan')
  raise UserError(
    f'an outcome among {", ".join(METRICS)}, head_f1, tail_f1, few_shot_accuracy and f1: '
    'with a class '
    f'({", ".join(result["class_names"])})',
    repr(name),
    "correct it in study.json and in the study's config alike",
  )


def per_class_f1(record: Record) -> np.ndarray:
  """F1 of each class, [C]; NaN of a class without test images."""
  return np.array(record['result']['per_class']['f1'], np.float64)


def conflict_entry(record: Record, at: str, part: str) -> Record | None:
  """The conflict of a part at a snapshot ('0', '0.5', 'loss 0.3'), if it was measured."""
  found = [e for e in record.get('conflict') or () if e['at'] == at and e['part'] == part]
  return found[-1] if found else None


def gram(entry: Record, scope: str) -> np.ndarray:
  """The Gram of a measurement, [C, C] float64, from its upper triangle; NaN for null."""
  packed = (entry.get('grams') or {}).get(scope)
  if packed is None:
    raise UserError(
      f'a Gram of the scope {scope}',
      f'{", ".join(entry.get("grams") or ()) or "none"}',
      'run the study again and measure this scope',
    )
  classes = (math.isqrt(8 * len(packed) + 1) - 1) // 2
  rows, columns = np.triu_indices(classes)
  if len(packed) != len(rows):
    raise UserError(
      'C (C + 1) / 2 numbers in a Gram',
      f'{len(packed)}',
      'remove this line and start the study again',
    )
  matrix = np.empty((classes, classes))
  matrix[rows, columns] = matrix[columns, rows] = np.array(packed, np.float64)
  return matrix


def _order(record: Record) -> tuple:
  """Sorts records by cell, variant and unit; axes may be of any type."""
  numbers = tuple((str(type(v)), v) if isinstance(v, str) else ('', v) for v in unit(record))
  return repr(cell(record)), record['axes']['variant'], numbers, record['study'], record['run']


def _differ(earlier: Record, later: Record) -> bool:
  """Whether two finished lines of one run say different things; times may differ."""
  scores = (
    {k: v for k, v in r.get('result', {}).items() if k != 'timing'} for r in (earlier, later)
  )
  first, second = scores
  return earlier['status'] == later['status'] == 'done' and first != second


def _place(record: Record) -> tuple[Cell, str, Unit]:
  """Where a run stands in the grid, whatever its name."""
  return cell(record), record['axes']['variant'], unit(record)


def _check_unique(done: Sequence[Record]) -> None:
  seen: dict[tuple, str] = {}
  for record in done:
    key = _place(record)
    if key in seen:
      raise UserError(
        'one run for each variant, cell and unit',
        f'runs {seen[key]} and {record["run"]} of the same axes',
        'remove one of them; if they differ on purpose, make an axis of the difference',
      )
    seen[key] = record['run']


def _provenance(found: Results, folder: Path, pool: bool) -> list[str]:
  """Notes on runs that differ in origin. UserError: their numbers may differ because of it."""
  done = found.done
  strict = [_mixed('study', (r['study'] for r in done))]
  without = [r for r in done if not r.get('config')]  # of others the configs are compared
  strict += [_mixed('config_sha256', (str(r['config_sha256'])[:12] for r in without))]
  versions = _versions(done)
  strict += [_mixed(name, (v for v in of if v)) for name, of in versions]
  for name in ('source_sha256', 'content_sha256'):  # earlier versions did not keep them
    images = (r['result'].get(name) for r in done)
    strict += [_mixed(name, (str(sha)[:12] for sha in images if sha))]
  strict += [*_configs(found), _splits(found)]
  mixed = [words for words in strict if words]
  if mixed and not pool:
    raise UserError(
      f'runs of one study, config and set of package versions in {folder}',
      '; '.join(mixed),
      'analyse them apart, in a folder each, or take them together with --pool',
    )
  loose = [_mixed(field, (r.get(field) for r in done)) for field in ('commit', 'device')]
  loose += _numerics(done)
  # what was not recorded when a run was made is not known to be another one
  loose += [_mixed(name, of) for name, of in versions if None in of]
  return [f'pooled: {words}' for words in mixed] + [
    f'runs of more than one {w}' for w in loose if w
  ]


def _versions(done: Sequence[Record]) -> list[tuple[str, list[str | None]]]:
  """('versions.jax', that of each run) by package, None where a run does not name it."""
  packages = sorted({name for record in done for name in record['versions']})
  return [(f'versions.{p}', [record['versions'].get(p) for record in done]) for p in packages]


def _numerics(done: Sequence[Record]) -> list[str]:
  """What decides the last bits of a run's numbers, where the runs that name it differ in it."""
  kept = [record['numerics'] for record in done if record.get('numerics')]
  names = sorted({name for numerics in kept for name in numerics})
  return [_mixed(f'numerics.{n}', (k[n] for k in kept if n in k)) for n in names]


def _configs(found: Results) -> list[str]:
  """Fields in which runs differ, and should not: of all runs, but for those that the grid sets; of
  one cell also these, but for those of variant and unit.

  The learning rate, which is tuned for each variant by itself, is compared within a variant. Fields
  that came later than a run count as their default, whatever digest its config has.
  """
  groups: dict[tuple, Counter] = {}
  of_run = grid.fields_of_runs(found.study['config'])
  for record in found.done:
    if not record.get('config'):
      continue
    at, variant = cell(record), record['axes']['variant']
    flat = config_lib.flatten(config_lib.completed(record['config']))
    flat = {field: value for field, value in flat.items() if not grid.is_place(field)}
    parts = {(): flat.keys() - of_run, (at,): of_run - {*OWN, RATE}}
    for key, fields in (parts | {(at, variant): {RATE}}).items():
      part = json.dumps({field: flat[field] for field in sorted(fields)})
      groups.setdefault(key, Counter())[part] += 1
  mixed = []
  for key, configs in groups.items():
    counted = [(json.loads(text), count) for text, count in configs.most_common()]
    words = [config_lib.differences(counted[0][0], part) for part, _ in counted[1:]]
    fields = dict.fromkeys(line.split(':')[0] for lines in words for line in lines)
    at, *variant = key or ((),)
    where = ', '.join([*variant, *(f'{axis} {value}' for axis, value in at)])
    mixed += [
      _mixed(f, (value for c, count in counted for value in [c.get(f)] * count))
      + (f' ({where})' if where else '')
      for f in fields
    ]
  return mixed


def _splits(found: Results) -> str:
  """Units whose variants were not trained and tested on the same images; '' without any."""
  groups: dict[tuple, set] = {}
  for record in found.done:
    sha = record['result'].get('splits_sha256')
    groups.setdefault((cell(record), unit(record)), set()).update([sha] if sha else [])
  of = (unit_words(found, unit) for (_, unit), shas in groups.items() if len(shas) > 1)
  wrong = ', '.join(dict.fromkeys(of))
  return f'splits_sha256: of {wrong} not the same for all variants' if wrong else ''


def _mixed(name: str, values: Iterable[Any]) -> str:
  """'jax: 0.10.2 in 30 runs, 0.11.0 in 2', the most frequent first; '' where all are the same."""
  counts = Counter(str(value) for value in values)
  ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
  words = [f'{value} in {count}{" runs" * (not i)}' for i, (value, count) in enumerate(ordered)]
  return f'{name}: {", ".join(words)}' if len(words) > 1 else ''
