"""Effects over imbalance factors: does what a treatment gives grow or shrink with the imbalance?"""

import math
from collections.abc import Iterator

import numpy as np

from csba_jax.analysis import wording
from csba_jax.analysis.comparisons import Study
from csba_jax.analysis.types import Comparison
from csba_jax.runtime import plain
from csba_jax.study import results as results_lib
from csba_jax.study.results import Cell, Record, Unit

AXIS = 'imbalance_factor'
LEAST_SPREAD = 1.5  # of the largest ratio to the smallest one; a slope over less says nothing

Pair = tuple[str, str]  # treatment, control
Sides = list[tuple[dict[Unit, Record], dict[Unit, Record]]]  # runs of both, factor by factor


def trends(study: Study) -> tuple[Comparison, ...]:
  """How the difference of the primary outcome changes while the imbalance grows tenfold.

  For each pair and condition: d_uf is the difference of unit u (seed or fold) at factor f, and
  x_f = log10 of `ratio`, since a factor of 1 leaves the images as they are. The slope of unit u is
  that of the least-squares line,

    s_u = sum_f (x_f - mean x) d_uf / sum_f (x_f - mean x)^2,

  and `difference` of the comparison is the mean of s_u over the units that have both sides at every
  factor, with the interval and the test of the study's differences. Means of treatment and control
  are NaN: there is one slope, of the difference. No verdict: the protocol plans none. `left_out`
  names what has no slope.
  """
  found = []
  for rest, pair, cells in _pairs(study):
    sides = _sides(study, pair, cells)
    if not _missing(study, sides):
      found.append(_trend(study, rest, pair, sides))
  return tuple(found)


def left_out(study: Study) -> list[str]:
  """What `trends` leaves out, in words: pairs without a slope, and units that a factor lacks."""
  notes = []
  for _, pair, cells in _pairs(study):
    sides = _sides(study, pair, cells)
    name = f'effect against the imbalance: {" against ".join(map(plain.clean, pair))}'
    if missing := _missing(study, sides):
      notes.append(f'{name} is left out, {missing}')
      continue
    every = dict.fromkeys(unit for both in sides for runs in both for unit in runs)
    some = [unit for unit in every if unit not in _units(sides)]
    if some:
      units = ', '.join(results_lib.unit_words(study.results, unit) for unit in some)
      notes.append(f'{name} without {units}, which not every factor has')
  return list(dict.fromkeys(notes))


def ratio(class_counts: np.ndarray) -> float:
  """Training images of the largest class / those of the smallest; inf if that has none."""
  smallest = class_counts.min()
  return float(class_counts.max() / smallest) if smallest else math.inf


def _pairs(study: Study) -> Iterator[tuple[Cell, Pair, list[Cell]]]:
  """(what they share, pair, cells that differ in their imbalance factor alone), two or more."""
  groups: dict[Cell, list[Cell]] = {}
  for cell in study.main_cells:
    if AXIS in dict(cell):
      rest = tuple((axis, value) for axis, value in cell if axis != AXIS)
      groups.setdefault(rest, []).append(cell)
  for rest, cells in groups.items():
    for pair in dict.fromkeys(study.family + study.secondary):
      if len(cells) > 1 and any(study.pairs_of(cell, [pair]) for cell in cells):
        yield rest, pair, cells


def _sides(study: Study, pair: Pair, cells: list[Cell]) -> Sides:
  treatment, control = pair
  return [
    (dict(study.results.runs(cell, treatment)), dict(study.results.runs(cell, control)))
    for cell in cells
  ]


def _units(sides: Sides) -> list[Unit]:
  """Those that both have at every factor."""
  return [unit for unit in sides[0][0] if all(unit in runs for both in sides for runs in both)]


def _missing(study: Study, sides: Sides) -> str:
  """Why there is no slope, in words; '' if there is one."""
  units = _units(sides)
  if not units:
    return f'no {study.units.removesuffix("s")} has runs of both at every factor'
  x = _logarithms(sides, units)
  if not np.isfinite(x).all():
    return 'a class has no training images at one of the factors'
  if np.ptp(x) < math.log10(LEAST_SPREAD):
    return 'the factors leave the classes nearly the same numbers of images'
  known = np.isfinite(_differences(study, sides, units)).all(1)
  return '' if known.any() else 'without an outcome at every factor'


def _logarithms(sides: Sides, units: list[Unit]) -> np.ndarray:
  """log10 of the ratio of each factor, of the mean class counts.   [factors]"""
  counts = [[control[u]['result']['class_counts'] for u in units] for _, control in sides]
  return np.log10([ratio(np.array(of_factor).mean(0)) for of_factor in counts])


def _differences(study: Study, sides: Sides, units: list[Unit]) -> np.ndarray:
  """Of the primary outcome, treatment - control.   [units, factors]"""
  outcomes = np.array(
    [
      [[results_lib.outcome(runs[unit], study.outcome) for runs in both] for both in sides]
      for unit in units
    ]
  )
  return outcomes[..., 0] - outcomes[..., 1]


def _trend(study: Study, rest: Cell, pair: Pair, sides: Sides) -> Comparison:
  units = _units(sides)
  x = _logarithms(sides, units)
  weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
  slopes = study.by_subset(_differences(study, sides, units) @ weights, units)
  steepest = float(np.abs(weights).sum())  # a difference is at most 1, up or down
  return Comparison(
    *pair,
    cell=dict(rest),
    outcome=wording.metric(study.outcome),
    treatment_mean=float('nan'),
    control_mean=float('nan'),
    difference=study.estimate(slopes, steepest),
    uncorrected=study.uncorrected(slopes, largest=steepest),
  )
