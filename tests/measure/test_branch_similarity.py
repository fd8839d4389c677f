"""Similarity of branches and gates by class, against slow formulas and the layers themselves."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csba_jax import config as config_lib
from csba_jax.data import pipeline
from csba_jax.measure import branch_similarity
from csba_jax.measure.branch_similarity import linear_cka
from csba_jax.methods import optimizers
from csba_jax.models import registry
from csba_jax.run import state as state_lib
from csba_jax.run.net import Metadata, Net

CLASSES = 4


def slow_hsic(k, m):
  """Unbiased HSIC of two kernel matrices, Song et al. 2012, eq. 5, term by term."""
  n = len(k)
  k, m = k * (1 - np.eye(n)), m * (1 - np.eye(n))
  one = np.ones(n)
  found = np.trace(k @ m)
  found += (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
  found -= 2 / (n - 2) * (one @ k @ m @ one)
  return found / (n * (n - 3))


def slow_cka(x, y):
  k, m = x @ x.T, y @ y.T
  return slow_hsic(k, m) / math.sqrt(slow_hsic(k, k) * slow_hsic(m, m))


def biased_cka(x, y):
  """Kornblith et al. 2019, with the biased HSIC."""
  x, y = x - x.mean(0), y - y.mean(0)
  across = np.square(x.T @ y).sum()
  return across / math.sqrt(np.square(x.T @ x).sum() * np.square(y.T @ y).sum())


def features(seed, n=30, d=5, e=7, common=0.0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, d)) + 3
  y = rng.normal(size=(n, e)) + common * x @ rng.normal(size=(d, e))
  return x, y


# ---- linear_cka


@pytest.mark.parametrize('n', [4, 5, 30])
@pytest.mark.parametrize('common', [0.0, 1.0])
def test_cka_is_the_formula_term_by_term(n, common):
  for seed in range(5):
    x, y = features(seed, n, common=common)
    k, m = (z @ z.T for z in (x - x.mean(0), y - y.mean(0)))
    if slow_hsic(k, k) * slow_hsic(m, m) > 0:
      assert linear_cka(x, y) == pytest.approx(slow_cka(x, y), rel=1e-8, abs=1e-10)


def test_hsic_is_that_of_song_et_al():
  x, y = features(0)
  x, y = x - x.mean(0), y - y.mean(0)
  n = len(x)
  expected = slow_hsic(x @ x.T, y @ y.T)
  assert branch_similarity._hsic(x, y) / (n * (n - 3)) == pytest.approx(expected, rel=1e-10)


def test_cka_of_the_same_up_to_rotation_scale_and_shift_is_one():
  rng = np.random.default_rng(1)
  x, y = features(1, common=1.0)
  rotation, _ = np.linalg.qr(rng.normal(size=(5, 5)))
  moved = -4.0 * x @ rotation + rng.normal(size=5)
  assert linear_cka(x, x) == pytest.approx(1, abs=1e-12)
  assert linear_cka(x, moved) == pytest.approx(1, abs=1e-9)
  assert linear_cka(moved, y) == pytest.approx(linear_cka(x, y), rel=1e-9)
  assert linear_cka(y, x) == pytest.approx(linear_cka(x, y), rel=1e-12)
  order = rng.permutation(len(x))
  assert linear_cka(x[order], y[order]) == pytest.approx(linear_cka(x, y), rel=1e-9)
  stretched = x * np.array([100.0, 1, 1, 1, 1])  # not a rotation: it is no longer the same
  assert linear_cka(x, stretched) < 0.9


def test_cka_of_independent_features_is_zero_in_the_mean_however_many():
  """Where the biased one is near 1."""
  found = []
  for seed in range(60):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 20, 400))
    found.append(linear_cka(x, y))
    assert biased_cka(x, y) > 0.9
  assert abs(np.mean(found)) < 3 * np.std(found) / math.sqrt(len(found))
  assert np.std(found) < 0.1
  assert min(found) < 0 < max(found)


def test_cka_grows_with_what_is_shared():
  values = [
    np.mean([linear_cka(*features(seed, common=common)) for seed in range(10)])
    for common in (0.0, 0.3, 1.0, 10.0)
  ]
  assert values == sorted(values)
  assert values[-1] > values[0] + 0.5


def test_cka_in_float32_is_computed_in_float64():
  x, y = features(2, common=0.5)
  shifted = (x + 1000).astype(np.float32)
  assert linear_cka(shifted, y.astype(np.float32)) == pytest.approx(linear_cka(x, y), abs=1e-4)


@pytest.mark.parametrize(
  ('x', 'y'),
  [
    (np.ones((10, 3)), np.random.default_rng(0).normal(size=(10, 2))),
    (np.random.default_rng(0).normal(size=(10, 2)), np.full((10, 3), 1e6)),
    (np.zeros((10, 3)), np.zeros((10, 3))),
    (np.full((10, 3), 0.1), np.full((10, 3), 0.1)),
    (np.eye(3), np.eye(3)),
    (np.zeros((0, 3)), np.zeros((0, 3))),
  ],
)
def test_cka_is_nan_where_nothing_varies_or_images_are_too_few(x, y):
  assert math.isnan(linear_cka(x, y))


# ---- measure


def net(attention, name='multibranch', width=0.05):
  """The initial net at a small width for images of 8 x 8 x 1."""
  c = config_lib.default()
  c.model.name, c.model.attention, c.model.width = name, attention, width
  model = registry.build(c.model, CLASSES, (8, 8, 1))
  tx, _ = optimizers.build(c, 1)
  metadata = Metadata(tuple('abcd'), np.ones(CLASSES, int), (8, 8, 1))
  return Net.of(model, state_lib.create(model, tx, (8, 8, 1), 0), metadata)


@pytest.fixture(scope='module')
def part():
  """Images of all classes but the last."""
  rng = np.random.default_rng(3)
  labels = rng.integers(0, CLASSES - 1, 23).astype(np.int32)
  labels[:3] = range(3)
  return pipeline.Part(rng.integers(0, 256, (23, 8, 8, 1), dtype=np.uint8), labels)


def shaken(net):
  """The net with every parameter away from its initial value, zeros too."""
  leaves, tree = jax.tree.flatten(net.params)
  rng = np.random.default_rng(5)
  moved = [x + 0.3 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
  return net.replace(params=jax.tree.unflatten(tree, moved))


@functools.partial(jax.jit, static_argnames=('model', 'keep'))
def forward(model, params, batch_stats, images, keep):
  variables = {'params': params, 'batch_stats': batch_stats}
  images = images.astype(jnp.float32) / 127.5 - 1
  return model.apply(variables, images, train=False, mutable=keep)


def kept(net, images):
  """(logits, what the layers kept), as NumPy."""
  found = forward(net.model, net.params, net.batch_stats, images, ('intermediates',))
  return jax.device_get(found)


def by_class(values, labels):
  """Loop over images and classes; NaN for an absent class."""
  rows = [
    [v for v, label in zip(values, labels, strict=True) if label == c] for c in range(CLASSES)
  ]
  empty = np.full(values.shape[1:], np.nan)
  return np.stack([np.mean(row, 0) if row else empty for row in rows])


@pytest.fixture(scope='module')
def csba(part):
  shaken_net = shaken(net('csba'))
  return shaken_net, branch_similarity.measure(shaken_net, part, 8)


BLOCKS = ['stage1/block1', 'stage2/block1', 'stage3/block1', 'stage3/block2']


@pytest.mark.seconds
def test_gates_are_those_of_the_layers(csba, part):
  """Recomputed from the weights: 2 sigmoid(W2 relu(W1 z)) of what the first block is given."""
  csba_net, found = csba
  assert sorted(found['gates']) == sorted(found['gate_spread']) == BLOCKS
  _, whole = kept(csba_net, part.images)
  for block in BLOCKS:
    stage, name = block.split('/')
    gates = np.asarray(whole['intermediates'][stage][name]['attention']['gates'][0], np.float64)
    means = by_class(gates, part.labels)  # [C, B, D]
    np.testing.assert_allclose(found['gates'][block], means.mean(-1).T, rtol=1e-5)
    spread = np.std(means[:3], 0).mean()
    assert found['gate_spread'][block] == pytest.approx(spread, rel=1e-4)
    assert np.shape(found['gates'][block]) == (3, CLASSES)
    assert np.isnan(np.array(found['gates'][block])[:, 3]).all()
    assert np.isfinite(np.array(found['gates'][block])[:, :3]).all()


@pytest.mark.seconds
def test_a_gate_is_2_sigmoid_of_its_own_branch(csba, part):
  """The features that are kept are those after the gate."""
  csba_net, _ = csba
  _, whole = kept(csba_net, part.images)
  block = whole['intermediates']['stage3']['block2']
  gates, branches = block['attention']['gates'][0], block['branches'][0]
  ungated = branches / gates  # the gate is one number for each channel of an image
  weights = jax.device_get(csba_net.params['stage3']['block2']['attention'])
  for b, name in enumerate(('branch1x1', 'branch3x3', 'branch5x5')):
    w1, w2 = weights[name]['squeeze'], weights[name]['excite']
    hidden = np.maximum(ungated[:, b] @ w1['kernel'] + w1['bias'][None], 0)
    expected = 2 / (1 + np.exp(-(hidden @ w2['kernel'] + w2['bias'][None])))
    np.testing.assert_allclose(gates[:, b], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.seconds
def test_cka_of_branches_is_over_all_images_and_symmetric(csba, part):
  csba_net, found = csba
  _, whole = kept(csba_net, part.images)
  assert sorted(found['cka']) == BLOCKS
  for block in BLOCKS:
    stage, name = block.split('/')
    u = np.asarray(whole['intermediates'][stage][name]['branches'][0], np.float64)
    expected = [[linear_cka(u[:, a], u[:, b]) for b in range(3)] for a in range(3)]
    np.testing.assert_allclose(found['cka'][block], expected, rtol=1e-3, atol=1e-4)
    known = np.array(found['cka'][block])
    np.testing.assert_allclose(known, known.T, rtol=1e-12)
    diagonal = np.diag(known)
    np.testing.assert_allclose(diagonal[~np.isnan(diagonal)], 1)


@pytest.mark.seconds
@pytest.mark.parametrize('batch_size', [5, 23, 64])
def test_batches_and_padding_change_nothing(csba, part, batch_size):
  csba_net, found = csba
  again = branch_similarity.measure(csba_net, part, batch_size)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope='module')
def csba_class(part):
  initial = net('csba_class')
  return initial, branch_similarity.measure(initial, part, 8)


@pytest.mark.seconds
def test_untrained_class_gates_are_one(csba_class):
  """2 sigmoid(0): V and E start at zero, and the net as plain CSBA."""
  _, found = csba_class
  assert sorted(found['gates']) == sorted([*BLOCKS, 'head'])
  assert sorted(found['gate_spread']) == BLOCKS
  head = np.array(found['gates']['head'])
  np.testing.assert_array_equal(head[:, :3], np.ones((3, CLASSES - 1)))
  assert np.isnan(head[:, 3]).all()


@pytest.mark.seconds
def test_class_gates_are_of_the_logit_of_the_images_class(csba_class, part):
  csba_net, _ = csba_class
  csba_net = shaken(csba_net)
  found = branch_similarity.measure(csba_net, part, 8)
  _, whole = kept(csba_net, part.images)
  gates = np.asarray(whole['intermediates']['head']['class_gates'][0], np.float64)  # [N, K, B]
  own = np.stack([gates[i, label] for i, label in enumerate(part.labels)])
  np.testing.assert_allclose(found['gates']['head'], by_class(own, part.labels).T, rtol=1e-5)
  assert np.ptp(np.array(found['gates']['head'])[:, :3]) > 0.01


@pytest.mark.seconds
@pytest.mark.parametrize(
  'attention',
  ['none', *(pytest.param(a, marks=pytest.mark.slow) for a in ('none_wide', 'se', 'cbam'))],
)
def test_nets_without_gates_have_branches_alone(part, attention):
  found = branch_similarity.measure(net(attention), part, 32)
  assert sorted(found['cka']) == BLOCKS
  assert found['gates'] == found['gate_spread'] == {}


def test_a_net_without_branches_has_nothing(driver, part):
  found = branch_similarity.measure(net('none', 'tiny'), part, 32)
  assert found == {'cka': {}, 'gates': {}, 'gate_spread': {}}


@pytest.mark.seconds
def test_nothing_is_kept_unless_asked_for(csba_class, part):
  """Neither in a state nor in what a forward pass gives, and the logits are the same."""
  csba_net, _ = csba_class
  model, variables = csba_net.model, csba_net.variables
  images = jnp.zeros((2, 8, 8, 1))
  initial = jax.eval_shape(model.init, jax.random.key(0), images)
  assert set(initial) == {'params', 'batch_stats'}
  names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(variables)]
  for word in ('intermediates', 'gates', "'branches'"):
    assert not any(word in name for name in names)
  step = functools.partial(model.apply, train=True, mutable=['batch_stats'])
  assert set(jax.eval_shape(step, variables, images)[1]) == {'batch_stats'}
  logits, whole = kept(csba_net, part.images)
  assert set(whole) == {'intermediates'}
  plain = forward(model, csba_net.params, csba_net.batch_stats, part.images, False)
  np.testing.assert_allclose(plain, logits, rtol=1e-5, atol=1e-6)


def test_spread_and_means_of_absent_classes():
  values, labels = np.arange(12.0).reshape(4, 3), np.array([2, 0, 2, 0])
  means = branch_similarity._class_means(values, labels, 3)
  np.testing.assert_array_equal(means[0], values[[1, 3]].mean(0))
  np.testing.assert_array_equal(means[2], values[[0, 2]].mean(0))
  assert np.isnan(means[1]).all()
  assert branch_similarity._spread(means) == pytest.approx(1.5)  # two classes, 3 apart
  assert math.isnan(branch_similarity._spread(means[:2]))
  assert math.isnan(branch_similarity._spread(np.full((3, 2), np.nan)))
