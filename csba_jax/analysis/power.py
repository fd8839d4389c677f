"""What a study of so many pairs can find, by simulation: decide on it before the first run."""

import numpy as np

from csba_jax.analysis import resampling, stats
from csba_jax.errors import UserError
from csba_jax.study.protocol import SIGNIFICANCE


def power(
  effect: float,
  deviation: float,
  pairs: int,
  family: int = 1,
  test_to_rest: float | None = None,
  draws: int = 1000,
  seed: int = 0,
) -> float:
  """Share of simulated studies in which a gain of this size is supported.

  A study has `family` comparisons of `pairs` paired differences each. The first has the effect, the
  others have none:

    d_i = effect + deviation * (sqrt(r) u + e_i),  u and e_i standard normal

  where r = n_test / n_rest stands for what shared images have in common (Nadeau and Bengio 2003),
  and is 0 without them. u is the same for all pairs of a study, so that `deviation` is the standard
  deviation that its differences show. Supported: p < 0.05 after Holm and a mean above 0, with the
  tests that a study has: sign flips, or the corrected resampled t where images are shared.
  Comparisons are drawn independently; in a study they share the runs of a control.

  Args:
    effect: mean of the differences, such as 0.02 of macro-F1.
    deviation: their standard deviation, > 0, as earlier runs show it.
    pairs: seeds or folds, at least 2.
    family: number of comparisons that Holm corrects over, at least 1.
    test_to_rest: None for a test set of its own; else as of `stats.corrected_resampled_t`.
    draws: simulated studies; the standard error of the share is at most 0.5 / sqrt(draws).
    seed: of the simulation.

  Raises:
    UserError: an argument out of its range.

  Example:
    >>> power(0.05, 0.03, pairs=10, draws=200) > 0.9  # a gain of 0.05 is hard to miss
    True
    >>> power(0.01, 0.03, pairs=10, draws=200) < 0.5
    True
  """
  finite = np.isfinite(effect) and 0 < deviation < np.inf
  if not (finite and pairs >= 2 and family >= 1 and draws >= 1):
    raise UserError(
      'a finite effect, a finite deviation > 0, pairs >= 2, family >= 1 and draws >= 1',
      f'{effect:g}, {deviation:g}, {pairs}, {family} and {draws}',
      'correct them',
    )
  rng = np.random.default_rng(seed)
  supported = 0
  for _ in range(draws):
    shared = np.sqrt(test_to_rest or 0.0) * rng.standard_normal((family, 1))
    differences = deviation * (shared + rng.standard_normal((family, pairs)))
    differences[0] += effect
    p = stats.holm(np.array([_p(values, test_to_rest, family) for values in differences]))
    supported += bool(p[0] < SIGNIFICANCE and differences[0].mean() > 0)
  return supported / draws


def _p(differences: np.ndarray, test_to_rest: float | None, family: int) -> float:
  """The p-value that a study gives these differences [n].

  Of more than 16 pairs a study draws 9,999 sign flips. Fewer do here: the smallest p that they can
  give stays below a fifth of what Holm asks of the first of the family.
  """
  if test_to_rest is not None:
    return stats.corrected_resampled_t(differences, test_to_rest).p
  return resampling.sign_flip_p(differences, seed=0, resamples=max(999, 200 * family))
