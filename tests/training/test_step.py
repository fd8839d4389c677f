"""The gradient of a step is one part of it: a class-weighted one against the usual, and a loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from csba_jax.data import augment
from csba_jax.gradients.pullback import losses_and_pullback
from csba_jax.methods import losses, optimizers
from csba_jax.models import registry
from csba_jax.run import state as state_lib
from csba_jax.runtime import sharding
from csba_jax.training.gradient import Gradient, gradient_of_the_mean
from csba_jax.training.step import make_step

CLASSES, IMAGES = 10, 40
KEY = jax.random.key(5)


def class_weighted(weights):
  """A gradient function: of (1/N) sum_i w_{y_i} l_i, through one pullback of weights."""

  def gradient(forward, params, batch, kept, key):
    found, pullback, auxiliary = losses_and_pullback(lambda p: forward(p, batch), params)
    by_example = jnp.asarray(weights, found.dtype)[batch['label']]
    loss, direction = (by_example * found).mean(), pullback(by_example / len(found))
    return Gradient(loss, direction, auxiliary, kept, {})

  return gradient


@functools.cache
def setting(driver):
  """(config, model, tx, initial state, batch) of the driver's net."""
  config = driver.tiny_config()
  model = registry.build(config.model, CLASSES, (8, 8, 1))
  tx, _ = optimizers.build(config, 36)
  state = state_lib.create(model, tx, (8, 8, 1), 3)
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (IMAGES, 8, 8, 1), dtype=np.uint8)
  return config, model, tx, state, {'image': images, 'label': np.arange(IMAGES) % CLASSES}


def step_with(driver, gradient_fn):
  """(new state, metrics) after one step of that gradient."""
  config, model, tx, state, batch = setting(driver)
  layout, counts = sharding.layout(config), np.arange(CLASSES, 0, -1)
  step = make_step(config, model, tx, counts, 36, layout, gradient_fn=gradient_fn)
  return jax.jit(step)(state, batch, KEY)


def test_a_step_of_class_weights_one_is_the_ordinary_step_to_the_bit(driver):
  ordinary = step_with(driver, gradient_of_the_mean)
  found = step_with(driver, class_weighted(np.ones(CLASSES)))
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(ordinary), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.seconds
def test_a_step_of_class_weights_is_the_weighted_sum_of_class_gradients(driver):
  """Against a loop over classes, each with a gradient and a forward pass of its own."""
  _, model, tx, state, batch = setting(driver)
  weights = np.linspace(0, 2, CLASSES)
  new, metrics = step_with(driver, class_weighted(weights))

  key = jax.random.fold_in(KEY, 0)
  crops = augment.random_crop(jax.random.split(key)[0], batch['image'], 1)
  images = crops.astype(jnp.float32) / 127.5 - 1

  @jax.jit
  def sum_of_class(params, c):
    variables = {'params': params, 'batch_stats': state.batch_stats}
    logits, updated = model.apply(variables, images, train=True, mutable=['batch_stats'])
    of_class = losses.cross_entropy(logits, batch['label']) * (batch['label'] == c)
    return of_class.sum(), updated['batch_stats']

  both = jax.jit(jax.value_and_grad(sum_of_class, has_aux=True))
  loss, gradient = 0.0, jax.tree.map(lambda x: np.zeros(x.shape), state.params)
  for c, weight in enumerate(weights):
    (class_loss, statistics), class_gradient = both(state.params, c)
    loss += weight * float(class_loss) / IMAGES
    gradient = jax.tree.map(
      lambda g, h, w=weight: g + w * np.asarray(h, float) / IMAGES, gradient, class_gradient
    )
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))
  np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-5)
  gradient = jax.tree.map(np.float32, gradient)
  updates, _ = tx.update(gradient, tx.init(state.params), state.params)
  expected = optax.apply_updates(state.params, updates), statistics
  found = new.params, new.batch_stats
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('gradient_fn', [gradient_of_the_mean, class_weighted(np.ones(CLASSES))])
def test_the_statistics_come_out_of_the_only_forward_pass(gradient_fn):
  calls = []

  def forward(params, batch):
    calls.append(1)
    return params * batch['x'], batch['x'].mean()

  batch = {'x': jnp.array([1.0, 3.0]), 'label': np.array([0, 1])}
  found = gradient_fn(forward, jnp.array(2.0), batch, {}, KEY)
  assert (float(found.loss), float(found.direction), float(found.auxiliary)) == (4.0, 2.0, 2.0)
  assert len(calls) == 1
