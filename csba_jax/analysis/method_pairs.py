"""Methods against methods within one variant: losses, samplers, surgery and their controls.

A study names its pairs beforehand (`method_pairs`). All of them, in every variant and condition,
are one family on the primary outcome, with the p-values of Holm and the rule of `gain_verdict`.
Few-shot accuracy, accuracy and conflict stand beside it without a verdict.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from csba_jax.analysis import comparisons, wording
from csba_jax.analysis.comparisons import NAN, Study
from csba_jax.analysis.conflict import END, Measured
from csba_jax.analysis.types import Comparison
from csba_jax.study import results as results_lib
from csba_jax.study.results import Record, Unit

BESIDE = ('few_shot_accuracy', 'accuracy')
CONFLICT = ('head_tail_conflict', 'minority_interference')
SCOPE, PART = 'shared', 'train'  # one variant has one set of parameters

Pair = tuple[str, str]  # treatment, control
Sides = Sequence[Mapping[Unit, Record]]  # their runs


def method_pairs(measured: Measured) -> tuple[Comparison, ...]:
  """Every pair in every variant and condition: the family, then what stands beside it.

  `cell` of a comparison has the variant in place of the method.
  """
  study = measured.study
  found = list(_sides(study))
  family = [_compare(study, *one, study.outcome) for one in found]
  beside = [_compare(study, *one, name) for name in BESIDE for one in found]
  conflict = [_compare_conflict(measured, *one, name) for name in CONFLICT for one in found]
  known = [c for c in (*beside, *conflict) if c.difference.n]
  return (*comparisons.judged(study, family), *known)


def _sides(study: Study) -> Iterator[tuple[dict[str, Any], Pair, Sides]]:
  """(variant and condition, pair, runs of both) of each pair of which one side ran."""
  pairs = [tuple(pair) for pair in study.config.get('method_pairs') or ()]
  conditions = dict.fromkeys(
    tuple((axis, value) for axis, value in cell if axis != 'method') for cell in study.main_cells
  )
  for condition in conditions:
    for variant in study.variants:
      for pair in pairs:
        cells = [_with_method(study, dict(condition), method) for method in pair]
        sides = [study.results.runs(cell, variant) for cell in cells]
        if any(sides):
          yield {'variant': variant, **dict(condition)}, pair, sides


def _with_method(study: Study, condition: Mapping[str, Any], method: str) -> results_lib.Cell:
  """The cell of a condition and a method, its axes in the order of the study's cells."""
  return tuple(
    (axis, method if axis == 'method' else condition[axis]) for axis, _ in study.main_cells[0]
  )


def _compare(
  study: Study, cell: Mapping[str, Any], pair: Pair, sides: Sides, measure: str
) -> Comparison:
  """A test metric of two methods, with the median seconds of a run of each."""
  units, _ = results_lib.common(study.results, pair, sides)
  treated, control = (
    float(np.median([runs[unit].get('seconds') or NAN for unit in units])) if units else NAN
    for runs in sides
  )
  found = comparisons.compare_runs(study, cell, pair, sides, measure)
  return dataclasses.replace(found, seconds=(treated, control))


def _compare_conflict(
  measured: Measured, cell: Mapping[str, Any], pair: Pair, sides: Sides, measure: str
) -> Comparison:
  """A measure of conflict at the end of the run."""
  study = measured.study
  units, missing = results_lib.common(study.results, pair, sides)
  treated, control = (
    np.array([measured.value(runs[unit], END, PART, SCOPE, measure) for unit in units])
    for runs in sides
  )
  return Comparison(
    *pair,
    cell={**cell, 'at': END, 'part': PART, 'scope': SCOPE},
    outcome=wording.metric(measure),
    treatment_mean=comparisons.mean_of(treated, control),
    control_mean=comparisons.mean_of(control, treated),
    difference=study.estimate(treated - control),
    missing=missing,
    uncorrected=study.uncorrected(treated - control),
  )
