"""Conflict from batches whose images are coupled, against loops over pairs of batches."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from csba_jax.errors import UserError
from csba_jax.gradients import batch_conflict, batch_estimate, exact_conflict

C, N = 3, 8
STACKED = np.repeat([[0], [1], [2]], 2, axis=1)


def losses_fn(params, batch):
  """A perceptron with BatchNorm in training: the losses of a batch are coupled."""
  x = batch['x'] @ params['hidden']['kernel']
  x = (x - x.mean(0, keepdims=True)) / jnp.sqrt(x.var(0, keepdims=True) + 1e-5)
  logits = jnp.tanh(x * params['norm']['scale'][None]) @ params['head']['kernel']
  label = batch['label'][:, None]
  return -jnp.take_along_axis(jax.nn.log_softmax(logits), label, 1)[:, 0]


def draw(seed=0, batches=4, labels=None):
  """(params, batches) in float64."""
  rng = np.random.default_rng(seed)
  params = {
    'hidden': {'kernel': rng.normal(size=(5, 6))},
    'norm': {'scale': rng.uniform(0.5, 1.5, 6)},
    'head': {'kernel': rng.normal(size=(6, C))},
  }
  found = []
  for b in range(batches):
    label = rng.integers(0, C, N) if labels is None else np.asarray(labels[b])
    found.append({'x': rng.normal(size=(N, 5)) + label[:, None], 'label': label})
  return jax.tree.map(jnp.asarray, params), found


def by_hand(params, batches, layers, weight=lambda batch: np.ones(N, bool)):
  """(Gram, [t_b without each batch], sizes): every pair of batches, every pair of classes."""

  @jax.jit
  def sum_gradient(params, batch, member):
    return jax.grad(lambda params: jnp.where(member, losses_fn(params, batch), 0).sum())(params)

  members = [[(b['label'] == c) & weight(b) for c in range(C)] for b in batches]
  sizes = np.array([[m.sum() for m in of] for of in members])
  rows = [
    [
      np.concatenate(
        [np.ravel(leaf) for name in layers for leaf in jax.tree.leaves(gradient[name])]
      )
      for gradient in (sum_gradient(params, batch, jnp.asarray(m)) for m in of)
    ]
    for batch, of in zip(batches, members, strict=True)
  ]

  def gram(kept):
    found = np.zeros((C, C))
    for c, d in np.ndindex(C, C):
      pairs = list(itertools.permutations(kept, 2))
      number = sum(sizes[a, c] * sizes[b, d] for a, b in pairs)
      product = sum(rows[a][c] @ rows[b][d] + rows[a][d] @ rows[b][c] for a, b in pairs) / 2
      found[c, d] = product / number if number else 0
    return found

  everything = range(len(batches))
  return gram(everything), [gram([a for a in everything if a != b]) for b in everything], sizes


@pytest.mark.seconds
@pytest.mark.parametrize('max_bytes', [10**9, 1])
def test_grams_and_errors_are_those_of_loops_over_pairs_of_batches(max_bytes):
  with jax.enable_x64(True):
    params, batches = draw()
    found = batch_conflict(
      losses_fn, params, batches, num_classes=C, head='^head', max_bytes=max_bytes
    )
    for scope, layers in (
      ('total', ('hidden', 'norm', 'head')),
      ('shared', ('hidden', 'norm')),
      ('norm', ('norm',)),
    ):
      gram, without, sizes = by_hand(params, batches, layers)
      at = found.at(scope)
      np.testing.assert_allclose(found.grams[at], gram, rtol=1e-9, atol=1e-12)
      without = np.stack(without)
      spread = 3 / 4 * ((without - without.mean(0)) ** 2).sum(0)
      np.testing.assert_allclose(found.errors[at], np.sqrt(spread), rtol=1e-7, atol=1e-12)
  assert found.counts.tolist() == sizes.sum(0).tolist()
  assert found.about == {'target': 'training batches', 'batches': 4, 'batch_size': N}


def test_intervals_of_class_measures_leave_out_batch_by_batch():
  params, batches = draw(seed=3, batches=5)
  prior = np.array([0.5, 0.3, 0.2])
  found = batch_conflict(losses_fn, params, batches, num_classes=C, prior=prior)

  def measures(gram):
    total, own = gram @ prior, np.diagonal(gram)
    with np.errstate(invalid='ignore'):
      cosine = total / np.sqrt(own * (total @ prior))
    return np.stack([prior * total / (total @ prior), cosine, 1 - total / (prior * own)])

  without = []
  for b in range(5):
    rest = batch_conflict(
      losses_fn, params, batches[:b] + batches[b + 1 :], num_classes=C, prior=prior
    )
    without.append(measures(rest.gram()))
  width = scipy.stats.t.ppf(0.975, 4) * np.sqrt(4 * np.var(without, axis=0))
  low, high = np.array([[-np.inf], [-1], [0]]), np.array([[np.inf], [1], [np.inf]])
  for i, sign in enumerate((-1, 1)):
    expected = np.clip(measures(found.gram()) + sign * width, low, high)
    known = ~np.isnan(expected)
    assert known.sum() >= 6
    np.testing.assert_allclose(found.class_intervals[:, i][known], expected[known], rtol=1e-6)
  np.testing.assert_allclose(
    found.class_measures(), np.clip(measures(found.gram()), low, high), rtol=1e-6
  )


@pytest.mark.seconds
def test_losses_are_means_over_the_images_of_all_batches():
  with jax.enable_x64(True):
    params, batches = draw()
    found = batch_conflict(losses_fn, params, batches, num_classes=C)
    losses = np.concatenate([losses_fn(params, batch) for batch in batches])
    label = np.concatenate([batch['label'] for batch in batches])
  np.testing.assert_allclose(found.losses, [losses[label == c].mean() for c in range(C)])


def test_what_is_masked_does_not_count_but_is_in_the_statistics():
  keep = np.arange(N) < 6
  with jax.enable_x64(True):
    params, batches = draw()
    masked = [batch | {'mask': keep} for batch in batches]
    found = batch_conflict(losses_fn, params, masked, num_classes=C)
    gram, _, sizes = by_hand(params, batches, ('hidden', 'norm', 'head'), lambda batch: keep)
  np.testing.assert_allclose(found.gram('total'), gram, rtol=1e-9, atol=1e-12)
  assert found.counts.tolist() == sizes.sum(0).tolist()


def test_a_class_that_few_batches_have():
  """In one batch: nothing is known; in two: a Gram without an interval; in three: both."""
  labels = [[0, 0, 0, 0, 1, 2, 2, 2]] + 2 * [[0, 0, 0, 0, 0, 0, 2, 2]] + [[0] * 8]
  params, batches = draw(labels=labels)
  params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  found = batch_conflict(losses_fn, params, batches, num_classes=C)
  assert found.counts.tolist() == [4 + 6 + 6 + 8, 1, 3 + 2 + 2]
  at = found.at('total')
  assert found.grams[at][1, 1] == 0
  assert np.isnan(found.cosine('total')[1]).all()
  assert np.isnan(found.low[at][1]).all()
  assert np.isfinite(found.low[at][0, 2])
  two = batch_conflict(losses_fn, params, batches[1:], num_classes=C)
  assert two.grams[at][2, 2] != 0
  assert np.isnan(two.low[at][2, 2])


@pytest.mark.seconds
def test_where_images_are_independent_it_estimates_the_gradient_of_the_data():
  """Per-example losses, every image once: the mean over many batches is the exact matrix."""

  def independent(params, batch):
    logits = jnp.tanh(batch['x'] @ params['hidden']['kernel']) @ params['head']['kernel']
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch['label'][:, None], 1)[:, 0]

  with jax.enable_x64(True):
    params, batches = draw(batches=300)
    params = {name: params[name] for name in ('hidden', 'head')}
    found = batch_conflict(independent, params, batches, num_classes=C)
    data = {name: np.concatenate([b[name] for b in batches]) for name in ('x', 'label')}
    exact = exact_conflict(independent, params, data, num_classes=C)
  at = found.at('total')
  assert (abs(found.grams[at] - exact.grams[at]) < 4 * found.errors[at]).all()
  np.testing.assert_allclose(found.losses, exact.losses)


def simulated(rng, mean, batches=6, size=12):
  """s_cb of batches of a long tail with a noise that all classes of a batch share."""
  classes, dimensions = mean.shape
  label = rng.choice(classes, p=[0.6, 0.3, 0.1], size=(batches, size))
  sizes = np.stack([np.bincount(row, minlength=classes) for row in label])
  shared = rng.normal(size=(batches, 1, dimensions))
  own = rng.normal(size=(batches, classes, dimensions)) * np.sqrt(sizes)[..., None]
  return sizes[..., None] * (mean + 0.7 * shared) + own, sizes


def test_estimates_are_unbiased_and_intervals_cover():
  """Noise that the classes of a batch share does not enter, as it would with plain products."""
  rng = np.random.default_rng(0)
  mean = np.array([[1.0, 0, 0.5, 0], [-0.5, 1, 0, 0.3], [0, -1, 1, 0.5]])
  true = mean @ mean.T
  found, plain, covered = [], [], []
  for _ in range(1500):
    rows, sizes = simulated(rng, mean)
    flat = rows.reshape(-1, mean.shape[1])
    gram, _, low, high = batch_estimate.unbiased_over_batches(flat @ flat.T, sizes)
    total = rows.sum(0) / np.maximum(sizes.sum(0), 1)[:, None]
    found.append(gram)
    plain.append(total @ total.T)
    norms = np.sqrt(np.diag(true))
    cosine = (true / np.outer(norms, norms))[0, 1]
    if np.isfinite(low[0, 1]):
      covered.append(low[0, 1] <= cosine <= high[0, 1])
  found, plain = np.array(found), np.array(plain)
  error = found.std(0) / np.sqrt(len(found))
  assert (abs(found.mean(0) - true) < 4 * error + 0.02).all(), found.mean(0) - true
  assert (plain.mean(0) - true)[0, 1] > 0.05  # the shared noise
  assert 0.9 < np.mean(covered) < 0.99, np.mean(covered)


def test_over_all_classes_it_is_the_product_of_the_steps_of_different_batches():
  """sum_cd G[c, d] (pairs of images c, d in different batches) = sum_{a != b} <step_a, step_b>."""
  with jax.enable_x64(True):
    params, batches = draw(batches=3)
    found = batch_conflict(losses_fn, params, batches, num_classes=C)
    step = jax.jit(jax.grad(lambda params, batch: losses_fn(params, batch).sum()))
    flat = [
      np.concatenate([np.ravel(x) for x in jax.tree.leaves(step(params, batch))])
      for batch in batches
    ]
  expected = sum(a @ b for a, b in itertools.permutations(flat, 2))
  sizes = np.stack([np.bincount(batch['label'], minlength=C) for batch in batches])
  pairs = np.outer(sizes.sum(0), sizes.sum(0)) - sizes.T @ sizes
  np.testing.assert_allclose((found.gram('total') * pairs).sum(), expected, rtol=1e-9)


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    (lambda b: b[:1], 'expected at least 2 batches; found 1; to fix it: draw more'),
    (
      lambda b: [b[0], jax.tree.map(lambda x: x[:5], b[1])],
      'expected batches of one shape; found .* first, .* in batch 1; to fix it: fill the smaller '
      "ones up, with 'mask' 0",
    ),
    (
      lambda b: [{'x': x['x'][:6].reshape(3, 2, 5), 'label': STACKED} for x in b],
      'expected flat batches, arrays .N, ....; found class-stacked ones',
    ),
    (lambda b: [x | {'label': x['label'] + 2} for x in b], 'label'),
    (lambda b: [x | {'x': x['x'] * np.nan} for x in b], 'expected finite losses'),
  ],
)
def test_bad_input_ends_in_one_line(change, said):
  params, batches = draw(batches=2)
  with pytest.raises(UserError, match=said):
    batch_conflict(losses_fn, params, change(batches), num_classes=C)
