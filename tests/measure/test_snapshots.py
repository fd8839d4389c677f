"""Snapshots of a run: measured exactly, at the right steps, once, and the run does not notice."""

import itertools
import json
import signal

import jax
import numpy as np
import pytest

from csba_jax.config import step_at
from csba_jax.gradients.conflict import Conflict
from csba_jax.measure import diagnose, snapshots, training_conflict
from csba_jax.run import restore
from csba_jax.run.records import snapshot_file
from csba_jax.run.schedule import Plan
from csba_jax.runtime.signals import StopRequest
from csba_jax.training import after_step, loop

pytestmark = pytest.mark.seconds  # all of them read a run that has to be trained first

SNAPSHOTS, LEVELS = '0,0.5,1', '2.2,1.5,0.01'  # the last one is never reached
FLAGS = [
  f'--config.diagnostics.snapshots="{SNAPSHOTS}"',
  f'--config.diagnostics.loss_levels="{LEVELS}"',
]


@pytest.fixture(scope='module')
def measured(driver, tmp_path_factory):
  """The driver's run with snapshots, as a process."""
  workdir = tmp_path_factory.mktemp('snapshots') / 'run'
  code, _, err = driver.finish(driver.start(workdir, *FLAGS))
  assert code == 0, err
  return workdir


@pytest.fixture(scope='module')
def plain(driver, tmp_path_factory):
  """The same without."""
  workdir = tmp_path_factory.mktemp('snapshots') / 'plain'
  run_here(driver.tiny_config(), workdir)
  return workdir


def run_here(config, workdir):
  with StopRequest() as stop:
    return loop.train_and_evaluate(config, str(workdir), stop)


def snapshot_lines(workdir):
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [line for line in lines if 'train_conflict_rate' in line]


def training_lines(workdir):
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [line for line in lines if 'train_loss' in line]


def load(workdir, name, part):
  return Conflict.load(workdir / 'conflict' / f'{snapshot_file(name, part)}.npz')


def step_of(workdir, name):
  return load(workdir, name, 'train').about['step']


def mean_loss(conflict):
  return conflict.losses @ conflict.counts / conflict.counts.sum()


def settled(run):
  return restore.renew_statistics(run.net, run.config, run.data)


def loss_with(run, batch_stats):
  losses_fn = diagnose.losses_of(run.net, run.config)
  batch = {'image': run.data.train.images, 'label': run.data.train.labels}
  return float(np.asarray(losses_fn(batch_stats, run.net.params, batch)).mean())


def test_a_snapshot_writes_its_files_and_its_line(driver, measured):
  total = driver.EPOCHS * driver.STEPS_PER_EPOCH
  result = json.loads((measured / 'result.json').read_text())
  steps = {'0': 0, '0.5': total // 2, '1': total, 'tested': result['checkpoint_step']}
  steps |= {f'loss {level}': step_of(measured, f'loss {level}') for level in (2.2, 1.5)}
  expected = {
    f'moment_{name}_{part}.{kind}'
    for name in ('0', '0.5', '1', 'tested', 'loss-2.2', 'loss-1.5')
    for part in ('train', 'val')
    for kind in ('npz', 'json')
  }
  assert {path.name for path in (measured / 'conflict').iterdir()} == expected
  at = steps | {'tested': total}  # it is measured when the run has ended
  lines = snapshot_lines(measured)
  assert sorted(line['step'] for line in lines) == sorted(at.values())
  for name, step in steps.items():
    here = [line for line in lines if line['step'] == at[name]]
    line = here[-1] if name == 'tested' else here[0]
    assert line['epoch'] == at[name] / driver.STEPS_PER_EPOCH
    assert line['timing']['diagnostics_seconds'] > 0
    for part in ('train', 'val'):
      found = load(measured, name, part)
      assert found.about['step'] == step
      assert found.about['target'] == f'{part}, exact'
      for key, value in found.summary().items():
        assert line[f'{part}_{key}'] == pytest.approx(value, nan_ok=True)
      branches = json.loads(
        (measured / 'conflict' / f'{snapshot_file(name, part)}.json').read_text()
      )
      assert branches == {'cka': {}, 'gates': {}, 'gate_spread': {}}  # a perceptron


def test_names_of_files():
  assert snapshot_file('0.1', 'train') == 'moment_0.1_train'
  assert snapshot_file('loss 0.3', 'val') == 'moment_loss-0.3_val'


def test_the_tested_net_is_what_csba_diagnose_looks_at(measured):
  run = restore.load_run(str(measured), 'best')
  expected = diagnose.diagnose_run(run, diagnose.Sampling(exact=True))
  found = load(measured, 'tested', 'train')
  assert found.about['step'] == run.net.step
  assert set(found.scopes) == set(expected.scopes)
  scale = np.abs(expected.gram('total')).max()
  for scope in expected.scopes:
    np.testing.assert_allclose(
      found.gram(scope), expected.gram(scope), rtol=1e-3, atol=1e-5 * scale
    )
  np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
  np.testing.assert_array_equal(found.counts, run.data.class_counts)
  np.testing.assert_allclose(found.prior, expected.prior)


def test_the_validation_part_is_all_of_it_under_the_same_prior(measured):
  run = restore.load_run(str(measured), 'latest')
  found = load(measured, '1', 'val')
  counts = np.bincount(run.data.val.labels, minlength=10)
  np.testing.assert_array_equal(found.counts, counts)
  np.testing.assert_array_equal(found.class_counts, run.data.class_counts)
  np.testing.assert_allclose(found.prior, load(measured, '1', 'train').prior)
  losses_fn = diagnose.losses_of(run.net, run.config)
  batch = {'image': run.data.val.images, 'label': run.data.val.labels}
  losses = np.asarray(losses_fn(settled(run).batch_stats, run.net.params, batch))
  for c in np.flatnonzero(counts):
    assert found.losses[c] == pytest.approx(losses[run.data.val.labels == c].mean(), rel=1e-4)


def test_the_untrained_net_has_statistics_of_the_training_images(measured):
  """And is the net that csba-diagnose --checkpoint=init measures."""
  run = restore.load_run(str(measured), 'init')
  expected = diagnose.diagnose_run(run, diagnose.Sampling(exact=True))
  found = load(measured, '0', 'train')
  scale = np.abs(expected.gram('total')).max()
  np.testing.assert_allclose(
    found.gram('shared'), expected.gram('shared'), rtol=1e-3, atol=1e-5 * scale
  )
  raw = jax.tree.map(np.zeros_like, run.net.batch_stats)
  raw['norm']['var'] = np.ones_like(raw['norm']['var'])
  losses_fn = diagnose.losses_of(run.net, run.config)
  batch = {'image': run.data.train.images, 'label': run.data.train.labels}
  as_made = np.asarray(losses_fn(raw, run.net.params, batch)).mean()
  mean = found.losses @ found.counts / found.counts.sum()
  assert abs(mean - as_made) > 0.01


def final_bytes(workdir):
  state = restore.load_state(str(workdir), 'latest')
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def test_a_run_with_snapshots_is_the_run_without_to_the_bit(driver, measured, plain):
  assert final_bytes(measured) == final_bytes(plain)
  with_snapshots, without = driver.records_of(measured), driver.records_of(plain)
  lines = [line for line in with_snapshots[1] if 'train_conflict_rate' not in line]
  assert lines == without[1]
  assert with_snapshots[2] == without[2]
  assert not (plain / 'conflict').exists()


@pytest.mark.slow
@pytest.mark.parametrize(
  ('end', 'name'),
  [
    ('after-step:20', 'KILL'),
    ('after-step:30', 'TERM'),
    ('after-step:3', 'KILL'),
    ('before-line:1', 'KILL'),
    ('after-line:1', 'KILL'),
    ('after-line:7', 'KILL'),
    ('after-step:18', 'TERM'),
  ],
)
def test_a_run_that_was_ended_and_goes_on_has_the_same_snapshots(
  driver, measured, tmp_path, end, name
):
  workdir = tmp_path / 'run'
  arguments = [*FLAGS, f'--end={end}', f'--signal={name}']
  code, _, err = driver.finish(driver.start(workdir, *arguments))
  assert code == {'KILL': -signal.SIGKILL, 'TERM': 75}[name], err
  code, _, err = driver.finish(driver.start(workdir, *FLAGS))
  assert code == 0, err
  assert driver.records_of(workdir) == driver.records_of(measured)
  names = sorted(path.name for path in (measured / 'conflict').iterdir())
  assert sorted(path.name for path in (workdir / 'conflict').iterdir()) == names
  for path in sorted((measured / 'conflict').iterdir()):
    other = workdir / 'conflict' / path.name
    if path.suffix == '.json':
      assert other.read_text() == path.read_text()
    else:
      ours, theirs = Conflict.load(other), Conflict.load(path)
      np.testing.assert_array_equal(ours.grams, theirs.grams)
      assert ours.about == theirs.about


def test_several_snapshots_at_one_step_are_measured_once(driver, tmp_path, monkeypatch):
  calls = []
  honest = snapshots.snapshot

  def counted(net, *others):
    calls.append(net.step)
    return honest(net, *others)

  monkeypatch.setattr(snapshots, 'snapshot', counted)
  config = driver.tiny_config(
    diagnostics__snapshots='0.34,0.3401,1,0.99',
    diagnostics__loss_levels='9,8',  # both by the first line
    train__epochs=1,
    data__val_fraction=0.0,
  )
  run_here(config, tmp_path)
  assert calls == [5, 5, 14, 14]  # 5: of the shares, and of the line; 14: the end, the tested net
  names = ['0.34', '0.3401', '0.99', '1', 'loss-8', 'loss-9', 'tested']
  assert sorted(path.name for path in (tmp_path / 'conflict').iterdir()) == sorted(
    f'moment_{name}_train.{kind}' for name in names for kind in ('npz', 'json')
  )
  a, b = load(tmp_path, '0.34', 'train'), load(tmp_path, 'loss 9', 'train')
  np.testing.assert_array_equal(a.grams, b.grams)
  assert [line['step'] for line in snapshot_lines(tmp_path)] == [5, 5, 5, 5, 14, 14, 14]


@pytest.mark.parametrize('averages', [False, True])
def test_batches_of_the_same_net_are_measured_once(driver, tmp_path, monkeypatch, averages):
  """The last net is the tested one here; measured again, its conflict would be the same."""
  calls = []
  honest, whole = training_conflict.measure, snapshots.snapshot

  def counted(net, *others, **options):
    calls.append(net.step)
    return honest(net, *others, **options)

  def forgetful(net, in_training, config, data, check, known):
    return whole(net, in_training, config, data, check)

  monkeypatch.setattr(training_conflict, 'measure', counted)
  config = driver.tiny_config(
    diagnostics__snapshots='0.5,1',
    diagnostics__statistics='batch',
    diagnostics__batches=3,
    train__epochs=1,
    train__ema_decay=0.9 if averages else 0.0,
    data__val_fraction=0.2 if averages else 0.0,
  )
  run_here(config, tmp_path / 'once')
  parts = ('train', 'val')[: 1 + averages]
  half, last = sorted(set(calls))
  assert calls == [half] * len(parts) + [last] * len(parts)
  monkeypatch.setattr(snapshots, 'snapshot', forgetful)
  run_here(config, tmp_path / 'twice')
  assert calls[2 * len(parts) :] == [half] * len(parts) + [last] * 2 * len(parts)
  for name, part in itertools.product(('0.5', '1', 'tested'), parts):
    once, twice = (load(tmp_path / run, name, part) for run in ('once', 'twice'))
    np.testing.assert_array_equal(once.grams, twice.grams)
    np.testing.assert_array_equal(once.losses, twice.losses)
    assert once.about == twice.about
    of_once, of_twice = (
      (tmp_path / run / 'conflict' / f'{snapshot_file(name, part)}.json').read_text()
      for run in ('once', 'twice')
    )
    assert of_once == of_twice


def test_snapshots_of_averages_are_of_the_averages(driver, tmp_path):
  config = driver.tiny_config(
    train__ema_decay=0.99, train__epochs=1, diagnostics__snapshots='1', data__val_fraction=0.0
  )
  run_here(config, tmp_path)
  run = restore.load_run(str(tmp_path), 'latest')
  found = load(tmp_path, 'tested', 'train')
  losses_fn = diagnose.losses_of(run.net, run.config)
  batch = {'image': run.data.train.images, 'label': run.data.train.labels}
  mean = mean_loss(found)
  state = restore.load_state(str(tmp_path), 'latest')
  averages = state.averages
  of_averages = losses_fn(averages['batch_stats'], averages['params'], batch).mean()
  of_last = losses_fn(state.batch_stats, state.params, batch).mean()
  assert mean == pytest.approx(float(of_averages), rel=1e-4)
  assert abs(float(of_last) - float(of_averages)) > 1e-3
  of_end = mean_loss(load(tmp_path, '1', 'train'))  # of the averages too, statistics renewed
  assert of_end == pytest.approx(mean, rel=0.1)
  assert abs(of_end - mean) > 1e-6


@pytest.mark.slow
def test_the_loss_of_a_snapshot_has_no_class_weights(driver, tmp_path):
  """As in csba-diagnose: what weights make of a class is its prior."""
  config = driver.tiny_config(
    loss__weights='inverse', train__epochs=1, diagnostics__snapshots='0,1', data__val_fraction=0.0
  )
  run_here(config, tmp_path)
  run = restore.load_run(str(tmp_path), 'latest')
  found = load(tmp_path, 'tested', 'train')
  np.testing.assert_allclose(found.prior, np.full(10, 0.1))
  expected = diagnose.diagnose_run(run, diagnose.Sampling(exact=True))
  np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)


# ---- when


def test_plan_of_snapshots_and_levels(driver):
  config = driver.tiny_config(diagnostics__snapshots=SNAPSHOTS, diagnostics__loss_levels=LEVELS)
  plan = Plan.of(config, 12 * 32)
  assert plan.total == 36
  assert plan.snapshots == (('0', 0), ('0.5', 18), ('1', 36))
  assert plan.loss_levels == (2.2, 1.5, 0.01)
  assert [plan.snapshots_at(step) for step in (0, 1, 18, 36)] == [['0'], [], ['0.5'], ['1']]
  config.stage.method, config.stage.source = 'tau_norm', 'x'
  assert Plan.of(config, 12 * 32).snapshots == (('0', 0), ('0.5', 0), ('1', 0))


def test_snapshots_that_are_no_whole_steps_come_after():
  assert [step_at(share, 36) for share in (0, 0.1, 1 / 36, 0.5, 0.51, 0.999, 1)] == [
    *(0, 4, 1, 18, 19, 36, 36)
  ]
  for total in (1, 7, 36, 1000):
    for k in range(total + 1):
      assert step_at(k / total, total) == k


def test_levels_are_reached_once_and_at_the_level():
  plan = Plan(12, 36, 5, 12, 0, loss_levels=(1.0, 0.3))
  assert plan.levels_at(1.01, []) == []
  assert plan.levels_at(1.0, []) == ['loss 1']
  assert plan.levels_at(0.9, ['loss 1']) == []
  assert plan.levels_at(0.1, []) == ['loss 1', 'loss 0.3']
  assert plan.levels_at(0.3, ['loss 1']) == ['loss 0.3']
  assert plan.levels_at(float('nan'), []) == []


def test_a_level_is_reached_by_the_loss_of_the_net_that_is_measured(driver, tmp_path, monkeypatch):
  """At the first log line, near enough by its batches, where that loss is at or below it; once."""
  looked = []
  honest = snapshots.training_loss

  def kept(net, config, data, check):
    looked.append((net.step, honest(net, config, data, check)))
    return looked[-1][1]

  monkeypatch.setattr(snapshots, 'training_loss', kept)
  config = driver.tiny_config(diagnostics__loss_levels='1.6,1.2', train__epochs=3)
  run_here(config, tmp_path)
  lines = {x['step']: x['train_loss'] for x in training_lines(tmp_path)}
  for level in (1.6, 1.2):
    conflict = load(tmp_path, f'loss {level}', 'train')
    step = conflict.about['step']
    assert mean_loss(conflict) <= level  # what the snapshot is called
    assert mean_loss(conflict) == pytest.approx(dict(looked)[step], rel=1e-5)
    assert all(loss > level for at, loss in looked if at < step)
    assert all(lines[at] <= after_step.NEAR * 1.6 for at, _ in looked)
  assert [at for at, _ in looked] == [
    at for at in lines if lines[at] <= after_step.NEAR * 1.6 and at <= step
  ]  # and none after the last level


def test_statistics_are_renewed_at_a_snapshot(measured):
  """What lags behind is not measured: the loss is that of the batches' own statistics."""
  run = restore.load_run(str(measured), 'latest')
  found = mean_loss(load(measured, '1', 'train'))
  assert found == pytest.approx(loss_with(run, settled(run).batch_stats), rel=1e-4)
  assert abs(found - loss_with(run, run.net.batch_stats)) > 1e-5
  assert settled(run).params is run.net.params


def test_a_second_stage_keeps_its_statistics(measured):
  run = restore.load_run(str(measured), 'latest')
  config = run.config.copy_and_resolve_references()
  config.stage.method = 'crt'
  kept = restore.renew_statistics(run.net, config, run.data)
  assert kept.batch_stats is run.net.batch_stats


@pytest.mark.parametrize('longest', [1, 3, 6, 100])
def test_a_dispatch_ends_at_each_snapshot(longest):
  snapshots = (('0', 0), ('0.2', 8), ('0.3', 11), ('1', 36))
  plan = Plan(12, 36, log_every=6, eval_every=12, diagnose_every=0, snapshots=snapshots)
  ends = []
  for first, last in plan.segments(0):
    calls = list(plan.dispatches(first, last, longest))
    assert calls[0][0] == first
    assert [a for a, _ in calls[1:]] == [b for _, b in calls[:-1]]
    assert calls[-1][1] == last
    assert all(0 < b - a <= longest for a, b in calls)
    ends += [b for _, b in calls]
  assert {8, 11, 36} <= set(ends)
