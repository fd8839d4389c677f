"""Variants against variants on test metrics: the primary family, offsets, noise floor and leak.

The protocol, fixed before any run is looked at (docs/study.md):

- Units (split, repeat, fold, seed) pair two variants within a cell. Of seeds whose images are
  independent the interval is the bootstrap-t one and the test flips signs. Where units share
  images, which are folds, and seeds that redraw training and test images from one set, both are
  Nadeau and Bengio's corrected t, and every verdict is by it. Of such seeds the interval that takes
  them as independent stands beside it, and decides nothing.
- Test metrics lie in [0, 1]: intervals are cut to that, those of differences to [-1, 1].
- The primary family is csba and csba_class, each against none and none_wide, in every main cell, on
  the primary outcome; Holm over all of it. se, cbam and none_wide against none are shown beside it.
  A study that declares pairs of its own has these for its family, and none beside it.
- Where there are folds and grouped splits, cells of naive splits are outside all comparisons but
  the leak.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from csba_jax.analysis import stats, subsets, wording
from csba_jax.analysis.stats import Estimate
from csba_jax.analysis.types import REFUTED, SUPPORTED, UNDECIDED, Comparison, Score
from csba_jax.study import protocol
from csba_jax.study import results as results_lib
from csba_jax.study.protocol import SIGNIFICANCE
from csba_jax.study.results import Cell, Record, Results, Unit

CAPACITY_CONTROL = 'none_wide'  # as many parameters as csba, without attention
OFFSETS = ('accuracy', 'head_f1')  # what a gain may not cost
METRICS = ('macro_f1', 'accuracy', 'balanced_accuracy', 'head_f1', 'tail_f1')
NOISE_SEEDS = 4  # fewer cannot be split into two sets with an interval
NAN = float('nan')


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
  """Results with what their analysis was told beforehand."""

  results: Results
  resamples: int = 9999  # of every bootstrap and permutation

  @property
  def config(self) -> Mapping[str, Any]:
    """The study's own: variants, methods, outcome, margin, ..., base."""
    return self.results.study['config']

  @property
  def outcome(self) -> str:
    """The primary outcome: macro_f1 or f1:CLASS."""
    return self.config['outcome']

  @property
  def margin(self) -> float:
    """The largest loss that would not matter."""
    return float(self.config['margin'])

  @property
  def smallest_effect(self) -> float:
    """The smallest gain that would matter."""
    return float(self.config['smallest_effect'])

  @functools.cached_property
  def cells(self) -> tuple[Cell, ...]:
    """All cells, in the order of their first run."""
    return tuple(dict.fromkeys(results_lib.cell(record) for record in self.results.done))

  @functools.cached_property
  def variants(self) -> tuple[str, ...]:
    """Those of the config in its order, then any other that was run."""
    run = (record['axes']['variant'] for record in self.results.done)
    return tuple(dict.fromkeys([*self.config.get('variants', ()), *run]))

  @property
  def folds(self) -> int:
    """See `Results.folds`."""
    return self.results.folds

  @property
  def units(self) -> str:
    """What an interval counts, for a sentence: 'folds', 'seeds', or 'subsets' of several seeds."""
    return 'folds' if self.folds else 'subsets' if self.subset_of else 'seeds'

  @functools.cached_property
  def subset_of(self) -> Mapping[Unit, int]:
    """The subset of the training images of each unit, where some units share one; else {}.

    Also {} where all units have the same one: then an interval speaks of it alone (`one_subset`).
    """
    found = subsets.of_units(self.results.done)
    return found if subsets.are_shared(found) and not self.folds else {}

  @property
  def one_subset(self) -> bool:
    """Whether several seeds have one subset of the training images, all the same."""
    found = subsets.of_units(self.results.done)
    return not self.folds and len(set(found.values())) == 1 < len(found)

  def by_subset(self, values: np.ndarray, units: Sequence[Unit]) -> np.ndarray:
    """What intervals and tests take: `subsets.means` where units share a subset, else the values.

    Runs on the same images are not independent.   [n, ...] -> [number of subsets, ...] or the same
    """
    return subsets.means(values, units, self.subset_of) if self.subset_of else values

  def paired(
    self, treated: np.ndarray, control: np.ndarray, units: Sequence[Unit]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Both `by_subset`, without the units of which either misses a value.   [n, ...] each"""
    if not self.subset_of:
      return treated, control
    lost = np.isnan(treated) | np.isnan(control)
    first, second = (self.by_subset(np.where(lost, NAN, v), units) for v in (treated, control))
    return first, second

  @functools.cached_property
  def redrawn(self) -> bool:
    """Whether seeds redraw training and test images from one set.

    Not so with folds, with a separate test set, and where all seeds have the same split.
    """
    if self.folds or not protocol.redraws(self._data):
      return False
    splits: dict[tuple, set] = {}
    for record in self.results.done:
      at = (results_lib.cell(record), record['axes']['variant'])
      splits.setdefault(at, set()).add(record['result'].get('splits_sha256'))
    return any(len(s) > 1 for s in splits.values())

  @property
  def test_to_rest(self) -> float | None:
    """See `protocol.test_to_rest`; None where units do not share images."""
    if not (self.folds or self.redrawn):
      return None
    return protocol.test_to_rest({**self._data, 'folds': self.folds})

  @property
  def _data(self) -> Mapping[str, Any]:
    return self.config.get('base', {}).get('data', {})

  @property
  def main_cells(self) -> tuple[Cell, ...]:
    """The cells that claims are about: of folds, those of grouped splits if there are any."""
    grouped = tuple(cell for cell in self.cells if dict(cell).get('split') == 'grouped')
    return (grouped or self.cells) if self.folds else self.cells

  @functools.cached_property
  def family(self) -> tuple[tuple[str, str], ...]:
    """The (treatment, control) pairs that are tested together: its own, or the protocol's."""
    return protocol.family(self.config)

  @functools.cached_property
  def secondary(self) -> tuple[tuple[str, str], ...]:
    """The pairs shown beside the family."""
    return protocol.secondary(self.config)

  @functools.cached_property
  def of_attention(self) -> tuple[tuple[str, str], ...]:
    """The pairs of the family that the links on gain, conflict and offsets are about.

    All but those of CAPACITY_CONTROL, or all of a family that has no others.
    """
    found = tuple(pair for pair in self.family if pair[1] != CAPACITY_CONTROL)
    return found or self.family

  @functools.cached_property
  def of_capacity(self) -> tuple[tuple[str, str], ...]:
    """The other pairs of the family, against a control of equal capacity."""
    return tuple(pair for pair in self.family if pair not in self.of_attention)

  def condition(self, cell: Mapping[str, Any]) -> str:
    """The method, and whatever else tells this cell from the study's other main ones."""
    return wording.condition(cell, [dict(other) for other in self.main_cells])

  def pairs_of(self, cell: Cell, candidates: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The (treatment, control) that the study has: both planned or run, one of them run here."""
    there = {variant for variant in self.variants if self.results.runs(cell, variant)}
    return [
      pair for pair in candidates if set(pair) <= set(self.variants) and there.intersection(pair)
    ]

  def estimate(self, differences: np.ndarray, largest: float = 1.0) -> Estimate:
    """Interval and test of the mean of differences [n], by the study's protocol.

    Args:
      differences: of units that are independent, as `paired` makes them.
      largest: that a difference can be, up or down; 1 for metrics in [0, 1].
    """
    return self._estimate(differences).cut(-largest, largest)

  def non_inferiority(self, differences: np.ndarray, margin: float) -> Estimate:
    """The same for an interval of 90 % that is judged by a margin."""
    found = stats.non_inferiority(
      differences, margin, self.test_to_rest, resamples=self.resamples, units=self.units
    )
    return found.cut(-1, 1)

  def uncorrected(
    self, differences: np.ndarray, level: float = 0.95, largest: float = 1.0
  ) -> Estimate | None:
    """Of seeds that redraw one set: as if their images were independent.

    Args:
      largest: see `estimate`.
    """
    if not self.redrawn:
      return None
    found = stats.paired_difference(differences, level, resamples=self.resamples, units=self.units)
    return found.cut(-largest, largest)

  def mean(self, values: np.ndarray) -> Estimate:
    """Interval of the mean of one variant's metric [n]; a test against 0 would say nothing."""
    found = self._estimate(values).cut(0, 1)
    method = found.method.replace('identical differences', 'identical values')
    return dataclasses.replace(found, p=NAN, method=method)

  def _estimate(self, values: np.ndarray) -> Estimate:
    if self.test_to_rest is not None:
      return stats.corrected_resampled_t(values, self.test_to_rest, units=self.units)
    return stats.paired_difference(values, resamples=self.resamples, units=self.units)


def scores(study: Study) -> tuple[Score, ...]:
  """Test metrics of every variant in every cell, means over units."""
  found = []
  for cell in study.cells:
    for variant in study.variants:
      by_unit = study.results.runs(cell, variant)
      units, runs = list(by_unit), list(by_unit.values())
      if not runs:
        continue
      names = dict.fromkeys([study.outcome, *METRICS])
      by_class = np.stack([results_lib.per_class_f1(run) for run in runs])
      found.append(
        Score(
          cell=dict(cell),
          variant=variant,
          parameters=int(runs[0]['result']['parameters']),
          metrics={
            name: study.mean(
              study.by_subset(np.array([results_lib.outcome(run, name) for run in runs]), units)
            )
            for name in names
          },
          per_class_f1=tuple(study.mean(values) for values in study.by_subset(by_class, units).T),
          confusion=np.sum([run['result']['confusion_matrix'] for run in runs], axis=0),
        )
      )
  return tuple(found)


def compare_outcome(
  study: Study, cell: Cell, pair: tuple[str, str], measure: str, margin: float | None = None
) -> Comparison:
  """A test metric of a treatment against a control, paired; no verdict yet.

  Args:
    margin: of non-inferiority, for an interval of 90 %; None for one of 95 %.
  """
  sides = [study.results.runs(cell, variant) for variant in pair]
  return compare_runs(study, dict(cell), pair, sides, measure, margin)


def compare_runs(
  study: Study,
  cell: Mapping[str, Any],
  names: tuple[str, str],
  sides: Sequence[Mapping[Unit, Record]],
  measure: str,
  margin: float | None = None,
) -> Comparison:
  """The same of any two sets of runs, treatment first.

  Args:
    cell: what both have in common.
  """
  units, missing = results_lib.common_units(study.results, names, sides)
  treated, control = (
    np.array([results_lib.outcome(runs[unit], measure) for unit in units]) for runs in sides
  )
  treated, control = study.paired(treated, control, units)
  if margin is None:
    difference = study.estimate(treated - control)
  else:
    difference = study.non_inferiority(treated - control, margin)
  return Comparison(
    *names,
    cell=cell,
    outcome=wording.metric(measure),
    treatment_mean=mean_of(treated, control),
    control_mean=mean_of(control, treated),
    difference=difference,
    missing=missing,
    uncorrected=study.uncorrected(treated - control, difference.level),
  )


def mean_of(values: np.ndarray, partner: np.ndarray) -> float:
  """Mean over the units of which both sides are defined; NaN of none."""
  both = values[~np.isnan(values) & ~np.isnan(partner)]
  return float(both.mean()) if both.size else NAN


def primary(study: Study) -> tuple[Comparison, ...]:
  """The primary outcome: the family with Holm's p-values and verdicts, then the others."""
  family, others = (
    [
      compare_outcome(study, cell, pair, study.outcome)
      for cell in study.main_cells
      for pair in study.pairs_of(cell, candidates)
    ]
    for candidates in (study.family, study.secondary)
  )
  return (*judged(study, family), *others)


def judged(study: Study, family: Sequence[Comparison]) -> tuple[Comparison, ...]:
  """A family of comparisons of the primary outcome with Holm's p-values and verdicts."""
  adjusted = stats.holm(np.array([c.difference.p for c in family], np.float64))
  return tuple(
    dataclasses.replace(
      comparison,
      adjusted_p=float(p),
      verdict=gain_verdict(comparison.difference, float(p), study.smallest_effect),
      limits=(0.0, study.smallest_effect),
    )
    for comparison, p in zip(family, adjusted, strict=True)
  )


def gain_verdict(difference: Estimate, adjusted_p: float, smallest_effect: float) -> str:
  """Supported: p < 0.05 after Holm, and a gain. Not supported: the interval ends below the smallest
  effect that would matter. Undecided: anything else, also no interval.
  """
  if not difference.known:
    return UNDECIDED
  if adjusted_p < SIGNIFICANCE and difference.value > 0:
    return SUPPORTED
  return REFUTED if difference.high < smallest_effect else UNDECIDED


def offsets(study: Study) -> tuple[Comparison, ...]:
  """Non-inferiority of accuracy and head F1 to the control: 90 % intervals and the margin."""
  found = []
  for cell in study.main_cells:
    for pair in study.pairs_of(cell, study.of_attention):
      for measure in OFFSETS:
        comparison = compare_outcome(study, cell, pair, measure, study.margin)
        verdict = offset_verdict(comparison.difference, study.margin)
        found.append(dataclasses.replace(comparison, verdict=verdict, limits=(-study.margin,)))
  return tuple(found)


def offset_verdict(difference: Estimate, margin: float) -> str:
  """Supported: the 90 % interval lies above -margin. Not supported: it lies below. Undecided:
  anything else, also no interval.
  """
  if stats.is_non_inferior(difference, margin):
    return SUPPORTED
  return REFUTED if difference.known and difference.high < -margin else UNDECIDED


def noise(study: Study, cell: Cell, variant: str, outcome: str, values: np.ndarray) -> Comparison:
  """A variant against itself, half of its units against the other half; must come out null.

  The images that all units share are on both sides, where they cancel: no correction is due.

  Args:
    outcome: what the values [n], in [0, 1], are, in words.
  """
  return Comparison(
    treatment=variant,
    control=variant,
    cell=dict(cell),
    outcome=outcome,
    treatment_mean=NAN,  # of random halves: nothing to learn from
    control_mean=NAN,
    difference=stats.noise_floor(values, resamples=study.resamples).cut(-1, 1),
  )


def leak(study: Study) -> tuple[Comparison, ...]:
  """Naive split against grouped, by variant: what near-duplicates across the split are worth.

  The test images differ, so the runs are not paired: Welch's t, of means that know the overlap of
  their folds; beside it, as if folds were independent.
  """
  found = []
  for cell in study.cells:
    if dict(cell).get('split') != 'grouped':
      continue
    naive = tuple((axis, 'naive' if axis == 'split' else value) for axis, value in cell)
    for variant in study.variants:
      sides = [study.results.runs(at, variant) for at in (naive, cell)]
      if not all(sides):
        continue
      a, b = (
        np.array([results_lib.outcome(run, study.outcome) for run in side.values()])
        for side in sides
      )
      found.append(
        Comparison(
          treatment=variant,  # naive split
          control=variant,  # grouped folds
          cell={axis: value for axis, value in cell if axis != 'split'},
          outcome=wording.metric(study.outcome),
          treatment_mean=mean_of(a, a),
          control_mean=mean_of(b, b),
          difference=welch(a, b, study.test_to_rest or 0.0).cut(-1, 1),
          uncorrected=welch(a, b).cut(-1, 1),
        )
      )
  return tuple(found)


def welch(a: np.ndarray, b: np.ndarray, test_to_rest: float = 0.0) -> Estimate:
  """mean(a) - mean(b) of two samples, Welch's t; `n` counts both.

  The variance of either mean is (1 / n + n_test / n_rest) s^2, as in `stats.corrected_resampled_t`,
  and the degrees of freedom are those of Welch and Satterthwaite for these variances. A ratio of 0
  takes the units of a sample as independent.
  """
  a, b = a[~np.isnan(a)], b[~np.isnan(b)]
  n, words = len(a) + len(b), f'{len(a)} against {len(b)} runs, not paired'
  value = float(a.mean() - b.mean()) if len(a) and len(b) else NAN
  if min(len(a), len(b)) < 2:
    return Estimate(value, NAN, NAN, 0.95, n, NAN, f'no interval: {words}')
  if np.ptp(a) == 0 and np.ptp(b) == 0:
    return Estimate(value, NAN, NAN, 0.95, n, NAN, f'no interval: no spread in {words}')
  variances = [(1 / len(x) + test_to_rest) * x.var(ddof=1) for x in (a, b)]
  freedom = sum(variances) ** 2 / (
    variances[0] ** 2 / (len(a) - 1) + variances[1] ** 2 / (len(b) - 1)
  )
  error = float(np.sqrt(sum(variances)))
  low, high = (float(end) for end in scipy.stats.t.interval(0.95, freedom, value, error))
  p = float(2 * scipy.stats.t.sf(abs(value) / error, freedom))
  name = 'Welch t corrected for the overlap' if test_to_rest else 'Welch t'
  return Estimate(value, low, high, 0.95, n, p, f'{name}, {words}')
