"""The training loop: what it writes, and that no way of ending it early changes the end."""

import collections
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.datasets

from csba_jax.data import augment, pipeline, sampling
from csba_jax.errors import UserError
from csba_jax.measure import calibration, evaluate
from csba_jax.methods import losses, metrics, optimizers
from csba_jax.models import registry
from csba_jax.run import restore
from csba_jax.run import state as state_lib
from csba_jax.run.checkpoint import Checkpoints
from csba_jax.run.net import Metadata, Net, Preprocessing
from csba_jax.run.schedule import Plan
from csba_jax.runtime import backend, sharding
from csba_jax.runtime.signals import StopRequest
from csba_jax.training import loop
from csba_jax.training.step import make_step


@pytest.fixture(scope='session')
def finished(driver, tmp_path_factory):
  """Workdir of an undisturbed run."""
  workdir = tmp_path_factory.mktemp('runs') / 'undisturbed'
  code, _, err = driver.finish(driver.start(workdir))
  assert code == 0, err
  return workdir


def final_state(driver, workdir):
  """(step, leaves) of the last checkpoint: parameters, statistics, optimiser state."""
  config = driver.tiny_config()
  model = registry.build(config.model, 10, (8, 8, 1))
  tx, _ = optimizers.build(config, 1)
  like = state_lib.shapes(model, tx, (8, 8, 1))
  with Checkpoints(workdir / 'checkpoints', read_only=True) as checkpoints:
    step = checkpoints.steps()[-1]
    return step, jax.tree.leaves(checkpoints.restore(step, like.saved())[0])


def assert_same_end(driver, workdir, finished):
  """Everything reproducible is equal to the bit."""
  assert driver.records_of(workdir) == driver.records_of(finished)
  (step, leaves), (expected_step, expected) = (
    final_state(driver, workdir),
    final_state(driver, finished),
  )
  assert step == expected_step
  for leaf, other in zip(leaves, expected, strict=True):
    assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes()


def run_here(driver, workdir, **overrides):
  with StopRequest() as stop:
    return loop.train_and_evaluate(driver.tiny_config(**overrides), str(workdir), stop)


def test_a_run_learns_and_leaves_whole_records(driver, finished):
  config, lines, result = driver.records_of(finished)
  training = [line for line in lines if 'train_loss' in line]
  validation = [line for line in lines if 'val_macro_f1' in line]
  total = driver.EPOCHS * driver.STEPS_PER_EPOCH
  assert [line['step'] for line in training] == [5, 10, 12, 17, 22, 24, 29, 34, 36]
  assert [line['step'] for line in validation] == [12, 24, 36]
  assert training[-1]['step'] == total
  assert training[-1]['train_loss'] < 0.7 * training[0]['train_loss']
  assert config['versions']['jax'] == jax.__version__
  assert set(config) == {'config', 'versions', 'commit', 'environment', 'numerics'}
  assert set(result) >= {'accuracy', 'macro_f1', 'balanced_accuracy', 'per_class', 'parameters'}
  assert set(result['per_class']) == {'precision', 'recall', 'f1', 'support'}
  assert result['group_accuracy']['few'] is not None
  assert np.sum(result['confusion_matrix']) == result['examples'] == 539
  assert result['validation_macro_f1'] == max(line['val_score'] for line in validation)
  assert result['parameters'] == 64 * 16 + 16 + 32 + 160 + 10
  assert list((finished / 'tensorboard').iterdir())
  assert json.loads((finished / 'result.json').read_text())['timing']['seconds'] > 0


def test_the_best_checkpoint_is_tested(driver, finished):
  result = driver.records_of(finished)[2]
  again = evaluate.evaluate_run(str(finished), 'best')
  trust = again.pop('trust')
  assert trust.accuracy[0] == pytest.approx(result['accuracy'])
  assert trust.error[0] == pytest.approx(result['expected_calibration_error'], abs=1e-5)
  validation = calibration.Validation.load(finished, 10)
  assert trust.temperature == calibration.fit(validation, 10, None).temperature
  assert {name: again[name] for name in again} == {name: result[name] for name in again}
  val = evaluate.evaluate_run(str(finished), 'best', split='val')
  source = np.bincount(sklearn.datasets.load_digits().target)
  score = metrics.macro_f1_at(np.array(val['confusion_matrix']), source)
  assert score == result['validation_macro_f1']
  last = evaluate.evaluate_run(str(finished), 'latest')
  assert val['trust'] is last['trust'] is None  # the validation logits are those of the best
  assert last['checkpoint_step'] == driver.EPOCHS * driver.STEPS_PER_EPOCH
  assert evaluate.evaluate_run(str(finished), str(last['checkpoint_step'])) == last


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'which': '7'}, '--checkpoint=best, latest, init or one of .*; found 7'),
    ({'which': 'worst'}, 'found worst'),
  ],
)
def test_evaluation_of_a_checkpoint_that_is_not_there(finished, arguments, message):
  with pytest.raises(UserError, match=message):
    evaluate.evaluate_run(str(finished), **arguments)


def test_post_hoc_adjustment_of_a_finished_run(driver, finished):
  plain = evaluate.evaluate_run(str(finished), 'best')
  adjusted = evaluate.evaluate_run(str(finished), 'best', post_hoc_tau=1.0)
  assert (plain['post_hoc_tau'], adjusted['post_hoc_tau']) == (0.0, 1.0)

  def rare(result):  # predictions of the smaller half of the classes
    return np.sum(np.asarray(result['confusion_matrix'])[:, 5:])

  assert rare(adjusted) > rare(plain)
  with pytest.raises(UserError, match=r'a finite tau >= 0; found -1\.0'):
    evaluate.evaluate_run(str(finished), 'best', post_hoc_tau=-1.0)


@pytest.mark.seconds
def test_evaluation_without_checkpoints_or_validation_part(driver, finished, tmp_path):
  with pytest.raises(UserError, match='no config.json'):
    evaluate.evaluate_run(str(tmp_path))
  workdir = tmp_path / 'none'
  shutil.copytree(finished, workdir)
  shutil.rmtree(workdir / 'checkpoints')
  with pytest.raises(UserError, match='a run with checkpoints'):
    evaluate.evaluate_run(str(workdir))
  (workdir / 'checkpoints').mkdir()
  with pytest.raises(UserError, match='a saved checkpoint'):
    evaluate.evaluate_run(str(workdir))
  run_here(driver, tmp_path / 'all', data__val_fraction=0.0, train__epochs=1)
  for data_dir in (None, '/nowhere'):  # which is not read
    with pytest.raises(UserError, match='a val part with images'):
      evaluate.evaluate_run(str(tmp_path / 'all'), split='val', data_dir=data_dir)


def test_evaluation_counts_every_example_once(driver):
  config = driver.tiny_config()
  data = pipeline.load(config, print)
  model = registry.build(config.model, 10, (8, 8, 1))
  tx, _ = optimizers.build(config, 1)
  state = state_lib.create(model, tx, (8, 8, 1), 0)
  expected = np.zeros((10, 10), int)
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  logits = model.apply(variables, Preprocessing()(jnp.asarray(data.test.images)))
  for label, predicted in zip(data.test.labels, np.argmax(logits, -1), strict=True):
    expected[label, predicted] += 1
  net = Net.of(model, state, Metadata.of(data))
  for batch_size in (32, 100, 539, 1000):
    sums = evaluate.evaluate(net, data.test, batch_size)
    np.testing.assert_array_equal(sums.counts, expected)


def test_a_finished_run_is_left_alone(driver, finished):
  before = {path: path.stat().st_mtime_ns for path in finished.rglob('*') if path.is_file()}
  result = run_here(driver, finished)
  after = {path: path.stat().st_mtime_ns for path in finished.rglob('*') if path.is_file()}
  assert result['macro_f1'] == driver.records_of(finished)[2]['macro_f1']
  before.pop(finished / '.lock'), after.pop(finished / '.lock')
  assert after == before


def test_without_validation_the_last_step_is_tested(driver, tmp_path):
  result = run_here(driver, tmp_path, data__val_fraction=0.0, train__epochs=1)
  lines = driver.records_of(tmp_path)[1]
  assert result['checkpoint_step'] == lines[-1]['step'] == 14  # ceil(422 / 32)
  assert result['validation_macro_f1'] is None
  assert not any('val_macro_f1' in line for line in lines)


def static_step(driver):
  config = driver.tiny_config()
  model = registry.build(config.model, 10, (8, 8, 1))
  tx, _ = optimizers.build(config, 36)
  layout = sharding.layout(config)
  step_fn = make_step(config, model, tx, np.arange(10, 0, -1), 36, layout)
  return model, tx, step_fn, layout


def some_data():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
  return {'image': images, 'label': np.arange(40, dtype=np.int32) % 10}


@pytest.mark.seconds
def test_many_steps_in_one_dispatch_equal_single_ones(driver):
  model, tx, step_fn, layout = static_step(driver)
  data = some_data()
  indices = np.stack([sampling.batch_positions(0, step, 40, 16) for step in range(5)])
  initial, key = state_lib.create(model, tx, (8, 8, 1), 0), jax.random.key(0)
  together, metrics = loop.compiled_steps()(
    jax.tree.map(jnp.copy, initial), data, {'own': indices}, key, step_fn=step_fn, layout=layout
  )
  state, singly = initial, []
  for index in indices:
    state, one = loop.compiled_steps()(
      state, data, {'own': index[None]}, key, step_fn=step_fn, layout=layout
    )
    singly.append(one['loss'][0])
  assert int(together.step) == int(state.step) == 5
  np.testing.assert_allclose(metrics['loss'], np.stack(singly), rtol=1e-5)
  for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(state), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.seconds
def test_one_step_is_the_gradient_of_the_mean_loss(driver):
  model, tx, step_fn, _ = static_step(driver)
  state = state_lib.create(model, tx, (8, 8, 1), 3)
  batch = some_data()
  new, metrics = jax.jit(step_fn)(state, batch, jax.random.key(5))

  key = jax.random.fold_in(jax.random.key(5), 0)
  images = Preprocessing()(augment.random_crop(jax.random.split(key)[0], batch['image'], 1))

  def mean_loss(params):
    variables = {'params': params, 'batch_stats': state.batch_stats}
    logits, _ = model.apply(variables, images, train=True, mutable=['batch_stats'])
    return losses.cross_entropy(logits, batch['label']).sum() / 40

  loss, grads = jax.jit(jax.value_and_grad(mean_loss))(state.params)
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-6)
  np.testing.assert_allclose(metrics['grad_norm'], optax.tree.norm(grads), rtol=1e-6)
  updates, _ = tx.update(grads, tx.init(state.params), state.params)
  expected = optax.apply_updates(state.params, updates)
  for a, b in zip(jax.tree.leaves(new.params), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
  assert int(new.step) == 1


@pytest.mark.seconds
def test_runs_that_differ_in_seeds_alone_compile_once(driver, tmp_path):
  before = loop.compiled_steps()._cache_size()
  for seed in range(2):
    run_here(driver, tmp_path / str(seed), train__epochs=2, seed=seed, data__seed=seed)
  assert loop.compiled_steps()._cache_size() == before + 1


@pytest.mark.seconds
def test_a_run_of_long_dispatches_ends_like_one_of_single_steps(
  driver, finished, tmp_path, monkeypatch
):
  monkeypatch.setattr(backend, 'steps_per_dispatch', lambda longest: longest)
  run_here(driver, tmp_path)
  _, lines, result = driver.records_of(tmp_path)
  _, expected, expected_result = driver.records_of(finished)
  assert [line['step'] for line in lines] == [line['step'] for line in expected]
  for line, other in zip(lines, expected, strict=True):
    if 'train_loss' in line:
      np.testing.assert_allclose(line['train_loss'], other['train_loss'], rtol=1e-4)
  assert result['splits_sha256'] == expected_result['splits_sha256']


@pytest.mark.parametrize('start', range(0, 37))
def test_segments_end_at_lines_and_epochs_from_any_start(start):
  plan = Plan(steps_per_epoch=12, total=36, log_every=5, eval_every=24, diagnose_every=0)
  segments = list(plan.segments(start))
  ends = [0, 5, 10, 12, 17, 22, 24, 29, 34, 36]
  assert [end for _, end in segments] == [end for end in ends if end > start]
  assert [first for first, _ in segments[1:]] == [end for _, end in segments[:-1]]
  assert [step for step in range(1, 37) if plan.evaluates_at(step)] == [24, 36]


@pytest.mark.parametrize('every', [0, 1, 4, 7, 100])
def test_a_dispatch_ends_at_each_step_that_is_diagnosed(every):
  plan = Plan(12, 36, log_every=6, eval_every=24, diagnose_every=every)
  for longest in (1, 3, 6):
    calls = list(plan.dispatches(6, 18, longest))
    assert [first for first, _ in calls] == [6, *(end for _, end in calls[:-1])]
    assert calls[-1][1] == 18
    assert all(0 < end - first <= longest for first, end in calls)
    ends = {end for _, end in calls}
    assert {step for step in range(7, 19) if plan.diagnoses_at(step)} <= ends


def test_a_dispatch_ends_where_frozen_weights_begin_to_move():
  plan = Plan(12, 36, log_every=12, eval_every=24, diagnose_every=0, frozen=9)
  assert list(plan.dispatches(0, 12, 12)) == [(0, 9), (9, 12)]
  assert list(plan.dispatches(12, 24, 12)) == [(12, 24)]


KILLS = [
  'after-step:17',
  'saving:2',
  'before-config:1',
  'after-config:1',
  'before-step:1',
  'before-line:4',
  'after-line:3',
  'after-line:7',
  'before-save:1',
  'saving:1',
  'saving:3',
  'before-last-wait:1',
  'all-saved:1',
  'before-evaluation:2',
  'after-evaluation:4',
  'before-result:1',
  'after-result:1',
]


def copied(workdir, copy):
  """Copies a workdir as it is at one moment, although a thread may be saving to it."""
  while workdir.exists():
    with contextlib.suppress(OSError, shutil.Error):  # a file was renamed meanwhile
      before = sorted(workdir.rglob('*'))
      shutil.copytree(workdir, copy)
      there = sorted(workdir / path.relative_to(copy) for path in copy.rglob('*'))
      if sorted(workdir.rglob('*')) == before == there:
        return
    shutil.rmtree(copy, ignore_errors=True)


@pytest.fixture(scope='session')
def left_by_kills(driver, tmp_path_factory):
  """(an undisturbed run, a folder with its workdir as it was at each of KILLS).

  A process that is killed there leaves just that: nothing of its memory comes to the disk.
  """
  folder, counts = tmp_path_factory.mktemp('kills'), collections.Counter()

  def arrive(place):
    counts[place] += 1
    if (end := f'{place}:{counts[place]}') in KILLS:
      copied(folder / 'undisturbed', folder / end)

  with pytest.MonkeyPatch.context() as patch:
    driver.places(arrive, patch.setattr)
    run_here(driver, folder / 'undisturbed')
  return folder / 'undisturbed', folder


@pytest.mark.parametrize('end', KILLS)
def test_what_a_kill_leaves_ends_as_if_undisturbed(driver, left_by_kills, tmp_path, end):
  undisturbed, folder = left_by_kills
  if (folder / end).exists():  # not before the folder is claimed
    shutil.copytree(folder / end, tmp_path / 'run')
  else:
    assert end == 'before-config:1'
  run_here(driver, tmp_path / 'run')
  assert_same_end(driver, tmp_path / 'run', undisturbed)


@pytest.mark.seconds
@pytest.mark.parametrize(
  'end', KILLS[:1] + [pytest.param(end, marks=pytest.mark.slow) for end in KILLS[1:]]
)
def test_a_killed_run_ends_as_if_undisturbed(driver, finished, tmp_path, end):
  workdir = tmp_path / 'run'
  code, _, err = driver.finish(driver.start(workdir, f'--end={end}'))
  assert code == -signal.SIGKILL, err
  code, _, err = driver.finish(driver.start(workdir))
  assert code == 0, err
  assert_same_end(driver, workdir, finished)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_if_undisturbed(driver, finished, tmp_path):
  workdir = tmp_path / 'run'
  for end in ('after-step:3', 'after-step:14', 'saving:1', 'after-step:5', 'before-evaluation:1'):
    code, _, err = driver.finish(driver.start(workdir, f'--end={end}'))
    assert code == -signal.SIGKILL, err
  assert driver.finish(driver.start(workdir))[0] == 0
  assert_same_end(driver, workdir, finished)


@pytest.mark.slow
def test_the_multibranch_net_killed_ends_as_if_undisturbed(driver, tmp_path):
  net = ['--config.model.name="multibranch"', '--config.model.attention="csba_class"']
  net += ['--config.model.width=0.1', '--config.train.epochs=2']
  for name, end in (('whole', []), ('killed', ['--end=saving:2'])):
    driver.finish(driver.start(tmp_path / name, *net, *end))
  code, _, err = driver.finish(driver.start(tmp_path / 'killed', *net))
  assert code == 0, err
  assert 'going on from the checkpoint at step' in err
  assert driver.records_of(tmp_path / 'killed') == driver.records_of(tmp_path / 'whole')


@pytest.mark.seconds
@pytest.mark.parametrize(
  ('end', 'name', 'expected'),
  [
    ('after-step:17', 'TERM', 75),
    pytest.param('after-step:12', 'TERM', 75, marks=pytest.mark.slow),
    pytest.param('before-evaluation:2', 'TERM', 75, marks=pytest.mark.slow),
    pytest.param('before-step:1', 'INT', 130, marks=pytest.mark.slow),
  ],
)
def test_a_signal_saves_and_leaves_with_its_code(driver, finished, tmp_path, end, name, expected):
  workdir = tmp_path / 'run'
  code, _, err = driver.finish(driver.start(workdir, f'--end={end}', f'--signal={name}'))
  assert code == expected, err
  assert 'saved, start again to go on' in err
  step, _ = final_state(driver, workdir)
  assert f'stopped at step {step}' in err
  code, _, err = driver.finish(driver.start(workdir))
  assert code == 0
  assert f'going on from the checkpoint at step {step}' in err
  assert_same_end(driver, workdir, finished)


@pytest.mark.slow
def test_two_processes_on_one_workdir(driver, tmp_path):
  workdir = tmp_path / 'run'
  first = driver.start(workdir, '--end=after-step:10', '--signal=STOP')
  try:
    deadline = time.monotonic() + 120
    while (
      not (workdir / 'metrics.jsonl').exists() or not (workdir / 'metrics.jsonl').stat().st_size
    ):
      assert time.monotonic() < deadline
      assert first.poll() is None
      time.sleep(0.1)
    code, _, err = driver.finish(driver.start(workdir))
    assert code == 1
    assert 'another process at work' in err.splitlines()[-1]
  finally:
    first.send_signal(signal.SIGCONT)
  code, _, err = driver.finish(first)
  assert code == 0, err  # the first one never noticed


def test_another_config_names_the_fields(driver, finished):
  with pytest.raises(UserError, match=r'train.epochs: 3 there, 5 here; train.momentum: 0.9 there'):
    run_here(driver, finished, train__epochs=5, train__momentum=0.5)


@pytest.mark.seconds
def test_nan_loss_stops_with_the_steps_and_keeps_the_last_good_checkpoint(driver, tmp_path):
  config = {'train__learning_rate': 1e18, 'train__warmup_fraction': 0.5}
  with pytest.raises(
    UserError, match=r'gradient norm (nan|inf) in steps (\d+) to \2 .*learning_rate'
  ):
    run_here(driver, tmp_path, **config)
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert all(np.isfinite(line['train_loss']) for line in lines if 'train_loss' in line)
  assert not (tmp_path / 'result.json').exists()


def test_nan_late_names_the_checkpoint_that_is_kept(driver, tmp_path, monkeypatch):
  honest = loop.compiled_steps()

  def poisoned(state, data, indices, key, **static):
    step = int(state.step)
    state, metrics = honest(state, data, indices, key, **static)
    return state, metrics | ({'loss': jnp.full(1, jnp.nan)} if step == 20 else {})

  monkeypatch.setattr(loop, 'compiled_steps', lambda: poisoned)
  with pytest.raises(UserError, match='loss nan, .* in steps 21 to 21 .*checkpoint is at step 12'):
    run_here(driver, tmp_path)
  assert final_state(driver, tmp_path)[0] == 12


def truncate(path):
  with open(path, 'r+b') as file:
    file.truncate(max(0, path.stat().st_size // 2))


def kill_in_last_save(driver, workdir):
  """Steps with a complete checkpoint: a save begins only once the one before is complete."""
  code, _, err = driver.finish(driver.start(workdir, '--end=saving:3'))
  assert code == -signal.SIGKILL, err
  steps = sorted(
    int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit()
  )
  assert steps in ([12, 24], [24, 36], [12, 24, 36])
  return steps


@pytest.mark.slow
@pytest.mark.parametrize('what', ['data', 'metadata'])
def test_a_truncated_checkpoint_falls_back_to_the_one_before(driver, finished, tmp_path, what):
  workdir = tmp_path / 'run'
  *_, before, newest = kill_in_last_save(driver, workdir)
  checkpoint = workdir / 'checkpoints' / str(newest)
  files = [path for path in checkpoint.rglob('*') if path.is_file()]
  inside = [path for path in files if path.parent.name == 'd']
  for path in inside if what == 'data' else set(files) - set(inside):
    truncate(path)
  code, _, err = driver.finish(driver.start(workdir))
  assert code == 0, err
  assert f'checkpoint {newest} is damaged, going back to the one before' in err
  assert f'going on from the checkpoint at step {before}' in err
  assert (workdir / 'checkpoints-damaged' / str(newest)).is_dir()
  assert_same_end(driver, workdir, finished)


def test_a_lost_best_checkpoint_does_not_stop_the_run(driver, tmp_path, monkeypatch, capsys):
  scores = iter([0.9, 0.1, 0.1])

  def lose_the_best(self):
    self._checkpoints.wait()
    for path in (tmp_path / 'run/checkpoints/12').rglob('*'):
      if path.is_file():
        truncate(path)

  monkeypatch.setattr(metrics, 'macro_f1_at', lambda *_: next(scores))
  monkeypatch.setattr(loop.Records, 'wait', lose_the_best)
  result = run_here(driver, tmp_path / 'run')
  assert 'the best checkpoint is lost, testing the last step' in capsys.readouterr().err
  assert result['checkpoint_step'] == 36
  assert result['validation_macro_f1'] is None


def test_the_best_checkpoint_stays_the_best_where_a_run_goes_on_from_it(
  driver, tmp_path, monkeypatch
):
  scores = iter([0.9, 0.1, 0.1])
  monkeypatch.setattr(metrics, 'macro_f1_at', lambda *_: next(scores))
  with StopRequest() as stop, monkeypatch.context() as patch:
    save = loop.Records.save

    def save_and_be_told_to_stop(*args):
      save(*args)
      if not stop.requested:
        os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(loop.Records, 'save', save_and_be_told_to_stop)
    assert loop.train_and_evaluate(driver.tiny_config(), str(tmp_path), stop) is None
  result = run_here(driver, tmp_path)
  assert (result['checkpoint_step'], result['validation_macro_f1']) == (12, 0.9)


def test_parameters_that_overflow_are_never_saved(driver, tmp_path, monkeypatch):
  honest = loop.compiled_steps()

  def overflow(state, data, indices, key, **static):
    state, found = honest(state, data, indices, key, **static)
    bad = jax.tree.map(lambda x: x * jnp.inf, state.params)
    return (state.replace(params=bad) if int(state.step) == 24 else state), found

  monkeypatch.setattr(loop, 'compiled_steps', lambda: overflow)
  with pytest.raises(UserError, match=r'infinity after step 24; .* of steps \[12\]'):
    run_here(driver, tmp_path)


def test_data_that_changed_under_a_run(driver, tmp_path, monkeypatch):
  workdir = tmp_path / 'run'
  run_here(driver, workdir, train__epochs=1)
  (workdir / 'result.json').unlink()
  honest = pipeline.cache.load_arrays

  def another(*args):  # the same counts and indices, but one image is another one
    arrays = honest(*args)
    return pipeline.dataclasses.replace(arrays, names=('digits/new', *arrays.names[1:]))

  monkeypatch.setattr(pipeline.cache, 'load_arrays', another)
  with pytest.raises(UserError, match='the data has changed'):
    run_here(driver, workdir, train__epochs=1)
  with pytest.raises(UserError, match='the data has changed'):
    evaluate.evaluate_run(str(workdir))


def test_pixels_that_changed_under_a_run(driver, tmp_path, monkeypatch):
  workdir = tmp_path / 'run'
  run_here(driver, workdir, train__epochs=1)
  (workdir / 'result.json').unlink()
  honest = pipeline.cache.load_arrays

  def another(*args):  # the same names and labels, but two images have another content
    arrays = honest(*args)
    sums = arrays.sums.copy()
    sums[:2] += 1
    return pipeline.dataclasses.replace(arrays, sums=sums)

  monkeypatch.setattr(pipeline.cache, 'load_arrays', another)
  message = r'found 2 with the same name and another content, such as digits/000[01]; to fix it'
  with pytest.raises(UserError, match=message):
    run_here(driver, workdir, train__epochs=1)
  for command in (evaluate.evaluate_run, restore.load_run):
    with pytest.raises(UserError, match=message):
      command(str(workdir))


@pytest.fixture
def small_mount(tmp_path):
  """mount(options): a small file system of its own; skips where that is not allowed."""
  mounted = []

  def mount(options):
    folder = tmp_path / f'mount{len(mounted)}'
    folder.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(folder)]
    try:
      subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
      pytest.skip(f'needs the right to mount a tmpfs: {error}')
    mounted.append(folder)
    return folder

  yield mount
  for folder in mounted:
    subprocess.run(['umount', '-l', str(folder)], check=True)


def only_one_line(err):
  """The last line is the message, and there is no traceback."""
  assert 'Traceback' not in err
  last = err.strip().splitlines()[-1]
  assert last.startswith('driver.py: expected')
  return last


@pytest.mark.seconds
def test_a_read_only_workdir(driver, small_mount):
  folder = small_mount('ro,size=1m')
  code, _, err = driver.finish(driver.start(folder / 'run'))
  assert code == 1
  assert 'Read-only file system' in only_one_line(err)


@pytest.mark.slow
def test_a_full_workdir_then_room_again(driver, finished, small_mount):
  folder = small_mount('size=600k')
  (folder / 'run').mkdir()
  assert driver.finish(driver.start(folder / 'run', '--end=after-step:30'))[0] == -signal.SIGKILL
  filler = folder / 'filler'
  with open(filler, 'wb', buffering=0) as file, contextlib.suppress(OSError):
    while file.write(bytes(1024)):
      pass
  code, _, err = driver.finish(driver.start(folder / 'run'))
  assert code == 1, err
  assert 'No space left' in only_one_line(err) or 'room' in only_one_line(err)
  os.unlink(filler)
  code, _, err = driver.finish(driver.start(folder / 'run'))
  assert code == 0, err
  assert_same_end(driver, folder / 'run', finished)


@pytest.mark.seconds
def test_a_workdir_that_is_full_from_the_start(driver, small_mount):
  folder = small_mount('size=8k')
  code, _, err = driver.finish(driver.start(folder / 'run'))
  assert code == 1
  only_one_line(err)
  assert not (folder / 'run/config.json').exists() or json.loads(
    (folder / 'run/config.json').read_text()
  )


OF_A_RUN = ('loading', 'decoding', '379 train', 'compiling', 'step ')


@pytest.mark.seconds
def test_a_disk_that_fills_while_a_run_saves(driver, small_mount):
  """Orbax logs a traceback in each of its threads; only the reason is shown."""
  code, out, err = driver.finish(driver.start(small_mount('size=60k') / 'run'))
  assert (code, out) == (1, '')
  last = only_one_line(err)
  assert 'found No space left on device; ' in last
  said = err.splitlines()[:-1]
  assert all(line.startswith(OF_A_RUN) for line in said), err


def test_a_batch_larger_than_the_data_leaves_the_folder_free(driver, tmp_path):
  workdir = tmp_path / 'run'
  with pytest.raises(UserError, match='a batch larger than the data'):
    run_here(driver, workdir, train__batch_size=4000)
  assert not (workdir / 'config.json').exists()
  run_here(driver, workdir, train__epochs=1)  # the same folder, once the flag is repaired


def test_step_keys_depend_on_seed_and_step_only(driver):
  model, tx, step_fn, _ = static_step(driver)
  state = state_lib.create(model, tx, (8, 8, 1), 0)
  step = jax.jit(step_fn)
  key = jax.random.key(0)
  first, again = (step(state, some_data(), key)[1]['loss'] for _ in range(2))
  np.testing.assert_array_equal(first, again)
  later = step(state.replace(step=state.step + 1), some_data(), key)[1]['loss']
  other = step(state, some_data(), jax.random.key(1))[1]['loss']
  assert len({float(first), float(later), float(other)}) == 3  # other crops


@pytest.mark.parametrize(
  ('counts', 'named'),
  [
    ([5, 70, 8], 'b 70, c 8, a 5'),
    (list(range(1, 31)), f'{chr(97 + 29)} 30 to a 1'),
  ],
)
def test_the_classes_of_the_training_part_are_named_from_the_largest(counts, named):
  data = types.SimpleNamespace(
    train=[0] * 9,
    val=[0] * 2,
    test=[0],
    class_counts=np.array(counts),
    class_names=[chr(97 + c) for c in range(len(counts))],
  )
  assert loop._about_data(data) == (
    f'9 training, 2 validation, 1 test images of {len(counts)} classes; '
    f'training images by class: {named}'
  )
