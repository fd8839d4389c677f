"""Estimates with an interval and a p-value: differences over seeds, associations, their audit.

Everywhere: `level` is the nominal coverage, in (0, 1). p-values are two-sided, twice the smaller
tail; statistics equal up to rounding are ties, and count in both tails. NaN is a missing value;
it is left out, as `method` says. Infinite numbers, wrong shapes, bad options raise UserError.

Nothing is left to chance where all cases can be had, see `csba_jax.analysis.resampling`: the
bootstrap samples of up to 10 units, the sign flips of up to 16, the orders of up to 10 units of a
correlation and of up to 8 classes of a Mantel test are enumerated. Beyond, `resamples` (at least
99) of them are drawn at random; `seed` is that of all drawing: the same call gives the same answer.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.stats

from csba_jax.analysis import ranks, resampling
from csba_jax.errors import UserError

NAN = float('nan')


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A number, where it may lie, and how probable one as far from 0 were without an effect."""

  value: float
  low: float  # NaN: no interval
  high: float
  level: float  # nominal coverage of [low, high]
  n: int  # units: seeds, folds or classes
  p: float  # two-sided, of the hypothesis 0; NaN: no test
  method: str  # a few words for a table

  @property
  def known(self) -> bool:
    """Whether there is an interval."""
    return not (math.isnan(self.low) or math.isnan(self.high))

  def excludes(self, number: float) -> bool:
    """Whether there is an interval and the number lies outside it."""
    return self.known and not self.low <= number <= self.high

  def cut(self, low: float, high: float) -> 'Estimate':
    """The interval cut to what the number can be: no true value, so no coverage, is lost."""
    ends = np.clip([self.low, self.high], low, high)  # NaN stays NaN
    return dataclasses.replace(self, low=float(ends[0]), high=float(ends[1]))


def paired_difference(
  differences: np.ndarray,
  level: float = 0.95,
  seed: int = 0,
  resamples: int = 9999,
  units: str = 'seeds',
) -> Estimate:
  """Mean of paired differences over seeds, bootstrap-t interval, sign-flip permutation test.

    [m - t*_(1 - a/2) s / sqrt(n), m - t*_(a/2) s / sqrt(n)],  t* = (m* - m) sqrt(n) / s*

  with stars for resampled seeds and a = 1 - level (Efron and Tibshirani 1993, ch. 12.5). Share of
  95 % intervals with the true mean (4000 samples, 2000 resamples; normal, chi2(4), exponential):

    n    bootstrap-t          t                    BCa                  percentile
    5    0.95   0.93   0.93   0.95   0.91   0.88   0.83   0.82   0.79   0.83   0.81   0.78
    10   0.95   0.95   0.94   0.95   0.93   0.90   0.89   0.89   0.88   0.90   0.88   0.87
    20   0.95   0.95   0.95   0.95   0.93   0.92   0.92   0.92   0.92   0.92   0.91   0.91

  So BCa and percentile intervals are too short for the usual 5 to 20 seeds. The price: at n = 5
  the bootstrap-t interval is about a third wider than the t interval on normal differences, and
  at n <= 3, or with many ties, it is unbounded; the t interval then takes its place and `method`
  says so. Identical differences have no interval: [v, v] would say nothing about new seeds.

  The test is of a distribution symmetric about 0: with exponential differences of mean 0 it rejects
  8 to 10 % at the 5 % level. p >= 2^(1 - n): never below 0.0625 with 5 seeds. Test and interval may
  disagree about 0. `method` says 'exact' where all bootstrap samples are enumerated.

  Args:
    differences: [n] treatment - control of the same seed.
    units: what they are, for `method`.
  """
  _check(level, resamples)
  kept, left_out = _present(differences, 'differences')
  n = len(kept)
  if n < 2:
    return _without_interval(kept, level, left_out)
  low, high, words = _interval(kept, level, seed, resamples)
  p = resampling.sign_flip_p(kept, seed, resamples)
  return Estimate(float(kept.mean()), low, high, level, n, p, f'{words} over {n} {units}{left_out}')


def corrected_resampled_t(
  differences: np.ndarray, test_to_rest: float, level: float = 0.95, units: str = 'folds'
) -> Estimate:
  """Mean over folds, or over random splits of one set; t interval and test that know the overlap.

    t = m / sqrt((1 / n + n_test / n_rest) s^2),  n - 1 degrees of freedom

  Nadeau and Bengio 2003. Folds share training images, so that the plain t test takes n folds for
  far more evidence than they are; n_test / n_rest, their n_test / n_train, stands in for an unknown
  correlation, which makes this a good approximation and not an exact test. That correlation comes
  from drawing test and training parts from one set, so n_rest is all of the set but the test part,
  also where the tail is then cut: training parts with a cut tail share fewer images than the ratio
  takes them to. Without any spread there is no interval, and p is 1 for a mean of 0, else NaN: the
  formula divides by 0.

  Args:
    differences: [repeats * folds] treatment - control of the same fold.
    test_to_rest: n_test / n_rest: 1 / (k - 1) for k folds, f / (1 - f) for a test part of share f.
    units: what they are, for `method`.
  """
  _check(level)
  if not (math.isfinite(test_to_rest) and test_to_rest > 0):
    raise UserError('n_test / n_rest > 0', f'{test_to_rest}', 'give 1 / (k - 1) for k folds')
  kept, left_out = _present(differences, 'differences')
  n = len(kept)
  if n < 2:
    return _without_interval(kept, level, left_out)
  mean = float(kept.mean())
  if _identical(kept):
    p = 1.0 if mean == 0 else NAN
    words = f'no interval: identical differences over {n} {units}{left_out}'
    return Estimate(mean, NAN, NAN, level, n, p, words)
  error = float(np.sqrt((1 / n + test_to_rest) * kept.var(ddof=1)))
  p = float(2 * scipy.stats.t.sf(abs(mean) / error, n - 1))
  low, high = (float(end) for end in scipy.stats.t.interval(level, n - 1, mean, error))
  return Estimate(mean, low, high, level, n, p, f'corrected resampled t over {n} {units}{left_out}')


def holm(p_values: np.ndarray) -> np.ndarray:
  """Step-down adjusted p-values, adj_(k) = max_{j <= k} min(1, (m - j + 1) p_(j)).  [m] -> [m]

  Holm 1979: controls the chance of any false rejection, however the tests depend on each other.
  NaN (a test that was not possible) stays NaN and does not count in m.
  """
  p_values = _array(p_values, 'p_values', '[m]')
  tested = np.flatnonzero(~np.isnan(p_values))
  if ((p_values[tested] < 0) | (p_values[tested] > 1)).any():
    raise UserError('p-values from 0 to 1, or NaN', f'{p_values.tolist()}', 'give p-values')
  order = tested[np.argsort(p_values[tested], kind='stable')]
  scaled = p_values[order] * np.arange(len(order), 0, -1)
  adjusted = np.full(p_values.shape, np.nan)
  adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
  return adjusted


def non_inferiority(
  differences: np.ndarray,
  margin: float,
  test_to_rest: float | None = None,
  seed: int = 0,
  resamples: int = 9999,
  units: str | None = None,
) -> Estimate:
  """Two-sided 90 % interval of treatment - control, whose lower end is a one-sided 95 % bound.

  Judge it with `is_non_inferior`, which at a true loss of just the margin says yes in 4 to 6 % of
  normal and up to 10 % of left-skewed exponential samples (n = 5 to 20, over seeds). The p-value is
  the two-sided one of no difference, not of the margin.

  Args:
    differences: [n] treatment - control, where more is better.
    margin: largest loss that would not matter, > 0, in the unit of the differences.
    test_to_rest: None for `paired_difference` over seeds, a ratio for `corrected_resampled_t`.
    units: what the differences are of, for `method`; None: seeds, or folds with a ratio.
  """
  _check_margin(margin)
  if test_to_rest is None:
    estimate = paired_difference(differences, 0.9, seed, resamples, units or 'seeds')
  else:
    estimate = corrected_resampled_t(differences, test_to_rest, 0.9, units or 'folds')
  return dataclasses.replace(estimate, method=f'{estimate.method}, margin {margin:g}')


def is_non_inferior(estimate: Estimate, margin: float) -> bool:
  """low > -margin at 5 %, one-sided; False where there is no interval. Refuses other levels."""
  _check_margin(margin)
  if not math.isclose(estimate.level, 0.9):
    raise UserError('an estimate at level 0.9', f'{estimate.level}', 'take that of non_inferiority')
  return estimate.known and estimate.low > -margin


def association(
  reduction: np.ndarray,
  gain: np.ndarray,
  test_to_rest: float | None = None,
  seed: int = 0,
  resamples: int = 9999,
) -> Estimate:
  """Does less conflict go with more F1?  Mean over classes of Spearman's correlation over seeds.

  Interval: tanh(atanh r +- t_(S-1) e), e = sd(atanh r*) with r* from resampled seeds. Of normal
  samples, it covered the true mean correlation (0, 0.48 or 0.79) in 91 to 97 % (S = 10) and 96 to
  99 % (S = 5) of 500; percentile intervals in 86 to 94 % and 87 to 96 %.
  p: the seeds of `gain` are permuted, alike in all classes, which keeps the dependence between
  classes; S = 4 has p >= 1 / 12.

  With `test_to_rest` both know that units share images, as `corrected_resampled_t` does: e is
  multiplied by sqrt(1 + S n_test / n_rest), and p is that of atanh(r) / e, t with S - 1 degrees of
  freedom. This carries a correction of means over to a correlation, and is cautious: what the
  shared images do to all units alike cancels in a correlation.

  Seeds that miss every class in either array are left out, then classes that miss a value or are
  constant. With S < 4 there is a value, but neither test nor interval.

  Args:
    reduction: [S, C] conflict of the control - conflict of the treatment.
    gain: [S, C] F1 of the treatment - F1 of the control, of the same seeds and classes.
    test_to_rest: None where units are independent, else as of `corrected_resampled_t`.
  """
  return associations(reduction, gain, (test_to_rest,), seed, resamples)[0]


def associations(
  reduction: np.ndarray,
  gain: np.ndarray,
  ratios: Sequence[float | None],
  seed: int = 0,
  resamples: int = 9999,
) -> list[Estimate]:
  """`association` for each of several values of `test_to_rest`, with one look at all resamples."""
  _check(resamples=resamples)
  x, y = _seeds_and_classes(reduction, gain)
  classes = np.shape(gain)[1]
  varying = (x != x[:1]).any(0) & (y != y[:1]).any(0)
  x, y = x[:, varying], y[:, varying]
  n, used = x.shape
  words = f'Spearman over {n} units within class, mean of {used} of {classes} classes'
  if n < 2 or used == 0:
    return [Estimate(NAN, NAN, NAN, 0.95, n, NAN, f'no test: {words}') for _ in ratios]
  # r of any order of the seeds is a sum of n entries of this [S, S] matrix
  products = ranks.unit_ranks(x.T).T @ ranks.unit_ranks(y.T) / used
  value = float(np.trace(products))
  if n < 4:
    return [Estimate(value, NAN, NAN, 0.95, n, NAN, f'no test: {words}') for _ in ratios]
  drawn, found = ranks.resampled_association(x, y, seed, resamples), []
  for ratio in ratios:
    low, high, p = _z_interval(value, *drawn, n, ratio or 0.0)
    if ratio is None:
      found.append(
        Estimate(value, low, high, 0.95, n, resampling.order_p(products, seed, resamples), words)
      )
    else:
      found.append(Estimate(value, low, high, 0.95, n, p, f'{words}, corrected for the overlap'))
  return found


def across_classes(
  reduction: np.ndarray,
  gain: np.ndarray,
  test_to_rest: float | None = None,
  seed: int = 0,
  resamples: int = 9999,
) -> Estimate:
  """Do the classes with less conflict gain more F1?  Spearman over classes of the means over seeds.

  p: permuted classes, as if they were exchangeable, which rare and frequent ones are not: their
  size may drive both sides. Interval: as in `association`, from resampled seeds; of these classes
  only, and descriptive, since resampled means are noisier than the means. `n` counts classes. Args
  and missing values as in `association`. Below 4 classes no test, below 4 seeds no interval.
  """
  _check(resamples=resamples)
  x, y = _seeds_and_classes(reduction, gain)
  seeds, n = x.shape
  words = f'Spearman over {n} of {np.shape(gain)[1]} classes, means of {seeds} units'
  value = float(ranks.spearman(x.mean(0), y.mean(0))) if seeds and n > 1 else NAN
  if math.isnan(value) or n < 4:
    return Estimate(value, NAN, NAN, 0.95, n, NAN, f'no test: {words}')
  products = np.outer(ranks.unit_ranks(x.mean(0)), ranks.unit_ranks(y.mean(0)))
  p = resampling.order_p(products, seed, resamples)
  if seeds < 4:
    return Estimate(value, NAN, NAN, 0.95, n, p, f'no interval: {words}')
  counts, weights = resampling.multisets(seeds, seed, resamples)
  # rounded: means that are equal but for rounding must have one rank
  drawn = ranks.spearman(*(np.round(counts @ z / seeds, 12) for z in (x, y)))
  low, high, _ = _z_interval(value, drawn, weights, seeds, test_to_rest or 0.0)
  return Estimate(value, low, high, 0.95, n, p, words)


def mantel(a: np.ndarray, b: np.ndarray, seed: int = 0, resamples: int = 9999) -> Estimate:
  """Spearman's correlation of the pairs of classes in two symmetric matrices (Mantel 1967).

  p: rows and columns of b are permuted together. No interval. a and b are [C, C], symmetric up to
  1e-5 of their largest entry (else UserError), and their diagonals are not looked at. Classes that
  miss every pair in either matrix are left out; of the others, each order of the classes leaves out
  the pairs that are NaN in a or in b so ordered, and ranks the rest anew; an order that leaves
  nothing to correlate counts against the finding. `n` counts classes; fewer than 4 have no test.
  """
  _check(resamples=resamples)
  a, b = _symmetric(a, 'a'), _symmetric(b, 'b')
  if a.shape != b.shape:
    found = f'{a.shape} and {b.shape}'
    raise UserError('the same classes in a and b', found, 'put NaN where a class is missing')
  classes = len(a)
  kept = np.flatnonzero(~(np.isnan(a).all(1) | np.isnan(b).all(1)))
  a, b = a[np.ix_(kept, kept)], b[np.ix_(kept, kept)]
  n = len(kept)
  words = f'Mantel, Spearman, {n} of {classes} classes'
  rows, columns = np.triu_indices(n, 1)
  value = float(ranks.spearman(a[rows, columns], b[rows, columns])) if n > 2 else NAN
  if n < 4 or math.isnan(value):
    return Estimate(value, NAN, NAN, 0.95, n, NAN, f'no test: {words}')
  p = resampling.permutation_p(
    lambda order: ranks.spearman(a[rows, columns], b[order[..., rows], order[..., columns]]),
    n,
    len(rows),
    seed,
    resamples,
  )
  return Estimate(value, NAN, NAN, 0.95, n, p, words)


def noise_floor(
  values: np.ndarray, level: float = 0.95, seed: int = 0, resamples: int = 9999
) -> Estimate:
  """`paired_difference` between two halves of the seeds of the same variant: should come out null.

  The [n] values, one metric of n seeds, are shuffled once, by `seed`; value i of the first half
  minus value i of the second, floor(n / 2) pairs, an odd last value left out. Name the seed before
  looking. These pairs share no seed, so what a shared seed would cancel stays in: the floor is
  at or above that of a comparison paired by seed, and has half its pairs.
  """
  _check(level, resamples)
  kept, left_out = _present(values, 'values')
  split = _split(kept, np.random.default_rng(seed))
  estimate = paired_difference(split, level, seed, resamples)
  words = estimate.method.replace('seeds', 'pairs of units')
  return dataclasses.replace(estimate, method=f'noise floor, {words}{left_out}')


def _split(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """First half minus second half of the shuffled values.   [n] -> [n // 2]"""
  half = len(values) // 2
  shuffled = rng.permutation(values)
  return shuffled[:half] - shuffled[half : 2 * half]


def _interval(kept: np.ndarray, level: float, seed: int, resamples: int) -> tuple:
  """(low, high, name) of the mean of at least 2 differences, see `paired_difference`."""
  n, mean = len(kept), float(kept.mean())
  if _identical(kept):
    return NAN, NAN, 'no interval: identical differences'
  counts, weights = resampling.multisets(n, seed, resamples)
  centred, spread = kept - mean, np.ptp(kept)
  gap = counts @ centred / n
  error = np.sqrt((counts * (centred - gap[:, None]) ** 2).sum(1) / (n - 1) / n)
  gap[np.abs(gap) <= 1e-12 * spread] = 0.0
  flat = error <= resampling.TIE * spread / n  # all units equal up to rounding: t* has no bound
  t = np.divide(gap, error, out=np.where(gap > 0, np.inf, -np.inf), where=~flat)
  t[gap == 0] = 0.0
  # the outermost t* with at least a tail beyond it: flipped signs flip the interval exactly
  order, tail = np.argsort(t), (1 - level) / 2 - 1e-12
  lowest = t[order][np.searchsorted(np.cumsum(weights[order]), tail)]
  highest = t[order[::-1]][np.searchsorted(np.cumsum(weights[order[::-1]]), tail)]
  scale = float(kept.std(ddof=1)) / math.sqrt(n)
  low, high = mean - scale * float(highest), mean - scale * float(lowest)
  if math.isfinite(low) and math.isfinite(high):
    return low, high, f'{"exact " if resampling.is_exact(n) else ""}bootstrap-t'
  low, high = scipy.stats.t.interval(level, n - 1, mean, scale)
  return float(low), float(high), 't interval (bootstrap-t unbounded)'


def _identical(values: np.ndarray) -> bool:
  """Equal up to rounding."""
  return bool(np.ptp(values) <= 1e-12 * np.abs(values).max())


def _without_interval(kept: np.ndarray, level: float, left_out: str) -> Estimate:
  """Of fewer than 2 units."""
  n = len(kept)
  value = float(kept[0]) if n else NAN
  units = '1 unit' if n == 1 else '0 units'
  return Estimate(value, NAN, NAN, level, n, NAN, f'no interval: {units}{left_out}')


def _z_interval(
  value: float,
  resampled: np.ndarray,
  chances: np.ndarray,
  units: int,
  test_to_rest: float = 0.0,
) -> tuple[float, float, float]:
  """(low, high, p) at 95 % on the scale of atanh; none for r = +-1, where that scale ends."""
  known = ~np.isnan(resampled)
  if abs(value) > 1 - 1e-9 or known.sum() < 2:
    return NAN, NAN, NAN
  z = np.arctanh(np.clip(resampled[known], -0.999, 0.999))  # a few seeds are easily perfect
  chances = chances[known] / chances[known].sum()
  spread = math.sqrt(chances @ (z - chances @ z) ** 2 * (1 + units * test_to_rest))
  if not spread:
    return NAN, NAN, NAN
  centre, half = math.atanh(value), scipy.stats.t.ppf(0.975, units - 1) * spread
  p = float(2 * scipy.stats.t.sf(abs(centre) / spread, units - 1))
  return float(np.tanh(centre - half)), float(np.tanh(centre + half)), p


def _array(values: np.ndarray, name: str, shape: str) -> np.ndarray:
  """A float64 copy with as many axes as `shape`, such as '[S, C]', has letters."""
  values = np.array(values, np.float64)
  if values.ndim != shape.count(',') + 1 or np.isinf(values).any():
    found = 'an infinite number' if np.isinf(values).any() else f'shape {values.shape}'
    raise UserError(f'{name} {shape}, finite or NaN', found, 'put NaN where a value is missing')
  return values


def _present(values: np.ndarray, name: str) -> tuple[np.ndarray, str]:
  """The values that are not NaN, and words about the others."""
  values = _array(values, name, '[n]')
  missing = int(np.isnan(values).sum())
  return values[~np.isnan(values)], f' ({missing} NaN left out)' if missing else ''


def _seeds_and_classes(reduction: np.ndarray, gain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Both without the seeds that miss everything, then without classes that miss anything."""
  x, y = _array(reduction, 'reduction', '[S, C]'), _array(gain, 'gain', '[S, C]')
  if x.shape != y.shape:
    found = f'{x.shape} and {y.shape}'
    raise UserError('the same seeds and classes in both', found, 'put NaN where one is missing')
  seeds = ~(np.isnan(x).all(1) | np.isnan(y).all(1))
  x, y = x[seeds], y[seeds]
  classes = ~(np.isnan(x) | np.isnan(y)).any(0)
  return x[:, classes], y[:, classes]


def _symmetric(matrix: np.ndarray, name: str) -> np.ndarray:
  """The matrix with NaN on the diagonal."""
  matrix = _array(matrix, name, '[C, C]')
  if matrix.shape[0] != matrix.shape[1]:
    raise UserError(f'{name} [C, C]', f'shape {matrix.shape}', 'give one row and column per class')
  np.fill_diagonal(matrix, np.nan)
  scale = np.nanmax(np.abs(matrix), initial=0.0)
  # float32 products of class gradients are symmetric up to rounding only
  if not np.allclose(matrix, matrix.T, rtol=0, atol=1e-5 * scale, equal_nan=True):
    raise UserError(f'{name} symmetric', 'an asymmetric one', f'give ({name} + {name}.T) / 2')
  return (matrix + matrix.T) / 2


def _check(level: float = 0.95, resamples: int = 9999) -> None:
  if not 0 < level < 1:
    raise UserError('0 < level < 1', f'level {level}', 'give 0.95 for a 95 % interval')
  if resamples < 99:
    raise UserError('resamples >= 99', f'{resamples}', 'leave it at 9999 for what you publish')


def _check_margin(margin: float) -> None:
  if not (math.isfinite(margin) and margin > 0):
    raise UserError('margin > 0', f'{margin}', 'give the largest loss that would not matter')
