"""Losses per example against NumPy in float64, finite differences and what they are for."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from csba_jax import losses
from csba_jax.errors import UserError

COUNTS = np.array([500, 80, 7, 1])


def random_batch(seed, n=40):
  rng = np.random.default_rng(seed)
  return 3 * rng.normal(size=(n, len(COUNTS))), rng.integers(0, len(COUNTS), n)


def cross_entropy_reference(logits, labels):
  """-log softmax, example by example."""
  values = []
  for row, label in zip(np.asarray(logits, np.float64), labels, strict=True):
    largest = row.max()
    values.append(largest + math.log(sum(math.exp(x - largest) for x in row)) - row[label])
  return np.array(values)


def balanced_softmax_reference(logits, labels):
  """-log(n_y e^{s_y} / sum_c n_c e^{s_c})  (Ren et al. 2020, eq. 3)."""
  values = []
  for row, label in zip(np.asarray(logits, np.float64), labels, strict=True):
    weighted = [n * math.exp(x) for n, x in zip(COUNTS, row, strict=True)]
    values.append(-math.log(weighted[label] / sum(weighted)))
  return np.array(values)


REFERENCES = {
  'cross_entropy': cross_entropy_reference,
  'balanced_softmax': balanced_softmax_reference,
}


def test_every_loss_has_a_reference_here():
  assert REFERENCES.keys() == losses.LOSSES.keys()


@pytest.mark.parametrize('name', REFERENCES)
def test_loss_equals_its_formula(name):
  logits, labels = random_batch(0)
  found = losses.build(name, COUNTS)(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
  assert found.shape == (len(labels),)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, REFERENCES[name](logits, labels), rtol=2e-5, atol=2e-6)
  with jax.enable_x64(True):
    found = losses.build(name, COUNTS)(jnp.asarray(logits), jnp.asarray(labels))
    assert found.dtype == jnp.float64
  np.testing.assert_allclose(found, REFERENCES[name](logits, labels), rtol=1e-12)


def test_hand_worked_numbers():
  logits = jnp.array([[0.0, math.log(3.0)]] * 2)
  labels = jnp.array([0, 1])
  plain = losses.build('cross_entropy', np.array([9, 1]))(logits, labels)
  np.testing.assert_allclose(plain, [math.log(4), math.log(4 / 3)], rtol=1e-6)
  balanced = losses.build('balanced_softmax', np.array([3, 1]))(logits, labels)  # e^s n = 3, 3
  np.testing.assert_allclose(balanced, [math.log(2), math.log(2)], rtol=1e-6)
  balanced = losses.build('balanced_softmax', np.array([3, 1]))(jnp.zeros((2, 2)), labels)
  np.testing.assert_allclose(balanced, [math.log(4 / 3), math.log(4)], rtol=1e-6)


def test_balanced_softmax_of_equal_counts_is_cross_entropy():
  logits, labels = random_batch(1)
  logits, labels = jnp.asarray(logits, jnp.float32), jnp.asarray(labels)
  balanced = losses.build('balanced_softmax', np.full(4, 60))(logits, labels)
  plain = losses.build('cross_entropy', np.full(4, 60))(logits, labels)
  np.testing.assert_allclose(balanced, plain, rtol=1e-5, atol=1e-6)


def test_counts_and_prior_give_the_same():
  logits, labels = random_batch(2)
  logits, labels = jnp.asarray(logits, jnp.float32), jnp.asarray(labels)
  counts = losses.build('balanced_softmax', COUNTS)(logits, labels)
  prior = losses.build('balanced_softmax', COUNTS / COUNTS.sum())(logits, labels)
  np.testing.assert_allclose(counts, prior, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', REFERENCES)
def test_a_constant_added_to_all_logits_changes_nothing(name):
  logits, labels = random_batch(3)
  loss_fn = losses.build(name, COUNTS)
  shifted = loss_fn(jnp.asarray(logits + 5.0, jnp.float32), jnp.asarray(labels))
  np.testing.assert_allclose(
    shifted, loss_fn(jnp.asarray(logits, jnp.float32), jnp.asarray(labels)), rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize('name', REFERENCES)
def test_large_logits_stay_finite(name):
  logits = jnp.array([[1e4, -1e4, 0.0, 0.0]] * 2)
  value, grad = jax.value_and_grad(
    lambda x: losses.build(name, COUNTS)(x, jnp.array([0, 1])).sum()
  )(logits)
  assert np.isfinite(value)
  assert np.isfinite(grad).all()


@pytest.mark.parametrize('name', REFERENCES)
def test_gradient_equals_finite_differences(name):
  logits, labels = random_batch(4, n=5)
  with jax.enable_x64(True):
    loss_fn = losses.build(name, COUNTS)
    found = jax.grad(lambda x: loss_fn(x, jnp.asarray(labels)).sum())(jnp.asarray(logits))
  step = 1e-5
  expected = np.zeros_like(logits)
  for i, j in np.ndindex(*logits.shape):
    up, down = logits.copy(), logits.copy()
    up[i, j] += step
    down[i, j] -= step
    difference = REFERENCES[name](up, labels) - REFERENCES[name](down, labels)
    expected[i, j] = difference.sum() / (2 * step)
  np.testing.assert_allclose(found, expected, atol=1e-8)


@pytest.mark.parametrize(
  ('name', 'optimum'),
  [('balanced_softmax', np.zeros(4)), ('cross_entropy', np.log(COUNTS / COUNTS[0]))],
)
def test_features_that_say_nothing_lead_to_the_right_posterior(name, optimum):
  # With one logit vector for all images, balanced softmax ends at equal logits: no class is
  # preferred. Plain cross-entropy ends at the log of the training prior.
  labels = np.repeat(np.arange(4), COUNTS)
  with jax.enable_x64(True):
    loss_fn = losses.build(name, COUNTS)

    def mean_loss(vector):
      return loss_fn(jnp.broadcast_to(vector, (len(labels), 4)), jnp.asarray(labels)).mean()

    value_and_grad = jax.jit(jax.value_and_grad(mean_loss))
    found = scipy.optimize.minimize(
      lambda v: [np.asarray(x) for x in value_and_grad(jnp.asarray(v))],
      np.array([1.0, -2.0, 0.5, 3.0]),
      jac=True,
      method='BFGS',
      options={'gtol': 1e-9},
    ).x
    at_optimum = value_and_grad(jnp.asarray(optimum))[1]
  np.testing.assert_allclose(found - found[0], optimum, atol=1e-3)
  np.testing.assert_allclose(at_optimum, np.zeros(4), atol=1e-12)


def test_losses_can_be_jitted():
  logits, labels = random_batch(5)
  found = jax.jit(losses.build('balanced_softmax', COUNTS))(
    jnp.asarray(logits, jnp.float32), jnp.asarray(labels)
  )
  np.testing.assert_allclose(
    found, balanced_softmax_reference(logits, labels), rtol=2e-5, atol=2e-6
  )


def test_unknown_name_lists_the_known_ones():
  with pytest.raises(
    UserError,
    match=r"^expected loss\.name among cross_entropy, balanced_softmax; found 'ldam'; "
    r'to fix it: set --config\.loss\.name$',
  ):
    losses.build('ldam', COUNTS)
