"""The diagnosis of a run: what it predicts happens, training goes on unmoved, files are whole."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csba_jax.data import pipeline, sampling
from csba_jax.errors import UserError
from csba_jax.gradients import class_gradients, class_grams
from csba_jax.gradients import conflict as conflict_lib
from csba_jax.gradients.conflict import Conflict
from csba_jax.measure import diagnose, probe
from csba_jax.methods import losses, optimizers
from csba_jax.models import multibranch
from csba_jax.run import restore
from csba_jax.run import state as state_lib
from csba_jax.runtime import backend
from csba_jax.runtime.signals import StopRequest
from csba_jax.training import loop

ROOT = Path(__file__).parents[2]
NET = {
  'model__name': 'multibranch',
  'model__attention': 'csba',
  'model__width': 0.1,
  'train__epochs': 4,
  'diagnostics__every': 20,
  'diagnostics__images': 8,
}


def run_here(config, workdir):
  with StopRequest() as stop:
    return loop.train_and_evaluate(config, str(workdir), stop)


@pytest.fixture(scope='session')
def workdir(driver, tmp_path_factory):
  """A multibranch net trained on the digits of a long tail, measured every 20 steps."""
  workdir = tmp_path_factory.mktemp('diagnose') / 'run'
  run_here(driver.tiny_config(**NET), workdir)
  return workdir


@pytest.fixture(scope='session')
def run(workdir):
  return restore.load_run(str(workdir), 'latest')


def losses_and_data(run, dtype=jnp.float32):
  """The run's losses by its own config, written anew; and its training images."""
  model = multibranch.build(10, (8, 8, 1), 'csba', 0.1, dtype)
  loss_fn = losses.unweighted(run.config, run.data.class_counts)

  def losses_fn(params, batch):
    variables = {'params': params, 'batch_stats': stats}
    return loss_fn(model.apply(variables, batch['image'], train=False), batch['label'])

  stats = jax.tree.map(lambda x: x.astype(dtype), run.net.batch_stats)
  images = jnp.asarray(run.data.train.images, dtype) / 127.5 - 1
  return losses_fn, {'image': images, 'label': run.data.train.labels}


@pytest.mark.seconds
def test_the_diagnostic_predicts_what_a_step_does(run):
  """A step of plain SGD along class d's gradient changes L_c by -lr G[c, d], for all pairs.

  float64, frozen statistics, every training image of a net that was trained on them; the step of
  the prior-weighted loss changes L_c by -lr times the sum of `progress`.
  """
  with jax.enable_x64(True):
    losses_fn, batch = losses_and_data(run, jnp.float64)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), run.net.params)
    call = functools.partial(class_grams, losses_fn, num_classes=10, per_example=True)
    gram = np.asarray(call(params, batch).total)
    g = class_gradients(losses_fn, params, batch, num_classes=10, per_example=True)
    member = jnp.asarray(batch['label'])[None] == jnp.arange(10)[:, None]

    @jax.jit
    def class_losses(params):
      found = losses_fn(params, batch)
      return jnp.where(member, found[None], 0).sum(1) / member.sum(1)

    @jax.jit
    def change(weights, lr):
      """Of every class's loss, by a step of rate lr along sum_d weights_d g_d."""
      step = jax.tree.map(lambda x: jnp.tensordot(weights, x, 1), g)
      moved = jax.tree.map(lambda p, s: p - lr * s, params, step)
      return class_losses(moved) - class_losses(params)

    scale = np.sqrt(np.outer(np.diagonal(gram), np.diagonal(gram)))
    lr = 1e-6 / scale.max() ** 0.5
    happened = np.stack([change(w, lr) for w in jnp.eye(10)], axis=1)  # [c, d]
    mixed = np.asarray(
      change(jnp.asarray(prior := run.data.class_counts / len(run.data.train)), lr)
    )
  assert (gram < 0).any()
  assert (np.abs(happened + lr * gram) / (lr * scale)).max() < 1e-3
  predicted = -lr * conflict_lib.progress(gram, prior).sum(1)
  assert np.abs(mixed - predicted).max() < 1e-3 * np.abs(predicted).max()


@pytest.fixture(scope='session')
def exact(run):
  return diagnose.diagnose_run(run, diagnose.Sampling(exact=True))


@pytest.mark.seconds
def test_exact_is_the_run_on_all_its_training_images(run, exact):
  losses_fn, batch = losses_and_data(run)
  expected = class_grams(
    losses_fn, run.net.params, batch, num_classes=10, per_example=True, head='^head/'
  )
  scale = np.sqrt(np.outer(*2 * [np.diagonal(expected.shared)]))
  assert (np.abs(exact.gram() - expected.shared) / scale).max() < 1e-4
  assert set(exact.layers) == set(expected.grams)
  assert exact.counts.tolist() == exact.class_counts.tolist() == run.data.class_counts.tolist()
  assert exact.class_names == run.data.class_names
  wanted = {'step': 48, 'loss': 'cross_entropy', 'attention': 'csba', 'target': 'train, exact'}
  assert wanted.items() <= exact.about.items()


@pytest.mark.seconds
def test_layers_come_from_input_to_output(exact):
  assert exact.layers[0] == 'stem/full/conv'
  assert exact.layers[-1] == 'head'
  stages = [name[:6] for name in exact.layers if name.startswith('stage')]
  assert stages == sorted(stages)
  assert exact.layers.index('stage1/block1/branch5x5/row/conv') < exact.layers.index(
    'stage1/block1/branch5x5/column/conv'
  )


@pytest.mark.seconds
def test_chosen_layers_alone(run, exact):
  found = diagnose.diagnose_run(run, diagnose.Sampling(exact=True), layers='stage2/.*conv/kernel')
  assert found.layers == tuple(
    name for name in exact.layers if name.startswith('stage2') and name.endswith('conv')
  )
  for name in found.layers:
    np.testing.assert_allclose(found.gram(name), exact.gram(name), rtol=1e-4, atol=1e-9)
  np.testing.assert_array_equal(found.gram('shared'), found.gram('total'))


@pytest.mark.seconds
@pytest.mark.parametrize('layers', ['stage9', '('])
def test_layers_that_find_nothing(run, layers):
  with pytest.raises(UserError, match='expected --layers'):
    diagnose.diagnose_run(run, diagnose.Sampling(), layers)


@pytest.mark.slow
def test_the_probe_is_an_estimate_of_the_run(run):
  """One compiled step against the pass that goes from image to image on the host."""
  state = restore.load_state(str(run.workdir), 'latest')
  found = probe.ImageProbe(run.net, run.config, run.data, run.net.layout).measure(state)
  sample = diagnose.Sampling(images=8, folds=probe.FOLDS, seed=run.config.seed)
  expected = diagnose.diagnose_run(run, sample)
  assert found.scopes == expected.scopes
  for name in ('grams', 'errors'):
    a, b = getattr(found, name), getattr(expected, name)
    assert np.abs(a - b).max() < 1e-4 * np.abs(b).max()
  np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
  assert found.about['folds'] == probe.FOLDS


@pytest.mark.seconds
def test_snapshots_and_lines_of_a_run(workdir, run):
  found = sorted((workdir / 'conflict').glob('*_probe.npz'))
  assert [path.name for path in found] == ['step000020_probe.npz', 'step000040_probe.npz']
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  lines = [line for line in lines if 'conflict_rate' in line]
  assert [line['step'] for line in lines] == [20, 40]
  for path, line in zip(found, lines, strict=True):
    snapshot = Conflict.load(path)
    assert snapshot.about['step'] == line['step']
    summary = {k: None if v != v else v for k, v in snapshot.summary().items()}
    assert summary.items() <= line.items()
    assert line['timing']['diagnostics_seconds'] > 0
  assert snapshot.class_names == run.data.class_names
  assert any(b'conflict_rate' in path.read_bytes() for path in (workdir / 'tensorboard').iterdir())


@pytest.mark.seconds
@pytest.mark.parametrize(
  ('fields', 'room', 'expected'),
  [
    (
      {'diagnostics__snapshots': '0.5'},
      30_000,
      'Grams within the 0.0 GB of a device, for snapshots of 10 classes; found .* class gradients '
      'of hidden; to fix it: set --config.diagnostics.snapshots',
    ),
    ({'diagnostics__loss_levels': '0.5'}, 30_000, 'for snapshots of 10 classes; found '),
    ({'diagnostics__every': 7}, 30_000, 'for a probe of 4 folds of 10 classes; found .*every=0'),
    ({'diagnostics__every': 7, 'diagnostics__images': 800}, 400_000, "device's share of the probe"),
  ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
  driver, monkeypatch, tmp_path, fields, room, expected
):
  """And the same folder takes a run that follows the advice."""
  monkeypatch.setattr(backend, 'device_bytes', lambda: room)
  with pytest.raises(UserError, match=expected) as error:
    run_here(driver.tiny_config(**fields), tmp_path / 'run')
  assert '\n' not in str(error.value)
  assert not [path for path in tmp_path.rglob('*') if path.is_file() and path.name != '.lock']
  assert run_here(driver.tiny_config(train__epochs=1), tmp_path / 'run')


class Clock:
  """Says a time that the measurement moves."""

  now = 0.0

  def __call__(self):
    return self.now


@pytest.mark.seconds
@pytest.mark.parametrize(
  ('per_call', 'first', 'exact'),
  [(0.1, 0.1, True), (0.5, 50.0, True), (0.7, 0.0, False), (30.0, 0.0, False)],
)
def test_every_image_is_taken_where_that_is_quick(capsys, per_call, first, exact):
  """A hundred calls of 10 images. The first one compiles, which says nothing about the others."""
  asked, ticks, clock = [], [], Clock()

  def measured(sample, tick):
    asked.append(sample)
    for call in range(100 if sample.exact else 1):
      clock.now += first if call == 0 else per_call
      tick(10 * call + 10, 1000)
    return sample

  sample = diagnose.Sampling(images=8, seed=3)
  tick = lambda *done: ticks.append(done)  # noqa: E731
  found = diagnose._exact_if_quick(measured, sample, tick, clock)
  assert found == dataclasses.replace(sample, exact=exact)
  assert asked[0] == dataclasses.replace(sample, exact=True)
  said = capsys.readouterr().err
  if exact:
    assert (len(asked), said, ticks[-1]) == (1, '', (1000, 1000))
  else:
    seconds = 99 * per_call  # after the first call
    assert said == f'every image would take about {seconds:.0f} s (--exact): taking a sample\n'
    assert len(ticks) < 10


def test_several_processes_take_a_sample(monkeypatch):
  monkeypatch.setattr(diagnose.distributed, 'count', lambda: 2)
  found = diagnose._exact_if_quick(lambda sample, _: sample, diagnose.Sampling(), print)
  assert found == diagnose.Sampling(exact=False)


def leaves_of(driver, workdir):
  config = driver.tiny_config()
  assert restore.config_of(str(workdir)).train.epochs == config.train.epochs
  state = restore.load_state(str(workdir), 'latest')
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def without_diagnostics(records):
  _, lines, result = records
  return [line for line in lines if 'conflict_rate' not in line], result


@pytest.fixture(scope='session')
def measured(driver, tmp_path_factory):
  """The driver's run with a measurement every 7 steps."""
  workdir = tmp_path_factory.mktemp('measured') / 'run'
  code, _, err = driver.finish(driver.start(workdir, '--config.diagnostics.every=7'))
  assert code == 0, err
  return workdir


@pytest.mark.seconds
def test_training_is_the_same_to_the_bit_with_diagnostics_and_without(driver, measured, tmp_path):
  run_here(driver.tiny_config(), tmp_path / 'plain')
  assert leaves_of(driver, measured) == leaves_of(driver, tmp_path / 'plain')
  with_lines, plain = driver.records_of(measured), driver.records_of(tmp_path / 'plain')
  assert without_diagnostics(with_lines) == without_diagnostics(plain)
  assert len(with_lines[1]) == len(plain[1]) + 36 // 7
  assert not (tmp_path / 'plain/conflict').exists()


@pytest.mark.slow
@pytest.mark.parametrize('end', ['after-step:17', 'after-line:4'])
def test_a_killed_run_ends_with_the_same_snapshots(driver, measured, tmp_path, end):
  arguments = ['--config.diagnostics.every=7']
  code, _, err = driver.finish(driver.start(tmp_path / 'run', *arguments, f'--end={end}'))
  assert code == -signal.SIGKILL, err
  code, _, err = driver.finish(driver.start(tmp_path / 'run', *arguments))
  assert code == 0, err
  assert driver.records_of(tmp_path / 'run') == driver.records_of(measured)
  names = sorted(path.name for path in (measured / 'conflict').iterdir())
  assert sorted(path.name for path in (tmp_path / 'run/conflict').iterdir()) == names
  for name in names:
    ours, theirs = (
      Conflict.load(folder / 'conflict' / name) for folder in (tmp_path / 'run', measured)
    )
    np.testing.assert_array_equal(ours.grams, theirs.grams)


@pytest.mark.seconds
def test_the_untrained_net_has_statistics_of_the_training_images(driver, measured):
  """The driver's perceptron has one norm: its statistics by hand, batch by batch."""
  config = driver.tiny_config()
  run = restore.load_run(str(measured), 'init')
  initial = state_lib.create(run.net.model, *_optimizer(run), config.seed)
  assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), run.net.params, initial.params))
  assert run.net.step == 0
  hidden = jax.tree.map(np.asarray, initial.params['hidden'])
  mean, n, batch_size = 0.0, len(run.data.train), config.train.batch_size
  for step in range(restore.STATISTICS_BATCHES):
    index = sampling.batch_positions(config.seed, step, n, batch_size)
    images = run.data.train.images[index].reshape(batch_size, -1) / 127.5 - 1
    mean = 0.9 * mean + 0.1 * (images @ hidden['kernel'] + hidden['bias']).mean(0)
  np.testing.assert_allclose(run.net.batch_stats['norm']['mean'], mean, rtol=1e-3, atol=1e-4)


def test_the_prior_is_what_a_class_weighs_in_the_objective(driver):
  """Weights by inverse frequency and class-balanced sampling are one objective; by hand."""
  plain = driver.tiny_config()
  data = pipeline.load(plain, print)
  counts = data.class_counts

  def prior(step=0, **fields):
    return diagnose.objective_prior(driver.tiny_config(**fields), data, step)

  np.testing.assert_allclose(prior(), counts / counts.sum())
  np.testing.assert_allclose(prior(sampler__name='class'), np.full(10, 0.1))
  np.testing.assert_allclose(prior(loss__weights='inverse'), np.full(10, 0.1))
  roots = np.sqrt(counts)
  np.testing.assert_allclose(prior(sampler__name='square_root'), roots / roots.sum())
  deferred = {'loss__weights': 'inverse', 'loss__weights_start': 0.5}  # of 36 steps
  np.testing.assert_allclose(prior(17, **deferred), counts / counts.sum())
  np.testing.assert_allclose(prior(18, **deferred), np.full(10, 0.1))


@pytest.mark.seconds
def test_the_net_with_averages_is_diagnosed_as_it_is_evaluated(driver, tmp_path):
  config = driver.tiny_config(train__ema_decay=0.99, train__epochs=1)
  with StopRequest() as stop:
    loop.train_and_evaluate(config, str(tmp_path), stop)
  run = restore.load_run(str(tmp_path), 'latest')
  found = diagnose.diagnose_run(run, diagnose.Sampling(exact=True))
  state = restore.load_state(str(tmp_path), 'latest')
  averaged = dataclasses.replace(run, net=run.net.replace(**state.averages))
  expected = diagnose.diagnose_run(averaged, diagnose.Sampling(exact=True))
  np.testing.assert_array_equal(found.grams, expected.grams)
  raw = run.net.replace(params=state.params, batch_stats=state.batch_stats)
  raw = dataclasses.replace(run, net=raw)
  assert (diagnose.diagnose_run(raw, diagnose.Sampling(exact=True)).losses != found.losses).any()


def _optimizer(run):
  tx, _ = optimizers.build(run.config, 1)
  return tx, run.data.image_shape


@pytest.mark.seconds
def test_a_checkpoint_of_another_architecture(driver, workdir, measured, tmp_path):
  shutil.copytree(measured, tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run/checkpoints')
  shutil.copytree(workdir / 'checkpoints', tmp_path / 'run/checkpoints')
  with pytest.raises(UserError, match='of another architecture'):
    restore.load_run(str(tmp_path / 'run'), 'latest')


def start(*arguments):
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''}
  return subprocess.Popen(
    [sys.executable, '-m', 'csba_jax.bin.diagnose', *arguments],
    env=environment,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


@pytest.mark.slow
def test_the_binary_prints_and_writes(workdir, tmp_path):
  shutil.copytree(workdir, tmp_path / 'run')
  arguments = ['--images=8', '--folds=2', '--checkpoint=init', '--layers=stage3|head']
  process = start(f'--workdir={tmp_path}/run', *arguments)
  out, err = process.communicate(timeout=600)
  assert process.returncode == 0, err
  written = [line.removeprefix('written: ') for line in out.splitlines() if 'written: ' in line]
  stem = 'step000000_train_seed0_stage3-head'
  names = [f'{stem}.npz', f'{stem}_shared.png', f'{stem}_layers.png', f'{stem}_flow.png']
  assert [Path(path).name for path in written] == [*names, 'over_training.png']
  for path in written[1:]:
    assert Path(path).read_bytes().startswith(b'\x89PNG')
  found = Conflict.load(written[0])
  assert found.about['images'] == 8
  assert f'{found.cosine()[0, 1]:.3f}' in out
  assert 'of 45 pairs in the shared scope' in out
  assert re.search(
    r'^20 gradients of 8 images of each class, \d+ MiB at a time in 1 pass$', err, re.M
  )


@pytest.mark.slow
def test_where_nothing_can_be_written_the_result_is_printed(workdir, tmp_path):
  shutil.copytree(workdir, tmp_path / 'run', ignore=shutil.ignore_patterns('conflict'))
  (tmp_path / 'run/conflict').write_text('a file, where the folder should be')
  arguments = ['--images=8', '--folds=2', '--checkpoint=latest', '--layers=stage3|head']
  out, err = (process := start(f'--workdir={tmp_path}/run', *arguments)).communicate(timeout=600)
  assert process.returncode == 1
  assert 'of 45 pairs in the shared scope' in out
  assert 'written' not in out
  assert '; the result was printed; to fix it: ' in err.splitlines()[-1]
  assert 'Traceback' not in err


@pytest.mark.slow
def test_ctrl_c_leaves_whole_files_only(workdir, tmp_path):
  shutil.copytree(workdir, tmp_path / 'run')
  before = sorted(path.name for path in (tmp_path / 'run/conflict').iterdir())
  process = start(f'--workdir={tmp_path}/run', '--images=200000')
  while 'MiB at a time' not in process.stderr.readline():  # from here on it works on images
    assert process.poll() is None
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=600)
  assert process.returncode == 130, err
  assert err.splitlines()[-1] == 'stopped: nothing was written'
  assert not out
  assert sorted(path.name for path in (tmp_path / 'run/conflict').iterdir()) == before


@pytest.mark.seconds
@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    ([], 'expected --workdir'),
    (['--workdir=nix'], 'no config.json there'),
    (['--workdir={run}', '--checkpoint=7'], 'found 7'),
    (['--workdir={run}', '--layers=nix', '--data_dir=/nowhere'], 'which finds none of'),
    (['--workdir={run}', '--folds=1'], 'at least 2 folds'),
    (['--workdir={run}', '--target=test'], "--target: train or population; found 'test'"),
    (['--workdir={run}', '--images=two'], 'two'),
    (['--workdir={run}', 'stray'], 'flags only'),
  ],
)
def test_bad_input_ends_in_one_line(workdir, arguments, expected):
  process = start(*(argument.format(run=workdir) for argument in arguments))
  out, err = process.communicate(timeout=600)
  assert process.returncode == 1, err
  assert 'Traceback' not in err
  assert expected in err.splitlines()[-1]
  assert not out
