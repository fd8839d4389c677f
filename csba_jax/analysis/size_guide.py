"""The conflict matrix as a guide to depth and width: does conflict tell which size will do well?"""

import dataclasses

import numpy as np

from csba_jax.analysis import stats
from csba_jax.analysis.comparisons import Study
from csba_jax.analysis.measured import Measured
from csba_jax.analysis.types import SizeGuide
from csba_jax.study import results as results_lib
from csba_jax.study.results import Cell

SIZE = ('width', 'depth')
SNAPSHOTS = ('0', '0.1', '1')
MEASURES = ('head_tail_conflict', 'minority_interference', 'mean_cosine')
FEWEST = 4  # sizes; the order of three says nothing


def left_out(study: Study) -> list[str]:
  """What `size_guides` leaves out, in words: variants without a size, units that a size misses."""
  notes = []
  for group in _groups(study.main_cells):
    for variant in study.variants:
      runs = {cell: study.results.runs(cell, variant) for cell in group}
      without = [_size(cell) for cell, of_size in runs.items() if not of_size]
      every = dict.fromkeys(unit for of_size in runs.values() for unit in of_size)
      some = [u for u in every if not all(u in of_size for of_size in runs.values())]
      name = f'conflict as a guide to size: {variant}'
      if without and every:
        notes.append(f'{name} is left out, without a run of {", ".join(without)}')
      elif every and len(some) == len(every):
        notes.append(f'{name} is left out: no seed or fold has a run of every size')
      elif some:
        units = ', '.join(results_lib.unit_words(study.results, unit) for unit in some)
        notes.append(f'{name} without {units}, which not every size has')
  return notes


def _size(cell: Cell) -> str:
  """'width 0.5 and depth 2'"""
  return ' and '.join(f'{axis} {dict(cell)[axis]:g}' for axis in SIZE if axis in dict(cell))


def size_guides(measured: Measured) -> tuple[SizeGuide, ...]:
  """Conflict of nets that differ in width and depth alone, against the primary outcome.

  For every variant, snapshot and measure (common parameters, training images): Spearman's
  correlation over sizes of the means over units, p from permuted sizes, as
  `stats.across_classes` has it. Early snapshots say whether a short run, or none, could
  guide the choice of a size. Sizes are compared on the units that all of them have; a variant
  that misses a size is left out. `left_out` names both.
  """
  study, found = measured.study, []
  for group in _groups(study.main_cells):
    for variant in study.variants:
      runs = [study.results.runs(cell, variant) for cell in group]
      units = [unit for unit in runs[0] if all(unit in of_size for of_size in runs)]
      if not units:
        continue
      sides = [[of_size[unit] for of_size in runs] for unit in units]  # [S][sizes]
      outcome = np.array([[results_lib.outcome(r, study.outcome) for r in row] for row in sides])
      for at in SNAPSHOTS:
        for measure in MEASURES:
          what = (at, 'train', 'common', measure)
          conflict = np.array([[measured.value(r, *what) for r in row] for row in sides])
          if np.isnan(conflict).all():
            continue
          own, scores = study.paired(conflict, outcome, units)
          estimate = stats.across_classes(own, scores, resamples=study.resamples)
          words = estimate.method.replace('classes', 'sizes')
          found.append(
            SizeGuide(
              variant=variant,
              cells=tuple(dict(cell) for cell in group),
              at=at,
              measure=measure,
              conflict=own.mean(0),
              outcome=scores.mean(0),
              correlation=dataclasses.replace(estimate, method=words),
            )
          )
  return tuple(found)


def _groups(cells: tuple[Cell, ...]) -> list[list[Cell]]:
  """Cells that differ in size alone, at least FEWEST of them."""
  groups: dict[Cell, list[Cell]] = {}
  for cell in cells:
    rest = tuple((axis, value) for axis, value in cell if axis not in SIZE)
    groups.setdefault(rest, []).append(cell)
  return [group for group in groups.values() if len(group) >= FEWEST]
