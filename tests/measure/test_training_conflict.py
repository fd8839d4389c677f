"""The conflict of training batches: against a loop over batches, and what a step really does."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from csba_jax.data import pipeline
from csba_jax.errors import UserError
from csba_jax.gradients import class_grams
from csba_jax.gradients.conflict import Conflict
from csba_jax.measure import diagnose, probe, training_conflict
from csba_jax.measure.training_conflict import Batches
from csba_jax.run import restore
from csba_jax.run.net import Net
from csba_jax.run.schedule import training_stream
from csba_jax.runtime import backend, sharding
from csba_jax.runtime.signals import StopRequest
from csba_jax.training import loop
from csba_jax.training.job import Job

pytestmark = pytest.mark.seconds  # all of them read a run that has to be trained first

CLASSES = 10


@pytest.fixture(scope='session')
def run(driver, tmp_path_factory):
  """A perceptron with BatchNorm, trained on the digits of a long tail, without augmentation."""
  workdir = tmp_path_factory.mktemp('training') / 'run'
  with StopRequest() as stop:
    loop.train_and_evaluate(driver.tiny_config(augment__crop_padding=0), str(workdir), stop)
  return restore.load_run(str(workdir), 'latest')


@pytest.fixture(scope='session')
def measured(run):
  return training_conflict.of_run(run, 'latest', Batches(4, seed=3))


def losses_in_training(run, params, batch):
  """Cross-entropy [N] with the statistics of the batch, written anew."""
  variables = {'params': params, 'batch_stats': run.net.batch_stats}
  images = jnp.asarray(batch['image'], jnp.float32) / 127.5 - 1
  logits, _ = run.net.model.apply(variables, images, train=True, mutable=['batch_stats'])
  return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch['label'][:, None], 1)[:, 0]


def batches_of(run, number, seed):
  """The batches as they are drawn: one stream for each, at the step of the net."""
  stream, part = training_stream(run.config, run.data.train.labels), run.data.train
  found = []
  for k in range(number):
    own = dataclasses.replace(stream, purpose=f'conflict {seed} {k}')
    index = own.positions(run.net.step)
    found.append({'image': part.images[index], 'label': part.labels[index]})
  return found


def test_it_is_the_gram_of_the_runs_own_batches_in_training(run, measured):
  batches = batches_of(run, 4, 3)

  @jax.jit
  def sum_gradient(params, batch, member):
    chosen = lambda p: jnp.where(member, losses_in_training(run, p, batch), 0).sum()  # noqa: E731
    return jax.grad(chosen)(params)

  rows, sizes = {}, np.stack([np.bincount(b['label'], minlength=CLASSES) for b in batches])
  for b, c in np.ndindex(4, CLASSES):
    grads = sum_gradient(run.net.params, batches[b], jnp.asarray(batches[b]['label'] == c))
    flat = [np.ravel(x) for x in jax.tree.leaves({k: v for k, v in grads.items() if k != 'head'})]
    rows[b, c] = np.concatenate(flat).astype(np.float64)
  expected = np.zeros((CLASSES, CLASSES))
  for c, d in np.ndindex(CLASSES, CLASSES):
    pairs = list(itertools.permutations(range(4), 2))
    number = sum(sizes[a, c] * sizes[b, d] for a, b in pairs)
    total = sum(rows[a, c] @ rows[b, d] for a, b in pairs)
    expected[c, d] = total / number if number else 0
  found = measured.gram()
  assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
  assert measured.counts.tolist() == sizes.sum(0).tolist()
  assert measured.class_counts.tolist() == run.data.class_counts.tolist()
  wanted = {'target': 'training batches', 'statistics': 'batch', 'batches': 4, 'step': 36}
  wanted |= {'batch_size': 32, 'seed': 3}
  assert wanted.items() <= measured.about.items()
  assert measured.layers == ('hidden', 'norm', 'head')


def test_another_seed_takes_other_batches_and_the_same_seed_the_same(run, measured):
  again = training_conflict.of_run(run, 'latest', Batches(4, seed=3))
  np.testing.assert_array_equal(again.grams, measured.grams)
  other = training_conflict.of_run(run, 'latest', Batches(4, seed=4))
  assert (other.gram() != measured.gram()).any()


def test_what_is_measured_is_not_what_frozen_statistics_give(run, measured):
  frozen = diagnose.diagnose_run(run, diagnose.Sampling(exact=True))
  assert np.abs(frozen.gram('norm') - measured.gram('norm')).max() > 0.1 * frozen.gram('norm').max()


@pytest.mark.parametrize('rate', [1e-4, 1e-3, 1e-2])
def test_a_step_on_a_batch_changes_the_training_losses_by_minus_rate_times_gram(run, rate):
  """L_c(p - rate g_d) - L_c(p) = -rate G[c, d], both with the statistics of the batch.

  First order carries far: it is off by 0.07 %, 0.7 % and 8 % of the largest change here.
  """
  (batch,) = batches_of(run, 1, 0)
  params = run.net.params

  def class_losses(params):
    found = losses_in_training(run, params, batch)
    member = batch['label'][None] == np.arange(CLASSES)[:, None]
    return jnp.where(member, found[None], 0).sum(1) / np.maximum(member.sum(1), 1)

  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
    grads = jax.jit(jax.jacrev(class_losses))(params)
    gram = class_grams(
      lambda p, b: losses_in_training(run, p, b), params, batch, num_classes=CLASSES,
      strategy='masked',
    ).total  # fmt: skip
    before = class_losses(params)
    happened = []
    for d in range(CLASSES):
      moved = jax.tree.map(lambda p, g, d=d: p - rate * g[d], params, grads)
      happened.append(np.asarray(class_losses(moved) - before))
  happened, predicted = np.stack(happened, 1), -rate * np.asarray(gram)
  error = np.abs(happened - predicted).max() / np.abs(predicted).max()
  assert error < 10 * rate


def test_with_augmentation_the_batches_are_augmented(driver, run, measured):
  config = run.config.copy_and_resolve_references()
  config.augment.crop_padding = 1
  found = training_conflict.measure(run.net, config, run.data, run.data.train, Batches(4, seed=3))
  assert (found.counts == measured.counts).all()
  assert (found.gram() != measured.gram()).any()


def test_chosen_layers_and_progress(run, measured):
  ticks = []
  found = training_conflict.of_run(
    run, 'latest', Batches(2), 'hidden', lambda *done: ticks.append(done)
  )
  assert found.layers == ('hidden',)
  assert ticks == [(32, 64), (64, 64)]


def test_moving_averages_are_not_what_training_moves(driver, run, tmp_path):
  with StopRequest() as stop:
    config = driver.tiny_config(augment__crop_padding=0, train__ema_decay=0.9)
    loop.train_and_evaluate(config, str(tmp_path / 'run'), stop)
  averaged = restore.load_run(str(tmp_path / 'run'), 'latest')
  assert (averaged.net.params['hidden']['kernel'] != run.net.params['hidden']['kernel']).any()
  found = training_conflict.of_run(averaged, 'latest', Batches(2))
  expected = training_conflict.of_run(run, 'latest', Batches(2))
  np.testing.assert_allclose(found.gram(), expected.gram(), rtol=1e-4, atol=1e-7)


def test_it_is_saved_under_its_name(run, measured, tmp_path):
  first, *_ = diagnose.save(measured, tmp_path)
  assert first.name == 'step000036_training_batches_seed3.npz'
  np.testing.assert_array_equal(Conflict.load(first).grams, measured.grams)


def test_bad_input_ends_in_one_line(run):
  with pytest.raises(UserError, match='expected at least 2 batches; found 1; to fix it: draw more'):
    training_conflict.of_run(run, 'latest', Batches(1))
  with pytest.raises(UserError, match='expected --layers that finds parameters'):
    training_conflict.of_run(run, 'latest', Batches(2), 'nothing')


@pytest.mark.parametrize(('frozen', 'of_batchnorm'), [(0.9, 'batch'), (1.0, 'frozen')])
def test_where_training_keeps_the_statistics_conflict_is_measured_with_them(
  run, frozen, of_batchnorm
):
  config = run.config.copy_and_resolve_references()
  config.model.init, config.train.frozen = 'w.safetensors', frozen
  renewed = restore.renew_statistics(run.net, config, run.data).batch_stats
  same = jax.tree.map(lambda a, b: bool((a == b).all()), renewed, run.net.batch_stats)
  assert all(jax.tree.leaves(same)) == (frozen == 1)
  assert training_conflict.choose('auto', run.net, config) == of_batchnorm
  measured = training_conflict.measure(run.net, config, run.data, run.data.train, Batches(2))
  assert measured.about['statistics'] == of_batchnorm
  batch = {'image': np.linspace(-1, 1, 4 * 64).reshape(4, 8, 8, 1), 'label': np.arange(4)}
  losses_fn = training_conflict.losses_of(run.net, config)
  found = losses_fn(run.net.batch_stats, run.net.params, batch)
  variables = {'params': run.net.params, 'batch_stats': run.net.batch_stats}
  logits, _ = run.net.model.apply(
    variables, batch['image'], train=of_batchnorm == 'batch', mutable=['batch_stats']
  )
  expected = -jax.nn.log_softmax(logits)[np.arange(4), np.arange(4)]
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
  ('stage', 'of_batchnorm'), [('none', 'batch'), ('crt', 'frozen'), ('tau_norm', 'frozen')]
)
def test_auto_is_what_training_takes(run, stage, of_batchnorm):
  config = run.config.copy_and_resolve_references()
  config.stage.method = stage
  assert training_conflict.choose('auto', run.net, config) == of_batchnorm
  assert training_conflict.choose('auto', run.net.replace(batch_stats={}), config) == 'frozen'
  assert training_conflict.choose('frozen', run.net, config) == 'frozen'
  if stage != 'tau_norm':
    assert training_conflict.choose('batch', run.net, config) == 'batch'
    return
  with pytest.raises(UserError) as error:
    training_conflict.choose('batch', run.net, config)
  assert str(error.value) == (
    'expected a run that trains, for the conflict of its training batches; found '
    'stage.method=tau_norm; to fix it: set --statistics=frozen, in a run '
    '--config.diagnostics.statistics=frozen'
  )


def test_batches_of_the_validation_part_are_its_images_in_another_order(run):
  """Of a part that fills one batch, every batch has all images: there is no sampling error."""
  config = run.config.copy_and_resolve_references()
  config.sampler.name, config.train.batch_size = 'class', 64  # the sampler is of training alone
  part = run.data.val
  assert len(part) < config.train.batch_size
  found = training_conflict.measure(run.net, config, run.data, part, Batches(3))
  counts = np.bincount(part.labels, minlength=CLASSES)
  assert found.counts.tolist() == (3 * counts).tolist()
  assert found.about['target'] == 'validation batches'
  batch = {'image': part.images, 'label': part.labels}
  expected = class_grams(
    lambda p, b: losses_in_training(run, p, b), run.net.params, batch, num_classes=CLASSES,
    strategy='masked', head='^head/',
  )  # fmt: skip
  largest = np.abs(expected.shared).max()
  np.testing.assert_allclose(found.gram(), expected.shared, rtol=1e-3, atol=1e-4 * largest)
  assert found.errors[found.at()].max() < 1e-3 * largest


def test_the_same_on_one_device_and_on_eight(driver, run):
  state = restore.load_state(str(run.workdir), 'latest')
  config = run.config.copy_and_resolve_references()
  found = {}
  for devices, fsdp, batch in ((1, 1, 32), (8, 1, 32), (8, 4, 32), (8, 1, 30)):
    config.parallel.devices, config.parallel.fsdp = devices, fsdp
    config.train.batch_size = 32
    placed = sharding.layout(config).place_state(jax.device_get(state))
    config.train.batch_size = batch  # 8 does not divide 30: each device does all of it
    net = Net.of(run.net.model, placed, run.net.metadata)
    measured = training_conflict.measure(net, config, run.data, run.data.train, Batches(2))
    found[devices, fsdp, batch] = measured.grams
    if batch == 32:
      largest = np.abs(found[1, 1, 32]).max((1, 2), keepdims=True)
      assert np.all(np.abs(measured.grams - found[1, 1, 32]) <= 1e-5 * largest)
  assert (found[8, 1, 30] != found[8, 1, 32]).any()


def test_a_probe_of_batches_is_the_measurement_of_its_step(run):
  config = run.config.copy_and_resolve_references()
  config.diagnostics.update({'statistics': 'auto', 'batches': 3, 'every': 1})
  made = probe.of_config(run.net, config, run.data, run.net.layout)
  found = made.measure(restore.load_state(str(run.workdir), 'latest'))
  expected = training_conflict.of_run(run, 'latest', Batches(3, seed=config.seed))
  np.testing.assert_array_equal(found.grams, expected.grams)
  assert found.about == expected.about
  config.diagnostics.statistics = 'frozen'
  assert type(probe.of_config(run.net, config, run.data, run.net.layout)) is probe.ImageProbe


def test_a_run_measures_its_training_batches(driver, run, tmp_path):
  """Probe and snapshots with 'batch', in a run with moving averages; training does not notice."""
  options = {'augment__crop_padding': 0, 'train__ema_decay': 0.9, 'train__epochs': 1}
  measures = {'every': 5, 'snapshots': '0,1', 'statistics': 'auto', 'batches': 2}
  measures = {f'diagnostics__{name}': value for name, value in measures.items()}
  for name, more in (('plain', {}), ('measured', measures)):
    with StopRequest() as stop:
      config = driver.tiny_config(**options, **more)
      loop.train_and_evaluate(config, str(tmp_path / name), stop)
  plain, measured = (restore.load_state(str(tmp_path / n), 'latest') for n in ('plain', 'measured'))
  jax.tree.map(np.testing.assert_array_equal, plain.params, measured.params)
  there = restore.load_run(str(tmp_path / 'measured'), 'latest')
  expected = training_conflict.of_run(there, 'latest', Batches(2, there.config.seed))
  folder = tmp_path / 'measured' / 'conflict'
  end = Conflict.load(folder / 'moment_1_train.npz')
  np.testing.assert_array_equal(end.grams, expected.grams)
  assert end.about['statistics'] == 'batch'
  assert Conflict.load(folder / 'moment_1_val.npz').about['target'] == 'validation batches'
  assert Conflict.load(folder / 'step000005_probe.npz').about['batches'] == 2


def test_batches_that_exceed_a_device_are_refused_before_the_first_step(run, monkeypatch):
  config = run.config.copy_and_resolve_references()
  config.diagnostics.update({'statistics': 'batch', 'snapshots': '1'})
  monkeypatch.setattr(backend, 'device_bytes', lambda: 30_000)
  with pytest.raises(UserError) as error:
    probe.check_room(run.net, config, devices=1)
  assert str(error.value).startswith(
    'expected class gradients and Grams within the 0.0 GB of a device, for 16 batches of 10 '
    'classes; found 0.'
  )
  assert str(error.value).endswith(
    'set --config.diagnostics.batches to fewer, or --config.diagnostics.statistics=frozen'
  )
  config.diagnostics.snapshots = ''
  probe.check_room(run.net, config, devices=1)  # nothing is measured


@pytest.mark.parametrize('weights', ['none', 'inverse', 'effective'])
def test_prior_and_gram_are_the_gradient_that_training_takes(driver, weights):
  """|grad of a step on all images|^2 = pi' G pi, over all layers, whatever the class weights."""
  config = driver.tiny_config(loss__weights=weights, augment__crop_padding=0, loss__beta=0.99)
  data = pipeline.load(config, print)
  job = Job.of(config, data)
  state, _ = job.begin()
  labels = data.train.labels
  _, shown = jax.jit(job.step_fn(0))(state, {'image': data.train.images, 'label': labels}, job.key)
  net = job.net(state)
  losses_fn = Partial(training_conflict.losses_of(net, config), net.batch_stats)
  batch = {'image': net.metadata.preprocessing(data.train.images), 'label': labels}
  found = class_grams(losses_fn, net.params, batch, num_classes=CLASSES, strategy='masked')
  prior = diagnose.objective_prior(config, data, 0)
  gram = np.sum([np.asarray(of_layer, float) for of_layer in found.grams.values()], 0)
  np.testing.assert_allclose(shown['grad_norm'], np.sqrt(prior @ gram @ prior), rtol=1e-5)
  if weights != 'none':  # so that the weights have a part in it
    plain = np.bincount(labels) / len(labels)
    assert abs(np.sqrt(plain @ gram @ plain) / shown['grad_norm'] - 1) > 0.1
