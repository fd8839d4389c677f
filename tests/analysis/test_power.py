"""Power by simulation: against the noncentral t, its size, and what makes it larger."""

import numpy as np
import pytest
import scipy.stats

from csba_jax.analysis import stats
from csba_jax.analysis.power import power
from csba_jax.errors import UserError


def by_theory(effect, deviation, pairs, inflation=1.0):
  """Power of a two-sided t test at 5 %, in the direction of the effect.

  inflation: by how much shared images raise the variance of the mean, which the test knows.
  """
  limit = scipy.stats.t.ppf(0.975, pairs - 1)
  shift = effect / deviation * np.sqrt(pairs / inflation)
  return scipy.stats.nct.sf(limit, pairs - 1, shift)


@pytest.mark.parametrize(('effect', 'pairs'), [(0.02, 10), (0.03, 10), (0.03, 7)])
def test_one_comparison_has_about_the_power_of_a_t_test(effect, pairs):
  found = power(effect, 0.03, pairs, draws=600)
  assert found == pytest.approx(by_theory(effect, 0.03, pairs), abs=0.07)


def test_without_an_effect_a_gain_is_found_in_a_fortieth():
  for ratio in (None, 0.25):
    found = power(0.0, 0.03, 8, test_to_rest=ratio, draws=2000)
    assert found == pytest.approx(0.025, abs=4 * np.sqrt(0.025 / 2000))


def test_the_deviation_is_the_one_that_differences_show(monkeypatch):
  seen = []
  monkeypatch.setattr(stats, 'corrected_resampled_t', lambda d, _: seen.append(d) or Zero())
  power(0.0, 0.05, 50, test_to_rest=0.4, draws=200)
  assert np.mean([d.std(ddof=1) for d in seen]) == pytest.approx(0.05, rel=0.03)
  assert np.std([d.mean() for d in seen]) == pytest.approx(0.05 * np.sqrt(1 / 50 + 0.4), rel=0.2)


class Zero:
  """An estimate that finds nothing."""

  p = 1.0


@pytest.mark.parametrize('family', [4, 40])
def test_a_family_divides_the_level_at_first(family):
  # others have no effect, so that Holm asks p < 0.05 / family of the first, about
  found = power(0.03, 0.03, 15, family, draws=300)
  limit = scipy.stats.t.ppf(1 - 0.025 / family, 14)
  assert found == pytest.approx(scipy.stats.nct.sf(limit, 14, np.sqrt(15)), abs=0.1)
  assert power(1.0, 0.01, 20, family, draws=20) == 1.0  # also of flips that are drawn


@pytest.mark.parametrize('ratio', [0.25, 3 / 7])
def test_shared_images_cost_what_the_corrected_t_test_says(ratio):
  pairs = 10
  inflation = 1 + pairs * ratio  # of the variance of the mean, s^2 / n
  found = power(0.08, 0.05, pairs, test_to_rest=ratio, draws=600)
  assert found == pytest.approx(by_theory(0.08, 0.05, pairs, inflation), abs=0.07)
  assert found < power(0.08, 0.05, pairs, draws=600)


def test_it_grows_with_effect_and_pairs_and_falls_with_the_family():
  by_effect = [power(effect, 0.03, 8, draws=300) for effect in (0.01, 0.03, 0.06)]
  by_pairs = [power(0.02, 0.03, pairs, draws=300) for pairs in (6, 9, 14)]
  by_family = [power(0.03, 0.03, 9, family, draws=300) for family in (8, 2, 1)]
  for found in (by_effect, by_pairs, by_family):
    assert found == sorted(found)
    assert found[0] < found[-1] - 0.2


def test_too_few_pairs_find_nothing():
  assert power(1.0, 0.01, 5, draws=20) == 0.0  # p is never below 2 / 2^5
  assert power(1.0, 0.01, 6, draws=20) == 1.0
  assert power(1.0, 0.01, 6, family=2, draws=20) == 0.0


@pytest.mark.parametrize(
  ('changes', 'found'),
  [
    ({'deviation': 0.0}, '0.02, 0, 10, 1 and 1000'),
    ({'deviation': float('nan')}, '0.02, nan, 10, 1 and 1000'),
    ({'deviation': float('inf')}, '0.02, inf, 10, 1 and 1000'),
    ({'effect': float('nan')}, 'nan, 0.03, 10, 1 and 1000'),
    ({'pairs': 1}, '0.02, 0.03, 1, 1 and 1000'),
    ({'family': 0}, '0.02, 0.03, 10, 0 and 1000'),
    ({'draws': 0}, '0.02, 0.03, 10, 1 and 0'),
  ],
)
def test_arguments_out_of_range(changes, found):
  with pytest.raises(UserError) as error:
    power(**{'effect': 0.02, 'deviation': 0.03, 'pairs': 10} | changes)
  assert str(error.value) == (
    'expected a finite effect, a finite deviation > 0, pairs >= 2, family >= 1 and draws >= 1; '
    f'found {found}; to fix it: correct them'
  )


def test_the_same_seed_gives_the_same_number():
  assert power(0.02, 0.03, 8, draws=50) == power(0.02, 0.03, 8, draws=50)
  assert len({power(0.02, 0.03, 8, draws=50, seed=seed) for seed in range(4)}) > 1
