"""Estimates against slow references and hand-worked numbers; size, power and coverage simulated."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from csba_jax.analysis import ranks, resampling, stats
from csba_jax.errors import UserError

DIFFERENCES = np.array([0.8, -0.3, 1.9, 0.4, 1.1, 0.2, 2.5, -0.7, 0.9, 1.4])


@pytest.fixture
def drawn_at_random(monkeypatch):
  """As for many units: simulations of hundreds of samples cannot enumerate the cases of each."""
  resampling.multisets.cache_clear()
  monkeypatch.setattr(resampling, 'MOST_CASES', 1000)
  monkeypatch.setattr(resampling, 'MOST_ORDERED', 1)
  yield
  resampling.multisets.cache_clear()


def within(rejected, expected, tail=1e-4):
  """Whether so many rejections are what a rate of `expected` gives, up to a chance of 2 tails."""
  low, high = scipy.stats.binom.ppf([tail, 1 - tail], len(rejected), expected)
  return low <= np.sum(rejected) <= high


def two_sided(null, observed):
  """Twice the smaller tail, with room for rounding."""
  null = np.asarray(null)
  return min(1, 2 * min(np.mean(null >= observed - 1e-9), np.mean(null <= observed + 1e-9)))


def mean_spearman(x, y):
  return np.mean([scipy.stats.spearmanr(a, b).statistic for a, b in zip(x.T, y.T, strict=True)])


def symmetric(rng, classes):
  m = rng.normal(size=(classes, classes))
  return m + m.T


def seeds_and_classes(seed, seeds, classes, r=0.0, shared=0.5):
  """Two [S, C] normal arrays that correlate by r, their classes by `shared`."""
  rng = np.random.default_rng(seed)

  def draw():
    common, own = rng.normal(size=(seeds, 1)), rng.normal(size=(seeds, classes))
    return math.sqrt(shared) * common + math.sqrt(1 - shared) * own

  x = draw()
  return x, r * x + math.sqrt(1 - r * r) * draw()


# Estimate


def test_an_estimate_without_an_interval_excludes_nothing():
  unknown = stats.Estimate(3.0, math.nan, math.nan, 0.95, 1, math.nan, '')
  assert not unknown.known
  assert not unknown.excludes(0)
  known = stats.Estimate(3.0, 1.0, 5.0, 0.95, 9, 0.01, '')
  assert known.known
  assert [known.excludes(x) for x in (0, 1, 3, 5, 6)] == [True, False, False, False, True]


def test_cutting_an_interval_leaves_all_else():
  whole = stats.Estimate(0.1, -0.2, 1.3, 0.95, 9, 0.01, 'words')
  assert whole.cut(0, 1) == stats.Estimate(0.1, 0.0, 1.0, 0.95, 9, 0.01, 'words')
  assert whole.cut(-1, 2) == whole
  assert not stats.Estimate(0.1, math.nan, math.nan, 0.95, 1, math.nan, '').cut(0, 1).known


def test_cut_intervals_cover_as_often():
  rng = np.random.default_rng(0)
  shares = rng.beta(0.3, 1.2, (500, 5))  # mean 0.2
  found = [stats.corrected_resampled_t(row, 0.25) for row in shares]
  assert any(e.low < 0 for e in found)
  assert [e.excludes(0.2) for e in found] == [e.cut(0, 1).excludes(0.2) for e in found]


# paired_difference


@pytest.mark.parametrize('n', [4, 7, 10])
def test_the_sign_flip_p_is_that_of_the_loop_over_all_signs(n):
  d = DIFFERENCES[:n]
  null = [np.mean(d * signs) for signs in itertools.product([-1, 1], repeat=n)]
  p = stats.paired_difference(d, resamples=99).p
  assert p == pytest.approx(two_sided(null, d.mean()), rel=1e-12)
  scipys = scipy.stats.permutation_test((d,), np.mean, permutation_type='samples')
  assert p == pytest.approx(scipys.pvalue, rel=1e-12)


@pytest.mark.parametrize(
  'd', [[0.1, 0.2, -0.3], [0.1, 0.2, 0.3, -0.6], [0.7, 0.1, -0.8, 0.3, -0.3], [0.1] * 3 + [-0.3]]
)
def test_sign_flip_p_of_a_mean_of_0_is_1(d):
  """The sums of these differ from 0 and from each other by rounding."""
  assert stats.paired_difference(np.array(d)).p == 1
  assert stats.paired_difference(1e-6 * np.array(d)).p == 1


def test_many_units_are_flipped_at_random(drawn_at_random):
  exact = scipy.stats.permutation_test((DIFFERENCES,), np.mean, permutation_type='samples').pvalue
  p = stats.paired_difference(DIFFERENCES, resamples=20_000).p
  assert p != exact
  assert p == pytest.approx(exact, abs=0.01)


def bootstrap_samples(n):
  """Every multiset of n units with n! / prod k! / n^n."""
  for drawn in itertools.combinations_with_replacement(range(n), n):
    times = map(math.factorial, np.bincount(drawn).tolist())
    yield drawn, math.factorial(n) / math.prod(times) / n**n


def spread(values, chances):
  """Standard deviation of values that are not equally probable."""
  chances = np.array(chances) / np.sum(chances)
  return math.sqrt(chances @ (values - chances @ np.array(values)) ** 2)


def exact_bootstrap_t(d, level):
  """(low, high): every multiset by a loop, with n! / prod k! / n^n, and its quantiles of t."""
  n, found = len(d), []
  for drawn, chance in bootstrap_samples(n):
    sample, gap = d[list(drawn)], d[list(drawn)].mean() - d.mean()
    error = sample.std(ddof=1) / math.sqrt(n)
    unbounded = math.copysign(math.inf, gap) if abs(gap) > 1e-12 else 0.0
    found.append((gap / error if error > 1e-12 else unbounded, chance))
  assert math.fsum(chance for _, chance in found) == pytest.approx(1)

  def quantile(sign):
    total = 0.0
    for t, chance in sorted((sign * t, chance) for t, chance in found):
      total += chance
      if total >= (1 - level) / 2:
        return sign * t

  return d.mean() - np.array([quantile(-1), quantile(1)]) * scipy.stats.sem(d)


@pytest.mark.parametrize(('n', 'level'), [(4, 0.95), (5, 0.9), (6, 0.95)])
def test_of_few_units_all_bootstrap_samples_are_taken(n, level):
  d = DIFFERENCES[:n]
  e = stats.paired_difference(d, level, resamples=99)
  assert (e.low, e.high) == pytest.approx(exact_bootstrap_t(d, level), rel=1e-9)
  assert e.method == f'exact bootstrap-t over {n} seeds'
  other = stats.paired_difference(d, level, seed=1)
  assert (other.low, other.high) == (e.low, e.high)


def test_the_interval_is_bootstrap_t(drawn_at_random):
  """Its own draws: equal up to the error of 20,000 resamples."""
  rng, d = np.random.default_rng(7), DIFFERENCES
  drawn = rng.choice(d, (20_000, len(d)))
  drawn = drawn[np.ptp(drawn, axis=1) > 0]
  t = (drawn.mean(1) - d.mean()) / scipy.stats.sem(drawn, axis=1)
  expected = d.mean() - np.quantile(t, [0.975, 0.025]) * scipy.stats.sem(d)
  e = stats.paired_difference(d, resamples=20_000)
  assert (e.low, e.high) == pytest.approx(expected, abs=0.06 * (e.high - e.low))
  assert e.value == pytest.approx(d.mean(), rel=1e-12)
  assert (e.n, e.level, e.method) == (10, 0.95, 'bootstrap-t over 10 seeds')
  wide = stats.paired_difference(d, level=0.99)
  assert wide.low < e.low < e.value < e.high < wide.high
  assert wide.level == 0.99


@pytest.mark.parametrize('resamples', [99, 1001, 9999])
def test_flipped_signs_flip_the_interval_and_keep_p(resamples):
  e = stats.paired_difference(DIFFERENCES, resamples=resamples)
  flipped = stats.paired_difference(-DIFFERENCES, resamples=resamples)
  assert (flipped.low, flipped.high) == pytest.approx((-e.high, -e.low), rel=1e-9)
  assert flipped.value == -e.value
  if resamples > 2**10:
    assert flipped.p == e.p
  # a resample of one seed n times whose value is the mean belongs to neither tail
  e, flipped = (
    stats.paired_difference(s * np.arange(-2.0, 3.0), resamples=resamples) for s in (1, -1)
  )
  assert (flipped.low, flipped.high) == pytest.approx((-e.high, -e.low), rel=1e-9)


def test_scale_scales_and_shift_shifts_the_interval():
  e = stats.paired_difference(DIFFERENCES)
  other = stats.paired_difference(100 * DIFFERENCES + 7)
  assert (other.low, other.high) == pytest.approx((100 * e.low + 7, 100 * e.high + 7), rel=1e-9)
  assert stats.paired_difference(100 * DIFFERENCES).p == e.p


def test_the_same_seed_gives_the_same_answer_and_another_one_a_close_one():
  d = np.random.default_rng(0).normal(0.2, 1, 20)  # 2^20 flips: p is random as well
  first, again, other = (stats.paired_difference(d, seed=s) for s in (1, 1, 2))
  assert first == again
  assert (first.low, first.p) != (other.low, other.p)
  assert first.low == pytest.approx(other.low, abs=0.05)
  assert first.p == pytest.approx(other.p, abs=0.03)


def test_nan_differences_are_left_out_and_counted():
  e = stats.paired_difference([*DIFFERENCES, math.nan, math.nan])
  clean = stats.paired_difference(DIFFERENCES)
  assert e.method == 'exact bootstrap-t over 10 seeds (2 NaN left out)'
  assert (e.value, e.low, e.high, e.n, e.p) == (clean.value, clean.low, clean.high, 10, clean.p)


@pytest.mark.parametrize(
  ('differences', 'value', 'method'),
  [
    ([], math.nan, 'no interval: 0 units'),
    ([2.0], 2.0, 'no interval: 1 unit'),
    ([math.nan, 2.0], 2.0, 'no interval: 1 unit (1 NaN left out)'),
  ],
)
def test_fewer_than_two_units_have_no_interval(differences, value, method):
  for e in (stats.paired_difference(differences), stats.corrected_resampled_t(differences, 0.25)):
    assert e.value == pytest.approx(value, nan_ok=True)
    assert math.isnan(e.low)
    assert math.isnan(e.high)
    assert math.isnan(e.p)
    assert e.method == method
    assert not e.known


@pytest.mark.parametrize(('v', 'p'), [(0.0, 1.0), (0.3, 2 / 2**6), (-0.3, 2 / 2**6)])
def test_identical_differences_have_no_interval(v, p):
  e = stats.paired_difference([v] * 6)
  assert (e.value, e.p) == pytest.approx((v, p), rel=1e-12)
  assert not e.known
  assert e.method == 'no interval: identical differences over 6 seeds'


def test_identical_differences_are_not_non_inferior():
  for ratio in (None, 0.25):
    e = stats.non_inferiority([0.0] * 6, 0.02, ratio)
    assert e.value == 0
    assert not stats.is_non_inferior(e, 0.02)


ALMOST_TIED = [0.1, 0.1 + 2**-56, 0.1 + 2**-55, 0.1 - 2**-56, 1.0]  # 0.1 but for rounding


@pytest.mark.parametrize('d', [[1.0, 2.0], [1, 2, 4], [0, 0, 0, 0, 1], ALMOST_TIED])
def test_where_bootstrap_t_is_unbounded_the_t_interval_takes_its_place(d):
  e = stats.paired_difference(d)
  expected = scipy.stats.t.interval(0.95, len(d) - 1, np.mean(d), scipy.stats.sem(d))
  assert (e.low, e.high) == pytest.approx(expected, rel=1e-12)
  assert e.method == f't interval (bootstrap-t unbounded) over {len(d)} seeds'


@pytest.mark.parametrize('skewed', [False, True])
@pytest.mark.parametrize(('n', 'bca'), [(5, 0.83), (10, 0.90)])
def test_the_interval_covers_where_bca_does_not(n, bca, skewed, drawn_at_random):
  """BCa covers 83 % and 79 % at n = 5, 89 % and 88 % at n = 10."""
  rng = np.random.default_rng(n)
  draws = rng.exponential(size=(1000, n)) - 1 if skewed else rng.normal(size=(1000, n))
  covered = [low <= 0 <= high for low, high, _ in (stats._interval(d, 0.95, 0, 999) for d in draws)]
  assert np.mean(covered) > max(0.91, bca + 0.025)
  assert np.mean(covered) < 0.98


def test_paired_difference_has_its_size_and_power(drawn_at_random):
  rng = np.random.default_rng(3)
  null = [stats.paired_difference(d, resamples=1999) for d in rng.normal(size=(400, 10))]
  assert within([e.p <= 0.05 for e in null], 0.05)
  assert within([e.excludes(0) for e in null], 0.05)
  effect = [stats.paired_difference(d, resamples=1999) for d in rng.normal(1.5, 1, (100, 10))]
  assert np.mean([e.p <= 0.05 for e in effect]) > 0.9
  assert np.mean([e.excludes(0) for e in effect]) > 0.88


# corrected_resampled_t


def test_corrected_t_by_hand():
  """Mean 2, variance 10 / 4 = 2.5, error sqrt((1 / 5 + 1 / 4) 2.5) = 1.0607, t = 1.8856, 4 df."""
  e = stats.corrected_resampled_t([0, 1, 2, 3, 4], 0.25)
  assert e.value == 2
  # t_4(0.975) = 2.7764; the tail of t_4 is elementary: 1/2 - x (3 - x^2) / 4, x = t / sqrt(4 + t^2)
  x = 1.885618 / math.sqrt(4 + 1.885618**2)
  assert e.p == pytest.approx(2 * (0.5 - x * (3 - x**2) / 4), abs=1e-6)
  assert (e.low, e.high) == pytest.approx(
    (2 - 2.776445 * 1.060660, 2 + 2.776445 * 1.060660), abs=1e-5
  )
  assert (e.n, e.method) == (5, 'corrected resampled t over 5 folds')


def test_corrected_t_nears_the_plain_t_test_without_overlap():
  e = stats.corrected_resampled_t(DIFFERENCES, 1e-12)
  plain = scipy.stats.ttest_1samp(DIFFERENCES, 0)
  assert e.p == pytest.approx(plain.pvalue, rel=1e-6)
  interval = plain.confidence_interval(0.95)
  assert (e.low, e.high) == pytest.approx((interval.low, interval.high), rel=1e-6)
  flipped = stats.corrected_resampled_t(-DIFFERENCES, 1e-12)
  assert (flipped.low, flipped.high, flipped.p) == pytest.approx((-e.high, -e.low, e.p), rel=1e-12)


def test_corrected_t_of_folds_without_spread():
  zero = stats.corrected_resampled_t([0.0] * 5, 0.25)
  assert (zero.value, zero.known, zero.p) == (0, False, 1)
  same = stats.corrected_resampled_t([0.1 + 0.2, 0.3, 0.3, math.nan], 0.25)
  assert same.value == pytest.approx(0.3)
  assert not same.known
  assert math.isnan(same.p)
  assert same.method == 'no interval: identical differences over 3 folds (1 NaN left out)'
  seeds = stats.corrected_resampled_t([0.0, 0.1], 0.25, units='seeds')
  assert seeds.method == 'corrected resampled t over 2 seeds'


def cross_validated(rng, tasks, gap=0.0, n=100, repeats=3, folds=5):
  """[tasks, repeats * folds] differences of test error of two least-squares fits.

  Model k sees feature k only; gap = 0 makes them equally good on average.
  """
  x = rng.normal(size=(2, tasks, n))
  y = (1 + gap) * x[0] + (1 - gap) * x[1] + rng.normal(size=(tasks, n))
  differences = []
  for _ in range(repeats):
    for test in rng.permutation(n).reshape(folds, -1):
      train = np.setdiff1d(np.arange(n), test)
      slope = (x[..., train] * y[:, train]).sum(-1) / (x[..., train] ** 2).sum(-1)
      error = ((y[:, test] - slope[..., None] * x[..., test]) ** 2).mean(-1)
      differences.append(error[1] - error[0])
  return np.stack(differences, 1)


def test_corrected_t_holds_its_size_under_cross_validation_where_the_plain_one_does_not():
  rng = np.random.default_rng(11)
  null = cross_validated(rng, 500)
  plain = scipy.stats.ttest_1samp(null, 0, axis=1).pvalue <= 0.05
  corrected = [stats.corrected_resampled_t(d, 0.25).p <= 0.05 for d in null]
  assert np.mean(plain) > 0.2
  assert 0.01 < np.mean(corrected) < 0.08
  effect = cross_validated(rng, 200, gap=0.4)
  assert np.mean([stats.corrected_resampled_t(d, 0.25).p <= 0.05 for d in effect]) > 0.85


# holm


def test_holm_known_example():
  # 4 x 0.005, 3 x 0.01, 2 x 0.03, then 1 x 0.04 raised to the one before
  assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize('seed', range(5))
def test_holm_rejects_what_the_step_down_loop_rejects(seed):
  p = np.round(np.random.default_rng(seed).uniform(size=9) ** 3, 2)  # with ties
  adjusted = stats.holm(p)
  for alpha in np.linspace(0.003, 0.997, 200):
    remaining, rejected = list(range(9)), set()
    while remaining:
      smallest = min(remaining, key=lambda i: p[i])
      if p[smallest] * len(remaining) > alpha:
        break
      rejected.add(smallest)
      remaining.remove(smallest)
    assert set(np.flatnonzero(adjusted <= alpha)) == rejected


def test_holm_does_not_count_nan_and_ignores_order():
  p = np.array([0.01, math.nan, 0.04, 0.03])
  adjusted = stats.holm(p)
  assert math.isnan(adjusted[1])
  np.testing.assert_allclose(adjusted[[0, 2, 3]], stats.holm(p[[0, 2, 3]]))
  np.testing.assert_allclose(stats.holm(p[::-1]), adjusted[::-1])
  assert stats.holm([]).shape == (0,)
  assert stats.holm([0.6, 0.9]).tolist() == [1, 1]
  assert np.isnan(stats.holm([math.nan])).all()


# non_inferiority


def test_non_inferiority_is_the_lower_end_of_the_90_percent_interval():
  over_seeds = stats.non_inferiority(DIFFERENCES - 1, 0.5)
  same = stats.paired_difference(DIFFERENCES - 1, level=0.9)
  assert (over_seeds.low, over_seeds.high, over_seeds.p) == (same.low, same.high, same.p)
  assert over_seeds.method == 'exact bootstrap-t over 10 seeds, margin 0.5'
  over_folds = stats.non_inferiority(DIFFERENCES - 1, 0.5, test_to_rest=0.25)
  same = stats.corrected_resampled_t(DIFFERENCES - 1, 0.25, level=0.9)
  assert (over_folds.low, over_folds.high, over_folds.p) == (same.low, same.high, same.p)
  for e in (over_seeds, over_folds):
    assert e.level == 0.9
    assert stats.is_non_inferior(e, -e.low + 1e-9)
    assert not stats.is_non_inferior(e, -e.low)


def test_non_inferiority_is_not_shown_without_an_interval_and_is_5_percent_at_the_margin(
  drawn_at_random,
):
  assert not stats.is_non_inferior(stats.non_inferiority([1.0], 100), 100)
  draws = np.random.default_rng(8).normal(-1, 1, (500, 10))
  yes = [stats.is_non_inferior(stats.non_inferiority(d, 1.0, resamples=999), 1.0) for d in draws]
  assert within(yes, 0.05)


# association


@pytest.mark.parametrize('ties', [False, True])
def test_association_is_brute_force(ties):
  x, y = seeds_and_classes(0, 5, 3, r=0.5)
  if ties:
    x, y = np.round(2 * x), np.round(2 * y)
  e = stats.association(x, y)
  null = [mean_spearman(x, y[list(order)]) for order in itertools.permutations(range(5))]
  assert e.value == pytest.approx(mean_spearman(x, y), abs=1e-12)
  assert e.p == pytest.approx(two_sided(null, e.value), abs=1e-12)
  assert (e.n, e.method) == (5, 'Spearman over 5 units within class, mean of 3 of 3 classes')


def test_the_interval_of_association_is_that_of_resampled_seeds():
  x, y = seeds_and_classes(1, 8, 3, r=0.9)
  rng, z = np.random.default_rng(5), []
  for _ in range(1000):
    drawn = rng.integers(0, 8, 8)
    z.append(math.atanh(np.clip(mean_spearman(x[drawn], y[drawn]), -0.999, 0.999)))
  half = scipy.stats.t.ppf(0.975, 7) * np.std(z, ddof=1)
  centre = math.atanh(mean_spearman(x, y))
  e = stats.association(x, y)
  ends = [centre - half, centre + half]
  assert np.arctanh([e.low, e.high]) == pytest.approx(ends, abs=0.1 * half)


def test_the_interval_of_a_correlation_by_hand():
  """sd of -1 and 1, equally probable, is 1; t_4(0.975) = 2.776445."""
  drawn, chances = np.tanh([-1.0, 1.0, math.nan]), np.array([0.25, 0.25, 0.5])
  low, high, p = stats._z_interval(math.tanh(0.5), drawn, chances, 5)
  half = 2.776445
  assert (low, high) == pytest.approx((math.tanh(0.5 - half), math.tanh(0.5 + half)), abs=1e-6)
  assert p == pytest.approx(2 * scipy.stats.t.sf(0.5, 4))
  wide = stats._z_interval(math.tanh(0.5), drawn, chances, 5, test_to_rest=0.25)
  factor = math.sqrt(1 + 5 / 4)  # (1 / n + ratio) in place of 1 / n
  ends = math.tanh(0.5 - factor * half), math.tanh(0.5 + factor * half)
  assert wide == pytest.approx((*ends, 2 * scipy.stats.t.sf(0.5 / factor, 4)), abs=1e-6)


def test_random_permutations_come_from_the_seed():
  x, y = seeds_and_classes(1, 12, 10, r=0.2)
  assert stats.association(x, y, resamples=999) == stats.association(x, y, resamples=999)
  other = stats.association(x, y, seed=1, resamples=999)
  assert stats.association(x, y, resamples=999).p != other.p


@pytest.mark.parametrize('n', [4, 5, 7])
def test_sums_of_all_orders_are_those_of_the_loop(n):
  products = np.random.default_rng(n).normal(size=(n, n))
  found = np.concatenate([batch.ravel() for batch in resampling._sums_of_orders(products)])
  orders = itertools.permutations(range(n))
  assert np.sort(found) == pytest.approx(
    np.sort([sum(products[i, j] for i, j in enumerate(order)) for order in orders])
  )


def test_ten_units_have_all_their_orders():
  """A perfect correlation of ten ranks: it and its mirror image, of 10! orders."""
  x = np.arange(10.0)
  products = np.outer(ranks.unit_ranks(x), ranks.unit_ranks(x))
  assert resampling.order_p(products, 0, 99) == pytest.approx(2 / math.factorial(10))


@pytest.mark.parametrize('ties', [False, True])
def test_of_few_seeds_association_takes_all_bootstrap_samples(ties):
  x, y = seeds_and_classes(2, 5, 3, r=0.5)
  if ties:
    x, y = np.round(x), np.round(y)
  values, chances = [], []
  for drawn, chance in bootstrap_samples(5):
    own = [
      scipy.stats.spearmanr(a, b).statistic
      for a, b in zip(x[list(drawn)].T, y[list(drawn)].T, strict=True)
      if len(set(a)) > 1 and len(set(b)) > 1
    ]
    if own:
      values.append(math.atanh(np.clip(np.mean(own), -0.999, 0.999)))
      chances.append(chance)
  half = scipy.stats.t.ppf(0.975, 4) * spread(values, chances)
  e = stats.association(x, y, resamples=99)
  centre = math.atanh(e.value)
  assert (e.low, e.high) == pytest.approx(np.tanh([centre - half, centre + half]), abs=1e-9)
  corrected, plain = stats.associations(x, y, (0.25, None), resamples=99)
  assert plain == e
  assert corrected == stats.association(x, y, 0.25, resamples=99)
  half *= math.sqrt(1 + 5 * 0.25)
  ends = np.tanh([centre - half, centre + half])
  assert (corrected.low, corrected.high) == pytest.approx(ends, abs=1e-9)
  t = centre / (half / scipy.stats.t.ppf(0.975, 4))
  assert corrected.p == pytest.approx(2 * scipy.stats.t.sf(abs(t), 4), abs=1e-9)
  assert corrected.method == f'{e.method}, corrected for the overlap'


def test_across_classes_takes_all_bootstrap_samples():
  x, y = np.random.default_rng(3).normal(size=(2, 4, 6))
  values, chances = [], []
  for drawn, chance in bootstrap_samples(4):
    r = scipy.stats.spearmanr(x[list(drawn)].mean(0), y[list(drawn)].mean(0)).statistic
    values.append(math.atanh(np.clip(r, -0.999, 0.999)))
    chances.append(chance)
  half = scipy.stats.t.ppf(0.975, 3) * spread(values, chances)
  e = stats.across_classes(x, y, resamples=99)
  centre = math.atanh(e.value)
  assert (e.low, e.high) == pytest.approx(np.tanh([centre - half, centre + half]), abs=1e-9)


def test_association_sees_ranks_alone_and_no_names_of_classes():
  x, y = seeds_and_classes(2, 7, 4, r=0.4)
  e = stats.association(x, y)
  other = stats.association(np.exp(x) + 5, y * np.array([1, 10, 100, 3]))
  relabelled = stats.association(x[:, ::-1], y[:, ::-1])
  for same in (other, relabelled):
    assert (same.value, same.low, same.high, same.p) == pytest.approx(
      (e.value, e.low, e.high, e.p), rel=1e-9
    )
  negated = stats.association(x, -y)
  assert (negated.value, negated.low, negated.high, negated.p) == pytest.approx(
    (-e.value, -e.high, -e.low, e.p), rel=1e-9
  )


def test_association_leaves_out_failed_seeds_and_then_classes_without_rank():
  x, y = seeds_and_classes(3, 7, 5, r=0.4)
  spoilt_x, spoilt_y = x.copy(), y.copy()
  spoilt_x[:, 1], spoilt_y[:, 3], spoilt_y[2, 4] = 0.25, math.nan, math.nan
  spoilt_x = np.vstack([spoilt_x, np.full(5, math.nan)])
  spoilt_y = np.vstack([spoilt_y, np.ones(5)])
  e, clean = stats.association(spoilt_x, spoilt_y), stats.association(x[:, [0, 2]], y[:, [0, 2]])
  assert (e.value, e.low, e.p, e.n) == pytest.approx((clean.value, clean.low, clean.p, 7))
  assert e.method == 'Spearman over 7 units within class, mean of 2 of 5 classes'


def test_association_has_no_test_below_4_seeds_or_without_a_class():
  x, y = seeds_and_classes(4, 3, 5)
  three = stats.association(x, y)
  assert three.value == pytest.approx(mean_spearman(x, y))
  assert math.isnan(three.p)
  assert not three.known
  assert three.method.startswith('no test: Spearman over 3 units')
  for nothing in (np.ones((6, 2)), np.full((6, 2), math.nan), np.ones((1, 2)), np.ones((6, 0))):
    e = stats.association(nothing, nothing)
    assert math.isnan(e.value)
    assert math.isnan(e.p)
    assert e.method.startswith('no test')
  perfect = stats.association(np.arange(6.0)[:, None], np.arange(6.0)[:, None])
  assert perfect.value == pytest.approx(1)
  assert perfect.p == pytest.approx(2 / 720)
  assert not perfect.known


def test_association_has_its_size_and_power_with_dependent_classes(drawn_at_random):
  null = [
    stats.association(*seeds_and_classes(s, 8, 6, shared=0.7), resamples=199) for s in range(300)
  ]
  assert within([e.p <= 0.05 for e in null], 0.05)
  assert np.mean([e.excludes(0) for e in null]) < 0.09
  effect = [
    stats.association(*seeds_and_classes(s, 10, 6, r=0.7), resamples=199) for s in range(60)
  ]
  assert np.mean([e.p <= 0.05 for e in effect]) > 0.85
  assert np.mean([e.low <= 0.683 <= e.high for e in effect]) > 0.85  # 6 / pi asin(0.7 / 2)


# across_classes


def test_across_classes_is_brute_force():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(2, 4, 6))
  e = stats.across_classes(x, y)
  means_x, means_y = x.mean(0), y.mean(0)
  null = [
    scipy.stats.spearmanr(means_x, means_y[list(order)]).statistic
    for order in itertools.permutations(range(6))
  ]
  assert e.value == pytest.approx(scipy.stats.spearmanr(means_x, means_y).statistic, abs=1e-12)
  assert e.p == pytest.approx(two_sided(null, e.value), abs=1e-12)
  assert e.low < e.value < e.high
  assert (e.n, e.method) == (6, 'Spearman over 6 of 6 classes, means of 4 units')


def test_the_interval_across_classes_is_that_of_resampled_seeds():
  rng = np.random.default_rng(1)
  truth = np.arange(6.0)
  x, y = truth + rng.normal(0, 2, (2, 8, 6))
  z = []
  for _ in range(1000):
    drawn = rng.integers(0, 8, 8)
    r = scipy.stats.spearmanr(x[drawn].mean(0), y[drawn].mean(0)).statistic
    z.append(math.atanh(np.clip(r, -0.999, 0.999)))
  half = scipy.stats.t.ppf(0.975, 7) * np.std(z, ddof=1)
  centre = math.atanh(scipy.stats.spearmanr(x.mean(0), y.mean(0)).statistic)
  e = stats.across_classes(x, y)
  assert (e.low, e.high) == pytest.approx(np.tanh([centre - half, centre + half]), abs=0.05)


def test_across_classes_edges():
  x, y = seeds_and_classes(6, 5, 6)
  spoilt = y.copy()
  spoilt[1, 2] = math.nan
  kept = [0, 1, 3, 4, 5]
  e, clean = stats.across_classes(x, spoilt), stats.across_classes(x[:, kept], y[:, kept])
  assert (e.value, e.low, e.p, e.n) == (clean.value, clean.low, clean.p, 5)
  assert e.method == 'Spearman over 5 of 6 classes, means of 5 units'
  few = stats.across_classes(x[:, :3], y[:, :3])
  assert few.method.startswith('no test')
  assert math.isnan(few.p)
  assert not math.isnan(few.value)
  one = stats.across_classes(x[:1], y[:1])
  assert one.method.startswith('no interval')
  assert one.p == stats.across_classes(x[[0, 0, 0]], y[[0, 0, 0]]).p > 0
  assert not one.known
  assert math.isnan(stats.across_classes(np.ones((5, 6)), y).value)
  assert math.isnan(stats.across_classes(np.full((5, 6), math.nan), y).value)


# mantel


def mantel_by_loops(a, b):
  """(r, p): every order of the classes, pair by pair, spearmanr of what is there."""

  def r(order):
    pairs = [(a[i, j], b[order[i], order[j]]) for i, j in itertools.combinations(range(len(a)), 2)]
    pairs = [pair for pair in pairs if not np.isnan(pair).any()]
    if len(pairs) < 2:
      return math.nan
    return scipy.stats.spearmanr(*zip(*pairs, strict=True)).statistic

  orders = list(itertools.permutations(range(len(a))))
  null = [r(order) for order in orders]
  return null[0], two_sided(np.where(np.isnan(null), null[0], null), null[0])


@pytest.mark.parametrize('missing', [False, True])
def test_mantel_is_brute_force(missing):
  rng = np.random.default_rng(0)
  a, b = symmetric(rng, 5), np.round(symmetric(rng, 5))
  b = b + np.round(a)
  if missing:
    a[0, 3] = a[3, 0] = b[1, 2] = b[2, 1] = math.nan
  r, p = mantel_by_loops(a, b)
  e = stats.mantel(a, b)
  assert e.value == pytest.approx(r, abs=1e-12)
  assert e.p == pytest.approx(p, abs=1e-12)
  assert (e.n, e.method) == (5, 'Mantel, Spearman, 5 of 5 classes')
  assert not e.known


def test_an_order_without_a_correlation_counts_against_the_finding():
  a = np.full((5, 5), math.nan)
  for i, value in enumerate([0.3, 0.1, 0.7, 0.4]):
    a[i, i + 1] = a[i + 1, i] = value
  r, p = mantel_by_loops(a, a**2)
  e = stats.mantel(a, a**2)
  assert (e.value, e.p) == pytest.approx((r, p), abs=1e-12)
  assert e.p > 0.1


def test_mantel_ignores_names_of_classes_the_diagonal_scale_and_rounding():
  rng = np.random.default_rng(1)
  a, b = symmetric(rng, 6), symmetric(rng, 6)
  e = stats.mantel(a, b)
  order = rng.permutation(6)
  for same in (
    stats.mantel(a[np.ix_(order, order)], b[np.ix_(order, order)]),
    stats.mantel(a + 9 * np.eye(6), b),
    stats.mantel(np.exp(a), 1e-9 * b),
    stats.mantel(a + 1e-7 * np.triu(np.ones((6, 6))), b),
    stats.mantel(b, a),
  ):
    assert (same.value, same.p) == pytest.approx((e.value, e.p), abs=1e-12)


def test_mantel_leaves_out_absent_classes():
  rng = np.random.default_rng(2)
  a, b = symmetric(rng, 7), symmetric(rng, 7)
  absent_a, absent_b = a.copy(), b.copy()
  absent_a[2], absent_a[:, 2] = math.nan, math.nan
  absent_b[5], absent_b[:, 5] = math.nan, math.nan
  kept = np.ix_([0, 1, 3, 4, 6], [0, 1, 3, 4, 6])
  e, clean = stats.mantel(absent_a, absent_b), stats.mantel(a[kept], b[kept])
  assert (e.value, e.p, e.n) == (clean.value, clean.p, 5)
  assert e.method == 'Mantel, Spearman, 5 of 7 classes'
  few = stats.mantel(a[:3, :3], b[:3, :3])
  assert math.isnan(few.p)
  assert few.method.startswith('no test')
  for nothing in (np.ones((5, 5)), np.full((5, 5), math.nan), np.ones((1, 1)), np.ones((0, 0))):
    e = stats.mantel(nothing, nothing)
    assert math.isnan(e.value)
    assert math.isnan(e.p)


def test_mantel_has_its_size_and_power(drawn_at_random):
  """Pairs that share a class depend on each other: the plain p of spearmanr is no test."""
  rng = np.random.default_rng(4)
  rows, columns = np.triu_indices(10, 1)

  def distances(points):
    return np.linalg.norm(points[:, None] - points[None], axis=-1)

  null, plain = [], []
  for _ in range(300):
    effects = rng.normal(size=(2, 10))
    a, b = (e[:, None] + e[None] + symmetric(rng, 10) / 2 for e in effects)
    null.append(stats.mantel(a, b, resamples=199).p <= 0.05)
    plain.append(scipy.stats.spearmanr(a[rows, columns], b[rows, columns]).pvalue <= 0.05)
  assert within(null, 0.05)
  assert np.mean(plain) > 0.15
  effect = []
  for _ in range(60):
    points = rng.normal(size=(10, 3))
    near = points + 0.5 * rng.normal(size=(10, 3))
    effect.append(stats.mantel(distances(points), distances(near), resamples=199).p <= 0.05)
  assert np.mean(effect) > 0.9


# noise_floor


def test_noise_floor_is_the_paired_difference_of_two_halves():
  values = np.random.default_rng(0).normal(70, 2, 11)
  shuffled = np.random.default_rng(3).permutation(values)
  expected = stats.paired_difference(shuffled[:5] - shuffled[5:10], seed=3)
  e = stats.noise_floor(values, seed=3)
  assert (e.value, e.low, e.high, e.p, e.n) == (
    expected.value,
    expected.low,
    expected.high,
    expected.p,
    5,
  )
  assert e.method == 'noise floor, exact bootstrap-t over 5 pairs of units'
  shifted = stats.noise_floor(values + 10, seed=3)
  assert (shifted.low, shifted.high) == pytest.approx((e.low, e.high), rel=1e-9)
  assert stats.noise_floor([*values, math.nan], seed=3).method.endswith('(1 NaN left out)')
  assert stats.noise_floor([1.0, 2.0, 3.0]).method == 'noise floor, no interval: 1 unit'
  assert stats.noise_floor(values, level=0.5).level == 0.5


def test_noise_floor_is_null_95_percent_of_the_time(drawn_at_random):
  draws = np.random.default_rng(5).normal(size=(400, 20))
  assert within([stats.noise_floor(v, resamples=999).excludes(0) for v in draws], 0.05)


def test_halves_of_the_same_seeds_seldom_differ(drawn_at_random):
  """Of 200 splits of one sample's 20 seeds into halves, about one in twenty excludes 0."""
  rng, rates = np.random.default_rng(6), []
  for values in rng.normal(size=(10, 20)):
    splits = (stats._split(values, rng) for _ in range(200))
    ends = [stats._interval(split, 0.95, s, 999)[:2] for s, split in enumerate(splits)]
    rates.append(np.mean([not low <= 0 <= high for low, high in ends]))
  assert 0.03 < np.mean(rates) < 0.075


# errors

SQUARE = np.eye(4)
ONE_SIDED = np.triu(np.ones((4, 4)))
HALF_NAN = np.array([[0, math.nan, 1, 1], [2, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]])


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (
      lambda: stats.paired_difference([[1.0]]),
      'differences [n], finite or NaN; found shape (1, 1)',
    ),
    (lambda: stats.paired_difference([1, math.inf]), 'found an infinite number'),
    (lambda: stats.paired_difference([1, 2], level=95), '0 < level < 1; found level 95'),
    (lambda: stats.paired_difference([1, 2], resamples=10), 'resamples >= 99; found 10'),
    (lambda: stats.corrected_resampled_t([1, 2], 0), 'n_test / n_rest > 0; found 0'),
    (lambda: stats.corrected_resampled_t([1, 2], math.nan), 'n_test / n_rest > 0; found nan'),
    (lambda: stats.corrected_resampled_t([1, 2], 0.25, level=1), '0 < level < 1; found level 1'),
    (lambda: stats.holm([0.5, 1.5]), 'p-values from 0 to 1, or NaN; found [0.5, 1.5]'),
    (lambda: stats.holm(0.5), 'p_values [m], finite or NaN; found shape ()'),
    (lambda: stats.non_inferiority([1, 2], 0), 'margin > 0; found 0'),
    (lambda: stats.is_non_inferior(stats.non_inferiority([1, 2], 1), -1), 'margin > 0; found -1'),
    (lambda: stats.is_non_inferior(stats.paired_difference([1, 2]), 1), 'level 0.9; found 0.95'),
    (lambda: stats.association(np.ones(3), np.ones(3)), 'reduction [S, C], finite or NaN; found'),
    (
      lambda: stats.association(np.ones((4, 3)), np.ones((3, 4))),
      'the same seeds and classes in both; found (4, 3) and (3, 4)',
    ),
    (lambda: stats.association(np.ones((4, 3)), np.full((4, 3), math.inf)), 'gain [S, C], finite'),
    (lambda: stats.across_classes(np.ones((4, 3)), np.ones((4, 2))), 'found (4, 3) and (4, 2)'),
    (lambda: stats.across_classes(SQUARE, SQUARE, resamples=0), 'resamples >= 99; found 0'),
    (lambda: stats.mantel(np.ones((2, 3)), SQUARE), 'a [C, C]; found shape (2, 3)'),
    (lambda: stats.mantel(SQUARE, np.eye(5)), 'the same classes in a and b; found (4, 4) and (5,'),
    (lambda: stats.mantel(SQUARE, ONE_SIDED), 'b symmetric; found an asymmetric one'),
    (lambda: stats.mantel(SQUARE, 1e-9 * ONE_SIDED), 'b symmetric; found an asymmetric one'),
    (lambda: stats.mantel(HALF_NAN, SQUARE), 'a symmetric; found an asymmetric one'),
    (lambda: stats.noise_floor([1, 2], level=0), '0 < level < 1; found level 0'),
    (lambda: stats.noise_floor([[1, 2]]), 'values [n], finite or NaN; found shape (1, 2)'),
  ],
)
def test_bad_input_is_refused(call, message):
  with pytest.raises(UserError) as error:
    call()
  assert message in str(error.value)
