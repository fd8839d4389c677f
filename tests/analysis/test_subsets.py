"""Seeds that share a subset of the training images: intervals and tests count subsets."""

import re
import runpy
import types
from pathlib import Path

import numpy as np
import pytest

from csba_jax.analysis import comparisons, conflict, findings, measured, stats
from csba_jax.study import grid, planned, results

simulated = types.SimpleNamespace(**runpy.run_path(Path(__file__).parents[1] / 'simulated.py'))
SEEDS, SUBSETS = 11, 5  # so that subset 0 has three seeds and the others two


@pytest.fixture(scope='module')
def study(tmp_path_factory):
  """Its study.json says nothing of subsets, or less than was run: the records know."""
  return with_subsets(tmp_path_factory.mktemp('subsets'), SUBSETS)


def with_subsets(folder, subsets, **options):
  options = {'seeds': SEEDS, 'variants': ('none', 'csba')} | options
  about, records = simulated.make(**options)
  for record in records:
    record['config']['data'] = {'seed': record['axes']['seed'] % subsets}
  return comparisons.Study(results.read(simulated.write(folder, about, records)), 499)


def by_hand(study, of_run):
  """of_run(record of csba) - of_run(record of none), the mean of each subset in a plain loop."""
  (cell,) = study.main_cells
  treated, control = (study.results.runs(cell, variant) for variant in ('csba', 'none'))
  by_subset = {}
  for unit, run in treated.items():
    by_subset.setdefault(unit[-1] % SUBSETS, []).append(of_run(run) - of_run(control[unit]))
  assert sorted(map(len, by_subset.values())) == [2, 2, 2, 2, 3]
  return np.array([np.mean(values, axis=0) for values in by_subset.values()])


def test_a_difference_has_one_value_a_subset(study):
  (cell,) = study.main_cells
  found = comparisons.compare_outcome(study, cell, ('csba', 'none'), 'macro_f1').difference
  wanted = stats.paired_difference(by_hand(study, lambda run: results.outcome(run, 'macro_f1')))
  assert (found.low, found.high, found.p) == pytest.approx((wanted.low, wanted.high, wanted.p))
  assert found.value == pytest.approx(wanted.value)
  assert found.n == SUBSETS
  both = comparisons.compare_outcome(study, cell, ('csba', 'none'), 'macro_f1')
  assert both.treatment_mean - both.control_mean == pytest.approx(found.value)
  scores = {score.variant: score.metrics['macro_f1'].value for score in comparisons.scores(study)}
  assert both.treatment_mean == pytest.approx(scores['csba'])
  assert both.control_mean == pytest.approx(scores['none'])
  assert found.method == 'exact bootstrap-t over 5 subsets'
  assert study.units == 'subsets'


def test_a_margin_and_a_mean_have_one_too(study):
  (cell,) = study.main_cells
  of_accuracy = by_hand(study, lambda run: results.outcome(run, 'accuracy'))
  wanted = stats.non_inferiority(of_accuracy, 0.02)
  found = comparisons.compare_outcome(study, cell, ('csba', 'none'), 'accuracy', 0.02).difference
  assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
  assert found.n == SUBSETS
  assert [score.metrics['macro_f1'].n for score in comparisons.scores(study)] == [SUBSETS] * 2


def test_conflict_and_its_link_to_f1_have_one_too(study):
  (cell,) = study.main_cells
  what = ('1', 'train', 'shared', 'head_tail_conflict')
  of_conflict = by_hand(study, lambda run: measured.Measured(study).value(run, *what))
  sides = [study.results.runs(cell, variant) for variant in ('csba', 'none')]
  found = conflict.compare_runs(
    measured.Measured(study), dict(cell), ('csba', 'none'), sides, what
  ).difference
  assert (found.value, found.n) == (pytest.approx(of_conflict.mean()), SUBSETS)
  link = next(link for link in conflict.links(study) if link.treatment == 'csba')
  assert link.gain == pytest.approx(by_hand(study, results.per_class_f1))
  assert (link.within.n, link.reduction.shape) == (SUBSETS, link.gain.shape)


def test_missing_values_are_left_out_of_the_mean_of_their_subset(study):
  units = [('grouped', 0, 0, seed) for seed in (0, 1, 5, 6, 10)]
  values = np.array([[1.0, np.nan], [2.0, np.nan], [np.nan, 5.0], [4.0, np.nan], [6.0, 7.0]])
  np.testing.assert_array_equal(study.by_subset(values, units), [[3.5, 6], [3, np.nan]])


def test_a_pair_of_which_one_misses_a_value_counts_on_neither_side(study):
  units = [('grouped', 0, 0, seed) for seed in (0, 1, 5, 6)]
  treated, control = np.array([1.0, 2.0, 3.0, np.nan]), np.array([np.nan, 4.0, 5.0, 6.0])
  found = study.paired(treated, control, units)
  np.testing.assert_array_equal(found, [[3.0, 2.0], [5.0, 4.0]])


@pytest.mark.parametrize('subsets', [1, SEEDS, SEEDS + 1])
def test_one_subset_for_all_or_one_for_each_seed_changes_nothing(tmp_path, subsets):
  same = with_subsets(tmp_path, subsets)
  values, units = np.arange(4.0), [('grouped', 0, 0, seed) for seed in range(4)]
  assert same.by_subset(values, units) is values
  assert same.units == 'seeds'
  (cell,) = same.main_cells
  assert comparisons.compare_outcome(same, cell, ('csba', 'none'), 'macro_f1').difference.n == SEEDS
  notes = ' '.join(findings.analyse(same.results, 499).notes)
  assert ('one subset of the training images' in notes) == (subsets == 1)
  assert 'the seeds share' not in notes


def test_every_part_of_a_report_counts_subsets(tmp_path):
  sizes = {'seeds': 12, 'methods': ('cross_entropy', 'balanced_softmax')}
  found = findings.analyse(with_subsets(tmp_path, 6, **sizes).results, 499)
  for group in (found.comparisons, found.offsets, found.conflict):
    assert {c.difference.n for c in group} == {6}
  assert {c.difference.n for c in found.noise} == {3}  # half of them against the other half
  assert {link.within.n for link in found.links} == {6}
  lines = [line for claim in found.claims for line in claim.sentences]
  assert any('6 subsets' in line for line in lines)
  assert not any(re.search(r'\d+ pairs? of (runs|seeds)', line) for line in lines)


def test_the_report_says_what_an_interval_counts(study):
  (line,) = (note for note in findings.analyse(study.results, 499).notes if 'share' in note)
  assert line == (
    'the seeds share 5 subsets of the training images: intervals and tests count subsets, each by '
    'the mean of its runs'
  )


FEW = (
  '5 subsets cannot support any comparison: the smallest p of 1 test is 0.062 after Holm; '
  'use 6 subsets'
)


def test_few_subsets_cannot_support_anything_however_many_seeds(study):
  assert FEW in findings.analyse(study.results, 499).notes
  c = grid.default()
  c.variants, c.seeds, c.subsets = ('none', 'csba'), 40, 5
  c.base.data.source, c.base.data.name = 'tfds', 'cifar10'
  c.base.model.name = 'multibranch'
  c.pairs = (('csba', 'none'),)
  assert planned.too_few_seeds(c, grid.runs(c)) == [FEW]
  c.subsets = 6
  assert planned.too_few_seeds(c, grid.runs(c)) == []
