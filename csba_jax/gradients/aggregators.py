"""The aggregators of gradient surgery: from the Gram of class gradients to a weight for each class.

`surgery` says what they share, and has the table of their names.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from csba_jax.errors import UserError
from csba_jax.gradients import quadratic

PyTree = Any
Weighed = tuple[Array, PyTree]
MOST = 1000.0  # times C: the weights that `cagrad` adds, at most
LEAST = 1e-6  # weight of `gradnorm` at least
_TINY = 1e-30


class Rows(NamedTuple):
  """The rows a_c = pi_c g_c of the classes that are there, by length and direction."""

  present: Array  # [C] bool
  lengths: Array  # [C] relative to the longest; 0 where absent
  cosines: Array  # [C, C]; those of the identity where absent
  conflict: Array  # bool: an inner product of two classes that are there is negative


class _Pairs(NamedTuple):
  """Each row, which may have changed, and the row that it looks at; [C] each."""

  one: Array  # index
  other: Array  # index
  product: Array  # <one, other>; other rows have length 1, and one had it at first
  squared_one: Array  # |one|^2
  squared_other: Array  # 1, or more where a Gram was not semidefinite
  use: Array  # bool: both are there, and not the same


def rows_of(gram: Array, prior: Array) -> Rows:
  """Lengths and cosines of the rows.   [C, C], [C] -> Rows; UserError for other shapes"""
  gram, prior = jnp.asarray(gram, jnp.float32), jnp.asarray(prior, jnp.float32)
  if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
    raise UserError('a Gram of shape [C, C]', f'shape {list(gram.shape)}', 'pass one Gram')
  check_shape('prior', prior, gram.shape[:1])
  squares = jnp.diagonal(gram)
  there = (squares > 0) & jnp.isfinite(squares) & (prior > 0) & jnp.isfinite(prior)
  pairs = there[:, None] & there[None]
  present = there & ~(pairs & ~jnp.isfinite(gram)).any(1)
  pairs = present[:, None] & present[None]
  norms = jnp.sqrt(jnp.where(present, squares, 1))
  eye = jnp.eye(len(prior))
  cosines = jnp.where(pairs & (eye == 0), gram, 0) / norms[:, None] / norms[None] + eye
  lengths = jnp.where(present, prior / _positive(jnp.where(present, prior, 0).max()) * norms, 0)
  return Rows(present, lengths / _positive(lengths.max()), cosines, (cosines < 0).any())


def check_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
  """Raises UserError unless the array has this shape."""
  if jnp.shape(array) != shape:
    expected, found = f'{name} of shape {list(shape)}', f'shape {list(jnp.shape(array))}'
    raise UserError(expected, found, 'pass one for each class of the Gram')


def semidefinite(rows: Rows) -> Rows:
  """The rows with the nearest cosines that are semidefinite."""
  return rows._replace(cosines=quadratic.semidefinite(rows.cosines))


def pcgrad(
  gram: Array, prior: Array, state: PyTree, key: Array, *, losses: Array | None = None
) -> Weighed:
  """PCGrad: each row drops its component along every row that it conflicts with, one by one.

  a_i <- a_i - min(0, <a_i, a_j>) / |a_j|^2 a_j for all j != i in random order, with a_j as it was;
  the weights are those of sum_i a_i. They are at least 1. No state.

  Yu et al. 2020. As in the paper each row has an order of its own.
  """
  del losses
  rows = semidefinite(rows_of(gram, prior))

  def change(found: None, at: _Pairs) -> tuple[Array, None]:
    return jnp.maximum(0, -at.product / at.squared_other), found

  added, _ = _in_random_order(rows, key, change, None)
  return _finish(rows, 1 + _over_lengths(rows, _dot(rows.lengths, added)), rows.conflict), state


def upgrad(
  gram: Array, prior: Array, state: PyTree, key: Array, *, losses: Array | None = None
) -> Weighed:
  """UPGrad: the sum of the projections of each row onto the dual cone of all rows.

  sum_i argmin |d - a_i|^2 over the d with <d, a_c> >= 0 for all c: no class loses to first order.
  The weights are at least 1. No state.

  Quinton & Rey 2024 (Jacobian descent). Projections are summed, not averaged, so that weights are
  1 where nothing conflicts: C times theirs. See `quadratic.nonnegative` for the accuracy.
  """
  del key, losses
  rows = semidefinite(rows_of(gram, prior))
  solve = functools.partial(quadratic.nonnegative, rows.cosines, programs=len(rows.lengths))
  added = jax.vmap(solve)(rows.cosines)
  return _finish(rows, 1 + _over_lengths(rows, _dot(rows.lengths, added)), rows.conflict), state


def dual_projection(
  gram: Array, prior: Array, state: PyTree, key: Array, *, losses: Array | None = None
) -> Weighed:
  """DualProj: the plain step projected onto the dual cone of the rows.

  argmin |d - sum_i a_i|^2 over the d with <d, a_c> >= 0 for all c: the smallest change of the step
  after which no class loses to first order. The weights are at least 1. No state.

  Lopez-Paz & Ranzato 2017 (GEM, equation 11), which protects the tasks before; here all classes.
  """
  del key, losses
  rows = semidefinite(rows_of(gram, prior))
  added = quadratic.nonnegative(rows.cosines, _dot(rows.cosines, rows.lengths))
  return _finish(rows, 1 + _over_lengths(rows, added), rows.conflict), state


def mgda(
  gram: Array, prior: Array, state: PyTree, key: Array, *, losses: Array | None = None
) -> Weighed:
  """MGDA: the shortest convex combination of the rows, n argmin |sum_c w_c a_c|^2 over the simplex.

  The weights sum to the number n of classes that are there. A step of sum_c w_c a_c / n helps every
  class by at least its own squared length, and it is no longer than the shortest row: the classes
  with long rows get next to nothing. No state.

  Desideri 2012; Sener & Koltun 2018 without their upper bound, and solved as one program of
  `quadratic.nonnegative` in place of Frank-Wolfe.
  """
  del key, losses
  rows = semidefinite(rows_of(gram, prior))
  inverse = _inverse_lengths(rows)
  y = quadratic.nonnegative(rows.cosines + inverse[:, None] * inverse[None], -inverse)
  y = _over_lengths(rows, y)
  return _finish(rows, rows.present.sum() * y / jnp.maximum(y.sum(), _TINY)), state


def cagrad(
  gram: Array,
  prior: Array,
  state: PyTree,
  key: Array,
  *,
  losses: Array | None = None,
  c: float = 0.5,
) -> Weighed:
  """CAGrad: the best step for the class that gains least, within c |s| of the plain step s.

  argmax_d min_i <a_i, d> over |d - s| <= c |s|, s = sum_i a_i; it is d = s + c |s| v / |v| for a
  convex combination v of the rows. c >= 0; at 0 it is the plain step. No state.

  Liu et al. 2021. Theirs is around the mean of the rows and ours around their sum: C times theirs,
  without the division by 1 + c^2 in their code. Where rows can cancel to v = 0, no d helps all;
  then d is the one nearest to s that harms none, and the weights that are added stay below 1000 C.
  d is sought by its level min_i <a_i, d>, in 60 programs at most, until |d - s| is right to 1e-6.
  """
  del key, losses
  rows = semidefinite(rows_of(gram, prior))
  products = _dot(rows.cosines, rows.lengths)
  length = jnp.sqrt(jnp.maximum(_dot(rows.lengths, products), 0))  # of s
  radius = c * length
  inverse = _inverse_lengths(rows)
  shortest = jnp.where(rows.present, rows.lengths, jnp.inf).min()
  matrix = rows.cosines + inverse[:, None] * inverse[None]

  def reach(level: Array) -> tuple[Array, Array]:
    """y, with all <a_i, d> >= shortest (level - inverse' y) and = where y > 0; and |d - s|."""
    y = quadratic.nonnegative(matrix, products - level * inverse)
    return y, jnp.sqrt(jnp.maximum(_dot(y, _dot(rows.cosines, y)), 0))

  def unfinished(state: tuple) -> Array:
    count, low, _, high, _, error, _ = state
    return (count < 60) & (error > 1e-6 * radius) & (high - low > 1e-7 * jnp.abs(high))

  def narrow(state: tuple) -> tuple:
    count, low, below, high, above, error, y = state
    secant = low + (high - low) * (radius - below) / jnp.maximum(above - below, _TINY)
    level = jnp.where(count % 2 == 0, jnp.clip(secant, low, high), (low + high) / 2)
    new, reached = reach(level)
    beyond, missed = reached > radius, jnp.abs(reached - radius)
    low, below = (jnp.where(beyond, *pair) for pair in ((low, level), (below, reached)))
    high, above = (jnp.where(beyond, *pair) for pair in ((level, high), (reached, above)))
    y, error = (jnp.where(missed < error, *pair) for pair in ((new, y), (missed, error)))
    return count + 1, low, below, high, above, error, y

  low = jnp.where(rows.present, products / jnp.maximum(inverse, _TINY), jnp.inf).min()
  high = (1 + c) * length + shortest * MOST * len(products)
  y, above = reach(high)
  start = (0, low, jnp.zeros_like(radius), high, above, jnp.abs(above - radius), y)
  y = lax.while_loop(unfinished, narrow, start)[-1]
  return _finish(rows, 1 + _over_lengths(rows, y), radius > 0), state


def gradvac(
  gram: Array,
  prior: Array,
  state: PyTree,
  key: Array,
  *,
  losses: Array | None = None,
  beta: float = 0.01,
) -> Weighed:
  """Gradient vaccine: a row whose cosine with another is below its usual value is moved up to it.

  For all j != i in random order, phi = cos(a_i, a_j) with a_i as it is by now, and t its target. If
  phi < t: a_i <- a_i + |a_i| (t sqrt(1 - phi^2) - phi sqrt(1 - t^2)) / (|a_j| sqrt(1 - t^2)) a_j.
  Then t <- (1 - beta) t + beta phi, 0 <= beta <= 1. State {'targets': [C, C]}, which start at 0.

  Wang et al. 2021, with the shared layers as one group. 1 - t^2 counts as 1e-6 at least.
  """
  del losses
  rows = semidefinite(rows_of(gram, prior))

  def change(found: tuple[Array, Array], at: _Pairs) -> tuple[Array, tuple[Array, Array]]:
    targets, below = found
    target = targets[at.one, at.other]
    one, other = jnp.sqrt(jnp.maximum(at.squared_one, 0)), jnp.sqrt(at.squared_other)
    cosine = jnp.clip(at.product / jnp.maximum(one * other, _TINY), -1, 1)
    across = jnp.sqrt(jnp.maximum(1 - target**2, 1e-6))
    move = one * (target * jnp.sqrt(1 - cosine**2) - cosine * across) / (other * across)
    lower = at.use & (cosine < target)
    moved = jnp.where(at.use, (1 - beta) * target + beta * cosine, target)
    return jnp.where(lower, move, 0), (targets.at[at.one, at.other].set(moved), below | lower.any())

  start = (jnp.asarray(state['targets'], jnp.float32), jnp.zeros((), bool))
  added, (targets, below) = _in_random_order(rows, key, change, start)
  weights = _finish(rows, 1 + _over_lengths(rows, _dot(rows.lengths, added)), below)
  return weights, {'targets': targets}


def gradnorm(
  gram: Array,
  prior: Array,
  state: PyTree,
  key: Array,
  *,
  losses: Array | None = None,
  alpha: float = 1.5,
  rate: float = 0.1,
) -> Weighed:
  """GradNorm: weighted rows of one length, longer for the classes whose loss falls slowly.

  log w_c <- log w_c - rate (log |w_c a_c| - log m - alpha log r_c), with m the mean of |w_c a_c|
  over the classes that are there, and r_c = (L_c / first L_c) / mean. Then weights are scaled to
  sum to the number of these classes. alpha >= 0, 0 <= rate <= 1. State {'weights': [C], 'losses':
  [C]}: the first losses, 0 where a class was not there yet.

  Chen et al. 2018. They take gradient steps on sum_c |w_c |a_c| - m r_c^alpha|, whose size depends
  on that of the gradients, and use the weights a step later; rows there are those of the last
  shared layer. Here weights are 1e-6 at least, and r_c = 1 where a loss is not positive.

  Raises:
    UserError: without losses [C] (unless alpha is 0).
  """
  del key
  rows = rows_of(gram, prior)
  weights, first = (jnp.asarray(state[name], jnp.float32) for name in ('weights', 'losses'))
  slow = jnp.zeros_like(weights)  # log r_c
  if losses is not None:
    now = jnp.asarray(losses, jnp.float32)
    check_shape('losses', now, weights.shape)
    positive = rows.present & (now > 0) & jnp.isfinite(now)
    first = jnp.where((first <= 0) & positive, now, first)
    ratio = jnp.where(positive, now / jnp.where(first > 0, first, 1), 0)
    mean = ratio.sum() / jnp.maximum(positive.sum(), 1)
    slow = jnp.where(positive, jnp.log(jnp.where(positive, ratio / mean, 1)), 0)
  elif not (isinstance(alpha, int | float) and alpha == 0):
    raise UserError(
      'losses [C], the mean loss of each class, for gradnorm', 'None', 'pass losses=, or alpha=0'
    )
  norms = jnp.where(rows.present, weights * rows.lengths, 1)
  count = rows.present.sum()
  mean = jnp.where(rows.present, norms, 0).sum() / jnp.maximum(count, 1)
  step = rate * (jnp.log(norms) - jnp.log(jnp.where(count > 0, mean, 1)) - alpha * slow)
  new = jnp.where(rows.present, weights * jnp.exp(-step), 0)
  new = jnp.maximum(new * (count / jnp.maximum(new.sum(), _TINY)), LEAST)
  new *= count / jnp.where(rows.present, new, 0).sum()
  found = _finish(rows, new)
  weights = jnp.where(rows.present & (count > 1), found, weights)
  return found, {'weights': weights, 'losses': first}


def interference(
  gram: Array,
  prior: Array,
  state: PyTree,
  key: Array,
  *,
  losses: Array | None = None,
  share: float = 1.0,
  protect: Array | None = None,
) -> Weighed:
  """The smallest change of the weights by which no class loses more than a share of its own gain.

  argmin |w - 1|^2 over w >= 0 with, for every protected class c,
    sum_{d != c} w_d pi_d G[c, d] >= -share w_c pi_c G[c, c]:
  the interference with c (`conflict.interference`, with w_d pi_d in place of pi_d) is at most the
  share. At share = 1 no protected class loses to first order. w = 1 where this holds already.
  w = 0 is allowed, and it is the answer where protected classes undo each other whatever their
  weights, as all classes do near a minimum: training then stands still. Protect a few. No state.

  Of this project. Weights are within 5e-5 of SciPy's for C from 2 to 100. Where the weights that
  keep the limits form a thin cone, as where nearly all classes conflict, they are within 2e-3 up to
  C = 30; at C = 100 and beyond they may not be resolved, and break limits by 1e-3.

  Args:
    share: from 0 to 1.
    protect: bool [C], such as the minority; by default all classes.
  """
  del key, losses
  rows = rows_of(gram, prior)
  size = len(rows.lengths)
  protected = rows.present
  if protect is not None:
    protect = jnp.asarray(protect, bool)
    check_shape('protect', protect, (size,))
    protected &= protect
  eye = jnp.eye(size)
  gains = rows.cosines * rows.lengths[None] * jnp.where(eye > 0, share, 1)  # / |a_c|, by [c, d]
  gains = jnp.where(protected[:, None], gains, 0)
  violated = (gains.sum(1) < 0).any()
  limits = jnp.concatenate([gains / _positive(jnp.linalg.norm(gains, axis=1))[:, None], eye])
  weights = quadratic.nearest_in_cone(limits, jnp.ones(size))
  return _finish(rows, jnp.maximum(weights, 0), violated), state


def _dot(a: Array, b: Array) -> Array:
  return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _positive(x: Array) -> Array:
  """x where it is positive, and 1 elsewhere."""
  return jnp.where(x > 0, x, 1)


def _over_lengths(rows: Rows, y: Array) -> Array:
  """Weights of rows from weights of rows of length 1.   [C] -> [C]"""
  return y / _positive(rows.lengths)


def _inverse_lengths(rows: Rows) -> Array:
  """1 / lengths relative to the shortest row, [C] from 0 to 1; 0 where absent."""
  shortest = jnp.where(rows.present, rows.lengths, jnp.inf).min()
  return jnp.where(rows.present, shortest / _positive(rows.lengths), 0)


def _finish(rows: Rows, weights: Array, change: Array | bool = True) -> Array:
  """The weights; 1 for absent classes, and for all where nothing is to change."""
  weights = jnp.where(rows.present, weights, 1)
  change &= (rows.present.sum() > 1) & jnp.isfinite(weights).all()
  return jnp.where(change, weights, 1)


def _in_random_order(
  rows: Rows, key: Array, change: Callable[[Any, _Pairs], tuple[Array, Any]], found: Any
) -> tuple[Array, Any]:
  """Lets every row look at all others one by one, each in an order of its own.

  Args:
    change: (found, pairs) -> (what each row adds of the row that it looks at [C], found).

  Returns:
    [C, C] of what row i has added of row j, for rows of length 1; and found.
  """
  size = len(rows.lengths)
  every = jnp.arange(size)
  orders = jax.vmap(lambda key: jax.random.permutation(key, size))(jax.random.split(key, size))
  own = jnp.diagonal(rows.cosines)

  def look(t: Array, state: tuple) -> tuple:
    added, products, found = state  # products[i, j] of row i as it is and row j as it was
    other = orders[:, t]
    use = rows.present & rows.present[other] & (other != every)
    squared = products[every, every] + (added * products).sum(1)
    pairs = _Pairs(every, other, products[every, other], squared, own[other], use)
    move, found = change(found, pairs)
    move = jnp.where(use, move, 0)
    added = added.at[every, other].add(move)
    return added, products + move[:, None] * rows.cosines[other], found

  start = (jnp.zeros_like(rows.cosines), rows.cosines, found)
  added, _, found = lax.fori_loop(0, size, look, start)
  return added, found
