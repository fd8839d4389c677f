"""Effects over imbalance factors: does what a treatment gives grow or shrink with the imbalance?"""

import math

import numpy as np

from csba_jax.analysis import wording
from csba_jax.analysis.comparisons import Study
from csba_jax.analysis.types import Comparison
from csba_jax.study import results as results_lib
from csba_jax.study.results import Cell

AXIS = 'imbalance_factor'


def trends(study: Study) -> tuple[Comparison, ...]:
  """How the difference of the primary outcome changes with each tenfold imbalance factor.

  For each pair and condition: d_uf is the difference of unit u (seed or fold) at factor f, and
  x_f = log10 of `ratio`, since a factor of 1 leaves the images as they are. The slope of unit u is
  that of the least-squares line,

    s_u = sum_f (x_f - mean x) d_uf / sum_f (x_f - mean x)^2,

  and `difference` of the comparison is the mean of s_u over the units that have both sides at every
  factor, with the interval and the test of the study's differences. Means of treatment and control
  are NaN: there is one slope, of the difference. No verdict: the protocol plans none. Nothing of
  factors that all leave the same ratio, or of a class without images.
  """
  found = []
  for rest, cells in _groups(study.main_cells).items():
    for pair in dict.fromkeys(study.family + study.secondary):
      if all(pair in study.pairs_of(cell, [pair]) for cell in cells):
        found.append(_trend(study, rest, cells, pair))
  return tuple(c for c in found if c is not None and c.difference.n)


def ratio(class_counts: np.ndarray) -> float:
  """Training images of the largest class / those of the smallest; inf if that has none."""
  smallest = class_counts.min()
  return float(class_counts.max() / smallest) if smallest else math.inf


def _trend(study: Study, rest: Cell, cells: list[Cell], pair: tuple[str, str]) -> Comparison | None:
  """The slope of one pair in cells that differ in their imbalance factor alone; None without."""
  sides = [study.results.runs(cell, variant) for cell in cells for variant in pair]
  units = [unit for unit in sides[0] if all(unit in runs for runs in sides)]
  if not units:
    return None
  outcomes = np.array(
    [[results_lib.outcome(runs[unit], study.outcome) for runs in sides] for unit in units]
  ).reshape(len(units), len(cells), 2)
  counts = [[runs[unit]['result']['class_counts'] for unit in units] for runs in sides[1::2]]
  x = np.log10([ratio(np.array(of_cell).mean(0)) for of_cell in counts])
  if not np.isfinite(x).all() or np.ptp(x) == 0:
    return None
  weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
  slopes = study.by_subset((outcomes[..., 0] - outcomes[..., 1]) @ weights, units)
  return Comparison(
    *pair,
    cell=dict(rest),
    outcome=wording.metric(study.outcome),
    treatment_mean=float('nan'),
    control_mean=float('nan'),
    difference=study.estimate(slopes, largest=float(np.abs(weights).sum())),
    uncorrected=study.uncorrected(slopes),
  )


def _groups(cells: tuple[Cell, ...]) -> dict[Cell, list[Cell]]:
  """Cells that differ in their imbalance factor alone, by what they share; at least two factors."""
  groups: dict[Cell, list[Cell]] = {}
  for cell in cells:
    if AXIS in dict(cell):
      rest = tuple((axis, value) for axis, value in cell if axis != AXIS)
      groups.setdefault(rest, []).append(cell)
  return {rest: group for rest, group in groups.items() if len(group) > 1}
