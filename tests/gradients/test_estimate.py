"""Estimates: exact against all at once, unbiased for their target, intervals that cover."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from csba_jax.errors import UserError
from csba_jax.gradients import (
  Conflict,
  batch_conflict,
  class_grams,
  conflict_matrix,
  estimate,
  estimated_conflict,
  exact_conflict,
  fold_statistics,
)
from csba_jax.gradients.gram import Layers

COUNTS = np.array([40, 18, 6, 1])
FEATURES = 7


def losses_fn(params, batch):
  """A perceptron; its losses are per-example."""
  hidden = jnp.tanh(batch['x'] @ params['body']['w'] + params['body']['b'][None])
  logits = hidden @ params['head']['w']
  return -jax.nn.log_softmax(logits)[jnp.arange(len(logits)), batch['label']]


@pytest.fixture(scope='module')
def params():
  rng = np.random.default_rng(0)
  shapes = {'body': {'w': (FEATURES, 6), 'b': (6,)}, 'head': {'w': (6, len(COUNTS))}}
  return jax.tree.map(
    lambda shape: rng.normal(size=shape).astype(np.float32),
    shapes,
    is_leaf=lambda x: type(x) is tuple,
  )


@pytest.fixture(scope='module')
def data():
  """A long tail down to a single image, in no order."""
  rng = np.random.default_rng(1)
  label = rng.permutation(np.repeat(np.arange(len(COUNTS)), COUNTS)).astype(np.int32)
  x = (
    rng.normal(size=(len(label), FEATURES)) + 0.7 * rng.normal(size=(len(COUNTS), FEATURES))[label]
  )
  return {'x': x.astype(np.float32), 'label': label}


def call(function, params, data, **options):
  return function(losses_fn, params, data, num_classes=len(COUNTS), head='^head/', **options)


@pytest.fixture(scope='module')
def exact(params, data):
  return call(estimate.exact_conflict, params, data)


def per_image_gradients(params, data):
  """[N, P] of the shared scope, in float64 on the host."""

  def loss(body, x, label):
    return losses_fn(params | {'body': body}, {'x': x[None], 'label': label[None]})[0]

  grads = jax.vmap(jax.grad(loss), (None, 0, 0))(params['body'], data['x'], data['label'])
  flat = [np.asarray(g, np.float64).reshape(len(data['label']), -1) for g in jax.tree.leaves(grads)]
  return np.concatenate(flat, axis=1)


def close(found, expected, tolerance):
  scale = np.sqrt(np.outer(np.diagonal(expected), np.diagonal(expected)))
  assert (np.abs(found - expected) / scale).max() < tolerance


@pytest.mark.seconds
def test_exact_is_all_images_at_once(params, data, exact, monkeypatch):
  at_once = class_grams(losses_fn, params, data, num_classes=len(COUNTS), head='^head/')
  for scope, gram in [('shared', at_once.shared), ('total', at_once.total), *at_once.grams.items()]:
    close(exact.gram(scope), np.asarray(gram, np.float64), 1e-5)
  np.testing.assert_allclose(exact.losses, at_once.losses, rtol=1e-5)
  assert exact.counts.tolist() == COUNTS.tolist()
  assert (exact.errors == 0).all()
  np.testing.assert_array_equal(exact.low, exact.high)
  assert exact.about['target'] == 'train, exact'
  monkeypatch.setattr(estimate.backend, 'images_per_dispatch', lambda: 7)  # ragged last batches
  again = call(estimate.exact_conflict, params, data)
  close(again.gram('total'), exact.gram('total'), 1e-5)


@pytest.mark.seconds
def test_exact_against_gradients_of_single_images(params, data, exact):
  g = per_image_gradients(params, data)
  means = np.stack([g[data['label'] == c].mean(0) for c in range(len(COUNTS))])
  close(exact.gram(), means @ means.T, 1e-5)


def test_passes_change_nothing_and_ticks_count_them(params, data, exact):
  ticks = []
  again = call(
    estimate.exact_conflict, params, data, max_bytes=1, tick=lambda *done: ticks.append(done)
  )
  np.testing.assert_allclose(again.grams, exact.grams, rtol=1e-6)
  total = 2 * COUNTS.sum()  # two layers, a pass each
  assert ticks[-1] == (total, total)
  assert [done for done, _ in ticks] == sorted({done for done, _ in ticks})


def test_an_absent_class_has_a_zero_row(params, data):
  kept = data['label'] != 2
  found = call(estimate.exact_conflict, params, {k: v[kept] for k, v in data.items()})
  assert (found.grams[:, 2] == 0).all()
  assert (found.grams[:, :, 2] == 0).all()
  assert np.isnan(found.cosine()[2]).all()
  assert not np.isnan(found.cosine()[0, 1])
  estimated = call(estimate.estimated_conflict, params, {k: v[kept] for k, v in data.items()})
  assert np.isnan(estimated.cosine()[2]).all()
  assert not estimated.resolvable()[2].any()
  assert not estimated.distinguishable()[2].any()
  assert not np.isnan(estimated.grams).any()


def test_folds_of_the_training_set_are_draws_with_replacement(data):
  index, sizes = estimate.draw_folds(data, len(COUNTS), 'train', 24, 8, seed=3)
  assert index.shape == (4, 8, 3)
  assert (sizes == 3).all()
  for c in range(len(COUNTS)):
    assert (data['label'][index[c]] == c).all()
  assert len(np.unique(index[2])) <= 6 < 24  # six images, drawn 24 times
  again, _ = estimate.draw_folds(data, len(COUNTS), 'train', 24, 8, seed=3)
  np.testing.assert_array_equal(again, index)
  other, _ = estimate.draw_folds(data, len(COUNTS), 'train', 24, 8, seed=4)
  assert (other != index).any()


def test_folds_of_the_population_share_no_image(data):
  index, sizes = estimate.draw_folds(data, len(COUNTS), 'population', 20, 8, seed=3)
  for c, n in enumerate(np.minimum(COUNTS, 20)):
    used = np.concatenate([index[c, k, : sizes[c, k]] for k in range(8)])
    assert len(used) == len(np.unique(used)) == n
    assert (data['label'][used] == c).all()
    assert sizes[c].max() - sizes[c].min() <= 1


def slow_unbiased(sums, sizes):
  """The formulas of `unbiased`'s docstring by loops, leaving folds out one by one."""
  classes, folds = sizes.shape
  s = {(c, k): sums[c * folds + k] for c in range(classes) for k in range(folds) if sizes[c, k]}
  of = {c: [k for k in range(folds) if sizes[c, k]] for c in range(classes)}

  def entry(c, d, without=None):
    total, pairs = 0.0, 0
    for k in of[c]:
      for m in of[d]:
        if without in ((c, k), (d, m)) or (c == d and k == m):
          continue
        total += s[c, k] @ s[d, m]
        pairs += sizes[c, k] * sizes[d, m]
    return total / pairs

  def cosine(c, d, without=None):
    return entry(c, d, without) / np.sqrt(entry(c, c, without) * entry(d, d, without))

  def error(function, c, d):
    variance = 0.0
    for e in {c, d}:
      replicates = np.array([function(c, d, (e, k)) for k in of[e]])
      variance += (len(of[e]) - 1) * replicates.var()
    return np.sqrt(variance)

  return entry, cosine, error


@pytest.mark.parametrize('target', ['train', 'population'])
def test_unbiased_against_loops(target):
  rng = np.random.default_rng(2)
  sizes = (
    np.full((3, 4), 5)
    if target == 'train'
    else np.array([[5, 5, 4, 4], [2, 2, 1, 1], [1, 1, 1, 0]])
  )
  vectors = rng.normal(size=(3, 1, 9)) * sizes[:, :, None] + 0.3 * rng.normal(size=(3, 4, 9))
  vectors = np.where(sizes[:, :, None] > 0, vectors, 0).reshape(12, 9)
  gram, errors, low, high = fold_statistics.unbiased(
    vectors @ vectors.T, sizes, np.array([50, 50, 3])
  )
  entry, cosine, error = slow_unbiased(vectors, sizes)
  quantile = {1: 12.7062047, 2: 4.3026527, 3: 3.1824463}
  for c, d in np.ndindex(3, 3):
    assert gram[c, d] == pytest.approx(entry(c, d), rel=1e-9)
    assert errors[c, d] == pytest.approx(error(entry, c, d), rel=1e-6)
    if c != d:
      folds = min((sizes[c] > 0).sum(), (sizes[d] > 0).sum())
      width = quantile[folds - 1] * error(cosine, c, d)
      expected = np.clip(cosine(c, d) + width * np.array([-1, 1]), -1, 1)
      np.testing.assert_allclose([low[c, d], high[c, d]], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('lacking', [False, True])
def test_intervals_of_class_measures_leave_out_fold_by_fold(lacking):
  """Shares, cosines with the batch gradient and interference, computed anew without each fold."""
  classes, folds = 4, 3
  rng = np.random.default_rng(1)
  sizes = np.array([[3, 2, 2], [2, 2, 1], [4, 3, 3], [1, 1, 1]])
  g = rng.normal(size=(classes * folds, 9)) * np.sqrt(sizes.reshape(-1, 1))
  g += sizes.reshape(-1, 1) * np.repeat(rng.normal(2, 1, (classes, 9)), folds, axis=0)
  counts = np.array([50, 30, 20, 1 if lacking else 9])
  prior = counts / counts.sum()

  def measures(sizes):
    there = g * (sizes.reshape(-1, 1) > 0)
    gram = fold_statistics.unbiased(there @ there.T, sizes)[0]
    total = gram @ prior
    own = np.diagonal(gram)
    undone = np.maximum(0, -(total - prior * own)) / (prior * own)
    shown = prior * total / (total @ prior), total / np.sqrt(own * (total @ prior)), undone
    raw = *shown[:2], -(total - prior * own) / (prior * own)
    return np.stack(shown), np.stack(raw)

  found = fold_statistics.class_intervals_over_folds(g @ g.T, sizes, counts, prior)
  variance = np.zeros((3, classes))
  for c in range(classes):
    without = []
    for k in range(folds):
      rest = sizes.copy()
      rest[c, k] = 0
      without.append(measures(rest)[1])
    variance += (folds - 1) * np.var(without, axis=0)
  width = scipy.stats.t.ppf(0.975, 2) * np.sqrt(variance)
  values = measures(sizes)[1]
  low = np.array([[-np.inf], [-1], [0]])
  high = np.array([[np.inf], [1], [np.inf]])
  expected = np.stack([np.clip(values + s * width, low, high) for s in (-1, 1)], axis=1)
  kept = slice(0, 3) if lacking else slice(None)
  np.testing.assert_allclose(found[..., kept], expected[..., kept], rtol=1e-9, atol=1e-12)
  assert np.isnan(found[..., 3]).all() == lacking


def test_a_class_of_one_image_gets_no_interval(params, data):
  for target in ('train', 'population'):
    found = call(estimate.estimated_conflict, params, data, target=target)
    at = found.at('shared')
    assert np.isnan(found.low[at, 3]).all()
    assert np.isnan(found.high[at, :, 3]).all()
    assert not found.resolvable()[3].any()
    assert not np.isnan(found.low[at][:3, :3]).any()
    assert found.about['target'] == target


def test_estimates_come_close_to_what_is_exact(params, data, exact):
  found = call(estimate.estimated_conflict, params, data, images=800, folds=8)
  assert np.abs(found.cosine() - exact.cosine())[:3, :3].max() < 0.1
  np.testing.assert_allclose(found.losses, exact.losses, rtol=0.1)
  assert found.counts.tolist() == [800] * 4


REPETITIONS = 1500


@pytest.fixture(scope='module')
def gradients(params, data):
  return per_image_gradients(params, data)


def resample(gradients, label, target, images, folds, repetitions=REPETITIONS):
  """`unbiased`, and the naive Gram of the same images, over many draws of folds."""
  found, naive = [], []
  for seed in range(repetitions):
    index, sizes = estimate.draw_folds({'label': label}, len(COUNTS), target, images, folds, seed)
    used = np.arange(index.shape[2]) < sizes[:, :, None]
    sums = np.where(used[..., None], gradients[index], 0).sum(2)
    flat = sums.reshape(-1, sums.shape[-1])
    found.append(fold_statistics.unbiased(flat @ flat.T, sizes, COUNTS))
    means = sums.sum(1) / sizes.sum(1)[:, None]
    naive.append(means @ means.T)
  return [np.stack(part) for part in zip(*found, strict=True)], np.stack(naive)


def deviations(samples, truth):
  """How many standard errors the mean over draws is from the truth, entry by entry."""
  error = samples.std(0) / np.sqrt(len(samples))
  return np.abs(samples.mean(0) - truth) / np.where(error > 0, error, 1)


@pytest.fixture(scope='module')
def resampled(gradients, data):
  return resample(gradients, data['label'], 'train', 64, 8)


@pytest.fixture(scope='module')
def truth(gradients, data):
  means = np.stack([gradients[data['label'] == c].mean(0) for c in range(len(COUNTS))])
  return means @ means.T


def test_the_estimate_is_unbiased_and_the_naive_one_is_not(resampled, truth):
  (grams, *_), naive = resampled
  assert deviations(grams, truth)[:3, :3].max() < 4
  biased = deviations(naive, truth)
  assert min(biased[0, 0], biased[1, 1], biased[2, 2]) > 5
  assert (naive.mean(0) - truth)[np.diag_indices(3)].min() > 0  # noise adds to the norms


def test_drawing_without_replacement_would_be_biased_for_the_training_set(gradients, data, truth):
  """Disjoint folds of all six images of a class know nothing of what a second draw would add."""
  (grams, *_), _ = resample(gradients, data['label'], 'population', 64, 8, repetitions=400)
  assert abs(grams[:, 2, 2].mean() - truth[2, 2]) > 8 * max(grams[:, 2, 2].std() / 20, 1e-12)


def test_intervals_cover(resampled, truth):
  (grams, errors, low, high), _ = resampled
  expected = conflict_matrix(truth)
  squares = np.einsum('rcc->rc', grams) > 2 * np.einsum('rcc->rc', errors)
  for c, d in ((0, 1), (0, 2), (1, 2)):
    solid = squares[:, c] & squares[:, d]
    assert solid.sum() > 500
    inside = (low[:, c, d] <= expected[c, d]) & (expected[c, d] <= high[:, c, d])
    assert 0.90 <= inside[solid].mean() <= 0.99


def test_the_population_is_estimated_without_bias():
  """New images every time: the expectation is the class's mean, known here."""
  rng = np.random.default_rng(5)
  counts = np.array([30, 6])
  means = rng.normal(size=(2, 20))
  found = []
  for seed in range(REPETITIONS):
    label = np.repeat([0, 1], counts)
    images = means[label] + 1.5 * rng.normal(size=(36, 20))
    index, sizes = estimate.draw_folds({'label': label}, 2, 'population', 64, 8, seed)
    used = np.arange(index.shape[2]) < sizes[:, :, None]
    sums = np.where(used[..., None], images[index], 0).sum(2).reshape(16, 20)
    found.append(fold_statistics.unbiased(sums @ sums.T, sizes, counts))
  grams, _, low, high = (np.stack(part) for part in zip(*found, strict=True))
  assert deviations(grams, means @ means.T).max() < 4
  expected = conflict_matrix(means @ means.T)[0, 1]
  assert 0.90 <= ((low[:, 0, 1] <= expected) & (expected <= high[:, 0, 1])).mean() <= 0.99


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'target': 'test'}, "target among train, population; found 'test'"),
    ({'folds': 1}, 'at least 2 folds'),
    ({'images': 4, 'folds': 8}, 'found 8 folds, 4 images'),
    ({'head': 'classifier'}, 'a head that matches'),
  ],
)
def test_wrong_options(params, data, options, message):
  with pytest.raises(UserError, match=message):
    estimate.estimated_conflict(losses_fn, params, data, num_classes=4, **options)


@pytest.mark.parametrize(
  'label',
  [np.zeros(3), np.zeros((3, 1), int), np.array([0, 4]), np.array([-1, 0]), np.zeros(0, int)],
)
def test_wrong_labels(params, label):
  data = {'x': np.zeros((len(label), FEATURES), np.float32), 'label': label}
  for function in (estimate.exact_conflict, estimate.estimated_conflict):
    with pytest.raises(UserError, match=r"data\['label'\] \[N\] of integers from 0 to 3"):
      function(losses_fn, params, data, num_classes=4)


def test_the_prior_is_that_of_the_data(params, data):
  for function in (estimate.exact_conflict, estimate.estimated_conflict):
    assert call(function, params, data).class_counts.tolist() == COUNTS.tolist()
    found = call(
      function, params, data, class_counts=COUNTS[::-1], class_names=np.array(list('abcd'))
    )
    assert found.class_counts.tolist() == COUNTS[::-1].tolist()
    np.testing.assert_allclose(found.prior, COUNTS[::-1] / COUNTS.sum())
    weighed = call(function, params, data, prior=np.array([1, 1, 2, 4]))
    np.testing.assert_allclose(weighed.prior, [0.125, 0.125, 0.25, 0.5])
    assert found.class_names == ('a', 'b', 'c', 'd')
    with pytest.raises(UserError, match='4 class names; found 2'):
      call(function, params, data, class_names=['a', 'b'])


def test_coupled_losses_are_refused(params, data):
  def coupled(params, batch):
    return losses_fn(params, batch | {'x': batch['x'] - batch['x'].mean(0, keepdims=True)})

  for function in (estimate.exact_conflict, estimate.estimated_conflict):
    with pytest.raises(UserError, match='per-example losses for a conflict over a data set'):
      function(coupled, params, data, num_classes=4)
    with pytest.raises(UserError, match='per-example losses'):
      function(losses_fn, params, data, num_classes=4, per_example=False)
    function(losses_fn, params, data, num_classes=4, per_example=True)


def test_wrong_losses(params, data):
  with pytest.raises(UserError, match='one loss for each of the 32 examples'):
    estimate.exact_conflict(lambda p, b: losses_fn(p, b).mean(), params, data, num_classes=4)
  nan = data | {'x': np.where(data['label'][:, None] == 1, np.nan, data['x'])}
  with pytest.raises(UserError, match=r'NaN or infinity from losses_fn in classes \[1\]'):
    call(estimate.exact_conflict, params, nan)


NAMES = {
  'class_names': tuple('abcd'),
  'class_counts': COUNTS,
  'prior': COUNTS / COUNTS.sum(),
  'about': {'target': 'x'},
}


def test_from_folds_sums_scopes_over_layers(params):
  layers = Layers.of(params, None, '^head/')
  rng = np.random.default_rng(0)
  parts = [rng.normal(size=(8, 30)) + 3 for _ in layers.names]
  sums = [p @ p.T for p in parts]
  found = estimate.from_folds(layers, sums, np.ones(8), np.full((4, 2), 2), COUNTS, NAMES)
  np.testing.assert_allclose(found.gram('total'), found.gram('body') + found.gram('head'))
  np.testing.assert_array_equal(found.gram('shared'), found.gram('body'))


class InOrder(NamedTuple):
  """Parameters that stand otherwise than their names in the alphabet."""

  stem: dict
  body: list
  head: dict


@pytest.mark.seconds
def test_layers_stand_in_one_order_everywhere():
  body = [{'w': jnp.eye(2)} for _ in range(11)]  # the names of 2 and 10 sort otherwise, too
  params = InOrder({'w': jnp.eye(2)}, body, {'w': jnp.ones((2, 2))})

  def losses(params, batch):
    x = batch['x'] @ params.stem['w']
    for layer in params.body:
      x = x @ layer['w']
    return ((x @ params.head['w']) ** 2).sum(1)

  x = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
  batch = {'x': x, 'label': np.arange(8) % 2}
  given = {'num_classes': 2, 'head': '^head'}

  def of_batch(params, batch):
    return class_grams(losses, params, batch, strategy='masked', per_example=True, **given)

  expected = ['stem', *(f'body/{i}' for i in range(11)), 'head']
  assert list(of_batch(params, batch).grams) == expected
  assert list(jax.jit(of_batch)(params, batch).grams) == expected
  assert Conflict.of(of_batch(params, batch)).layers == tuple(expected)
  for found in (
    exact_conflict(losses, params, batch, per_example=True, **given),
    estimated_conflict(losses, params, batch, images=4, folds=2, per_example=True, **given),
    batch_conflict(losses, params, [batch, batch], **given),
  ):
    assert list(found.layers) == expected
