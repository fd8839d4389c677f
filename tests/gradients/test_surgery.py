"""Aggregators against vectors in float64, SciPy and TorchJD; what they promise; the Optax form."""

import functools
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize

from csba_jax.errors import UserError
from csba_jax.gradients import quadratic, surgery
from csba_jax.gradients.conflict import interference as interference_of

NAMES = tuple(surgery.AGGREGATORS)
SPARING = ('pcgrad', 'upgrad', 'dual_projection', 'interference')  # 1 where nothing is negative
KEY = jax.random.key(3)
CLASSES = 6
ROOM = 10  # classes of the compiled functions
# by surgery_reference.py, with torch 2.13.0 and torchjd 0.18.0
REFERENCE = pathlib.Path(__file__).with_name('surgery_reference.npz')


# what is always given, so that each aggregator is compiled once
SETTINGS = {
  'cagrad': {'c': 0.5},
  'gradvac': {'beta': 0.01},
  'gradnorm': {'alpha': 1.5, 'rate': 0.1},
  'interference': {'share': 0.5, 'protect': np.ones(ROOM, bool)},
}


@functools.cache
def compiled(name, mapped=False):
  """(gram, prior, state, key, losses, settings) -> (weights, state)."""

  def weigh(gram, prior, state, key, losses, settings):
    return surgery.AGGREGATORS[name](gram, prior, state, key, losses=losses, **settings)

  return jax.jit(jax.vmap(weigh, (0, *(None,) * 5)) if mapped else weigh)


def padded(array, axes, value):
  """With absent classes behind the others: one size, and one compilation, for all tests."""
  array = np.asarray(array)
  widths = [(0, max(0, ROOM - n) if i in axes else 0) for i, n in enumerate(array.shape)]
  return jnp.asarray(np.pad(array, widths, constant_values=value))


def weigh(name, gram, prior=None, state=None, key=KEY, losses=None, mapped=False, **settings):
  """(weights, state), as float64."""
  classes = np.shape(gram)[-1]
  room = max(classes, ROOM)
  axes = (1, 2) if mapped else (0, 1)
  gram = padded(np.asarray(gram, np.float32), axes, 0)
  prior = padded(np.asarray(np.ones(classes) if prior is None else prior, np.float32), (0,), 1)
  losses = padded(np.asarray(np.ones(classes) if losses is None else losses, np.float32), (0,), 1)
  state = surgery.initial(name, room) if state is None else state
  settings = SETTINGS.get(name, {}) | settings
  if name == 'interference':
    settings['protect'] = padded(settings['protect'], (0,), True)
  weights, state = compiled(name, mapped)(gram, prior, state, key, losses, settings)
  assert weights.dtype == jnp.float32
  assert (np.asarray(weights)[..., classes:] == 1).all()
  return np.asarray(weights, np.float64)[..., :classes], jax.tree.map(np.asarray, state)


def weights_of(*args, **settings):
  return weigh(*args, **settings)[0]


def prior_of(classes=CLASSES):
  pi = 3.0 ** -np.arange(classes)
  return pi / pi.sum()


def gradients(seed=0, classes=CLASSES, width=20, spread=30, opposed=0.5):
  """Class gradients [C, P] with conflict; their lengths grow up to `spread` times."""
  g = np.random.default_rng(seed).normal(size=(classes, width))
  g -= opposed * g.mean(0)
  return g * np.geomspace(1, spread, classes)[:, None]


def close(found, expected, tolerance):
  """The vectors agree, relative to the length of the second."""
  assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


# ---- slow references: vectors in float64, loops, SciPy


def orders_of(key, classes):
  """The orders that a key gives."""
  keys = jax.random.split(key, ROOM)
  every = np.asarray(jax.vmap(lambda key: jax.random.permutation(key, ROOM))(keys))
  return [[j for j in order if j < classes] for order in every[:classes]]


def slow_pcgrad(rows, key):
  total = 0
  for i, order in enumerate(orders_of(key, len(rows))):
    d = rows[i].copy()
    for j in order:
      if j != i and d @ rows[j] < 0:
        d -= d @ rows[j] / (rows[j] @ rows[j]) * rows[j]
    total += d
  return total


def slow_gradvac(rows, key, targets, beta):
  total, targets = 0, targets.copy()
  norm = np.linalg.norm
  for i, order in enumerate(orders_of(key, len(rows))):
    d = rows[i].copy()
    for j in order:
      if j == i:
        continue
      t, phi = targets[i, j], d @ rows[j] / norm(d) / norm(rows[j])
      if phi < t:
        factor = t * np.sqrt(1 - phi**2) - phi * np.sqrt(1 - t**2)
        d += norm(d) * factor / norm(rows[j]) / np.sqrt(1 - t**2) * rows[j]
      targets[i, j] = (1 - beta) * t + beta * phi
    total += d
  return total, targets


def onto_dual_cone(vector, rows):
  """argmin |d - vector| with rows @ d >= 0, by NNLS over what the rows add."""
  y, _ = optimize.nnls(rows.T, -vector, maxiter=10_000)
  return vector + y @ rows


def slow_interference(gram, prior, share, protect):
  own = np.eye(len(gram), dtype=bool)
  a = prior[:, None] * prior[None] * gram * np.where(own, share, 1)
  a /= np.linalg.norm(a, axis=1)[:, None]  # of the limits, so that SciPy's tolerance fits them
  found = optimize.minimize(
    lambda w: np.sum((w - 1) ** 2) / 2,
    np.ones(len(gram)),
    jac=lambda w: w - 1,
    bounds=[(0, None)] * len(gram),
    constraints={'type': 'ineq', 'fun': lambda w: a[protect] @ w, 'jac': lambda w: a[protect]},
    method='SLSQP',
    options={'ftol': 1e-14, 'maxiter': 500},
  )
  assert found.success
  return found.x


@pytest.mark.parametrize('seed', range(6))
def test_projections_against_vectors(seed):
  g, pi = gradients(seed), prior_of()
  rows = pi[:, None] * g
  gram = g @ g.T
  close(weights_of('pcgrad', gram, pi) @ rows, slow_pcgrad(rows, KEY), 3e-6)
  expected = onto_dual_cone(rows.sum(0), rows)
  close(weights_of('dual_projection', gram, pi) @ rows, expected, 1e-5)
  expected = sum(onto_dual_cone(row, rows) for row in rows)
  close(weights_of('upgrad', gram, pi) @ rows, expected, 1e-5)


def test_gradvac_against_vectors_over_steps():
  pi, beta = prior_of(), 0.2
  state, targets = surgery.initial('gradvac', ROOM), np.zeros((CLASSES, CLASSES))
  moved = 0
  for seed in range(6):
    g = gradients(seed, opposed=-3 if seed < 2 else 0.5)  # agreement first, so that targets rise
    rows, key = pi[:, None] * g, jax.random.key(seed)
    weights, state = weigh('gradvac', g @ g.T, pi, state, key, beta=beta)
    expected, targets = slow_gradvac(rows, key, targets, beta)
    close(weights @ rows, expected, 2e-5)
    np.testing.assert_allclose(state['targets'][:CLASSES, :CLASSES], targets, atol=2e-6)
    moved += (weights != 1).any()
  assert moved >= 4
  assert targets.max() > 0.05


@pytest.mark.parametrize('seed', range(6))
def test_mgda_is_the_shortest_convex_combination(seed):
  """d is it if and only if <d, a_c> >= |d|^2 for all c."""
  g, pi = gradients(seed), prior_of()
  rows = pi[:, None] * g
  weights = weights_of('mgda', g @ g.T, pi)
  assert weights.min() >= 0
  assert weights.sum() == pytest.approx(CLASSES, rel=1e-6)
  d = weights @ rows / CLASSES
  assert (rows @ d).min() >= (1 - 1e-5) * d @ d
  assert np.linalg.norm(d) <= (1 + 1e-6) * np.linalg.norm(rows, axis=1).min()


@pytest.mark.seconds
@pytest.mark.parametrize('seed', range(6))
def test_cagrad_against_its_dual(seed):
  """max_d min_i <a_i, d> in the ball is min_v <v, s> + c |s| |v| over convex combinations v."""
  c = [0.1, 0.5, 0.9][seed % 3]
  g, pi = gradients(seed, spread=5), prior_of()
  rows = pi[:, None] * g
  s = rows.sum(0)
  radius = c * np.linalg.norm(s)
  d = weights_of('cagrad', g @ g.T, pi, c=c) @ rows
  assert np.linalg.norm(d - s) <= (1 + 1e-5) * radius
  scale = np.linalg.norm(rows, axis=1).min() * np.linalg.norm(s)
  dual = optimize.minimize(
    lambda v: (v @ rows @ s + radius * np.linalg.norm(v @ rows)) / scale,
    np.full(CLASSES, 1 / CLASSES),
    bounds=[(0, 1)] * CLASSES,
    constraints={'type': 'eq', 'fun': lambda v: v.sum() - 1},
    method='SLSQP',
    options={'ftol': 1e-13, 'maxiter': 1000},
  )
  assert (rows @ d).min() / scale == pytest.approx(dual.fun, abs=1e-4)
  assert (rows @ d).min() > (rows @ s).min()


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('share', [0.5, 1.0])
def test_interference_against_scipy(seed, share):
  g, pi = gradients(seed, opposed=0), prior_of()
  gram = g @ g.T
  protect = np.arange(CLASSES) >= [0, 3][seed % 2]
  weights = weights_of('interference', gram, pi, share=share, protect=protect)
  expected = slow_interference(gram, pi, share, protect)
  np.testing.assert_allclose(weights, expected, atol=3e-5)


def test_gradnorm_against_a_loop():
  pi, alpha, rate = prior_of(), 0.7, 0.3
  state, w, first = surgery.initial('gradnorm', ROOM), np.ones(CLASSES), None
  for seed in range(5):
    g = gradients(seed)
    losses = np.random.default_rng(seed).uniform(0.5, 2, CLASSES)
    first = losses if first is None else first
    lengths = pi * np.linalg.norm(g, axis=1)
    slow = losses / first / np.mean(losses / first)
    w = w * (w * lengths / np.mean(w * lengths) / slow**alpha) ** -rate
    w *= CLASSES / w.sum()
    found, state = weigh('gradnorm', g @ g.T, pi, state, losses=losses, alpha=alpha, rate=rate)
    np.testing.assert_allclose(found, w, rtol=2e-5)
    np.testing.assert_allclose(state['losses'][:CLASSES], first, rtol=1e-6)


def test_gradnorm_without_alpha_ends_in_rows_of_one_length():
  g, pi = gradients(spread=300), prior_of()
  state = surgery.initial('gradnorm', ROOM)
  for _ in range(60):
    weights, state = weigh('gradnorm', g @ g.T, pi, state, alpha=0.0, rate=0.3)
  lengths = weights * pi * np.linalg.norm(g, axis=1)
  np.testing.assert_allclose(lengths, lengths[0], rtol=1e-4)
  assert weights.sum() == pytest.approx(CLASSES, rel=1e-6)


# ---- TorchJD, and tables by hand


@pytest.fixture(scope='module')
def reference():
  with np.load(REFERENCE) as file:
    return {name: file[name].astype(np.float64) for name in file}


@pytest.mark.seconds
@pytest.mark.parametrize('classes', [2, 3, 5, 10])
def test_torchjd_gives_the_same(reference, classes):
  gram = reference[f'gram_{classes}']

  def miss(weights, expected):
    """|sum_c (w_c - w'_c) a_c| / |sum_c w'_c a_c|, for each Gram."""
    squared = [np.einsum('ni,nij,nj->n', w, gram, w) for w in (weights - expected, expected)]
    return np.sqrt(np.maximum(squared[0], 0) / squared[1])

  assert len(gram) == 50
  for name in ('upgrad', 'dual_projection'):
    expected = reference[f'{name}_{classes}']
    assert (np.abs(expected - 1).max(1) > 0.01).sum() > 10, name
    assert miss(weights_of(name, gram, mapped=True), expected).max() < 2e-6, name
  # theirs by an interior point to 1e-4, around the mean
  expected = classes * reference[f'cagrad_{classes}']
  assert miss(weights_of('cagrad', gram, mapped=True), expected).max() < 5e-4
  # theirs by Frank-Wolfe, which ends early: never shorter than ours, and seldom far from it
  expected, weights = reference[f'mgda_{classes}'] * classes, weights_of('mgda', gram, mapped=True)
  ours, theirs = (np.einsum('ni,nij,nj->n', w, gram, w) for w in (weights, expected))
  assert (ours <= theirs * (1 + 1e-5)).all()
  assert np.median(miss(weights, expected)) < 1e-5


def test_torchjd_gives_the_same_where_the_order_is_none(reference):
  for i in range(0, 50, 2):
    gram, state = reference['gram_2'][i], surgery.initial('gradvac', ROOM)
    np.testing.assert_allclose(weights_of('pcgrad', gram), reference['pcgrad_2'][i], rtol=1e-5)
    for call, given in enumerate((np.abs(gram), gram, gram)):
      found, state = weigh('gradvac', given, state=state, beta=0.3)
      np.testing.assert_allclose(found, reference['gradvac_2'][i, call], rtol=2e-4)


@pytest.mark.seconds
@pytest.mark.parametrize('name', NAMES)
def test_many_at_once_are_each_alone(reference, name):
  grams = reference['gram_5']
  together = weights_of(name, grams, mapped=True)
  alone = [weights_of(name, gram) for gram in grams[:6]]
  np.testing.assert_allclose(together[:6], alone, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
  ('name', 'gram', 'weights'),
  [
    # 1 + 22 / 18 and 1 + 22 / 38: each takes from the other what it opposes
    ('pcgrad', [[18, -22], [-22, 38]], [2.22222, 1.57895]),
    ('upgrad', [[18, -22], [-22, 38]], [2.22222, 1.57895]),
    # the sum (-4, 16) opposes the first row alone: 1 + 4 / 18
    ('dual_projection', [[18, -22], [-22, 38]], [1.22222, 1]),
    # (38 + 22, 18 + 22) / 100, twice
    ('mgda', [[18, -22], [-22, 38]], [1.2, 0.8]),
    ('mgda', [[1, 3], [3, 100]], [2, 0]),
    # 22 w_2 <= 9 w_1 and 22 w_1 <= 19 w_2 leave nothing
    ('interference', [[18, -22], [-22, 38]], [0, 0]),
    # 10 w_2 <= 9 w_1: the nearest of k (1, 0.9) is k = 1.9 / 1.81
    ('interference', [[18, -10], [-10, 38]], [1.04972, 0.94475]),
  ],
)
def test_tables_by_hand(name, gram, weights):
  """A change here is a change of what the method is."""
  np.testing.assert_allclose(weights_of(name, gram), weights, rtol=1e-5, atol=1e-6)


def test_cagrad_by_hand():
  """Two rows at right angles, of lengths 1 and 3: the step turns to the short one."""
  gram, c = np.diag([1.0, 9.0]), 0.5
  weights = weights_of('cagrad', gram, c=c)
  # <a_1, d> = 1 + v_1 < 9 = <a_2, s>: v is the first row alone, of length c |s|
  np.testing.assert_allclose(weights, [1 + c * np.sqrt(10), 1], rtol=1e-5)


# ---- what they promise


@pytest.mark.parametrize('name', NAMES)
def test_one_class_or_none_gives_ones(name):
  for diagonal in ([0, 0, 0], [0, 4, 0], [np.nan, 4, -1], [np.inf, 4, 0]):
    found = weights_of(name, np.diag(np.array(diagonal, float)), np.array([0.2, 0.3, 0.5]))
    assert (found == 1).all(), diagonal


@pytest.mark.parametrize('name', SPARING)
def test_without_conflict_weights_are_exactly_one(name):
  for seed in range(5):
    gram = np.abs(gradients(seed) @ gradients(seed).T)  # not semidefinite
    assert (weights_of(name, gram, prior_of()) == 1).all()


def test_other_reasons_for_weights_of_exactly_one():
  g, pi = gradients(), prior_of()
  gram = g @ g.T
  assert (gram < 0).any()
  assert (weights_of('cagrad', gram, pi, c=0.0) == 1).all()
  assert (weights_of('gradvac', np.abs(gram), pi) == 1).all()  # targets start at 0
  assert (weights_of('interference', gram, pi, protect=np.zeros(CLASSES, bool)) == 1).all()
  undone = np.where(interference_of(gram, pi) > 0.5, True, False)
  assert undone.any()
  assert not undone.all()
  assert (weights_of('interference', gram, pi, protect=~undone) == 1).all()


@pytest.mark.parametrize('name', NAMES)
def test_absent_classes_keep_one_and_stay_out(name):
  """With them, the others have the weights that they have without them."""
  here = [0, 2, 3, 5]
  g, pi = gradients(1), prior_of()
  gram = g @ g.T
  deterministic = name not in ('pcgrad', 'gradvac')
  expected = weights_of(name, gram[np.ix_(here, here)], pi[here], losses=np.ones(4))
  for absent in (0.0, np.nan, -1.0, np.inf):
    holes = gram.copy()
    holes[[1, 4]] = holes[:, [1, 4]] = absent
    found, state = weigh(name, holes, pi)
    assert (found[[1, 4]] == 1).all()
    assert np.isfinite(found).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    if deterministic:
      np.testing.assert_allclose(found[here], expected, rtol=2e-4, atol=1e-5)
    else:
      assert (found[here] != 1).any()
  without_prior = np.where(np.isin(np.arange(CLASSES), here), pi, 0)
  found = weights_of(name, gram, without_prior)
  assert (found[[1, 4]] == 1).all()
  one_hole = gram.copy()
  one_hole[0, 3] = one_hole[3, 0] = (
    np.nan
  )  # both are there, what they do to each other is not known
  found = weights_of(name, one_hole, pi)
  assert (found[[0, 3]] == 1).all()
  assert np.isfinite(found).all()
  assert (found != 1).any()


@pytest.mark.parametrize('name', [n for n in NAMES if n not in ('pcgrad', 'gradvac')])
def test_the_order_of_the_classes_does_not_matter(name):
  g, pi, order = gradients(2), prior_of(), np.random.default_rng(0).permutation(CLASSES)
  losses = np.linspace(1, 2, CLASSES)
  gram = g @ g.T
  there = weights_of(name, gram, pi, losses=losses)
  moved = weights_of(name, gram[np.ix_(order, order)], pi[order], losses=losses[order])
  np.testing.assert_allclose(moved, there[order], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('scale', [1e-12, 1e10])
def test_the_scale_of_the_gram_and_of_the_prior_does_not_matter(name, scale):
  g, pi = gradients(3), prior_of()
  expected = weights_of(name, g @ g.T, pi)
  found = weights_of(name, scale * (g @ g.T), 1e-3 * pi)
  np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize('name', NAMES)
def test_grams_that_are_not_semidefinite_give_finite_weights(name):
  for seed in range(4):
    rng = np.random.default_rng(seed)
    gram = rng.normal(size=(CLASSES, CLASSES)) * np.geomspace(1, 300, CLASSES)[:, None]
    gram = gram + gram.T
    np.fill_diagonal(gram, np.abs(np.diagonal(gram)) * (seed + 0.1))
    found = weights_of(name, gram, prior_of())
    assert np.isfinite(found).all()
    assert found.min() > -1e-6 or name == 'gradvac'


@pytest.mark.parametrize('name', ['pcgrad', 'upgrad', 'dual_projection'])
def test_projections_only_add(name):
  g = gradients(4)
  assert weights_of(name, g @ g.T, prior_of()).min() >= 1


@pytest.mark.parametrize('name', ['upgrad', 'dual_projection'])
def test_no_class_loses_to_first_order(name):
  for seed in range(5):
    g, pi = gradients(seed), prior_of()
    d = weights_of(name, g @ g.T, pi) @ (pi[:, None] * g)
    gains = g @ d / np.linalg.norm(g, axis=1) / np.linalg.norm(pi[:, None] * g, axis=1).max()
    assert gains.min() > -1e-6


def test_no_protected_class_loses_more_than_the_share():
  for seed in range(5):
    g, pi = gradients(seed, opposed=0), prior_of()
    gram = g @ g.T
    for share in (0.5, 1.0):
      for protect in (np.ones(CLASSES, bool), np.arange(CLASSES) >= 4):
        weights = weights_of('interference', gram, pi, share=share, protect=protect)
        kept = weights > 1e-4
        undone = interference_of(gram, weights * pi)
        held = kept & protect
        assert (undone[held] < share + 1e-3).all()
        assert weights.min() >= 0


def test_random_orders_come_from_the_key():
  g = gradients()
  one, again, other = (
    weights_of('pcgrad', g @ g.T, key=jax.random.key(seed)) for seed in (0, 0, 1)
  )
  assert (one == again).all()
  assert (one != other).any()


@pytest.mark.seconds
def test_a_hundred_classes_with_lengths_that_differ_300_times():
  g = gradients(classes=100, width=400, spread=300, opposed=0)
  weights = weights_of('upgrad', g @ g.T)
  close(weights @ g, sum(onto_dual_cone(row, g) for row in g), 2e-5)


@pytest.mark.seconds
def test_programs_too_large_for_pivots_take_gradients(monkeypatch):
  g = gradients(1, spread=3)
  unit = g / np.linalg.norm(g, axis=1)[:, None]
  gram = jnp.asarray(unit @ unit.T, jnp.float32)
  linear = gram.sum(0) - 1.5
  expected = quadratic.nonnegative(gram, linear)
  assert (np.asarray(expected) > 0).any()
  limits = jnp.concatenate([jnp.asarray(unit[:, :CLASSES], jnp.float32), jnp.eye(CLASSES)])
  limits /= jnp.linalg.norm(limits, axis=1)[:, None]
  nearest = quadratic.nearest_in_cone(limits, jnp.ones(CLASSES))
  monkeypatch.setattr(quadratic, 'LARGEST_ONE', 1)
  monkeypatch.setattr(quadratic, 'LARGEST_MANY', 1)
  np.testing.assert_allclose(quadratic.nonnegative(gram, linear), expected, atol=1e-4)
  by_gradients = quadratic.nearest_in_cone(limits, jnp.ones(CLASSES))
  np.testing.assert_allclose(by_gradients, nearest, atol=1e-3)


# ---- before and after


def test_what_cannot_be_told_from_zero_is_left_alone():
  gram = np.array([[4.0, -1, -2, 3], [-1, 4, -3, -1], [-2, -3, 4, -1], [3, -1, -1, -4]])
  low, high = gram - 1.5, gram + 1.5
  low[0, 2] = low[2, 0] = np.nan
  expected = gram.copy()
  expected[[0, 1, 0, 2, 1, 3, 2, 3], [1, 0, 2, 0, 3, 1, 3, 2]] = 0
  for wrap in (lambda f: f, jax.jit):
    found = wrap(surgery.without_uncertain)(gram, low, high)
    np.testing.assert_array_equal(found, expected)
  stacked = surgery.without_uncertain(*(np.stack([x, x]) for x in (gram, low, high)))
  np.testing.assert_array_equal(stacked[1], expected)


def test_the_length_of_the_step_is_kept():
  g, pi = gradients(), prior_of()
  gram, rows = g @ g.T, pi[:, None] * g
  weights = weights_of('upgrad', gram, pi)
  kept = np.asarray(surgery.keep_length(weights, gram, pi), np.float64)
  length = np.linalg.norm(rows.sum(0))
  assert np.linalg.norm(weights @ rows) > 1.01 * length
  assert np.linalg.norm(kept @ rows) == pytest.approx(length, rel=1e-5)
  np.testing.assert_allclose(kept / weights, kept[0] / weights[0], rtol=1e-6)


def test_the_length_of_the_step_where_there_is_none():
  g, pi = gradients(), prior_of()
  ones, zeros = np.ones(CLASSES), np.zeros(CLASSES)
  gram = g @ g.T
  assert (surgery.keep_length(ones, gram, pi) == 1).all()
  assert (surgery.keep_length(zeros, gram, pi) == 0).all()
  assert (surgery.keep_length(2 * ones, 0 * gram, pi) == 2).all()
  opposite = np.array([[1.0, -1], [-1, 1]])  # the plain step is zero
  found = surgery.keep_length(np.array([2.0, 1]), opposite, np.ones(2))
  np.testing.assert_allclose(found, np.array([2.0, 1]) * 2 / 3, rtol=1e-6)  # of mean 1
  found = surgery.keep_length(0.01 * ones, gram, pi)
  np.testing.assert_allclose(found, 0.1, rtol=1e-6)  # 10 at most


# ---- jit and vmap


@pytest.mark.parametrize('name', NAMES)
def test_nothing_is_compiled_anew(name):
  step, state = compiled(name), surgery.initial(name, ROOM)
  weigh(name, gradients() @ gradients().T, state=state)
  before = step._cache_size()
  for seed in range(2):
    g = gradients(seed)
    _, state = weigh(name, g @ g.T, state=state, key=jax.random.key(seed))
  assert step._cache_size() == before


# ---- Optax


def tree_of(seed=0, dtype=np.float32):
  """Class gradients [C, ...] of a net with two layers and a head, and parameters like them."""
  rng = np.random.default_rng(seed)
  shapes = {'body': {'kernel': (4, 3), 'bias': (3,)}, 'head': {'kernel': (3, CLASSES)}}

  def is_shape(x):
    return isinstance(x, tuple)

  params = jax.tree.map(lambda s: jnp.zeros(s, dtype), shapes, is_leaf=is_shape)
  rows = jax.tree.map(
    lambda s: jnp.asarray(rng.normal(size=(CLASSES, *s)), dtype), shapes, is_leaf=is_shape
  )
  return params, rows


@pytest.mark.seconds
def test_the_optax_form_is_the_explicit_sum():
  params, rows = tree_of()
  pi = prior_of()
  for head in (None, '^head/'):
    tx = surgery.gradient_surgery('dual_projection', pi, head=head)
    found, state = jax.jit(tx.update)(rows, tx.init(params), params)
    within = rows if head is None else rows['body']
    flat = np.concatenate([x.reshape(CLASSES, -1) for x in jax.tree.leaves(within)], 1)
    weights = weights_of('dual_projection', flat @ flat.T, pi)
    assert (weights != 1).any()
    for path, leaf in jax.tree.leaves_with_path(found):
      plain = head is not None and path[0].key == 'head'
      row = np.asarray(rows[path[0].key][path[1].key], np.float64)
      expected = np.tensordot(pi * (1 if plain else weights), row, 1)
      np.testing.assert_allclose(leaf, expected, atol=2e-5 * np.abs(expected).max())
    assert int(state.count) == 1


@pytest.mark.seconds
def test_the_optax_form_in_a_chain():
  params, _ = tree_of()
  pi = prior_of()
  alone = surgery.gradient_surgery('pcgrad', pi, seed=4)
  tx = optax.chain(surgery.gradient_surgery('pcgrad', pi, seed=4), optax.sgd(0.1, momentum=0.9))

  @jax.jit
  def step(params, state, rows):
    updates, state = tx.update(rows, state, params)
    return optax.apply_updates(params, updates), state

  state, own, trace = tx.init(params), alone.init(params), jax.tree.map(jnp.zeros_like, params)
  expected = params
  for seed in range(3):
    _, rows = tree_of(seed)
    params, state = step(params, state, rows)
    direction, own = alone.update(rows, own)
    trace = jax.tree.map(lambda t, d: 0.9 * t + d, trace, direction)
    expected = jax.tree.map(lambda p, t: p - 0.1 * t, expected, trace)
  assert step._cache_size() == 1
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, expected)
  _, rows = tree_of()
  first, _ = alone.update(rows, alone.init(params))
  later, _ = alone.update(rows, own)  # the same rows in another order
  assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (first, later)), strict=True))


@pytest.mark.seconds
def test_the_optax_form_keeps_the_length_dtype_and_losses():
  params, rows = tree_of(dtype=jnp.bfloat16)
  pi = prior_of()
  tx = surgery.gradient_surgery('pcgrad', pi, same_length=True)
  found, _ = tx.update(rows, tx.init(params))
  plain = jax.tree.map(lambda x: np.tensordot(pi, np.asarray(x, np.float64), 1), rows)
  assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
  lengths = [
    np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(tree)))
    for tree in (found, plain)
  ]
  assert lengths[0] == pytest.approx(lengths[1], rel=0.01)
  tx = surgery.gradient_surgery('gradnorm', pi)
  _, state = tx.update(rows, tx.init(params), losses=jnp.arange(1.0, CLASSES + 1))
  np.testing.assert_array_equal(state.aggregator['losses'], np.arange(1, CLASSES + 1))


def test_a_head_that_is_everything_takes_the_plain_step():
  _, rows = tree_of()
  rows, pi = {'head': rows['head']}, prior_of()
  params = {'head': {'kernel': jnp.zeros((3, CLASSES))}}
  tx = surgery.gradient_surgery('pcgrad', pi, head='head')
  found, _ = tx.update(rows, tx.init(params))
  expected = np.tensordot(pi, np.asarray(rows['head']['kernel'], np.float64), 1)
  np.testing.assert_allclose(found['head']['kernel'], expected, atol=1e-5)


# ---- what is refused


@pytest.mark.parametrize(
  ('name', 'settings', 'words'),
  [
    ('pcgrd', {}, "expected an aggregator among pcgrad, .*; found 'pcgrd'; to fix it: use pcgrad"),
    (7, {}, 'found 7; to fix it: use one of these'),
    ('pcgrad', {'c': 1}, 'expected settings of pcgrad: none; found c'),
    ('gradnorm', {'losses': 1}, 'expected settings of gradnorm: alpha, rate; found losses'),
    ('cagrad', {'c': -0.1}, 'expected c, a number of at least 0; found -0.1'),
    ('cagrad', {'c': float('inf')}, 'found inf'),
    ('cagrad', {'c': True}, 'found True'),
    ('gradvac', {'beta': 1.5}, 'expected beta, a number from 0 to 1; found 1.5'),
    ('gradnorm', {'alpha': float('nan')}, 'expected alpha, a number of at least 0; found nan'),
    ('gradnorm', {'rate': 2}, 'expected rate, a number from 0 to 1; found 2'),
    ('interference', {'share': '1'}, 'expected share, a number from 0 to 1'),
    ('interference', {'protect': [1, 0]}, r'expected protect, bool \[C\], or None'),
    ('interference', {'protect': True}, r'expected protect, bool \[C\], or None'),
  ],
)
def test_names_and_settings_are_checked(name, settings, words):
  with pytest.raises(UserError, match=words):
    surgery.build(name, **settings)


def test_every_setting_has_a_range():
  for fun in surgery.AGGREGATORS.values():
    keywords = [p for p in inspect.signature(fun).parameters.values() if p.kind is p.KEYWORD_ONLY]
    names = {p.name for p in keywords} - {'losses', 'protect'}
    assert names <= set(surgery._RANGES)
    surgery.build(fun.__name__, **{p.name: p.default for p in keywords if p.name in names})


def direct(name, gram, prior, losses=None, **settings):
  state = surgery.initial(name, 3)
  return surgery.build(name, **settings)(gram, prior, state, KEY, losses=losses)


@pytest.mark.parametrize(
  ('call', 'words'),
  [
    (lambda: surgery.initial('mgd', 3), 'use mgda'),
    (lambda: surgery.initial('mgda', 0), 'expected num_classes >= 1; found 0'),
    (lambda: surgery.initial('mgda', 2.5), 'found 2.5'),
    (lambda: surgery.initial('mgda', True), 'found True'),
    (
      lambda: direct('mgda', np.ones((2, 3)), np.ones(2)),
      r'a Gram of shape \[C, C\]; found shape \[2, 3\]',
    ),
    (lambda: direct('mgda', np.eye(3), np.ones(2)), r'prior of shape \[3\]; found shape \[2\]'),
    (
      lambda: direct('interference', np.eye(3), np.ones(3), protect=np.ones(1, bool)),
      r'protect of shape \[3\]; found shape \[1\]',
    ),
    (
      lambda: direct('gradnorm', np.eye(3), np.ones(3), losses=np.ones(2)),
      r'losses of shape \[3\]; found shape \[2\]',
    ),
    (
      lambda: direct('gradnorm', np.eye(3), np.ones(3)),
      'the mean loss of each class, for gradnorm; found None; to fix it: pass losses=, or alpha=0',
    ),
    (
      lambda: surgery.keep_length(np.ones(2), np.eye(3), np.ones(3)),
      r'weights of shape \[3\]; found shape \[2\]',
    ),
    (lambda: surgery.gradient_surgery('mgd', np.ones(3)), 'use mgda'),
    (lambda: surgery.gradient_surgery('mgda', [1, -1]), 'expected prior, one number of at least 0'),
    (lambda: surgery.gradient_surgery('mgda', [0, 0]), 'not all 0'),
    (lambda: surgery.gradient_surgery('mgda', ['a']), 'prior'),
    (lambda: surgery.gradient_surgery('mgda', [[1.0]]), 'prior'),
    (lambda: surgery.gradient_surgery('mgda', [1, 1], seed=1.5), 'seed, an integer; found 1.5'),
    (
      lambda: surgery.gradient_surgery('mgda', prior_of(), head='tail').init(tree_of()[0]),
      "a head that matches parameters of the classifier; found 'tail'",
    ),
    (
      lambda: surgery.gradient_surgery('mgda', prior_of()).update(
        tree_of()[0], surgery.gradient_surgery('mgda', prior_of()).init(tree_of()[0])
      ),
      r'a leading axis of 6 classes, .* found body/bias of shape \[3\]; to fix it: put this',
    ),
  ],
)
def test_what_is_refused(call, words):
  with pytest.raises(UserError, match=words):
    call()


def test_gradnorm_needs_no_losses_without_alpha():
  found, state = surgery.build('gradnorm', alpha=0)(
    np.diag([1.0, 4.0]), np.ones(2), surgery.initial('gradnorm', 2), KEY
  )
  assert found[0] > 1 > found[1]
  assert (state['losses'] == 0).all()


def test_gradnorm_takes_a_class_up_when_it_comes():
  """First losses are those of the first time; weights of absent classes wait."""
  state = surgery.initial('gradnorm', ROOM)
  gram, losses = np.diag([1.0, 4.0, 0.0]), np.array([2.0, 3.0, np.nan])
  found, state = weigh('gradnorm', gram, state=state, losses=losses)
  np.testing.assert_array_equal(state['losses'][:3], [2, 3, 0])
  assert found[2] == state['weights'][2] == 1
  assert found[:2].sum() == pytest.approx(2, rel=1e-6)
  found, state = weigh('gradnorm', np.diag([1.0, 4.0, 1.0]), state=state, losses=np.ones(3))
  np.testing.assert_array_equal(state['losses'][:3], [2, 3, 1])
  assert found.sum() == pytest.approx(3, rel=1e-6)
