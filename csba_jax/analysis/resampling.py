"""Bootstrap samples, sign flips and orders of a few units: all of them, else random ones.

Up to MOST_CASES are enumerated: the bootstrap samples of up to 10 units (92,378 multisets, each
with its multinomial probability), the sign flips of up to 16, the orders of up to 8; the orders of
up to MOST_ORDERED where the statistic is a sum over units. Beyond, `resamples` are drawn at random,
from `seed`. p-values are two-sided, twice the smaller tail. Statistics equal up to rounding are
ties, and count in both tails; random cases are counted with the observed one.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import scipy.stats

MOST_CASES = 100_000  # that are enumerated in place of drawn
MOST_ORDERED = 10  # units whose orders are all counted, half of the units at a time: 3,628,800
TIE = 1e-9  # of the scale of a statistic: what differs by less differs by rounding
BATCH_NUMBERS = 2_000_000  # numbers that one batch of permutations may take: 16 MB in float64


def is_exact(units: int) -> bool:
  """Whether all bootstrap samples of so many units are enumerated."""
  return math.comb(2 * units - 1, units) <= MOST_CASES


@functools.lru_cache(maxsize=4)
def multisets(units: int, seed: int, resamples: int) -> tuple[np.ndarray, np.ndarray]:
  """How often each bootstrap sample holds each unit, and its probability.   [M, n], [M]"""
  if is_exact(units):
    places = 2 * units - 1  # stars are units in the sample, bars stand between two units
    bars = np.array(list(itertools.combinations(range(places), units - 1))).reshape(-1, units - 1)
    counts = np.diff(bars, prepend=-1, append=places, axis=1) - 1.0
    chances = scipy.stats.multinomial.pmf(counts, units, np.full(units, 1 / units))
  else:
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(units, np.full(units, 1 / units), resamples).astype(np.float64)
    chances = np.full(resamples, 1 / resamples)
  for array in (counts, chances):
    array.setflags(write=False)  # every call has the same ones
  return counts, chances


def sign_flip_p(differences: np.ndarray, seed: int, resamples: int) -> float:
  """p of the sum of differences [n] whose signs are flipped, of all flips or of random ones."""
  n = len(differences)
  exact = 2**n <= MOST_CASES
  if exact:
    signs = _signs(n)
  else:
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (resamples, n))
  scale = float(np.abs(differences).sum())
  return two_sided([signs @ differences], float(differences.sum()), scale, exact)


@functools.lru_cache(maxsize=4)
def _signs(units: int) -> np.ndarray:
  """All signs of so many units.   [2^n, n]"""
  signs = np.array(list(itertools.product([-1.0, 1.0], repeat=units)))
  signs.setflags(write=False)
  return signs


def two_sided(null: Iterable[np.ndarray], observed: float, scale: float, exact: bool) -> float:
  """Twice the smaller tail of a statistic, which comes in batches and has this scale.

  `exact`: the batches hold every case, also the observed one; random cases are counted with it.
  """
  higher = lower = total = int(not exact)
  for batch in null:
    higher += int((batch >= observed - TIE * scale).sum())
    lower += int((batch <= observed + TIE * scale).sum())
    total += batch.size
  return min(1.0, 2 * min(higher, lower) / total)


def order_p(products: np.ndarray, seed: int, resamples: int) -> float:
  """p of the sum over i of products[i, order[i]], whose largest sums are +-1.   [n, n]"""
  n = len(products)
  if n > MOST_ORDERED:
    rng = np.random.default_rng(seed)
    orders = rng.permuted(np.broadcast_to(np.arange(n), (resamples, n)), axis=1)
    return two_sided([products[np.arange(n), orders].sum(1)], np.trace(products), 1.0, False)
  return two_sided(_sums_of_orders(products), np.trace(products), 1.0, True)


def _sums_of_orders(products: np.ndarray) -> Iterator[np.ndarray]:
  """The sum of every order, for each choice of the columns that the first half of the rows takes.

  The sums of both halves are had apart, so that 10! orders take 252 * (5! + 5!) sums of 5 numbers
  and an addition each.
  """
  n = len(products)
  rows = np.arange(n)
  halves = rows[: n // 2], rows[n // 2 :]
  orders = [np.array(list(itertools.permutations(range(len(half))))) for half in halves]
  for chosen in itertools.combinations(range(n), n // 2):
    columns = np.array(chosen, int), np.setdiff1d(rows, chosen)
    first, second = (
      products[half, its[order]].sum(1)
      for half, its, order in zip(halves, columns, orders, strict=True)
    )
    yield first[:, None] + second[None]


def permutation_p(
  statistic: Callable[[np.ndarray], np.ndarray], n: int, numbers: int, seed: int, resamples: int
) -> float:
  """p of statistic([..., n] int orders) -> [...], in [-1, 1], of `numbers` numbers each."""
  observed = float(statistic(np.arange(n)))  # takes the place of NaN, in either tail
  digits = round(-math.log10(TIE))
  test = scipy.stats.permutation_test(
    (np.arange(n),),
    # rounded: SciPy's own room for ties is relative to the observed, so none at 0
    lambda order, axis: np.round(
      np.nan_to_num(statistic(order.astype(np.int64)), nan=observed), digits
    ),
    permutation_type='pairings',
    vectorized=True,
    n_resamples=MOST_CASES if math.factorial(n) <= MOST_CASES else resamples,
    batch=max(1, BATCH_NUMBERS // numbers),
    random_state=np.random.default_rng(seed),  # `rng` since SciPy 1.15, where this still works
  )
  return float(test.pvalue)
