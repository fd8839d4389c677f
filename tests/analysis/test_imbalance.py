"""Effects over imbalance factors: slopes against NumPy's polyfit, and the report on them."""

import copy
import runpy
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from csba_jax.analysis import findings, imbalance, wording
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
  return findings.analyse(read(*made(seeds=3, factors=FACTORS[:2])), resamples=99)


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
    low, high = scipy.stats.t.interval(0.95, 5, expected.mean(), scipy.stats.sem(expected))
    assert c.difference.low == pytest.approx(low, abs=high - low)  # a bootstrap-t, not that t
    assert c.difference.low < expected.mean() < c.difference.high
    assert 'imbalance_factor' not in c.cell
    assert c.verdict == ''
    assert np.isnan([c.treatment_mean, c.control_mean, c.adjusted_p]).all()


def test_units_that_lack_a_factor_are_left_out(study):
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


def test_a_pair_that_misses_a_factor_has_no_slope(study):
  about, records = study
  kept = [
    r
    for r in records
    if (r['axes']['variant'], r['axes']['imbalance_factor']) != ('none_wide', 10.0)
  ]
  pairs = {(c.treatment, c.control) for c in trends(about, kept)}
  assert pairs == {('csba', 'none')}


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


@pytest.mark.parametrize('smallest', [0, 6])
def test_without_two_ratios_there_is_no_slope(study, smallest):
  about, records = copy.deepcopy(study)
  for record in records:
    record['result']['class_counts'] = [60, 50, 40, smallest]
  assert trends(about, records) == ()


def test_one_factor_has_no_such_section():
  about, records = made(factors=(10.0,), seeds=2)
  one = findings.analyse(read(about, records), resamples=99)
  assert one.trends == ()
  assert 'imbalance' not in [section.anchor for section in content.sections(one)]


def test_the_reports_show_them(found):
  text = markdown.render(found)
  part = text.partition('## Effect against imbalance')[2].partition('\n## ')[0]
  assert 'Change of the difference of macro-F1 with each tenfold ratio of the largest' in (
    ' '.join(part.split())
  )
  assert len(found.trends) == 3
  for c in found.trends:
    assert f'{c.treatment} − {c.control}' in part
    assert wording.interval(c.difference, signed=True) in part
  assert 'Differences of macro-F1 by imbalance' in page.render(found)


def test_the_figure_has_a_row_for_each_factor(found):
  (drawn,) = figures.over_factors(found, found.comparisons, title='x', axis='y')
  rows = [drawn.index(f'>imbalance factor {factor:g} ({factor:g}:1)<') for factor in FACTORS[:2]]
  assert rows == sorted(rows)
