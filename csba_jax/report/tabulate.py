"""Findings as tables, and what several sections ask of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from csba_jax import words
from csba_jax.findings import Comparison, Findings, Score
from csba_jax.report import figures, table
from csba_jax.report.blocks import Table, Text


def by_cell(rows: Sequence[Any], findings: Findings) -> list[tuple[Mapping[str, Any], list]]:
  """Rows of each condition that has any, conditions in the order of the study."""
  groups: dict[tuple, list] = {words.base(cell): [] for cell in findings.cells}
  cells = {words.base(cell): cell for cell in findings.cells}
  for row in rows:
    key = words.base(row.cell)
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
) -> Table:
  """A row for each comparison: means, difference, interval, p, verdict; no column without use."""
  several = len({words.cell(c.cell, findings.cells) for c in comparisons}) > 1
  means = any(not math.isnan(c.treatment_mean) for c in comparisons)
  judged = any(c.verdict for c in comparisons)
  corrected = any(c.corrected is not None for c in comparisons)
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
    *(['corrected interval'] * corrected),
    *(['verdict by it'] * (corrected and judged)),
  ]
  rows = [
    [
      *([words.cell(c.cell, findings.cells)] * several),
      *([words.outcome(c)] * outcome),
      words.versus(c),
      str(c.difference.n),
      *([words.number(c.treatment_mean), words.number(c.control_mean)] * means),
      words.interval(c.difference, signed=True),
      words.probability(c.difference.p),
      *([words.probability(c.adjusted_p)] * adjusted),
      *([c.verdict or words.NONE] * judged),
      *([words.ends(c.corrected, signed=True)] * corrected),
      *([c.corrected_verdict or words.NONE] * (corrected and judged)),
    ]
    for c in comparisons
  ]
  sizes = words.level(c.difference for c in comparisons)
  if corrected:
    how = words.methods([c.corrected for c in comparisons if c.corrected is not None])
    sizes += (
      f'. Corrected interval, and the verdict by it: {how}, which knows that seeds redraw one'
    )
    sizes += ' set of images; beside the test that was stated before the runs, and not in its place'
  return Table(f'{caption} {sizes}.', head, rows, 1 + several + outcome)


def reasons(estimates: Sequence[Any]) -> list[Text]:
  """A small paragraph on why some of the estimates have no interval; [] where all have one."""
  text = words.without_interval(estimates)
  return [Text(text, 'small')] if text else []


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
    words.clean(variant.variant) if variant is not None else '',
    words.cell(one.cell, findings.cells),
    f'moment {words.moment(one.at)}',
    f'scope {words.clean(one.scope)}' if hasattr(one, 'scope') else '',
    f'part {words.clean(one.part)}',
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
    cells = [words.number(values[c, d], digits) if diagonal or c != d else '' for d in order]
    rows.append([f'{i + 1} {label}', *cells])
  head = ['class (training images)', *(str(i + 1) for i in range(len(order)))]
  return Table(caption, head, rows)
