"""A study: each run once, whatever happens to processes, files and folders."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from csba_jax import config as config_lib
from csba_jax.data import pipeline
from csba_jax.errors import UserError
from csba_jax.run.workdir import Workdir, lock_file
from csba_jax.runtime.signals import StopRequest
from csba_jax.study import collect, grid, results, runner, store, study_json, tuning
from csba_jax.training import loop

pytestmark = pytest.mark.usefixtures('driver')  # whose model the studies have

ROOT = Path(__file__).parents[2]
CONFIG = """
from csba_jax.study import grid


def get_config():
  c = grid.default()
  c.name = 'small'
  c.base.data.imbalance_factor = 20.0
  c.base.data.test_fraction = 0.3
  c.base.data.dir = '/of/this/machine'
  c.base.model.name = 'tiny'
  c.base.model.width = 0.05
  c.base.train.batch_size = 32
  c.base.train.epochs = 1
  c.variants = ('none',)
  c.methods = ('cross_entropy', 'balanced_softmax')
  c.seeds = 2
  return c
"""
# csba-study that knows the driver's model, in its worker processes too: they import this anew
BINARY = f"""
import importlib.util

spec = importlib.util.spec_from_file_location('driver', {str(ROOT / 'tests/driver.py')!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))

from csba_jax.bin import study

if __name__ == '__main__':
  study.cli()
"""
DONE = ['cross_entropy-s0', 'cross_entropy-s1', 'balanced_softmax-s0', 'balanced_softmax-s1']
RUNS = ['none-s0', 'none-s1', 'csba-s0', 'csba-s1']


def tiny(**fields):
  """Two methods and two seeds, an epoch of the driver's perceptron; fields as base__seed=1."""
  names = {}
  exec(CONFIG, names)
  c = names['get_config']()
  for name, value in fields.items():
    *sections, field = name.split('__')
    target = c
    for section in sections:
      target = target[section]
    target[field] = value
  return c


def small(**fields):
  """Two variants of a very narrow net and two seeds: RUNS."""
  net = {'base__model__name': 'multibranch', 'methods': ('cross_entropy',)}
  return tiny(**net | {'variants': ('none', 'csba')} | fields)


def start(c, folder, **options):
  with StopRequest() as stop:
    return runner.run_study(c, str(folder), stop, **options)


def lines(folder, name='results.jsonl'):
  return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def of_run(folder):
  """Records by run, without what depends on the clock, the tree and the share of cores."""
  found = {}
  for path in sorted(Path(folder).glob('results*.jsonl')):
    for record in lines(folder, path.name):
      result = {k: v for k, v in record.get('result', {}).items() if k != 'timing'}
      found[record['run']] = record | {'result': result, 'seconds': 0, 'commit': '', 'device': ''}
  return found


def in_process(monkeypatch, fails=(), **also):
  """Runs of no time, by this process; returns the names of those it was asked for.

  `also` is part of their results.
  """
  asked = []

  def work_off(runs, place, jobs, stop, write):
    for run in runs:
      asked.append(run.name)
      if run.name in fails:
        write(run, runner._failure('UserError: too\n  bad', 1.0))
      else:
        result = {'macro_f1': run.config.seed / 10, 'splits_sha256': 'x', 'timing': {}}
        result |= {'class_names': list('0123456789')} | also
        write(run, {'result': result, 'status': 'done', 'seconds': 1.0, 'device': 'none'})

  monkeypatch.setattr(runner, '_work_off', work_off)
  return asked


def binary(folder, *arguments):
  """csba-study of `tiny` as a process; workers and all."""
  files = folder.parent / f'{folder.name}-files'
  files.mkdir(exist_ok=True)
  (files / 'study_small.py').write_text(CONFIG)
  (files / 'csba-study').write_text(BINARY)
  command = [sys.executable, str(files / 'csba-study'), f'--config={files}/study_small.py']
  return subprocess.Popen(
    [*command, f'--workdir={folder}', *arguments],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def finish(process):
  """(exit code, standard output, standard error) of a child."""
  out, err = process.communicate(timeout=600)
  return process.returncode, out, err


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """Folder of a study that two worker processes did."""
  folder = tmp_path_factory.mktemp('study') / 'whole'
  code, out, err = finish(binary(folder, '--jobs=2'))
  assert code == 0, err
  assert out == f'4 runs done, 0 failed, 0 missing in {folder}\n'
  assert '4 runs, 0 of them done; 2 at a time' in err
  assert '4/4  ' in err
  return folder


# ---- worker processes


@pytest.mark.seconds
def test_a_study_ends_with_a_line_for_each_run(whole):
  found = lines(whole)
  assert sorted(record['run'] for record in found) == sorted(DONE)
  runs = {run.name: run for run in grid.runs(tiny())}
  for record in found:
    assert record['status'] == 'done'
    assert record['schema'] == runner.SCHEMA
    assert record['study'] == 'small'
    assert record['axes'] == runs[record['run']].axes
    assert record['config_sha256'] == grid.digest(tiny())
    assert record['config']['loss']['name'] == record['axes']['method']
    assert record['config']['seed'] == record['axes']['seed']
    assert record['device']
    assert record['seconds'] > 0
    assert 0 <= record['result']['macro_f1'] <= 1
    assert record['conflict'] == record['branches'] == []
  about = json.loads((whole / 'study.json').read_text())
  assert about['name'] == 'small'
  (command,) = about['commands']
  assert command.endswith(f' --workdir={whole} --jobs=2')
  assert command.startswith('csba-study --config=')
  assert about['config']['methods'] == ['cross_entropy', 'balanced_softmax']
  assert len(results.read(whole).done) == 4


@pytest.mark.seconds
def test_nothing_is_left_of_finished_runs_and_nothing_tells_of_this_machine(whole, cache_dir):
  assert not (whole / 'runs').exists()
  text = (whole / 'results.jsonl').read_text()
  text += json.dumps(json.loads((whole / 'study.json').read_text()) | {'commands': ''})
  for place in ('/of/this/machine', str(whole), cache_dir, str(ROOT), str(Path.home()) + '/'):
    assert place not in text


@pytest.mark.slow
def test_a_run_is_what_it_is_in_any_process(driver, whole, tmp_path):
  """The second run of a worker, which has compiled for the first, against this process."""
  run = next(run for run in grid.runs(tiny()) if run.name == DONE[-1])
  found = runner.do_run(run.name, run.config, runner._Place(tmp_path, True, True, 1))
  expected = of_run(whole)[run.name]
  del found['result']['timing']
  assert found['result'] == expected['result']
  workdir, log = tmp_path / f'runs/{run.name}', tmp_path / f'runs/{run.name}.log'
  assert (workdir / 'result.json').exists()  # kept, as was asked
  assert 'evaluating the test set' in log.read_text()
  again = runner.do_run(run.name, run.config, runner._Place(tmp_path, False, False, 1))
  assert again['result'].keys() == set(collect.OF_TUNING) - {'surgery'}
  assert again['result']['validation_macro_f1'] == expected['result']['validation_macro_f1']
  assert workdir.exists()  # until its line is written, by another process


@pytest.mark.slow
def test_a_killed_worker_fails_its_run_and_another_goes_on(tmp_path, monkeypatch, capsys):
  give, given = runner._Worker.give, []

  def give_and_kill(worker, run):
    give(worker, run)
    given.append((run.name, worker.process))
    if len(given) == 1:
      os.kill(worker.process.pid, signal.SIGKILL)

  monkeypatch.setattr(runner._Worker, 'give', give_and_kill)
  c = small(variants=('none',), learning_rates=(1e9,))  # which is no finite loss
  assert start(c, tmp_path) == runner.Outcome(done=0, failed=2, missing=0)
  (first, one), (second, another) = given
  assert (first, second) == ('s0', 's1')
  assert one.pid != another.pid
  assert not one.is_alive()
  assert not another.is_alive()
  killed, failed = lines(tmp_path)
  assert killed['error'] == 'its process ended with signal SIGKILL'
  assert killed['status'] == failed['status'] == 'failed'
  assert killed['device'] is None
  assert failed['error'].startswith('expected a finite loss')  # a UserError needs no name
  assert '\n' not in failed['error']
  assert 'Traceback' in (tmp_path / 'runs/s1.log').read_text()
  err = capsys.readouterr().err
  assert '2 runs, 0 of them done; 1 at a time' in err
  assert '1/2  s0  failed: its process ended with signal SIGKILL' in err
  assert '2 failed, 0 s left' in err


class Puppet:
  """A worker without a process; `dies` names the runs that it cannot be given any more."""

  made = ()
  dies = ()

  def __init__(self):
    self.run, self.alive, self.pid = None, True, 10**9 + len(self.made)
    self.process = self.connection = self
    type(self).made += (self,)

  @classmethod
  def start(cls, place, cores):
    return cls()

  def give(self, run):
    if run.name in self.dies and len(self.made) == 1:
      self.alive = False
      raise BrokenPipeError('the other end is gone')
    self.run = run

  def take(self):
    return {'status': 'done', 'run': self.run.name}

  def failure(self, words):
    raise AssertionError(words)

  def is_alive(self):
    return self.alive

  def join(self, timeout=None):
    pass

  close = kill = join


@pytest.fixture
def puppets(monkeypatch):
  monkeypatch.setattr(Puppet, 'made', ())
  monkeypatch.setattr(runner, '_Worker', Puppet)
  monkeypatch.setattr(runner, 'wait', lambda connections, timeout: connections)
  return Puppet


def test_a_run_that_ends_as_the_study_is_stopped_is_kept(puppets, monkeypatch):
  """SIGTERM finds the worker idle, which kills it: its record has come all the same."""
  stop, written = types.SimpleNamespace(requested=False), []

  def wait_and_stop(connections, timeout):
    stop.requested = True
    return connections

  def kill(pid, number):
    (worker,) = (w for w in puppets.made if w.pid == pid)
    worker.alive = False

  monkeypatch.setattr(runner, 'wait', wait_and_stop)
  monkeypatch.setattr(os, 'kill', kill)
  runs = grid.runs(small())
  runner._work_off(runs, None, 1, stop, lambda run, found: written.append(run.name))
  assert written == ['none-s0']


@pytest.mark.parametrize('number', [0, 1])
def test_a_worker_that_dies_between_two_runs_is_replaced(puppets, monkeypatch, number):
  monkeypatch.setattr(puppets, 'dies', (RUNS[number],))
  stop, written = types.SimpleNamespace(requested=False), []
  runs = grid.runs(small())
  runner._work_off(runs, None, 1, stop, lambda run, found: written.append(run.name))
  assert written == RUNS
  assert len(puppets.made) == 2


def test_a_worker_that_dies_as_the_study_is_stopped_is_no_error(puppets, monkeypatch):
  """A signal to the whole group: the idle worker goes before the first process sees it."""
  stop, written = types.SimpleNamespace(requested=False), []

  def give(worker, run):
    if run.name == RUNS[1]:
      stop.requested, worker.alive = True, False
      raise BrokenPipeError
    worker.run = run

  monkeypatch.setattr(puppets, 'give', give)
  runs = grid.runs(small())
  runner._work_off(runs, None, 1, stop, lambda run, found: written.append(run.name))
  assert written == RUNS[:1]
  assert len(puppets.made) == 1


# ---- the binary


def test_dry_run_lists_the_runs_of_a_shard(tmp_path):
  code, out, err = finish(binary(tmp_path / 'st', '--dry_run', '--shard=1/2'))
  assert code == 0, err
  assert out.splitlines() == [*DONE[2:], '2 runs']
  assert not (tmp_path / 'st').exists()


OWN_TEST_SET = ('--config.base.data.source=tfds', '--config.base.data.name=cifar10')


def test_dry_run_says_that_the_seeds_are_too_few(tmp_path):
  code, out, err = finish(
    binary(
      tmp_path / 'st',
      '--dry_run',
      "--config.variants=('none', 'csba')",
      '--config.base.model.name=multibranch',
      *OWN_TEST_SET,
    )
  )
  assert code == 0, err
  assert out.splitlines()[-1] == (
    '2 seeds cannot support any comparison: the smallest p of 2 tests is 1.000 after Holm; '
    'use 7 seeds'
  )


@pytest.mark.seconds
@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    (['--jobs=0'], 'expected --jobs of at least 1; found 0'),
    (['--workdir='], 'expected --workdir'),
    (['--config.tuned_by=/nix'], 'no study.json there'),
    (['--config.tuned_by=/nix', '--config.base.loss.name=focal', '--dry_run'], '--config.methods='),
  ],
)
def test_bad_input_ends_in_one_line(tmp_path, arguments, expected):
  code, out, err = finish(binary(tmp_path / 'st', *arguments))
  assert (code, out) == (1, ''), err
  assert 'Traceback' not in err
  assert expected in err.splitlines()[-1]
  assert not (tmp_path / 'st').exists()


@pytest.mark.slow
def test_a_run_that_fails_is_recorded_and_tried_again(tmp_path, whole):
  """A learning rate of 1e9 gives NaN; the other rate is not disturbed."""
  folder = tmp_path / 'st'
  arguments = ['--config.methods=("cross_entropy",)', '--config.learning_rates=(1e9, 0.1)']
  arguments += ['--config.seeds=1']
  for number in (1, 2):
    code, out, err = finish(binary(folder, *arguments))
    assert code == 1, err
    assert out == f'1 runs done, 1 failed, 0 missing in {folder}\n'
    assert 'Traceback' not in err
    failed, *more = [record for record in lines(folder) if record['status'] == 'failed']
    assert len(more) == number - 1
    assert failed['run'] == 'lr1e+09-s0'
    assert failed['error'].startswith('expected a finite loss and gradient; found loss ')
    assert '\n' not in failed['error']
    assert len(lines(folder)) == 1 + number
  log = (folder / 'runs/lr1e+09-s0.log').read_text()
  assert log.count('Traceback (most recent call last)') == 2
  assert of_run(folder)['lr0.1-s0']['result'] == of_run(whole)['cross_entropy-s0']['result']
  assert sorted(path.name for path in (folder / 'runs').iterdir()) == [
    'lr1e+09-s0',
    'lr1e+09-s0.log',
  ]
  assert len(results.read(folder).failed) == 1


@pytest.mark.slow
def test_a_stopped_study_goes_on_and_ends_as_if_undisturbed(driver, tmp_path):
  fields = {'methods': ('cross_entropy',), 'seeds': 1}
  fields |= {'base__train__epochs': 100, 'base__train__eval_every': 50}
  arguments = [f'--config.{k.replace("__", ".")}={v}' for k, v in fields.items()]
  folder = tmp_path / 'stopped'
  process = binary(folder, *arguments)
  metrics = folder / 'runs/s0/metrics.jsonl'
  deadline = time.monotonic() + 120
  while not metrics.exists() or metrics.read_text().count('\n') < 3:
    assert time.monotonic() < deadline
    assert process.poll() is None
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  code, out, err = finish(process)
  assert code == 75, err
  assert out == f'0 runs done, 0 failed, 1 missing in {folder}\n'
  assert 'stopping: the runs under way are saved; start the study again to finish them' in err
  assert not (folder / 'results.jsonl').exists()
  assert 'saved, start again to go on' in (folder / 'runs/s0.log').read_text()
  code, out, err = finish(binary(folder, *arguments, '--keep_runs'))
  assert code == 0, err
  log = (folder / 'runs/s0.log').read_text()
  assert 'going on from the checkpoint at step' in log
  assert (folder / 'runs/s0/result.json').exists()
  (run,) = grid.runs(tiny(**fields))
  plain = runner.do_run(run.name, run.config, runner._Place(tmp_path / 'plain', True, False, 1))
  del plain['result']['timing']
  assert of_run(folder)['s0']['result'] == plain['result']


@pytest.mark.slow
def test_shards_of_workers_equal_the_whole(whole, tmp_path):
  for index in (0, 1):
    code, _, err = finish(binary(tmp_path / 'st', f'--shard={index}/2', '--jobs=1'))
    assert code == 0, err
  assert of_run(tmp_path / 'st') == of_run(whole)


@pytest.mark.slow
@pytest.mark.timeout(900)  # three compilations of nets, on cores that others may use
def test_a_real_net_in_one_worker_and_in_two(tmp_path):
  """Two seeds of `csba` that share a worker's program, or not; with conflict and gates."""
  c = small(variants=('csba',), base__diagnostics__snapshots='1')
  for jobs in (1, 2):
    ended = start(c, tmp_path / str(jobs), jobs=jobs)
    assert ended == runner.Outcome(done=2, failed=0, missing=0)
  one, two = of_run(tmp_path / '1'), of_run(tmp_path / '2')
  # a worker has one thread, but one for each of the eight devices that the suite pretends to have
  assert {record['numerics']['threads'] for record in one.values()} == {8}
  assert sorted(one) == ['s0', 's1']
  assert one == two
  for record in one.values():
    assert [(entry['at'], entry['part']) for entry in record['conflict']] == [
      *(('1', 'train'), ('1', 'val')),
      *(('tested', 'train'), ('tested', 'val')),
    ]
    assert {'shared', 'common', 'stage1', 'branch1x1'} <= record['conflict'][0]['scopes'].keys()
    assert len(record['branches'][0]['gates']) == 4


# ---- what is missing, by runs of no time


@pytest.mark.seconds
def test_started_again_it_does_nothing(whole, monkeypatch, capsys):
  before = (whole / 'results.jsonl').read_bytes()
  monkeypatch.setattr(runner._Worker, 'start', None)  # would be called
  assert start(tiny(), whole, jobs=2) == runner.Outcome(done=4, failed=0, missing=0)
  assert (whole / 'results.jsonl').read_bytes() == before
  assert '4 runs, 4 of them done; 2 at a time' in capsys.readouterr().err


@pytest.mark.seconds
def test_a_line_that_was_taken_out_is_made_up(whole, tmp_path, monkeypatch):
  shutil.copytree(whole, tmp_path / 'st')
  path = tmp_path / 'st/results.jsonl'
  kept = [line for line in path.read_text().splitlines(True) if f'"{DONE[2]}"' not in line]
  path.write_text(''.join(kept))
  asked = in_process(monkeypatch)
  assert start(tiny(), tmp_path / 'st') == runner.Outcome(done=4, failed=0, missing=0)
  assert asked == [DONE[2]]
  assert path.read_text().startswith(''.join(kept))
  assert len(results.read(tmp_path / 'st').done) == 4


@pytest.mark.seconds
def test_a_torn_last_line_is_repaired_with_a_note(whole, tmp_path, monkeypatch, capsys):
  shutil.copytree(whole, tmp_path / 'st')
  path = tmp_path / 'st/results.jsonl'
  *kept, last = path.read_text().splitlines(True)
  path.write_text(''.join(kept) + last[:100])
  asked = in_process(monkeypatch)
  assert start(tiny(), tmp_path / 'st') == runner.Outcome(done=4, failed=0, missing=0)
  assert asked == [json.loads(last)['run']]
  assert 'results.jsonl: the last line was torn (100 bytes, kept in' in capsys.readouterr().err
  assert (tmp_path / 'st/results.jsonl.torn').read_text() == last[:100] + '\n'
  assert len(lines(tmp_path / 'st')) == 4


def test_a_failed_run_is_tried_again_and_a_finished_one_never(tmp_path, monkeypatch, capsys):
  asked = in_process(monkeypatch, fails=('none-s1',))
  assert start(small(), tmp_path) == runner.Outcome(done=3, failed=1, missing=0)
  assert asked == RUNS
  record = next(record for record in lines(tmp_path) if record['status'] == 'failed')
  assert (record['run'], record['error']) == ('none-s1', 'UserError: too bad')
  assert '2/4  none-s1  failed: UserError: too bad  1 s; 1 failed' in capsys.readouterr().err
  asked = in_process(monkeypatch)
  assert start(small(), tmp_path) == runner.Outcome(done=4, failed=0, missing=0)
  assert asked == ['none-s1']
  with open(tmp_path / 'results.jsonl', 'a') as file:  # a failure after the end counts for nothing
    file.write(json.dumps(record) + '\n')
  asked = in_process(monkeypatch)
  assert start(small(), tmp_path).failed == 0
  assert asked == []
  assert results.read(tmp_path).failed == ()


@pytest.mark.parametrize('keep', [False, True])
def test_the_folder_of_a_run_goes_after_its_line_is_on_disk(tmp_path, monkeypatch, keep):
  def full(*_):
    raise UserError('room', 'a full disk', 'free some')

  runs = [tmp_path / 'runs' / name for name in RUNS]
  for run in runs:
    run.mkdir(parents=True)
    run.with_name(f'{run.name}.log').touch()
  in_process(monkeypatch, fails=RUNS[1:2])
  with monkeypatch.context() as patch:
    patch.setattr(store, 'append', full)
    with pytest.raises(UserError, match='a full disk'):
      start(small(), tmp_path, keep_runs=keep)
  assert all(run.exists() for run in runs)
  start(small(), tmp_path, keep_runs=keep)
  assert [run.exists() for run in runs] == [keep, True, keep, keep]  # that of the failed one stays
  assert [run.with_name(f'{run.name}.log').exists() for run in runs] == [keep, True, keep, keep]


@pytest.mark.seconds
@pytest.mark.parametrize('parts', [1, 2, 3, 4, 7])
def test_shards_in_one_folder_or_in_several_are_the_whole(tmp_path, monkeypatch, parts):
  in_process(monkeypatch)
  start(small(), tmp_path / 'whole')
  for index in range(parts):
    start(small(), tmp_path / 'one', shard=f'{index}/{parts}')
    start(small(), tmp_path / f'of{index}', shard=f'{index}/{parts}')
  assert of_run(tmp_path / 'one') == of_run(tmp_path / 'whole')
  shutil.copytree(tmp_path / 'of0', tmp_path / 'together')
  for path in (tmp_path / 'together').glob('results*'):
    path.unlink()
  texts = [path.read_text() for path in sorted(tmp_path.glob('of*/results*.jsonl'))]
  (tmp_path / 'together/results.jsonl').write_text(''.join(texts))
  assert of_run(tmp_path / 'together') == of_run(tmp_path / 'whole')
  names = [record['run'] for record in results.read(tmp_path / 'whole').done]
  for folder in ('one', 'together'):
    assert [record['run'] for record in results.read(tmp_path / folder).done] == names
  asked = in_process(monkeypatch)
  for folder in ('one', 'together'):  # whoever did a run, it is done
    assert start(small(), tmp_path / folder) == runner.Outcome(4, 0, 0)
  assert asked == []


def test_two_processes_on_one_folder(tmp_path, monkeypatch):
  in_process(monkeypatch)
  with lock_file(tmp_path, '.results.jsonl.lock'):
    with pytest.raises(UserError, match=f'another process at work in {tmp_path}'):
      start(small(), tmp_path)
    start(small(), tmp_path, shard='0/2')  # writes a file of its own
  start(small(), tmp_path)


def test_shards_that_start_together_lose_no_command(tmp_path, monkeypatch):
  """Each reads study.json before any of them writes it, unless they take turns."""
  read = study_json.read

  def slowly(folder):
    found = read(folder)
    time.sleep(0.1)
    return found

  monkeypatch.setattr(study_json, 'read', slowly)
  in_process(monkeypatch)
  start(small(), tmp_path, command='first')
  shards = [
    threading.Thread(
      target=study_json.claim, args=(tmp_path, small()), kwargs={'command': f'{i}', 'shards': 5}
    )
    for i in range(5)
  ]
  for thread in shards:
    thread.start()
  for thread in shards:
    thread.join()
  commands = json.loads((tmp_path / 'study.json').read_text())['commands']
  assert sorted(commands) == ['0', '1', '2', '3', '4', 'first']


@pytest.mark.parametrize('fields', [{'seeds': 3}, {'variants': ('none', 'csba', 'se')}])
def test_shards_of_other_axes_are_refused(tmp_path, monkeypatch, fields):
  in_process(monkeypatch)
  start(small(), tmp_path, shard='0/2')
  with pytest.raises(UserError) as error:
    start(small(**fields), tmp_path, shard='1/2')
  ((field, _),) = fields.items()
  assert f'expected the axes that other shards in {tmp_path} have; found {field}: ' in (
    str(error.value)
  )
  assert 'all shards the same axes' in str(error.value)
  start(small(), tmp_path, shard='1/2')
  start(small(**fields), tmp_path)  # a whole study may grow, and its shards with it
  start(small(**fields), tmp_path, shard='1/2')


def test_the_folder_of_another_study(tmp_path, monkeypatch):
  in_process(monkeypatch)
  start(small(), tmp_path)
  with pytest.raises(UserError) as error:
    start(small(base__train__epochs=7, base__loss__tau=0.5, test=False), tmp_path)
  assert str(error.value) == (
    f'expected the study that {tmp_path} was started with; found '
    'base.loss.tau: 1.0 there, 0.5 here; base.train.epochs: 1 there, 7 here; '
    'test: True there, False here; to fix it: name another --workdir, or set these fields as they '
    'were'
  )
  for field, value in (('name', 'other'), ('outcome', 'f1:3'), ('subsets', 2)):
    with pytest.raises(UserError, match=f'{field}: .* there, {value!r} here'):
      start(small(**{field: value}), tmp_path)


@pytest.mark.parametrize('field', ['margin', 'smallest_effect'])
def test_what_was_stated_before_stays(tmp_path, monkeypatch, field):
  in_process(monkeypatch)
  start(small(), tmp_path)
  with pytest.raises(UserError, match=f'{field}: 0.0. there, 0.05 here'):
    start(small(**{field: 0.05}), tmp_path)
  assert json.loads((tmp_path / 'study.json').read_text())['config'][field] < 0.05


def test_more_seeds_and_variants_and_another_place_are_the_same_study(tmp_path, monkeypatch):
  in_process(monkeypatch)
  start(small(), tmp_path)
  asked = in_process(monkeypatch)
  c = small(seeds=3, variants=('none', 'csba', 'se'), base__data__dir='/elsewhere')
  assert start(c, tmp_path) == runner.Outcome(done=9, failed=0, missing=0)
  assert asked == ['none-s2', 'csba-s2', 'se-s0', 'se-s1', 'se-s2']
  assert json.loads((tmp_path / 'study.json').read_text())['config']['seeds'] == 3
  assert len(results.read(tmp_path).done) == 9


def test_an_axis_that_grows_from_one_value_keeps_its_runs(tmp_path, monkeypatch):
  """The run of one variant is called s0, of two none-s0: it is the same run."""
  in_process(monkeypatch)
  start(small(variants=('none',)), tmp_path)
  asked = in_process(monkeypatch)
  assert start(small(), tmp_path) == runner.Outcome(done=4, failed=0, missing=0)
  assert asked == ['csba-s0', 'csba-s1']
  assert len(results.read(tmp_path).done) == 4


@pytest.mark.parametrize(
  ('fields', 'expected'),
  [
    ({'variants': ('csba',)}, "model.attention: 'none' there, 'csba' here"),
    ({'subsets': 1}, 'subsets: 0 there, 1 here'),
  ],
)
def test_a_finished_run_of_that_name_with_another_config(tmp_path, monkeypatch, fields, expected):
  """Names say only what varies: a run may not be taken for another one."""
  in_process(monkeypatch)
  start(small(variants=('none',)), tmp_path)
  with pytest.raises(UserError, match=expected):
    start(small(**{'variants': ('none',)} | fields), tmp_path)


@pytest.mark.parametrize(
  'folder', sorted((ROOT / 'results').glob('*/study.json')), ids=lambda path: path.parent.name
)
def test_of_a_committed_study_nothing_is_missing(tmp_path, monkeypatch, folder):
  """Its command may be given again, whatever fields configs have got since; failures are tried."""
  name = folder.parent.name
  c = config_lib.sibling(str(ROOT / 'configs/of.py'), f'study_{name}')
  shutil.copytree(folder.parent, tmp_path / name)
  monkeypatch.chdir(ROOT)  # where tuned_by is
  failed = {record['run'] for record in results.read(tmp_path / name).failed}
  asked = in_process(monkeypatch)
  start(c, tmp_path / name)
  assert set(asked) <= failed


def before_a_field(folder):
  """Makes a study's folder one of a time before data.input, train.save_every and subsets."""

  def take_out(config):
    del config['data']['input'], config['train']['save_every']

  about = json.loads((folder / 'study.json').read_text())
  take_out(about['config']['base'])
  del about['config']['subsets']
  (folder / 'study.json').write_text(json.dumps(about))
  records = lines(folder)
  for record in records:
    take_out(record['config'])
    record['config_sha256'] = 'of another form'
  text = ''.join(json.dumps(record) + '\n' for record in records)
  (folder / 'results.jsonl').write_text(text)


def test_fields_that_came_later_count_as_their_default(tmp_path, monkeypatch):
  in_process(monkeypatch)
  start(small(seeds=1), tmp_path)
  before_a_field(tmp_path)
  with pytest.raises(UserError) as error:
    start(small(base__train__save_every=7, subsets=3), tmp_path)
  assert 'base.train.save_every: 1000 there, 7 here; subsets: 0 there, 3 here' in str(error.value)
  asked = in_process(monkeypatch)
  assert start(small(base__data__input='stream'), tmp_path) == runner.Outcome(4, 0, 0)
  assert asked == ['none-s1', 'csba-s1']
  found = results.read(tmp_path)  # old and new records are of one study
  assert (len(found.done), found.notes) == (4, ())


@pytest.mark.slow
def test_the_folder_of_a_failed_run_does_not_block_it_after_a_field_was_added(driver, tmp_path):
  run = grid.runs(tiny(seeds=1))[0]
  workdir = tmp_path / f'runs/{run.name}'
  with Workdir(workdir, run.config.to_dict()) as begun:
    begun.begin()
  record = json.loads((workdir / 'config.json').read_text())
  del record['config']['data']['input'], record['config']['mixing']
  (workdir / 'config.json').write_text(json.dumps(record))
  found = runner.do_run(run.name, run.config, runner._Place(tmp_path, True, True, 1))
  assert found['status'] == 'done', found


def test_every_command_that_started_it_is_kept(tmp_path, monkeypatch):
  in_process(monkeypatch)
  for command in ('one', 'two', 'one', 'three'):
    start(small(), tmp_path, command=command)
  assert json.loads((tmp_path / 'study.json').read_text())['commands'] == ['one', 'two', 'three']
  assert results.read(tmp_path).commands == ('one', 'two', 'three')
  old = json.loads((tmp_path / 'study.json').read_text())
  del old['commands']
  (tmp_path / 'study.json').write_text(json.dumps(old | {'command': 'of the first form'}))
  start(small(), tmp_path, command='new')
  assert results.read(tmp_path).commands == ('of the first form', 'new')


def test_an_outcome_that_is_no_class_is_found_before_anything_is_begun(tmp_path, monkeypatch):
  asked = in_process(monkeypatch)
  with pytest.raises(UserError) as error:
    start(small(outcome='f1:bird'), tmp_path)
  assert str(error.value) == (
    'expected an outcome f1:CLASS with a class of the data (0, 1, 2, 3, 4, 5, 6, 7, 8, 9); '
    "found 'f1:bird'; to fix it: set --config.outcome=..., and correct study.json if it is there"
  )
  assert asked == []
  assert not (tmp_path / 'study.json').exists()
  assert start(small(outcome='f1:3'), tmp_path).done == 4
  assert start(small(outcome='f1:bird', test=False), tmp_path / 'tuning').done == 4  # of no use


def test_the_outcome_of_a_finished_study_needs_no_data(tmp_path, monkeypatch):
  """Its runs know their classes; study.json and the config are corrected alike."""
  in_process(monkeypatch, class_names=['cat', 'dog'])
  monkeypatch.setattr(pipeline, 'open_sources', None)  # would be called
  start(small(), tmp_path)
  about = json.loads((tmp_path / 'study.json').read_text())
  about['config']['outcome'] = 'f1:bird'
  (tmp_path / 'study.json').write_text(json.dumps(about))
  with pytest.raises(UserError, match=r"a class of the data .cat, dog.; found 'f1:bird'"):
    start(small(outcome='f1:bird'), tmp_path)
  about['config']['outcome'] = 'f1:dog'
  (tmp_path / 'study.json').write_text(json.dumps(about))
  assert start(small(outcome='f1:dog'), tmp_path).done == 4


def test_jobs_and_shards_out_of_range(tmp_path):
  for options, message in (
    ({'jobs': 0}, '--jobs of at least 1; found 0; to fix it: set it to the number of cores'),
    ({'shard': '4/4'}, "0 <= i < n; found '4/4'"),
  ):
    with pytest.raises(UserError, match=message):
      start(small(), tmp_path / 'st', **options)
  assert not (tmp_path / 'st').exists()


# ---- what is said before any time is spent


FAMILY = ('none', 'none_wide', 'csba', 'csba_class')


@pytest.mark.parametrize(
  ('fields', 'tests', 'smallest', 'needed'),
  [
    ({'variants': FAMILY}, 4, '1.000', 8),
    ({'variants': (*FAMILY, 'se'), 'methods': ('drw', 'cross_entropy'), 'seeds': 7}, 8, '0.125', 9),
    ({'variants': ('none', 'csba', 'se'), 'widths': (0.1, 0.2), 'seeds': 5}, 2, '0.125', 7),
    ({'variants': ('none_wide', 'csba_class'), 'seeds': 5}, 1, '0.062', 6),
  ],
)
def test_seeds_that_are_too_few_to_support_anything(
  tmp_path, monkeypatch, capsys, fields, tests, smallest, needed
):
  in_process(monkeypatch)
  fields |= {'base__data__source': 'tfds', 'base__data__name': 'cifar10'}  # a test set of its own
  start(small(**fields), tmp_path / 'few')
  assert (
    f'cannot support any comparison: the smallest p of {tests} '
    f'test{"s" * (tests > 1)} is {smallest} after Holm; use {needed} seeds'
  ) in capsys.readouterr().err
  start(small(**fields | {'seeds': needed}), tmp_path / 'enough')
  assert 'cannot support' not in capsys.readouterr().err


@pytest.mark.parametrize(
  'fields',
  [
    {'variants': ('none', 'se')},  # no comparison of the family
    {'test': False},  # none at all
    {'base__data__folds': 2, 'seeds': 10},  # another test, which knows no such bound
    {},  # the same: digits of all seeds come from one set
  ],
)
def test_where_few_seeds_are_no_matter(tmp_path, monkeypatch, capsys, fields):
  in_process(monkeypatch)
  start(small(**fields), tmp_path)
  assert 'cannot support' not in capsys.readouterr().err


def test_rates_at_an_end_of_their_grid_are_said_and_kept(tmp_path, monkeypatch, capsys):
  words = 'the best learning rate was the largest of 0.1, 0.2 for csba'
  monkeypatch.setattr(tuning, 'chosen_rates', lambda c: None)
  monkeypatch.setattr(tuning, 'at_ends', lambda c: [words])
  in_process(monkeypatch)
  start(small(), tmp_path)
  assert words in capsys.readouterr().err
  assert json.loads((tmp_path / 'study.json').read_text())['rates_at_ends'] == [words]
  assert results.read(tmp_path).notes == (words,)


# ---- who does what


def test_a_worker_stays_with_the_shape_it_knows():
  runs = grid.runs(small(variants=('none', 'se', 'csba')))

  class Idle:
    def __init__(self):
      self.run = None

    def give(self, run):
      self.run = run

  workers, todo = [Idle(), Idle()], list(runs)
  for worker in workers:
    assert runner._feed(worker, workers, todo)
  assert [worker.run.name for worker in workers] == ['none-s0', 'se-s0']
  names = []
  while todo:
    runner._feed(workers[0], workers, todo)
    names.append(workers[0].run.name)
  assert names == ['none-s1', 'csba-s0', 'csba-s1', 'se-s1']  # the other's shape last
  assert not runner._feed(workers[0], workers, todo)


@pytest.mark.parametrize(
  ('cores', 'jobs', 'threads', 'runs', 'advised'),
  [
    (8, 1, 1, 20, 8),
    (8, 1, 1, 3, 3),
    (8, 1, 3, 20, 2),
    *((8, 2, 3, 20, None), (8, 1, 3, 1, None), (2, 2, 1, 9, None), (1, 1, 1, 9, None)),
  ],
)
def test_idle_cores_are_told(monkeypatch, cores, jobs, threads, runs, advised):
  monkeypatch.setattr(runner.numerics, 'cores', lambda: cores)
  words = ' '.join(runner._idle_cores(jobs, threads, runs))
  assert words == '' if advised is None else f'in {threads} of {cores} cores' in words
  assert advised is None or f' --jobs={advised} uses the others too' in words


def test_cores_are_shared():
  cores = sorted(os.sched_getaffinity(0))
  for jobs in range(1, len(cores) + 1):
    shares = runner._share_cores(jobs)
    assert len(shares) == jobs
    assert sorted(core for share in shares for core in share) == cores
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
  assert runner._share_cores(len(cores) + 1) == [cores] * (len(cores) + 1)


@pytest.mark.parametrize('ends', [True, False])
def test_a_run_that_another_process_is_still_at(tmp_path, monkeypatch, ends):
  """The worker of a study that was killed: it is waited for, and then left alone."""
  monkeypatch.setattr(runner, 'ORPHAN_SECONDS', 20.0 if ends else 0.3)
  trained = []
  monkeypatch.setattr(loop, 'train_and_evaluate', lambda *_: trained.append(1))
  run, workdir = grid.runs(small())[0], tmp_path / 'runs/none-s0'
  with contextlib.ExitStack() as stack:
    stack.enter_context(lock_file(workdir, '.lock'))
    if ends:
      threading.Timer(0.5, stack.pop_all().close).start()
    found = runner.do_run(run.name, run.config, runner._Place(tmp_path, True, False, 1))
  assert trained == [1] * ends
  if ends:
    assert found is None  # as a stopped run: what the stub returns
  else:
    assert found['status'] == 'left'
    assert f'another process at work in {workdir}' in found['error']


def test_a_run_that_is_left_is_missing_and_not_failed(tmp_path, monkeypatch, capsys):
  def work_off(runs, place, jobs, stop, write):
    write(runs[0], runner._failure('another process at work', 1.0, 'left'))

  monkeypatch.setattr(runner, '_work_off', work_off)
  assert start(small(), tmp_path) == runner.Outcome(done=0, failed=0, missing=4)
  assert not (tmp_path / 'results.jsonl').exists()
  assert 'none-s0  left for the next start: another process at work' in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_that_is_killed_and_started_at_once_again(tmp_path):
  """Its worker, which stops for itself, is not in the way."""
  fields = {'methods': ('cross_entropy',), 'seeds': 1}
  fields |= {'base__train__epochs': 100, 'base__train__eval_every': 50}
  arguments = [f'--config.{k.replace("__", ".")}={v}' for k, v in fields.items()]
  folder = tmp_path / 'killed'
  process = binary(folder, *arguments)
  metrics = folder / 'runs/s0/metrics.jsonl'
  deadline = time.monotonic() + 120
  while not metrics.exists() or metrics.read_text().count('\n') < 3:
    assert time.monotonic() < deadline
    assert process.poll() is None
    time.sleep(0.02)
  process.kill()
  code, out, err = finish(binary(folder, *arguments))
  process.communicate()
  assert code == 0, err
  assert out == f'1 runs done, 0 failed, 0 missing in {folder}\n'
  assert [record['status'] for record in lines(folder)] == ['done']


def test_a_stopped_run_leaves_no_record(tmp_path, monkeypatch):
  monkeypatch.setattr(loop, 'train_and_evaluate', lambda *_: None)
  run = grid.runs(small())[0]
  assert runner.do_run(run.name, run.config, runner._Place(tmp_path, True, False, 1)) is None
  assert (tmp_path / 'runs/none-s0.log').exists()


@pytest.mark.parametrize(
  ('error', 'words'),
  [
    (UserError('this', 'that', 'do so'), 'expected this; found that; to fix it: do so'),
    (ValueError('two\n lines'), 'ValueError: two lines'),
    (MemoryError(), 'MemoryError:'),
  ],
)
def test_what_a_run_raises_is_its_record(tmp_path, monkeypatch, error, words):
  def fail(*_):
    raise error

  monkeypatch.setattr(loop, 'train_and_evaluate', fail)
  run = grid.runs(small())[0]
  found = runner.do_run(run.name, run.config, runner._Place(tmp_path, True, False, 1))
  assert found.pop('seconds') >= 0
  assert found == {'status': 'failed', 'error': words, 'device': None}
  assert 'Traceback' in (tmp_path / 'runs/none-s0.log').read_text()


def test_a_score_that_is_undefined_and_the_time_left_are_told():
  assert runner._score({'macro_f1': None}) == 'macro f1 -'
  assert runner._score({'validation_macro_f1': 0.25}) == 'validation macro f1 0.250'
  assert [runner._duration(s) for s in (0.4, 119, 120, 7200)] == [
    '0 s',
    '119 s',
    '2 min',
    '120 min',
  ]
