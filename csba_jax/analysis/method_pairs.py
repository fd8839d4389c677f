"""Methods against methods within one variant: losses, samplers, surgery and their controls.

A study names its pairs beforehand (`method_pairs`). All of them, in every variant and condition,
are one family on the primary outcome, with the p-values of Holm and the rule of `gain_verdict`.
Few-shot accuracy, accuracy and conflict stand beside it without a verdict.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from csba_jax.analysis import comparisons
from csba_jax.analysis import conflict as conflict_lib
from csba_jax.analysis.comparisons import NAN, Study
from csba_jax.analysis.conflict import END
from csba_jax.analysis.measured import Measured
from csba_jax.analysis.types import Comparison
from csba_jax.study import results as results_lib
from csba_jax.study.results import Cell, Record, Unit

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
  conflict = [
    conflict_lib.compare_runs(measured, *one, (END, PART, SCOPE, name))
    for name in CONFLICT
    for one in found
  ]
  known = [c for c in (*beside, *conflict) if c.difference.n]
  return (*comparisons.judged(study, family), *known)


def _sides(study: Study) -> Iterator[tuple[dict[str, Any], Pair, Sides]]:
  """(variant and condition, pair, runs of both) of each pair of which one side ran."""
  pairs = [tuple(pair) for pair in study.config.get('method_pairs') or ()]
  conditions = dict.fromkeys(_with(cell, None) for cell in study.main_cells)
  for condition in conditions:
    for variant in study.variants:
      for pair in pairs:
        sides = [study.results.runs(_with(condition, method), variant) for method in pair]
        if any(sides):
          shared = {axis: value for axis, value in condition if axis != 'method'}
          yield {'variant': variant, **shared}, pair, sides


def _with(cell: Cell, method: str | None) -> Cell:
  """The cell with another method."""
  return tuple((axis, method if axis == 'method' else value) for axis, value in cell)


def _compare(
  study: Study, cell: Mapping[str, Any], pair: Pair, sides: Sides, measure: str
) -> Comparison:
  """A test metric of two methods, with the median seconds of a run of each."""
  units, _ = results_lib.common_units(study.results, pair, sides)
  treated, control = (
    float(np.median([runs[unit].get('seconds') or NAN for unit in units])) if units else NAN
    for runs in sides
  )
  found = comparisons.compare_runs(study, cell, pair, sides, measure)
  return dataclasses.replace(found, seconds=(treated, control))
