"""Small quadratic programs inside of compiled functions: min y' M y / 2 + q' y over y >= 0.

M is symmetric, positive semidefinite and scaled: its diagonal is about 1.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

LARGEST_ONE, LARGEST_MANY = 2000, 150  # variables up to which programs are solved by pivoting
PIVOTS = 40  # at most
STEPS = 1000  # of projected gradients, at most
PATIENCE = 3  # exchanges without progress before variables are exchanged one by one
REFINEMENTS = 4
TOLERANCE = 1e-6  # of signs, relative to the size of what is added up
RIDGE = 1e-7  # for each variable, relative to the diagonal: about what float32 rounds
SMALLEST = 1e-6  # singular value that counts, relative to rows of length 1


def semidefinite(matrix: Array) -> Array:
  """The nearest positive semidefinite matrix: negative eigenvalues become 0.   [n, n] -> [n, n]

  A matrix that is semidefinite but for the rounding of float32 comes back as it is. Unbiased
  estimates of Grams need not be semidefinite, nor Grams some of whose entries were set to 0.
  """

  def clipped(matrix: Array) -> Array:
    values, vectors = jnp.linalg.eigh(matrix)
    return _product(vectors * jnp.maximum(values, 0)[None], vectors.T)

  factor = jnp.linalg.cholesky(_with_ridge(matrix))  # NaN where there is none
  return lax.cond(jnp.isfinite(factor).all(), lambda x: x, clipped, matrix)


def nonnegative(matrix: Array, linear: Array, programs: int = 1) -> Array:
  """argmin of y' M y / 2 + q' y over y >= 0: y >= 0, z = M y + q >= 0 and y z = 0.

  Block principal pivoting (Kim & Park 2011): variables with y < 0 become 0 and those with z < 0
  become free, all at once while that helps, then one by one, 40 times at most. Each exchange solves
  the equations of the free variables anew, with a ridge of 1e-7 n whose effect four steps of
  refinement remove. Where it finds no solution, and where there are more than 2000 variables (150
  for several programs at once), up to 1000 steps of accelerated projected gradients follow, with
  restarts (O'Donoghue & Candes 2015).

  Against SciPy's NNLS in float64, on Grams of n = 2 to 100 random unit rows x_i, sum_i y_i x_i is
  wrong by at most 6e-6 of its size, mostly 1e-7. Where the condition number comes to 1e7, at
  which float32 cannot tell the Gram from a singular one, it is wrong by up to 2e-4.

  Args:
    matrix: M [n, n].
    linear: q [n].
    programs: with this matrix at once, by `jax.vmap` over q.

  Returns:
    y [n].
  """
  if len(linear) <= (LARGEST_ONE if programs == 1 else LARGEST_MANY):
    return _descend(matrix, linear, *_pivot(matrix, linear))
  return _descend(matrix, linear, jnp.zeros_like(linear), jnp.zeros((), bool))


def _product(a: Array, b: Array) -> Array:
  return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _with_ridge(matrix: Array) -> Array:
  size = len(matrix)
  return matrix + RIDGE * size * jnp.eye(size, dtype=matrix.dtype)


def _pivot(matrix: Array, linear: Array) -> tuple[Array, Array]:
  """Block principal pivoting: the best y that it met, and whether it is the solution."""
  size = len(linear)
  ridged, eye = _with_ridge(matrix), jnp.eye(size, dtype=matrix.dtype)

  def solve(free: Array) -> Array:
    factor = jnp.linalg.cholesky(jnp.where(free[:, None] & free[None], ridged, eye))
    y = jnp.zeros_like(linear)
    for _ in range(1 + REFINEMENTS):
      rest = jnp.where(free, -linear - _product(matrix, y), 0)
      y += jax.scipy.linalg.cho_solve((factor, True), rest)
    return y

  def look(free: Array, y: Array) -> tuple[Array, Array, Array]:
    """Which variables are on the wrong side; y cut at 0, and its objective."""
    z = _product(matrix, y) + linear
    scale = jnp.abs(linear).max() + _product(jnp.abs(matrix), jnp.abs(y))
    wrong = jnp.where(free, y < -TOLERANCE * jnp.abs(y).max(), z < -TOLERANCE * scale)
    y = jnp.maximum(y, 0)
    value = _product(y, _product(matrix, y) / 2 + linear)
    return wrong, y, jnp.where(jnp.isfinite(value), value, jnp.inf)

  def unfinished(state: tuple) -> Array:
    count, _, wrong, *_ = state
    return wrong.any() & (count < PIVOTS)

  def exchange(state: tuple) -> tuple:
    count, free, wrong, fewest, patience, best, least = state
    fewer = wrong.sum() < fewest
    fewest = jnp.where(fewer, wrong.sum(), fewest)
    patience = jnp.where(fewer, PATIENCE, patience - 1)
    last = jnp.arange(size) == size - 1 - jnp.argmax(wrong[::-1])
    free ^= wrong & (last | (patience >= 0))
    wrong, y, value = look(free, solve(free))
    better = (value < least) | ~wrong.any()
    best, least = jnp.where(better, y, best), jnp.where(better, value, least)
    return count + 1, free, wrong, fewest, patience, best, least

  free = jnp.zeros(size, bool)
  wrong, y, value = look(free, jnp.zeros_like(linear))
  state = (0, free, wrong, jnp.asarray(size + 1), jnp.asarray(PATIENCE), y, value)
  _, _, wrong, _, _, best, least = lax.while_loop(unfinished, exchange, state)
  return best, ~wrong.any() & jnp.isfinite(least)


def _descend(matrix: Array, linear: Array, y: Array, done: Array) -> Array:
  """Accelerated projected gradients from y, that start anew where they overshoot."""
  bound = jnp.abs(matrix).sum(0).max()
  power = matrix / bound
  for _ in range(
    3
  ):  # |M^8|^(1/8) is at least the largest eigenvalue, and at most n^(1/16) times it
    power = _product(power, power)
  rate = 1 / (bound * jnp.linalg.norm(power) ** (1 / 8))

  def unfinished(state: tuple) -> Array:
    return (state[0] < STEPS) & ~state[-1]

  def step(state: tuple) -> tuple:
    count, y, ahead, momentum, _ = state
    new = jnp.maximum(ahead - rate * (_product(matrix, ahead) + linear), 0)
    restart = _product(ahead - new, new - y) > 0
    momentum = jnp.where(restart, 1.0, momentum)
    longer = (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2
    done = jnp.abs(new - ahead).max() <= 1e-7 * new.max()
    return count + 1, new, new + (momentum - 1) / longer * (new - y), longer, done

  state = (0, y, y, jnp.ones((), linear.dtype), done)
  return lax.while_loop(unfinished, step, state)[1]


def nearest_in_cone(limits: Array, point: Array) -> Array:
  """argmin |w - p|^2 over the w with E w >= 0.

  Its dual, p + E' y with y >= 0 for the rows of E that are active, by the active sets of Lawson &
  Hanson (1974): the row that is violated most comes in, rows with y < 0 go out, one a step, at most
  5 n + 20 steps. w comes from an orthonormal basis of the active rows and not from y: where a cone
  is thin, y is 10^5 times p, and forming E E' would square that. Beyond n = 150, 1000 steps of
  accelerated projected gradients for y take its place, which leave thin cones unresolved.

  Args:
    limits: E [m, n], rows of length 1 or 0.
    point: p [n].

  Returns:
    w [n].
  """
  rows, size = limits.shape
  none, zero, no = jnp.zeros(rows, bool), jnp.zeros(rows, limits.dtype), jnp.zeros((), bool)
  if size > LARGEST_MANY:
    y = _descend(_product(limits, limits.T), _product(limits, point), zero, no)
    return point + _product(y, limits)
  padded = jnp.concatenate([limits, jnp.zeros((1, size), limits.dtype)])
  ridge = SMALLEST * jnp.eye(size, dtype=limits.dtype)

  def solve(active: Array) -> tuple[Array, Array]:
    """w and y for these rows with equality."""
    at = jnp.nonzero(active, size=size, fill_value=rows)[0]
    basis, upper = jnp.linalg.qr(jnp.concatenate([padded[at].T, ridge]))
    basis = basis[:size]
    first = _product(basis.T, point)
    w = point - _product(basis, first)
    second = _product(basis.T, w)  # once more, for what float32 and the ridge left
    y = -jax.scipy.linalg.solve_triangular(upper, first + second)
    return w - _product(basis, second), jnp.zeros(rows + 1, limits.dtype).at[at].set(y)[:rows]

  def unfinished(state: tuple) -> Array:
    return (state[0] < 5 * size + 20) & ~state[-1]

  def step(state: tuple) -> tuple:
    count, active, y, _, _ = state
    w, new = solve(active)
    low = active & (new <= 0)
    parts = jnp.where(low, y / jnp.where(low, jnp.maximum(y - new, 1e-30), 1), jnp.inf)
    back, first = low.any(), jnp.arange(rows) == jnp.argmin(parts)
    y = jnp.where(back, jnp.maximum(y + parts.min() * (new - y), 0), new)
    margin = jnp.where(active, jnp.inf, _product(limits, w))
    worst = jnp.arange(rows) == jnp.argmin(margin)
    done = ~back & (margin.min() >= -TOLERANCE * jnp.abs(point).max())
    active = jnp.where(back, active & ~first, active | (worst & ~done))
    return count + 1, active, jnp.where(active, y, 0), w, done

  return lax.while_loop(unfinished, step, (0, none, zero, point, no))[3]
