"""Schedule, decay mask and SGD against their formulas in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from csba_jax import config as config_lib
from csba_jax.errors import UserError
from csba_jax.methods import optimizers
from csba_jax.models import multibranch


def schedule_reference(step, peak, warmup_fraction, total):
  warmup = round(warmup_fraction * total)
  if step < warmup:
    return peak * step / warmup
  share = min(1.0, (step - warmup) / max(1, total - warmup))
  return peak * 0.5 * (1 + math.cos(math.pi * share))


@pytest.mark.seconds
@pytest.mark.parametrize(
  ('warmup_fraction', 'total'),
  [(0.025, 1000), (0.0, 50), (0.5, 7), (0.1, 30), (0.0, 1), (0.025, 1)],
)
def test_schedule_equals_its_formula_at_every_step(warmup_fraction, total):
  schedule = optimizers.cosine(0.3, warmup_fraction, total)
  steps = np.arange(total + 3)
  expected = [schedule_reference(int(step), 0.3, warmup_fraction, total) for step in steps]
  np.testing.assert_allclose(schedule(jnp.asarray(steps)), expected, atol=1e-6)


def test_schedule_endpoints():
  schedule = optimizers.cosine(0.1, 0.1, 100)
  assert float(schedule(0)) == 0
  assert float(schedule(5)) == pytest.approx(0.05)
  assert float(schedule(10)) == pytest.approx(0.1)
  assert float(schedule(55)) == pytest.approx(0.05)
  assert float(schedule(100)) == pytest.approx(0, abs=1e-8)


def test_without_warm_up_the_first_step_has_the_peak():
  assert float(optimizers.cosine(0.1, 0.0, 10)(0)) == pytest.approx(0.1)
  assert float(optimizers.cosine(0.1, 0.0, 1)(0)) == pytest.approx(0.1)


@pytest.fixture(scope='module')
def csba_class_shapes():
  model = multibranch.build(10, (8, 8, 1), 'csba_class', 0.1, jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))['params']


def test_weight_decay_leaves_out_exactly_the_norms_and_biases(csba_class_shapes):
  # scale and bias are the only parameters with one axis
  mask = optimizers.decay_mask(csba_class_shapes)
  assert jax.tree.map(lambda leaf: leaf.ndim > 1, csba_class_shapes) == mask
  assert mask['head'] == {'kernel': True, 'bias': False, 'class_embedding': True}
  assert mask['class_gate'] == {'squeeze': True, 'excite': True}
  assert mask['stage1']['block1']['branch3x3'] == {
    'conv': {'kernel': True},
    'norm': {'scale': False, 'bias': False},
  }
  assert mask['stage1']['block1']['attention']['branch1x1']['squeeze'] == {
    'kernel': True,
    'bias': False,
  }


def test_weight_decay_moves_exactly_the_masked_leaves(csba_class_shapes):
  some = {name: csba_class_shapes[name] for name in ('stem', 'class_gate', 'head')}
  params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), some)
  tx = optimizers.sgd(lambda _: 1.0, momentum=0.0, weight_decay=0.5)
  updates, _ = tx.update(jax.tree.map(np.zeros_like, params), tx.init(params), params)
  jax.tree.map(
    lambda update, decayed: np.testing.assert_allclose(update, -0.5 if decayed else 0.0),
    updates,
    jax.tree.map(lambda leaf: leaf.ndim > 1, some),
  )


def torch_sgd(params, grads_of_steps, rates, momentum, weight_decay):
  """torch.optim.SGD(nesterov=True) as its documentation writes it, for a dict of arrays."""
  params = {name: value.astype(np.float64) for name, value in params.items()}
  buffers = {}
  for step, (grads, rate) in enumerate(zip(grads_of_steps, rates, strict=True)):
    for name in params:
      decay = weight_decay if name == 'kernel' else 0.0
      gradient = grads[name] + decay * params[name]
      buffers[name] = gradient if step == 0 else momentum * buffers[name] + gradient
      params[name] = params[name] - rate * (gradient + momentum * buffers[name])
  return params


@pytest.mark.parametrize(('momentum', 'weight_decay'), [(0.9, 5e-2), (0.9, 0.0), (0.0, 5e-2)])
def test_sgd_equals_pytorchs_update_rule(momentum, weight_decay):
  rng = np.random.default_rng(0)
  shapes = {'kernel': (3, 4), 'bias': (4,), 'scale': (4,)}

  def draw():
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

  params, grads_of_steps = draw(), [draw() for _ in range(6)]
  schedule = optimizers.cosine(0.5, 0.4, 6)
  tx = optimizers.sgd(schedule, momentum, weight_decay)
  found, state = {'net': params}, tx.init({'net': params})
  for grads in grads_of_steps:
    updates, state = tx.update({'net': grads}, state, found)
    found = optax.apply_updates(found, updates)
  rates = [schedule_reference(step, 0.5, 0.4, 6) for step in range(6)]
  expected = torch_sgd(params, grads_of_steps, rates, momentum, weight_decay)
  for name in shapes:
    np.testing.assert_allclose(found['net'][name], expected[name], atol=2e-6)


def steps_reference(step, peak, warmup_fraction, total):
  warmup = round(warmup_fraction * total)
  if step < warmup:
    return peak * step / warmup
  return peak * 0.01 ** sum(step >= round(share * total) for share in (0.8, 0.9))


@pytest.mark.parametrize(('warmup_fraction', 'total'), [(0.025, 200), (0.0, 50), (0.1, 30)])
def test_steps_fall_at_four_and_nine_tenths(warmup_fraction, total):
  found = optimizers.steps(0.1, warmup_fraction, total)(jnp.arange(total))
  expected = [steps_reference(step, 0.1, warmup_fraction, total) for step in range(total)]
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_adamw_decays_apart_from_its_moments():
  """First step, by hand: the moments of one gradient give a step in the direction of its sign."""
  params = {'net': {'kernel': np.full((1, 1), 2.0, np.float32), 'bias': np.ones(1, np.float32)}}
  tx = optimizers.adamw(lambda _: 0.1, 0.9, 0.5)
  grads = jax.tree.map(lambda x: np.full_like(x, -3.0), params)
  updates, _ = tx.update(grads, tx.init(params), params)
  np.testing.assert_allclose(updates['net']['kernel'], [[0.1 * (1 - 0.5 * 2)]], atol=1e-6)
  np.testing.assert_allclose(updates['net']['bias'], [0.1], rtol=1e-5)


def configured(**train):
  config = config_lib.default()
  config.train.update(train)
  return config


def test_build_reads_the_config():
  config = configured(learning_rate=0.2, momentum=0.5, weight_decay=0.25, warmup_fraction=0.5)
  tx, schedule = optimizers.build(config, total_steps=4)
  np.testing.assert_allclose(schedule(jnp.arange(5)), [0, 0.1, 0.2, 0.1, 0], atol=1e-7)
  params = {'kernel': np.full((1, 1), 2.0, np.float32)}
  state = tx.init(params)
  # g + decay w = 1.5; rate 0 at step 0, so v = 1.5, then 0.5 * 1.5 + 1.5
  for expected in (0.0, -0.1 * (1.5 + 0.5 * 2.25)):
    updates, state = tx.update({'kernel': np.ones((1, 1), np.float32)}, state, params)
    np.testing.assert_allclose(updates['kernel'], [[expected]], atol=1e-7)


def test_build_takes_every_row_of_its_tables():
  params = {'kernel': np.ones((1, 1), np.float32)}
  for optimizer in optimizers.OPTIMIZERS:
    for schedule in optimizers.SCHEDULES:
      config = configured(optimizer=optimizer, schedule=schedule, warmup_fraction=0.0)
      tx, rate = optimizers.build(config, total_steps=10)
      updates, _ = tx.update(params, tx.init(params), params)
      assert float(rate(0)) == pytest.approx(0.1)
      assert float(updates['kernel'][0, 0]) < 0


@pytest.mark.parametrize('field', ['optimizer', 'schedule'])
def test_unknown_names_list_the_known_ones(field):
  with pytest.raises(
    UserError, match=rf"train\.{field} among .*; found 'x'; to fix it: set --config"
  ):
    optimizers.build(configured(**{field: 'x'}), total_steps=4)


@pytest.mark.parametrize(
  ('method', 'trained'),
  [
    ('crt', {'head/kernel', 'head/bias', 'head/scale'}),
    ('label_aware', {'head/kernel', 'head/bias', 'head/scale'}),
    ('lws', {'head/scale'}),
    ('tau_norm', set()),
  ],
)
def test_a_second_stage_moves_only_what_it_trains(method, trained):
  config = configured(weight_decay=0.5, warmup_fraction=0.0)
  config.stage.update(method=method, source='there')
  config.model.head = 'linear' if method == 'tau_norm' else 'scaled'
  tx, _ = optimizers.build(config, total_steps=4)
  ones = np.ones((2, 2), np.float32)
  params = {'stem': {'kernel': ones}, 'head': {'kernel': ones, 'bias': ones, 'scale': ones}}
  updates, _ = tx.update(params, tx.init(params), params)
  moved = {
    '/'.join(key.key for key in path)
    for path, leaf in jax.tree.leaves_with_path(updates)
    if np.any(leaf)
  }
  assert moved == trained
