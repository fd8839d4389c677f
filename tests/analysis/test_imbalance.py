"""Effects over imbalance factors: slopes against NumPy's polyfit, and the report on them."""

import copy
import runpy
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from csba_jax.analysis import findings, imbalance, stats, wording
from csba_jax.analysis.comparisons import Study
from csba_jax.report.study import content, figures, markdown, page
from csba_jax.study import results

simulated = types.SimpleNamespace(**runpy.run_path(Path(__file__).parents[1] / 'simulated.py'))
FACTORS = (10.0, 50.0, 200.0)
VARIANTS = ('none', 'none_wide', 'csba')


def made(factors=FACTORS, seeds=6, **options):
  """(study.json, records); macro-F1 of csba gains 0.02 with each factor, and noise of its own."""
  about, records = simulated.make(seeds=seeds, variants=VARIANTS, **options)
  rng, every = np.random.default_rng(0), []
  for i, factor in enumerate(factors):
    for record in copy.deepcopy(records):
      record['axes']['imbalance_factor'] = factor
      record['run'] += f'-if{factor:g}'
      record['result']['class_counts'] = [round(6 * factor), 20, 10, 6]
      gain = 0.02 * i if record['axes']['variant'] == 'csba' else 0
      record['result']['macro_f1'] += gain + 0.01 * rng.normal()
      every.append(record)
  return about, every


def read(about, records):
  return results.Results(about, tuple(records), (), ())


def trends(about, records):
  return imbalance.trends(Study(read(about, records), resamples=199))


def notes(about, records):
  return imbalance.left_out(Study(read(about, records), resamples=199))


def of_csba(about, records):
  (found,) = [c for c in trends(about, records) if (c.treatment, c.control) == ('csba', 'none')]
  return found


def slopes(records, treatment, control, factors=FACTORS, ratios=FACTORS):
  """By polyfit, seed by seed."""
  value = {
    (r['axes']['variant'], r['axes']['imbalance_factor'], r['axes']['seed']): r['result'][
      'macro_f1'
    ]
    for r in records
  }
  found = []
  for seed in sorted({seed for _, _, seed in value}):
    keys = [[(v, f, seed) for v in (treatment, control)] for f in factors]
    if all(key in value for pair in keys for key in pair):
      d = [value[a] - value[b] for a, b in keys]
      found.append(np.polyfit(np.log10(ratios), d, 1)[0])
  return np.array(found)


@pytest.fixture(scope='module')
def study():
  return made(methods=('cross_entropy', 'balanced_softmax'))


@pytest.fixture(scope='module')
def found():
  about, records = made(seeds=3, factors=FACTORS[:2], methods=('cross_entropy', 'balanced_softmax'))
  for record in records:  # the ratio is not always the factor
    if record['axes']['imbalance_factor'] == 50.0:
      record['result']['class_counts'] = [480, 20, 10, 6]
  return findings.analyse(read(about, records), resamples=99)


def test_slopes_are_those_of_a_line_over_the_logarithm(study):
  found = trends(*study)
  pairs = [(c.cell['method'], c.treatment, c.control) for c in found]
  assert sorted(pairs) == sorted(
    (method, *pair)
    for method in ('cross_entropy', 'balanced_softmax')
    for pair in (('csba', 'none'), ('csba', 'none_wide'), ('none_wide', 'none'))
  )
  for c in found:
    own = [r for r in study[1] if r['axes']['method'] == c.cell['method']]
    expected = slopes(own, c.treatment, c.control)
    assert c.difference.n == len(expected) == 6
    np.testing.assert_allclose(c.difference.value, expected.mean(), atol=1e-12)
    like = stats.paired_difference(expected, resamples=199)
    np.testing.assert_allclose([c.difference.low, c.difference.high], [like.low, like.high])
    assert c.difference.p == like.p
    assert 'imbalance_factor' not in c.cell
    assert c.verdict == ''
    assert np.isnan([c.treatment_mean, c.control_mean, c.adjusted_p]).all()


def test_units_that_lack_a_factor_are_left_out_and_named(study):
  about, records = study
  kept = [
    r
    for r in records
    if (r['axes']['variant'], r['axes']['seed'], r['axes']['imbalance_factor'])
    not in (('csba', 1, 50.0), ('none', 2, 200.0))
  ]
  for c in trends(about, kept):
    own = [r for r in kept if r['axes']['method'] == c.cell['method']]
    expected = slopes(own, c.treatment, c.control)
    assert c.difference.n == len(expected) < 6
    np.testing.assert_allclose(c.difference.value, expected.mean(), atol=1e-12)
  assert notes(about, kept) == [
    f'effect against the imbalance: {pair}, which not every factor has'
    for pair in (
      'csba against none without seed 1, seed 2',
      'csba against none_wide without seed 1',
      'none_wide against none without seed 2',
    )
  ]


def test_a_pair_that_misses_a_factor_has_no_slope(study):
  about, records = study
  kept = [
    r
    for r in records
    if (r['axes']['variant'], r['axes']['imbalance_factor']) != ('none_wide', 10.0)
  ]
  pairs = {(c.treatment, c.control) for c in trends(about, kept)}
  assert pairs == {('csba', 'none')}
  assert notes(about, kept) == [
    f'effect against the imbalance: {pair} is left out, no seed has runs of both at every factor'
    for pair in ('csba against none_wide', 'none_wide against none')
  ]


def test_a_unit_without_an_outcome_does_not_count(study):
  about, records = copy.deepcopy(study)
  for record in records:
    if (record['axes']['seed'], record['axes']['imbalance_factor']) == (3, 50.0):
      record['result']['macro_f1'] = None
  for c in trends(about, records):
    own = [r for r in records if r['axes']['method'] == c.cell['method'] and r['axes']['seed'] != 3]
    assert c.difference.n == 5
    expected = slopes(own, c.treatment, c.control)
    np.testing.assert_allclose(c.difference.value, expected.mean(), atol=1e-12)


def test_factors_may_come_in_any_order(study):
  about, records = study
  found, turned = trends(about, records), trends(about, records[::-1])
  for c in found:
    (same,) = [
      d
      for d in turned
      if (d.treatment, d.control, d.cell['method']) == (c.treatment, c.control, c.cell['method'])
    ]
    np.testing.assert_allclose(same.difference.value, c.difference.value, atol=1e-12)


def test_a_slope_over_less_than_a_tenfold_ratio_may_be_above_one():
  about, records = made(factors=(10.0, 20.0), seeds=3, redrawn=True)
  for record in records:
    if record['axes']['variant'] == 'csba' and record['axes']['imbalance_factor'] == 20.0:
      record['result']['macro_f1'] += 0.5
  c = of_csba(about, records)
  assert c.difference.value > 1
  assert c.difference.high > 1
  assert c.uncorrected.value > 1
  assert c.uncorrected.high > 1


def test_of_folds_the_grouped_ones_decide():
  about, records = made(factors=FACTORS[:2], seeds=1, folds=3, leak=0.1)
  grouped = [r for r in records if r['axes']['split'] == 'grouped']
  assert len(grouped) < len(records)
  c, alone = of_csba(about, records), of_csba(about, grouped)
  assert c.difference == alone.difference
  assert c.difference.method.startswith('corrected resampled t')


def test_runs_on_one_subset_count_once():
  about, records = made()
  for record in records:
    record['config'].setdefault('data', {})['seed'] = record['axes']['seed'] // 2
  c = of_csba(about, records)
  by_seed = slopes(records, 'csba', 'none')
  by_subset = by_seed.reshape(3, 2).mean(1)
  assert c.difference.n == 3
  np.testing.assert_allclose(c.difference.value, by_subset.mean(), atol=1e-12)


def test_seeds_that_redraw_one_set_have_the_corrected_interval():
  about, records = made(redrawn=True)
  c = of_csba(about, records)
  expected = slopes(records, 'csba', 'none')
  error = np.sqrt((1 / 6 + 0.3 / 0.7) * expected.var(ddof=1))
  low, high = scipy.stats.t.interval(0.95, 5, expected.mean(), error)
  np.testing.assert_allclose([c.difference.low, c.difference.high], [low, high], atol=1e-9)
  assert c.uncorrected.method.startswith('exact bootstrap-t')


def test_the_ratio_is_that_of_the_images_and_not_the_factor(study):
  """A factor of 1 leaves the images as they are, here 3:1."""
  about, records = copy.deepcopy(study)
  for record in records:
    if record['axes']['imbalance_factor'] == 10.0:
      record['axes']['imbalance_factor'] = 1.0
      record['result']['class_counts'] = [300, 200, 150, 100]
  for c in trends(about, records):
    own = [r for r in records if r['axes']['method'] == c.cell['method']]
    expected = slopes(own, c.treatment, c.control, (1.0, 50.0, 200.0), (3.0, 50.0, 200.0))
    np.testing.assert_allclose(c.difference.value, expected.mean(), atol=1e-12)


@pytest.mark.parametrize(
  ('counts', 'why'),
  [
    ([60, 50, 40, 6], 'the factors leave the classes nearly the same numbers of images'),
    ([60, 50, 40, 0], 'a class has no training images at one of the factors'),
  ],
)
def test_without_two_ratios_there_is_no_slope(study, counts, why):
  about, records = copy.deepcopy(study)
  for record in records:
    if record['axes']['imbalance_factor'] == 10.0 or counts[-1]:
      more = round(record['axes']['imbalance_factor'] / 100)  # 60 to 62 images
      record['result']['class_counts'] = [counts[0] + more, *counts[1:]]
  assert trends(about, records) == ()
  assert notes(about, records)[0] == (
    f'effect against the imbalance: csba against none is left out, {why}'
  )


def test_one_factor_has_no_such_section():
  about, records = made(factors=(10.0,), seeds=2)
  one = findings.analyse(read(about, records), resamples=99)
  assert one.trends == ()
  assert 'imbalance' not in [section.anchor for section in content.sections(one)]


def test_the_reports_show_them(found):
  text = markdown.render(found)
  part = text.partition('## Effect against imbalance')[2].partition('\n## ')[0]
  assert 'while the ratio grows tenfold' in ' '.join(part.split())
  assert len(found.trends) == 6
  for c in found.trends:
    assert wording.interval(c.difference, signed=True) in part
  family = {(c.treatment, c.control) for c in found.trends}
  shown = [c for c in found.comparisons if (c.treatment, c.control) in family]
  assert len(shown) == 12
  rows = [[word.strip() for word in line.split('|')[1:-1]] for line in part.splitlines()]
  for c in shown:
    factor = c.cell['imbalance_factor']
    numbers = [f'{factor:g}', {10.0: '10', 50.0: '80'}[factor]]
    interval = wording.interval(c.difference, signed=True, limits=c.limits)
    assert [*numbers, wording.versus(c), interval] in rows
  html = page.render(found)
  for method in ('balanced softmax', 'cross entropy'):
    assert f'Differences of macro-F1 by imbalance, {method}' in html


def test_the_figure_has_a_row_for_each_factor(found):
  (drawn,) = figures.over_factors(found, found.comparisons, title='x', axis='y')
  rows = [drawn.index(f'>imbalance factor {words}<') for words in ('10 (10:1)', '50 (80:1)')]
  assert rows == sorted(rows)
