"""Every row of the tables trains the digits: a few steps of a perceptron that compiles quickly."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from csba_jax import config as config_lib
from csba_jax.data import class_counts as class_counts_lib
from csba_jax.data import mixing, pipeline, policy, sampling
from csba_jax.errors import UserError
from csba_jax.measure.evaluate import evaluate
from csba_jax.methods import losses, optimizers
from csba_jax.models import registry
from csba_jax.runtime import sharding
from csba_jax.training.job import Job
from csba_jax.training.step import compiled_steps, make_step

STEPS = 12


@pytest.fixture(scope='module')
def data(driver):
  return pipeline.load(driver.tiny_config(), print)


def fields(section, name):
  """Config fields that choose a row, and what must go with it."""
  found = {f'{section}__name' if section != 'augment' else 'augment__policy': name}
  if section == 'loss':
    found['model__head'] = losses.LOSSES[name].classifiers[0]
  return found


ROWS = [
  *(('loss', name) for name in losses.LOSSES),
  *(('sampler', name) for name in sampling.SAMPLERS),
  *(('mixing', name) for name in mixing.MIXINGS),
  *(('augment', name) for name in policy.POLICIES),
]
# those of make test, one of each kind
FAST = [('loss', 'balanced_softmax'), ('sampler', 'class')]
assert set(FAST) <= set(ROWS)


def job_of(driver, data, **overrides):
  return Job.of(driver.tiny_config(**overrides), data)


def steps(job, state, first, last):
  on_device = {'image': data_of(job).images, 'label': data_of(job).labels}
  found = []
  for step in range(first, last):
    batch = sampling.draw(job.streams, step, step + 1)
    state, metrics = compiled_steps()(
      state, on_device, batch, job.key, step_fn=job.program.step_fn, layout=job.layout
    )
    found.append(float(metrics['loss'][0]))
  return state, found


def data_of(job):
  return job.data.train


@pytest.mark.parametrize(
  ('section', 'name'),
  [pytest.param(*row, marks=[pytest.mark.seconds] * (row not in FAST)) for row in ROWS],
)
def test_every_row_trains_the_digits_and_can_be_taken_up_in_the_middle(driver, data, section, name):
  # a scale of 30 on cosines calls for a smaller step
  rate = 0.02 if name == 'ldam' else 0.1
  job = job_of(driver, data, train__learning_rate=rate, **fields(section, name))
  initial, _ = job.begin()
  first = [np.asarray(leaf) for leaf in jax.tree.leaves(initial.params)]
  half, early = steps(job, initial, 0, STEPS // 2)
  kept = jax.tree.map(np.asarray, half)
  state, late = steps(job, half, STEPS // 2, STEPS)
  assert np.isfinite(early + late).all()
  assert np.mean(late) < np.mean(early[:3])  # it learns
  for before, after in zip(first, jax.tree.leaves(state.params), strict=True):
    assert (before != after).any()
  again, repeated = steps(job, job.layout.place_state(kept), STEPS // 2, STEPS)
  assert repeated == late
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state, again))


@pytest.mark.seconds
def test_averages_follow_the_parameters_and_are_what_is_evaluated(driver, data):
  decay = 0.9
  job = job_of(driver, data, train__ema_decay=decay)
  plain = job_of(driver, data)
  state, expected = job.begin()[0], None
  twin = plain.begin()[0]
  for step in range(8):
    before = jax.tree.map(np.asarray, {'params': twin.params, 'batch_stats': twin.batch_stats})
    expected = before if expected is None else expected
    state, losses_found = steps(job, state, step, step + 1)
    twin, losses_twin = steps(plain, twin, step, step + 1)
    assert losses_found == losses_twin  # averages change nothing else
    now = jax.tree.map(np.asarray, {'params': twin.params, 'batch_stats': twin.batch_stats})
    keep = min(decay, (1 + step) / (10 + step))
    expected = jax.tree.map(lambda a, x, k=keep: k * a + (1 - k) * x, expected, now)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.averages, expected
  )
  assert state.variables() is state.averages
  assert set(twin.variables()) == {'params', 'batch_stats'}
  assert twin.variables()['params'] is twin.params


@pytest.mark.seconds
def test_a_mixed_step_is_the_gradient_of_the_mixed_loss(driver, data):
  """One step of cmo by hand, from the same keys: augment both, paste, two losses by share."""
  job = job_of(driver, data, mixing__name='cmo', augment__crop_padding=0)
  state = job.begin()[0]
  own, partner = (sampling.draw(job.streams, 0, 1)[name][0] for name in ('own', 'partner'))
  part = data.train
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(job.config.seed), 0), 1 << 16)
  batch = {
    'image': part.images[own] / np.float32(127.5) - 1,
    'label': part.labels[own],
    'partner_image': part.images[partner] / np.float32(127.5) - 1,
    'partner_label': part.labels[partner],
  }
  mixed = mixing.build(job.config.mixing, data.class_counts, 36)(key, batch, 0)
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  model = job.program.model
  logits, _ = model.apply(variables, mixed['image'], train=True, mutable=['batch_stats'])
  share, log_p = np.asarray(mixed['share'], float), np.asarray(jax.nn.log_softmax(logits), float)
  rows = np.arange(len(own))
  expected = -(share * log_p[rows, part.labels[own]])
  expected -= (1 - share) * log_p[rows, part.labels[partner]]
  _, found = steps(job, state, 0, 1)
  np.testing.assert_allclose(found, expected.mean(), rtol=1e-5)


def test_post_hoc_adjustment_is_part_of_every_evaluation(driver, data):
  job = job_of(driver, data, loss__post_hoc_tau=1.5)
  state = job.begin()[0]
  for tau in (1.5, 0.0):
    logits = job.program.model.apply(state.variables(), data.test.images / np.float32(127.5) - 1)
    prior = data.class_counts / data.class_counts.sum()
    predicted = np.argmax(np.asarray(logits, float) - tau * np.log(prior), 1)
    expected = np.zeros((10, 10), int)
    np.add.at(expected, (data.test.labels, predicted), 1)
    net = dataclasses.replace(job.net(state), post_hoc_tau=tau)
    sums = evaluate(net, data.test, 100)
    np.testing.assert_array_equal(sums.counts, expected)


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'loss__name': 'hinge'}, 'loss.name among'),
    ({'loss__name': 'ldam'}, "model.head cosine for loss.name ldam; found 'linear'"),
    ({'loss__name': 'focal', 'mixing__name': 'mixup'}, 'takes mixed labels .*; found focal'),
    ({'mixing__name': 'puzzle'}, 'mixing.name among'),
    ({'sampler__name': 'smote'}, 'sampler.name among'),
    ({'augment__policy': 'fast'}, 'augment.policy'),
    ({'loss__weights': 'sqrt'}, 'loss.weights among'),
    ({'train__optimizer': 'lion'}, 'train.optimizer among'),
    ({'train__schedule': 'poly'}, 'train.schedule among'),
    (
      {'stage__method': 'crt'},
      "stage.method and stage.source together: .*found method 'crt', source",
    ),
    ({'stage__source': 'x'}, "found method 'none', source 'x'"),
    ({'stage__method': 'x', 'stage__source': 'x'}, 'stage.method among none, crt, lws'),
    ({'sampler__start': 0.8}, 'a sampler to defer with sampler.start'),
    ({'loss__weights_start': 0.8}, 'class weights to defer with loss.weights_start'),
    (
      {'stage__method': 'lws', 'stage__source': 'x'},
      "model.head scaled for stage.method lws; found 'linear'; .*set --config.model.head=scaled",
    ),
  ],
)
def test_what_cannot_be_run_is_said_before_it_begins(driver, data, overrides, message):
  with pytest.raises(UserError, match=message):
    job_of(driver, data, **overrides)


CONFIGS = Path(__file__).parents[1] / 'configs'
RECIPES = sorted(set(CONFIGS.glob('*.py')) - set(CONFIGS.glob('study_*')))


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_every_recipe_makes_a_step(path):
  """Names are known and parts go together: model, loss, classifier, mixing, stage, optimiser."""
  config = config_lib.sibling(str(path), path.stem)
  if config.stage.method != 'none':
    config.stage.source = 'runs/first'
  config_lib.check(config)
  side, channels = config.data.image_size, config.data.channels
  model = registry.build(config.model, 10, (side, side, channels))
  tx, schedule = optimizers.build(config, 1000)
  config.parallel.devices = 1
  layout = sharding.layout(config)
  step = make_step(config, model, tx, np.arange(10, 0, -1), 1000, layout)
  assert callable(step)
  assert float(schedule(500)) > 0


@pytest.mark.parametrize('factor', [1, 2, 10, 50, 100, 200, 500])
def test_imbalance_factors_up_to_500_are_one_override(factor):
  counts = class_counts_lib.profile_counts(5000, 10, factor, 'exp')
  assert counts[0] == 5000
  assert counts[-1] == 5000 // factor
  for recipe in ('cifar10_lt_resnet32', 'cifar10_lt_cpu'):
    config = config_lib.sibling(str(RECIPES[0]), recipe)
    config.data.imbalance_factor = factor
    config_lib.check(config)


@pytest.mark.seconds
@pytest.mark.parametrize(('optimizer', 'schedule'), [('adamw', 'cosine'), ('sgd', 'steps')])
def test_other_optimizers_and_schedules_train(driver, data, optimizer, schedule):
  rate = 0.1 if optimizer == 'sgd' else 0.01
  fields = {'train__optimizer': optimizer, 'train__schedule': schedule}
  job = job_of(driver, data, train__learning_rate=rate, **fields)
  _, found = steps(job, job.begin()[0], 0, 8)
  assert found[-1] < found[0]
