"""Second stages: what they take over, what they leave as it is, and what they refuse."""

import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csba_jax.errors import UserError
from csba_jax.measure.evaluate import evaluate
from csba_jax.methods import metrics
from csba_jax.run import restore
from csba_jax.runtime.signals import StopRequest
from csba_jax.training import loop, start_second_stage
from csba_jax.training.job import Job


def run_here(driver, workdir, **overrides):
  with StopRequest() as stop:
    return loop.train_and_evaluate(driver.tiny_config(**overrides), str(workdir), stop)


@pytest.fixture(scope='module')
def first(driver, tmp_path_factory):
  """Workdir of a first stage."""
  workdir = tmp_path_factory.mktemp('stages') / 'first'
  run_here(driver, workdir)
  return workdir


STAGES = {
  'crt': {'sampler__name': 'class'},
  'lws': {'sampler__name': 'class', 'model__head': 'scaled'},
  'label_aware': {
    'sampler__name': 'class',
    'model__head': 'scaled',
    'loss__name': 'label_aware_smoothing',
  },
  'tau_norm': {},
}


@pytest.fixture(scope='module')
def second(driver, first, tmp_path_factory):
  """method -> workdir of that second stage."""
  folder = tmp_path_factory.mktemp('second')
  for method, fields in STAGES.items():
    stage = {'stage__method': method, 'stage__source': str(first)}
    run_here(driver, folder / method, train__epochs=2, **stage, **fields)
  return {method: folder / method for method in STAGES}


def flat(params):
  return {
    '/'.join(key.key for key in path): np.asarray(leaf)
    for path, leaf in jax.tree.leaves_with_path(params)
  }


@pytest.mark.seconds
@pytest.mark.parametrize('method', STAGES)
def test_the_features_stay_and_the_classifier_moves(first, second, method):
  before = restore.load_state(str(first), 'best')
  after = restore.load_state(str(second[method]), 'latest')
  old, new = flat(before.params), flat(after.params)
  moved = {name for name in old if not np.array_equal(old[name], new[name])}
  assert moved == ({'head/kernel', 'head/bias'} if method != 'lws' else set())
  assert set(new) - set(old) == ({'head/scale'} if method in ('lws', 'label_aware') else set())
  if 'head/scale' in new:
    assert (new['head/scale'] != 1).any()
  jax.tree.map(np.testing.assert_array_equal, before.batch_stats, after.batch_stats)


@pytest.mark.seconds
@pytest.mark.parametrize('method', STAGES)
def test_a_second_stage_leaves_a_workdir_like_any_other(first, second, method):
  workdir = second[method]
  result = json.loads((workdir / 'result.json').read_text())
  about = result['stage']
  assert about['method'] == method
  assert about['source'] == str(first)
  assert about['source_step'] == json.loads((first / 'result.json').read_text())['checkpoint_step']
  again = evaluate(*evaluable(workdir))
  summary = metrics.summarise(again, np.asarray(result['class_counts']))
  assert summary['macro_f1'] == result['macro_f1']
  if method != 'tau_norm':
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    assert any('train_loss' in line for line in lines)


def evaluable(workdir):
  run = restore.load_run(str(workdir), 'best')
  return run.net, run.data.test, 100


@pytest.mark.seconds
def test_crt_begins_with_a_new_classifier_and_label_aware_with_the_old(driver, first):
  source = flat(restore.load_state(str(first), 'best').params)

  def begin(method):
    fields = {'stage__method': method, 'stage__source': str(first), **STAGES[method]}
    config = driver.tiny_config(**fields)
    job = Job.of(config, restore.load_run(str(first)).data)
    return flat(job.begin()[0].params)

  new, old = begin('crt'), begin('label_aware')
  assert (new['head/kernel'] != source['head/kernel']).all()
  np.testing.assert_array_equal(old['head/kernel'], source['head/kernel'])
  np.testing.assert_array_equal(old['head/scale'], np.ones(10))
  for found in (new, old):
    np.testing.assert_array_equal(found['hidden/kernel'], source['hidden/kernel'])


@pytest.mark.parametrize('tau', [0.0, 0.7, 1.0, 2.0])
def test_tau_normalised_rows_have_the_length_to_the_power_1_minus_tau(tau):
  kernel = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
  params = {'head': {'kernel': jnp.asarray(kernel), 'bias': jnp.ones(5)}, 'stem': jnp.ones(2)}
  found = start_second_stage.tau_normalised(params, tau)
  for k in range(5):
    length = np.linalg.norm(kernel[:, :, k])
    np.testing.assert_allclose(
      found['head']['kernel'][:, :, k], kernel[:, :, k] / length**tau, rtol=1e-5
    )
  assert not np.any(found['head']['bias'])
  assert found['stem'] is params['stem']


@pytest.mark.seconds
def test_tau_is_the_best_on_the_validation_part(first, second):
  tau = json.loads((second['tau_norm'] / 'result.json').read_text())['stage']['tau']
  run = restore.load_run(str(first), 'best')
  scores = {}
  for candidate in [round(0.1 * i, 1) for i in range(21)]:
    net = run.net.replace(params=start_second_stage.tau_normalised(run.net.params, candidate))
    sums = evaluate(net, run.data.val, 100)
    scores[candidate] = metrics.summarise(sums, run.data.class_counts)['balanced_accuracy']
  assert scores[tau] == max(scores.values())
  assert tau == min(t for t, score in scores.items() if score == max(scores.values()))


def test_a_tau_that_is_given_is_taken(driver, first, tmp_path):
  stage = {'stage__method': 'tau_norm', 'stage__source': str(first), 'stage__tau': 0.5}
  run_here(driver, tmp_path / 'half', **stage)
  found = restore.load_state(str(tmp_path / 'half'), 'latest').params
  source = restore.load_state(str(first), 'best').params
  expected = start_second_stage.tau_normalised(source, 0.5)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


class AskedToStop(StopRequest):
  """As if a signal came in the first step: the check before it has passed."""

  def check(self):
    if self._calls:
      self._receive(signal.SIGTERM, None)
    self._calls += 1
    super().check()


@pytest.mark.seconds
def test_a_stage_that_was_stopped_ends_like_one_that_was_not(driver, first, second, tmp_path):
  fields = {'stage__method': 'crt', 'stage__source': str(first), **STAGES['crt']}
  config, stop = driver.tiny_config(train__epochs=2, **fields), AskedToStop()
  assert loop.train_and_evaluate(config, str(tmp_path / 'crt'), stop) is None
  run_here(driver, tmp_path / 'crt', train__epochs=2, **fields)
  ours, theirs = (
    restore.load_state(str(path), 'latest') for path in (tmp_path / 'crt', second['crt'])
  )
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), ours, theirs))


def copied(source, target):
  shutil.copytree(source, target)
  return target


@pytest.mark.seconds
def test_a_stage_goes_on_without_its_source_and_remembers_it(driver, first, second, tmp_path):
  """Half of it is there: what the first stage is or was meanwhile does not matter."""
  source = copied(first, tmp_path / 'source')
  fields = {'stage__method': 'crt', 'stage__source': str(source), **STAGES['crt']}
  config, stop = driver.tiny_config(train__epochs=2, **fields), AskedToStop()
  assert loop.train_and_evaluate(config, str(tmp_path / 'crt'), stop) is None
  shutil.rmtree(source)
  result = run_here(driver, tmp_path / 'crt', train__epochs=2, **fields)
  expected = json.loads((second['crt'] / 'result.json').read_text())
  assert result['stage'] == expected['stage'] | {'source': str(source)}
  assert result['macro_f1'] == expected['macro_f1']


@pytest.mark.seconds
def test_a_stage_that_trains_nothing_repeats_no_line(driver, first, second, tmp_path):
  workdir = copied(second['tau_norm'], tmp_path / 'tau')
  (workdir / 'result.json').unlink()
  before = (workdir / 'metrics.jsonl').read_bytes()
  stage = {'stage__method': 'tau_norm', 'stage__source': str(first)}
  result = run_here(driver, workdir, train__epochs=2, **stage)
  assert (workdir / 'metrics.jsonl').read_bytes() == before
  expected = json.loads((second['tau_norm'] / 'result.json').read_text())
  assert result['stage'] == expected['stage']


@pytest.mark.seconds
@pytest.mark.parametrize('method', ['tau_norm', 'label_aware', 'lws'])
def test_the_factors_of_a_scaled_first_stage_are_not_lost(driver, second, method):
  """A further stage on LWS begins with LWS's predictions: its factors go into the kernel."""
  source = second['lws']
  fields = {'stage__method': method, 'stage__source': str(source), **STAGES[method]}
  if method == 'tau_norm':
    fields['stage__tau'] = 0.0
  run = restore.load_run(str(source), 'best')
  job = Job.of(driver.tiny_config(**fields), run.data)
  images = run.data.test.images / np.float32(127.5) - 1
  old = np.asarray(run.net.model.apply(run.net.variables, images))
  state, _ = job.begin()
  new = np.asarray(job.program.model.apply(state.variables(), images))
  if method == 'tau_norm':  # which leaves out the bias
    head = run.net.params['head']
    old = old - np.asarray(head['bias'] * head['scale'])
  np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-5)


@pytest.mark.seconds
def test_averages_of_the_first_stage_are_what_the_second_builds_on(driver, tmp_path):
  run_here(driver, tmp_path / 'first', train__ema_decay=0.9, train__epochs=1)
  source = restore.load_state(str(tmp_path / 'first'), 'best')
  stage = {'stage__method': 'crt', 'stage__source': str(tmp_path / 'first')}
  config = driver.tiny_config(train__ema_decay=0.9, **stage)
  job = Job.of(config, restore.load_run(str(tmp_path / 'first')).data)
  state, _ = job.begin()
  kernel = source.averages['params']['hidden']['kernel']
  np.testing.assert_array_equal(state.params['hidden']['kernel'], kernel)
  np.testing.assert_array_equal(state.averages['params']['hidden']['kernel'], kernel)
  assert (source.params['hidden']['kernel'] != kernel).any()


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    (
      {'data__imbalance_factor': 10.0},
      r'the model and the data of the first stage .*; found data.imbalance_factor: 20.0 there, 10',
    ),
    ({'data__seed': 1}, 'data.seed: 0 there, 1 here'),
    ({'model__dtype': 'bfloat16'}, "model.dtype: 'float32' there, 'bfloat16' here"),
    ({'model__head': 'cosine', 'loss__name': 'ldam'}, "model.head: 'linear' there, 'cosine' here"),
    ({'stage__checkpoint': '7'}, 'one of .*; found 7'),
  ],
)
def test_a_first_stage_that_does_not_fit(driver, first, tmp_path, overrides, message):
  stage = {'stage__method': 'crt', 'stage__source': str(first)}
  with pytest.raises(UserError, match=message):
    run_here(driver, tmp_path / 'run', **(stage | overrides))
  assert not (tmp_path / 'run' / 'config.json').exists()


def test_a_first_stage_that_is_not_finished(driver, first, tmp_path):
  source = copied(first, tmp_path / 'source')
  (source / 'result.json').unlink()
  stage = {'stage__method': 'crt', 'stage__source': str(source)}
  with pytest.raises(UserError, match=r'a finished run .*no result\.json'):
    run_here(driver, tmp_path / 'run', **stage)
  last = restore.load_state(str(first), 'latest').step
  config = driver.tiny_config(stage__checkpoint=str(int(last)), **stage)
  _, about = Job.of(config, restore.load_run(str(first)).data).begin()
  assert about['stage']['source_step'] == int(last)


@pytest.mark.seconds
def test_a_second_stage_was_never_untrained(second):
  with pytest.raises(UserError, match='a first stage for --checkpoint=init; found a second stage'):
    restore.load_run(str(second['crt']), 'init')


def test_a_first_stage_that_is_not_there(driver, first, tmp_path):
  stage = {'stage__method': 'crt'}
  with pytest.raises(UserError, match=r'no config\.json'):
    run_here(driver, tmp_path / 'run', stage__source=str(tmp_path / 'nix'), **stage)
  shutil.copytree(first, tmp_path / 'copy')
  shutil.rmtree(tmp_path / 'copy' / 'checkpoints')
  with pytest.raises(UserError, match='a run with checkpoints in .*; found none yet; .* csba-'):
    run_here(driver, tmp_path / 'run', stage__source=str(tmp_path / 'copy'), **stage)


def test_no_tau_can_be_chosen_without_a_validation_part(driver, tmp_path):
  run_here(driver, tmp_path / 'first', train__epochs=1, data__val_fraction=0.0)
  stage = {'stage__method': 'tau_norm', 'stage__source': str(tmp_path / 'first')}
  with pytest.raises(UserError, match=r'no validation part to choose it on; found -1\.0'):
    run_here(driver, tmp_path / 'second', data__val_fraction=0.0, **stage)
