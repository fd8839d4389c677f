"""Findings as tables, and what several sections ask of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from csba_jax.analysis import wording
from csba_jax.analysis.findings import Findings
from csba_jax.analysis.types import Comparison, Score
from csba_jax.report.html.blocks import Block, Items, Table, Text
from csba_jax.report.study import figures
from csba_jax.report.terminal import table
from csba_jax.runtime import plain

_MOST_NAMED = 12  # classes; of more, how many there are


def by_cell(rows: Sequence[Any], findings: Findings) -> list[tuple[Mapping[str, Any], list]]:
  """Rows of each condition that has any, conditions in the order of the study."""
  groups: dict[tuple, list] = {wording.base(cell): [] for cell in findings.cells}
  cells = {wording.base(cell): cell for cell in findings.cells}
  for row in rows:
    key = wording.base(row.cell)
    cells.setdefault(key, row.cell)
    groups.setdefault(key, []).append(row)
  return [(cells[key], group) for key, group in groups.items() if group]


def comparison_table(
  findings: Findings,
  comparisons: Sequence[Comparison],
  caption: str,
  *,
  adjusted: bool = False,
  outcome: bool = False,
  cells: Sequence[Mapping[str, Any]] = (),
) -> Table:
  """A row for each comparison: means, difference, interval, p, verdict; no column without use.

  `cells` are all the conditions that a row's is told from; those of the study by default.
  """
  cells = cells or findings.cells
  several = len({wording.cell(c.cell, cells) for c in comparisons}) > 1
  timed = any(c.seconds for c in comparisons)
  has_losses = any(c.losses for c in comparisons)
  means = any(not math.isnan(c.treatment_mean) for c in comparisons)
  judged = any(c.verdict for c in comparisons)
  beside = [c.uncorrected for c in comparisons if c.uncorrected is not None]
  head = [
    *(['condition'] * several),
    *(['outcome'] * outcome),
    'comparison',
    'n',
    *(['treatment', 'control'] * means),
    'difference',
    'p',
    *(['p (Holm)'] * adjusted),
    *(['verdict'] * judged),
    *(['time'] * timed),
    *(['losses'] * has_losses),
    *(['uncorrected interval'] * bool(beside)),
  ]
  rows = [
    [
      *([wording.cell(c.cell, cells)] * several),
      *([wording.outcome(c)] * outcome),
      wording.versus(c),
      str(c.difference.n),
      *([wording.number(c.treatment_mean), wording.number(c.control_mean)] * means),
      wording.interval(c.difference, signed=True, limits=c.limits),
      wording.probability(c.difference.p),
      *([wording.probability(c.adjusted_p)] * adjusted),
      *([c.verdict or wording.NONE] * judged),
      *([wording.ratio(c.seconds)] * timed),
      *([' / '.join(map(wording.number, c.losses)) if c.losses else wording.NONE] * has_losses),
      *([wording.ends(c.uncorrected, signed=True, limits=c.limits)] * bool(beside)),
    ]
    for c in comparisons
  ]
  sizes = wording.level(c.difference for c in comparisons)
  if beside:
    sizes += (
      f'. Uncorrected interval: {wording.methods(beside)}, as if units shared no images; it decides'
      ' nothing'
    )
  return Table(f'{caption} {sizes}.', head, rows, 1 + several + outcome)


def reasons(estimates: Sequence[Any]) -> list[Text]:
  """A small paragraph on why some of the estimates have no interval; [] where all have one."""
  text = wording.without_interval(estimates)
  return [Text(text, 'small')] if text else []


def groups(findings: Findings) -> list[Block]:
  """Which classes are the majority and which the minority, once for conditions that agree on it."""
  cells: dict[str, list[str]] = {}
  for cell, shares in zip(findings.cells, findings.groups, strict=True):
    cells.setdefault(_groups(findings, cell, shares), []).append(wording.cell(cell, findings.cells))
  if len(cells) == 1:
    cells = {text: ['all runs'] for text in cells}
  return [Items([f'{"; ".join(found)}: {text}' for text, found in cells.items()], 'small')]


def _groups(findings: Findings, cell: Mapping[str, Any], shares: np.ndarray) -> str:
  """Of one condition; a group of a single class must not be taken for a mean over classes."""
  majority, minority = (_group(findings, cell, of_group) for of_group in shares)
  names = zip(('head F1', 'tail F1'), shares, strict=True)
  alone = [f'{name} is that of a single class' for name, s in names if np.count_nonzero(s) == 1]
  return '; '.join([f'majority {majority}', f'minority {minority}', *alone]) + '.'


def _group(findings: Findings, cell: Mapping[str, Any], shares: np.ndarray) -> str:
  """Names from the largest class to the smallest, with the share of runs where it is not all."""
  classes = [c for c in figures.order(findings, cell) if shares[c] > 0]
  if len(classes) > _MOST_NAMED:
    return f'{len(classes)} classes'
  some = {c: f' (in {100 * shares[c]:.0f} % of the runs)' if shares[c] < 1 else '' for c in classes}
  return ', '.join(plain.clean(findings.class_names[c]) + some[c] for c in classes) or 'no class'


def setting(findings: Findings, name: str) -> float:
  """A number of the study's config, 0 where it has none."""
  try:
    value = float(findings.about.get('config', {}).get(name, 0))
  except (AttributeError, TypeError, ValueError):
    return 0.0
  return value if math.isfinite(value) else 0.0


def unit_count(score: Score) -> int:
  """The most units that a metric of this score is a mean over; 0 without metrics."""
  return max((e.n for e in score.metrics.values()), default=0)


def place(findings: Findings, one: Any, variant: Any) -> str:
  """'csba, balanced_softmax, end, scope common, val' of a matrix or a flow."""
  parts = [
    plain.clean(variant.variant) if variant is not None else '',
    wording.cell(one.cell, findings.cells),
    f'snapshot {wording.snapshot(one.at)}',
    f'scope {plain.clean(one.scope)}' if hasattr(one, 'scope') else '',
    f'part {plain.clean(one.part)}',
  ]
  return ', '.join(part for part in parts if part)


def matrix_table(
  findings: Findings,
  cell: Mapping[str, Any],
  values: np.ndarray,
  caption: str,
  *,
  digits: int = 2,
  diagonal: bool = False,
) -> Table | None:
  """A class-by-class matrix, largest class first; None where there are too many classes."""
  if len(values) > table.LARGEST_MATRIX:
    return None
  order, labels = figures.order(findings, cell), figures.class_labels(findings, cell)
  rows = []
  for i, (label, c) in enumerate(zip(labels, order, strict=True)):
    cells = [wording.number(values[c, d], digits) if diagonal or c != d else '' for d in order]
    rows.append([f'{i + 1} {label}', *cells])
  head = ['class (training images)', *(str(i + 1) for i in range(len(order)))]
  return Table(caption, head, rows)
