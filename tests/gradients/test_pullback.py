"""The pullback of losses against weighted sums of gradients, one example after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csba_jax.errors import UserError
from csba_jax.gradients.pullback import losses_and_pullback


def coupled(params, x):
  """Losses [N] of a net whose batch is normalised, and the mean that does it."""
  h = jnp.tanh(x @ params['w'])
  mean = h.mean(0)
  return ((h - mean[None]) ** 2).sum(-1) + params['b'] * x[:, 0], mean


@pytest.mark.seconds
def test_weights_over_examples_give_the_weighted_sum_of_gradients():
  rng = np.random.default_rng(0)
  params = {'w': jnp.asarray(rng.normal(size=(3, 2)), jnp.float32), 'b': jnp.float32(0.3)}
  x = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
  calls = []

  def losses_fn(params):
    calls.append(1)
    return coupled(params, x)

  losses, pullback, mean = losses_and_pullback(losses_fn, params)
  weights = [rng.normal(size=5), np.eye(5)[2], np.array([True, False, True, False, False])]
  found = [pullback(jnp.asarray(w)) for w in weights]
  assert len(calls) == 1
  np.testing.assert_allclose(losses, coupled(params, x)[0], rtol=1e-6)
  np.testing.assert_allclose(mean, coupled(params, x)[1], rtol=1e-6)
  one_by_one = [jax.grad(lambda p, i=i: coupled(p, x)[0][i])(params) for i in range(5)]
  for w, gradient in zip(weights, found, strict=True):
    for name, leaf in gradient.items():
      expected = sum(wi * np.asarray(g[name], float) for wi, g in zip(w, one_by_one, strict=True))
      np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('losses_fn', 'found'),
  [
    (lambda w: w * jnp.ones(3), 'Tracer; to fix it: return .losses, None.'),
    (lambda w: (w * jnp.ones(3), 1, 2), 'a tuple of 3'),
    (lambda w: ((w * jnp.ones(3)).mean(), None), r'losses of shape \[\]; .* leave out the mean'),
    (lambda w: (jnp.arange(3), None), 'float losses from losses_fn; found int32'),
    (lambda w: (None, None), 'found None'),
  ],
)
def test_losses_of_another_form_are_named(losses_fn, found):
  with pytest.raises(UserError, match=found):
    losses_and_pullback(losses_fn, 1.0)


def test_weights_of_another_shape_are_named():
  _, pullback, _ = losses_and_pullback(lambda w: (w * jnp.ones(3), None), 1.0)
  with pytest.raises(UserError, match=r'weights of shape \[3\].*found shape \[2\].*weights.labels'):
    pullback(jnp.ones(2))
  with pytest.raises(UserError, match='float arrays; found params of type int'):
    losses_and_pullback(lambda w: (w * jnp.ones(3), None), 1)
