"""Numbers, snapshots and conditions as findings and reports write them."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from csba_jax.analysis.stats import Estimate
from csba_jax.analysis.types import Comparison
from csba_jax.run.records import TESTED
from csba_jax.runtime import plain
from csba_jax.study.protocol import SIGNIFICANCE

NONE = '–'  # a number that is not there
PLACE = ('at', 'part', 'scope')  # where and when conflict was measured, in a comparison's cell
MEASURES = {  # as in the summaries of a conflict matrix
  'head_tail_conflict': 'head-tail conflict',
  'minority_interference': 'minority interference',
  'mean_cosine': 'mean cosine',
  'conflict_rate': 'conflict rate',
}
METRICS = {
  'macro_f1': 'macro-F1',
  'accuracy': 'accuracy',
  'balanced_accuracy': 'balanced accuracy',
  'head_f1': 'head F1',
  'tail_f1': 'tail F1',
  'few_shot_accuracy': 'few-shot accuracy',
  'expected_calibration_error': 'calibration error',
  'loss': 'test loss',
  **MEASURES,
}


def number(value: Any, digits: int = 3, signed: bool = False, limits: Sequence[float] = ()) -> str:
  """A real minus, no minus zero; a dash for NaN; more digits next to one of the limits."""
  value = float('nan') if value is None else float(value)
  if not math.isfinite(value):
    return NONE
  value = 0.0 if abs(value) < 1e-12 else value  # no minus zero, no rounding error
  digits = _digits(value, digits, limits)
  if value and (abs(value) >= 10_000 or abs(value) < 0.5 * 10**-digits):
    text = f'{value:.1g}' if abs(value) < 1 else f'{value:.2e}'  # at least its sign is seen
  else:
    text = f'{value:.{digits}f}'
  if signed and value > 0:
    text = f'+{text}'
  return text.replace('-', '−')


def interval(
  estimate: Estimate, digits: int = 3, signed: bool = False, limits: Sequence[float] = ()
) -> str:
  """0.512 [0.480, 0.544]; a dash in the brackets without an interval."""
  if not math.isfinite(estimate.value):
    return NONE
  return f'{number(estimate.value, digits, signed)} {ends(estimate, digits, signed, limits)}'


def ends(
  estimate: Estimate | None, digits: int = 3, signed: bool = False, limits: Sequence[float] = ()
) -> str:
  """[0.480, 0.544]; a dash in the brackets without an interval, or alone without an estimate."""
  if estimate is None:
    return NONE
  found = [number(end, digits, signed, limits) for end in (estimate.low, estimate.high)]
  return f'[{", ".join(found) if estimate.known else NONE}]'


def probability(p: float) -> str:
  """Three digits, more next to 0.05, '< 0.001' below what they can show; a dash for NaN."""
  if not math.isfinite(p):
    return NONE
  return '< 0.001' if p < 0.001 else number(p, limits=(SIGNIFICANCE,))


def within(estimate: Estimate, limits: Sequence[float] = ()) -> str:
  """'95 % interval +0.010 to +0.050', or that there is none."""
  if not estimate.known:
    return 'no interval: identical differences' if 'identical' in estimate.method else 'no interval'
  low, high = (number(end, signed=True, limits=limits) for end in (estimate.low, estimate.high))
  return f'{100 * estimate.level:g} % interval {low} to {high}'


def pairs(n: int, of: str) -> str:
  """'8 pairs of seeds', '1 pair of seeds', '8 subsets' of one or several pairs each"""
  if of == 'subsets':
    return f'{n} subset{"s" * (n != 1)}'
  return f'{n} pair{"s" * (n != 1)} of {of}'


def integer(value: Any) -> str:
  """12,345; a dash for what is no number."""
  try:
    return f'{round(float(value)):,}'
  except (TypeError, ValueError, OverflowError):
    return NONE


def size(count: float) -> str:
  """Training images of a class, a mean over runs where they differ."""
  return number(count, 0 if float(count).is_integer() else 1)


def duration(seconds: float) -> str:
  """'90 s', '12.5 min' or '3.0 h'; a dash for what is not finite."""
  if not math.isfinite(seconds):
    return NONE
  if seconds < 120:
    return f'{seconds:.0f} s'
  return f'{seconds / 60:.1f} min' if seconds < 7200 else f'{seconds / 3600:.1f} h'


def ratio(pair: Sequence[float] | None) -> str:
  """'1.25 ×', the first by the second; a dash without both."""
  first, second = pair or (math.nan, math.nan)
  return f'{first / second:.2f} ×' if math.isfinite(first) and second > 0 else NONE


def level(estimates: Iterable[Estimate]) -> str:
  """What a caption says of n and of the intervals: 'n = 5 units; bars: 95 % intervals'."""
  given = [e for e in estimates if math.isfinite(e.value)]
  known = [e for e in given if e.known]
  levels = sorted({e.level for e in known})
  percent = ' and '.join(f'{100 * x:g} %' for x in levels)
  counts = sample(e.n for e in given)
  if not known:
    return f'{counts}; no intervals'
  some = '' if len(known) == len(given) else ' where there is one'
  return f'{counts}; {percent} intervals{some}'


def sample(counts: Iterable[int]) -> str:
  """'n = 5 units', or 'n = 3 to 5 units' where the counts differ; 'n = 0' without any."""
  counts = sorted(set(counts))
  if not counts:
    return 'n = 0'
  if len(counts) == 1:
    return f'n = {counts[0]} unit{"s" * (counts[0] != 1)}'
  return f'n = {counts[0]} to {counts[-1]} units'


def without_interval(estimates: Iterable[Estimate]) -> str:
  """Why some estimates have a dash for an interval; '' where all have one."""
  reasons: dict[str, None] = {}
  for estimate in estimates:
    if math.isfinite(estimate.value) and not estimate.known:
      given = any(words in estimate.method for words in ('no interval', 'no test'))
      units = f'no interval: {estimate.n} unit{"s" * (estimate.n != 1)}'
      reasons[estimate.method if given else units] = None
  return f'[{NONE}]: {"; ".join(reasons)}.' if reasons else ''


def methods(estimates: Iterable[Estimate]) -> str:
  """How the intervals were made, each way once."""
  return '; '.join(
    dict.fromkeys(plain.clean(e.method) for e in estimates if math.isfinite(e.value))
  )


def value(setting: Any) -> str:
  """A value on one axis of the grid, floats without zeros at the end."""
  return f'{setting:g}' if isinstance(setting, float) else plain.clean(setting)


def axis(name: str) -> str:
  """The name of an axis, with spaces for its underscores."""
  return plain.clean(name).replace('_', ' ')


def metric(name: str) -> str:
  """'macro-F1' for macro_f1, 'F1 of bird' for f1:bird; words that are no key stay as they are."""
  if name.startswith('f1:'):
    return f'F1 of {plain.clean(name[3:])}'
  # 'macro_f1' is a key, 'F1 of wet_glass' are words with a name that is not to be changed
  return METRICS.get(name, axis(name) if re.fullmatch('[a-z0-9_]+', name) else plain.clean(name))


def outcome(comparison: Comparison) -> str:
  """What a comparison compares; where and when conflict was measured is left to the caption."""
  return metric(comparison.outcome)


def cell(cell: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
  """What sets a condition apart from the others of the study; '' where it is the only one."""
  names = [name for name in cell if name not in PLACE and _varies(name, cells)]
  return ', '.join(_setting(name, cell[name]) for name in names)


def condition(cell: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
  """The same for a sentence: the method first, also where all have the same one."""
  names = [n for n in cell if n == 'method' or (n not in PLACE and _varies(n, cells))]
  names.sort(key=lambda name: name != 'method')
  return ', '.join(_setting(name, cell[name]) for name in names)


def constant(cells: Sequence[Mapping[str, Any]]) -> str:
  """What all conditions have in common."""
  first = cells[0] if cells else {}
  return ', '.join(f'{axis(k)} {value(v)}' for k, v in first.items() if not _varies(k, cells))


def last(snapshots: Sequence[str]) -> str:
  """The last share of the run that was measured; else the lowest level of loss."""
  ordered = sorted(set(snapshots), key=by_snapshot)
  shares = [at for at in ordered if not matched(at) and at != TESTED]
  return (shares or ordered)[-1]


def base(cell: Mapping[str, Any]) -> tuple:
  """A condition without the place of a measurement, to compare and to look up."""
  return tuple(sorted((str(k), str(v)) for k, v in cell.items() if k not in PLACE))


def snapshot(at: str) -> str:
  """'0' -> start, '0.1' -> 10 %, '1' -> end, 'loss 0.3' -> loss ≤ 0.3."""
  if at.startswith('loss '):
    return f'loss ≤ {plain.clean(at[5:])}'
  if at == TESTED:
    return 'tested net'
  share = _float(at)
  if share is None:
    return plain.clean(at)
  return {0.0: 'start', 1.0: 'end'}.get(share, f'{100 * share:g} %')


def when(at: str) -> str:
  """The same in a sentence: 'at the start', 'after 10 % of the run', 'at training loss ≤ 0.3'."""
  if matched(at):
    return f'at training {snapshot(at)}'
  if at == TESTED:
    return 'of the tested net'
  return {'start': 'at the start', 'end': 'at the end of the run'}.get(
    snapshot(at), f'after {snapshot(at)} of the run'
  )


def by_snapshot(at: str) -> tuple[int, float, str]:
  """Sorts shares of the run upward, then the tested net, then levels of loss downward."""
  if at.startswith('loss '):
    return 2, -(_float(at[5:]) or 0.0), at
  if at == TESTED:
    return 1, 0.0, at
  share = _float(at)
  return (0, share, at) if share is not None else (3, 0.0, at)


def at(comparison: Comparison) -> str:
  """The snapshot of a measurement of conflict."""
  return str(comparison.cell.get('at', ''))


def matched(at: str) -> bool:
  """Whether a snapshot is a level of the training loss, and not a share of the run."""
  return at.startswith('loss ')


def versus(comparison: Comparison) -> str:
  """'csba − none'; one name for a variant against itself."""
  if comparison.treatment == comparison.control:
    return plain.clean(comparison.treatment)
  return f'{plain.clean(comparison.treatment)} − {plain.clean(comparison.control)}'


def _digits(value: float, digits: int, limits: Sequence[float]) -> int:
  """So many, and no fewer than `digits`, that the value is seen on its side of every limit."""
  for more in range(digits, 10):
    rounded = round(value, more)
    if all((rounded < x, rounded > x) == (value < x, value > x) for x in limits):
      return more
  return digits  # equal up to rounding errors


def _setting(name: str, setting: Any) -> str:
  """'balanced softmax', 'imbalance factor 20'"""
  return axis(setting) if name == 'method' else f'{axis(name)} {value(setting)}'


def _varies(name: str, cells: Sequence[Mapping[str, Any]]) -> bool:
  return len({str(cell.get(name)) for cell in cells}) > 1


def _float(text: str) -> float | None:
  try:
    value = float(text)
  except ValueError:
    return None
  return value if math.isfinite(value) else None
