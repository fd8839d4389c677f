"""The figures of a report: what a Findings holds, as SVG elements (see report/svg.py)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from csba_jax.analysis import wording
from csba_jax.analysis.findings import Findings
from csba_jax.analysis.imbalance import AXIS as FACTOR
from csba_jax.analysis.imbalance import ratio
from csba_jax.analysis.stats import Estimate
from csba_jax.analysis.types import BranchSimilarity, Comparison, Link, Matrix, MeanFlow, Score
from csba_jax.gradients.drawing import color_limit
from csba_jax.report.html import svg
from csba_jax.runtime import plain

MEASURES = ('head_tail_conflict', 'minority_interference', 'mean_cosine')
_NAN3 = (math.nan, math.nan, math.nan)


def order(findings: Findings, cell: Mapping[str, Any]) -> np.ndarray:
  """Classes from the largest to the smallest of a condition.   [C]"""
  return np.argsort(-np.asarray(findings.counts_in(cell), float), kind='stable')


def before_and_after(findings: Findings) -> tuple[str, str]:
  """The control and the treatment whose matrices are set side by side: those of the first pair."""
  names = findings.variants
  if findings.pairs and set(findings.pairs[0]) <= set(names):
    treatment, control = findings.pairs[0]
    return control, treatment
  control = 'none' if 'none' in names else (names[0] if names else '')
  others = [name for name in names if name != control]
  return control, 'csba' if 'csba' in others else (others[0] if others else '')


def class_labels(findings: Findings, cell: Mapping[str, Any]) -> list[str]:
  """'name (training images)', from the largest class of a condition to the smallest."""
  counts = findings.counts_in(cell)
  return [
    f'{plain.clean(findings.class_names[c])} ({wording.size(counts[c])})'
    for c in order(findings, cell)
  ]


def contrasts(
  comparisons: Sequence[Comparison],
  cells: Sequence[Mapping[str, Any]],
  *,
  title: str,
  axis: str,
  band: float = 0.0,
) -> list[str]:
  """Differences with intervals: a row for each pair of variants, a mark for each condition."""
  labels = list(dict.fromkeys(map(wording.versus, comparisons)))
  found = {(wording.base(c.cell), wording.versus(c)): triple(c.difference) for c in comparisons}
  bases = list(dict.fromkeys(wording.base(c.cell) for c in comparisons))
  names = {wording.base(c.cell): wording.cell(c.cell, cells) or 'all runs' for c in comparisons}
  drawn = []
  for start in range(0, len(bases), 6):  # as many as there are marks
    series = [
      svg.Series(names[base], [found.get((base, label), _NAN3) for label in labels], i)
      for i, base in enumerate(bases[start : start + 6])
    ]
    drawn.append(svg.dots(labels, series, title=title, axis=axis, zero=True, band=band))
  return drawn


def forest(
  comparisons: Sequence[Comparison], *, title: str, axis: str, band: float = 0.0
) -> list[str]:
  """Differences with intervals in one picture: a row for each comparison, with its numbers."""
  cells = [c.cell for c in comparisons]  # what does not vary among them need not be said
  labels, notes = [], []
  for c in comparisons:
    labels.append(', '.join(filter(None, [wording.versus(c), wording.cell(c.cell, cells)])))
    notes.append(wording.interval(c.difference, signed=True, limits=c.limits))
  series = [svg.Series('difference', [triple(c.difference) for c in comparisons], 4)]
  return [svg.dots(labels, series, title=title, axis=axis, zero=True, band=band, notes=notes)]


def over_factors(
  findings: Findings, comparisons: Sequence[Comparison], *, title: str, axis: str
) -> list[str]:
  """Differences with intervals: a row for each imbalance factor, a mark for each pair."""
  cells = {c.cell[FACTOR]: c.cell for c in comparisons}
  factors = sorted(cells)
  found = {(wording.versus(c), c.cell[FACTOR]): triple(c.difference) for c in comparisons}
  series = [
    svg.Series(pair, [found.get((pair, factor), _NAN3) for factor in factors], i)
    for i, pair in enumerate(dict.fromkeys(map(wording.versus, comparisons)))
  ]
  labels = [
    f'imbalance factor {wording.value(f)} ({ratio(findings.counts_in(cells[f])):.3g}:1)'
    for f in factors
  ]
  return [
    svg.dots(labels, series[start : start + 6], title=title, axis=axis, zero=True)
    for start in range(0, len(series), 6)  # as many as there are marks
  ]


def by_outcome(
  comparisons: Sequence[Comparison],
  cells: Sequence[Mapping[str, Any]],
  *,
  title: str,
  band: float = 0.0,
) -> list[str]:
  """`contrasts`, apart for each outcome."""
  return [
    drawn
    for name in dict.fromkeys(map(wording.outcome, comparisons))
    for drawn in contrasts(
      [c for c in comparisons if wording.outcome(c) == name],
      cells,
      title=f'{title}: differences of {name}',
      axis=f'difference of {name}',
      band=band,
    )
  ]


def per_class_f1(findings: Findings, scores: Sequence[Score]) -> list[str]:
  """F1 of every class for every variant of one condition."""
  series = [
    svg.Series(
      plain.clean(score.variant),
      [triple(score.per_class_f1[c]) for c in order(findings, score.cell)],
      index(findings, score.variant),
    )
    for score in scores
  ]
  title = 'F1 of each class for each variant, classes from largest to smallest'
  labels = class_labels(findings, scores[0].cell)
  return [svg.dots(labels, series, title=title, axis='F1 on the test images')]


def matrices(findings: Findings, before: Matrix | None, after: Matrix | None) -> list[str]:
  """Conflict matrices of two variants in one colour scale, then their difference in its own."""
  one = before or after
  assert one is not None
  cell = one.cell
  by_size, labels = np.ix_(*[order(findings, cell)] * 2), class_labels(findings, cell)
  given = [(plain.clean(m.variant), m.cosine[by_size]) for m in (before, after) if m is not None]
  limit = color_limit([values for _, values in given])
  drawn = [
    svg.heat_map(values, labels, title=name, limit=limit, named=i == 0)
    for i, (name, values) in enumerate(given)
  ]
  if before is not None and after is not None:
    change = given[1][1] - given[0][1]
    title = f'{given[1][0]} − {given[0][0]}'
    limit = color_limit([change])
    drawn.append(svg.heat_map(change, labels, title=title, limit=limit, named=False))
  return drawn


def confusions(findings: Findings, scores: Sequence[Score]) -> list[str]:
  """Confusion matrices, rows in percent of the true class."""
  cell = scores[0].cell
  by_size, labels = np.ix_(*[order(findings, cell)] * 2), class_labels(findings, cell)
  return [
    svg.heat_map(
      row_normalised(score.confusion)[by_size],
      labels,
      title=plain.clean(score.variant),
      limit=1.0,
      named=i == 0,
      percent=True,
      diagonal=True,
    )
    for i, score in enumerate(scores)
  ]


def over_snapshots(
  findings: Findings, flows: Sequence[MeanFlow], scope: str, snapshots: Sequence[str]
) -> list[str]:
  """Small multiples: each measure over the snapshots, a line for each variant."""
  variants = [v for v in findings.variants if any(f.variant == v for f in flows)]
  found = {(flow.variant, flow.at): flow.scopes.get(scope, {}) for flow in flows}
  labels = [wording.snapshot(at) for at in snapshots]
  drawn: list[str] = []
  for measure in MEASURES:
    series = []
    for variant in variants:
      values = [found.get((variant, at), {}).get(measure) for at in snapshots]
      series.append(
        svg.Series(plain.clean(variant), [bare(x) for x in values], index(findings, variant))
      )
    if any(math.isfinite(value[0]) for one in series for value in one.values):
      if not drawn:
        drawn.append(svg.key(series))
      drawn.append(
        svg.lines(labels, series, title=wording.MEASURES[measure], zero=measure == 'mean_cosine')
      )
  return drawn


def differences_over_snapshots(findings: Findings, found: Sequence[Comparison]) -> list[str]:
  """Differences of conflict with intervals: a plot a measure, a row a snapshot, a mark a pair.

  Against one control only, so that the variants keep their colours.
  """
  control = before_and_after(findings)[0]
  found = [c for c in found if c.control == control] or found
  snapshots = sorted({wording.at(c) for c in found}, key=wording.by_snapshot)
  drawn = []
  for name in dict.fromkeys(map(wording.outcome, found)):
    here = [c for c in found if wording.outcome(c) == name]
    values = {(wording.versus(c), wording.at(c)): triple(c.difference) for c in here}
    marks = {wording.versus(c): index(findings, c.treatment) for c in here}
    series = [
      svg.Series(pair, [values.get((pair, at), _NAN3) for at in snapshots], mark)
      for pair, mark in marks.items()
    ]
    title, axis = f'Differences of {name} at each snapshot', f'difference of {name}'
    labels = [wording.snapshot(at) for at in snapshots]
    drawn.append(svg.dots(labels, series, title=title, axis=axis, zero=True))
  return drawn


def by_class(findings: Findings, flows: Sequence[MeanFlow], what: str) -> list[str]:
  """Norms (on a logarithmic axis) or shares of the batch gradient, class by class."""
  norms = what == 'norms'
  series = [
    svg.Series(
      plain.clean(flow.variant),
      [bare((flow.norms if norms else flow.shares)[c]) for c in order(findings, flow.cell)],
      index(findings, flow.variant),
    )
    for flow in flows
  ]
  title = 'Norm of each class gradient' if norms else 'Share of each class in the batch gradient'
  axis = 'norm of the class gradient' if norms else 'share of the batch gradient'
  labels = class_labels(findings, flows[0].cell)
  return [svg.dots(labels, series, title=title, axis=axis, log=norms, zero=not norms)]


def by_scope(findings: Findings, flows: Sequence[MeanFlow]) -> list[str]:
  """Head-tail conflict in each stage and each branch."""
  scopes = list(dict.fromkeys(scope for flow in flows for scope in flow.scopes))
  series = [
    svg.Series(
      plain.clean(flow.variant),
      [bare(flow.scopes.get(scope, {}).get('head_tail_conflict')) for scope in scopes],
      index(findings, flow.variant),
    )
    for flow in flows
  ]
  axis = 'share of head-tail pairs in conflict'
  labels = [plain.clean(scope) for scope in scopes]
  return [svg.dots(labels, series, title='Head-tail conflict by scope', axis=axis, zero=True)]


def by_block(findings: Findings, found: Sequence[BranchSimilarity], what: str) -> list[str]:
  """CKA between branches or spread of the gates, block by block."""
  cka = what == 'cka'
  values = [(one, one.cka if cka else one.gate_spread) for one in found]
  blocks = list(dict.fromkeys(block for _, by_name in values for block in by_name))
  series = [
    svg.Series(
      plain.clean(one.variant),
      [bare(by_name.get(block)) for block in blocks],
      index(findings, one.variant),
    )
    for one, by_name in values
    if by_name
  ]
  if not blocks:
    return []
  axis = 'mean CKA of two branches' if cka else 'standard deviation of the mean gate over classes'
  title = 'Similarity of the branches by block' if cka else 'Spread of the gates by block'
  labels = [plain.clean(block) for block in blocks]
  return [svg.dots(labels, series, title=title, axis=axis)]


def link(findings: Findings, one: Link) -> list[str]:
  """Reduction of conflict against gain of F1, a point for each class and unit."""
  names, classes = class_labels(findings, one.cell), order(findings, one.cell)
  reduction, gain = np.asarray(one.reduction), np.asarray(one.gain)
  groups = [(name, reduction[:, c], gain[:, c]) for name, c in zip(names, classes, strict=True)]
  pair = f'{plain.clean(one.treatment)} against {plain.clean(one.control)}'
  return [
    svg.scatter(
      groups,
      title=f'Reduction of {plain.clean(one.measure)} against gain of F1, {pair}',
      # where and when it was measured is in the caption
      axes=(f'reduction of {plain.clean(one.measure).split(" (")[0]}', 'gain of F1'),
    )
  ]


def row_normalised(confusion: np.ndarray) -> np.ndarray:
  """Shares of the true class; NaN for a class without test images.   [C, C] -> [C, C]"""
  confusion = np.asarray(confusion, np.float64)
  total = confusion.sum(1, keepdims=True)
  return np.divide(confusion, total, out=np.full_like(confusion, np.nan), where=total > 0)


def triple(estimate: Estimate) -> tuple[float, float, float]:
  """A mark with the ends of its interval: (value, low, high), NaN for what is unknown."""
  return estimate.value, estimate.low, estimate.high


def bare(value: Any) -> tuple[float, float, float]:
  """A mark without an interval."""
  return (math.nan if value is None else float(value)), math.nan, math.nan


def index(findings: Findings, variant: str) -> int:
  """The colour and the marker that a variant has in every figure."""
  names = findings.variants
  return names.index(variant) if variant in names else len(names)
