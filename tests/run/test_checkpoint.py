"""Checkpoints: whole or absent, the latest two and the best."""

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.futures import signaling_client

from csba_jax.errors import TryAgain, UserError
from csba_jax.run import checkpoint
from csba_jax.run.checkpoint import Checkpoints
from csba_jax.runtime import distributed


def tree_at(step):
  return {'w': jnp.full((3, 4), step, jnp.float32), 'n': jnp.asarray(step, jnp.int32)}


LIKE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree_at(0))


def assert_is(tree, step):
  jax.tree.map(np.testing.assert_array_equal, tree, tree_at(step))


def test_what_is_saved_comes_back_with_its_meta(tmp_path):
  meta = {'losses': [0.1, 1 / 3], 'best_score': None, 'step': 7}
  with Checkpoints(tmp_path / 'c') as checkpoints:
    checkpoints.save(7, tree_at(7), meta)
    checkpoints.wait()
    tree, restored = checkpoints.restore(7, LIKE)
  assert_is(tree, 7)
  assert restored == meta


def test_the_latest_two_and_the_best_are_kept(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    for step, score in ((1, 0.2), (2, 0.9), (3, 0.1), (4, 0.9), (5, None), (6, 0.3), (7, None)):
      checkpoints.save(step, tree_at(step), {}, score)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [4, 6, 7]  # of equal scores the latest
    checkpoints.save(8, tree_at(8), {}, 0.5)  # scores are known across a restart
    checkpoints.wait()
    assert checkpoints.steps() == [4, 7, 8]


def test_a_save_without_a_score_warns_of_nothing(tmp_path, monkeypatch):
  """Orbax, which keeps the best, warns where a save has no metrics: a study prints that."""
  said = []
  monkeypatch.setattr(checkpoint.logging, 'warning', lambda text, *args: said.append(text % args))
  with Checkpoints(tmp_path) as checkpoints:
    for step, score in ((1, None), (2, 0.5), (3, None), (4, None)):
      checkpoints.save(step, tree_at(step), {}, score)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3, 4]
  assert said == []
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(5, tree_at(5), {}, 0.25)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 5]


def test_the_tree_may_be_donated_while_the_save_runs(tmp_path):
  change = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
  with Checkpoints(tmp_path) as checkpoints:
    tree = jax.tree.map(jnp.asarray, {'w': jnp.zeros((512, 512)), 'n': jnp.zeros((), jnp.int32)})
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    for step in range(4):
      checkpoints.save(step, tree, {})
      tree = change(tree)
      restored, _ = checkpoints.restore(step, like) if checkpoints.wait() is None else None
      assert float(restored['w'].min()) == float(restored['w'].max()) == step


def test_saving_the_last_step_again_is_nothing(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, tree_at(3), {'first': True})
    checkpoints.save(3, tree_at(4), {'first': False})
    checkpoints.wait()
    assert checkpoints.restore(3, LIKE)[1] == {'first': True}


def test_latest_of_none(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore_latest(LIKE) is None


def files_of(checkpoint, part):
  """Files of a checkpoint: array data, what describes it, the meta, the score."""
  return {
    'data': [path for path in sorted(checkpoint.rglob('d/*')) if path.is_file()],
    'metadata': [checkpoint / 'state/_METADATA'],
    'meta': [checkpoint / 'meta/metadata'],
    'score': [checkpoint / 'metrics/metrics'],
  }[part]


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  """Changes one bit in the middle."""
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


DAMAGES = {'truncated': truncate, 'deleted': lambda path: path.unlink(), 'flipped': flip}


# A failed read leaves a task of orbax behind, which complains when Python collects it.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('part', ['data', 'metadata', 'meta', 'score'])
@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_latest_is_set_aside(tmp_path, part, damage):
  with Checkpoints(tmp_path / 'c') as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, tree_at(step), {'step': step}, score=step)
  files = files_of(tmp_path / 'c/2', part)
  assert files
  DAMAGES[damage](files[-1])
  warnings = []
  with Checkpoints(tmp_path / 'c', warn=warnings.append) as checkpoints:
    tree, meta = checkpoints.restore_latest(LIKE)
    assert_is(tree, 1)
    assert meta == {'step': 1}
    assert [warning for warning in warnings if 'checkpoint 2 is damaged' in warning] == warnings
    assert len(warnings) == 1
    assert 'going back to the one before' in warnings[0]
    assert files[-1].name in warnings[0]
    assert checkpoints.steps() == [1]
    checkpoints.save(2, tree_at(2), {'step': 2})
  assert (tmp_path / 'c-damaged/2').is_dir()
  with Checkpoints(tmp_path / 'c') as checkpoints:
    assert_is(checkpoints.restore_latest(LIKE)[0], 2)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_damaged_one_is_found_for_what_it_is_on_every_way(tmp_path):
  """Evaluation reads a step by its number, without a word about others."""
  with Checkpoints(tmp_path / 'c') as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, tree_at(step), {})
  flip(files_of(tmp_path / 'c/1', 'data')[-1])
  with Checkpoints(tmp_path / 'c', read_only=True) as checkpoints:
    with pytest.raises(UserError, match='damaged: .* is not as it was saved; .* another of'):
      checkpoints.restore(1, LIKE)
    assert_is(checkpoints.restore(2, LIKE)[0], 2)


def finished(folder, step):
  """Waits until a checkpoint is there, without a word to the one who saves it."""
  deadline = time.monotonic() + 60
  while not (folder / str(step)).is_dir():
    assert time.monotonic() < deadline
    time.sleep(0.01)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_checkpoint_has_its_sums_from_the_moment_it_is_there(tmp_path):
  """The one that a killed process goes on from is its last: nothing came after it."""
  saving = Checkpoints(tmp_path / 'c')
  for step in (1, 2):
    saving.save(step, tree_at(step), {})
    finished(tmp_path / 'c', step)
    assert (tmp_path / f'c-sums/{step}.json').exists()
  shutil.copytree(tmp_path / 'c', tmp_path / 'killed')
  shutil.copytree(tmp_path / 'c-sums', tmp_path / 'killed-sums')
  saving.__exit__(None, None, None)
  flip(files_of(tmp_path / 'killed/2', 'data')[-1])
  warnings = []
  with Checkpoints(tmp_path / 'killed', warn=warnings.append) as checkpoints:
    assert_is(checkpoints.restore_latest(LIKE)[0], 1)
  assert len(warnings) == 1
  assert 'checkpoint 2 is damaged, going back to the one before' in warnings[0]


KILLED = """
import os, sys
import jax.numpy as jnp
from csba_jax.run import checkpoint
tree = {'w': jnp.full((3, 4), 2, jnp.float32), 'n': jnp.asarray(2, jnp.int32)}
checkpoints = checkpoint.Checkpoints(sys.argv[1])
checkpoints.save(1, tree, {})
checkpoints.wait()
write = checkpoint.write_atomically
def die(*args):
  if sys.argv[2] == 'after':
    write(*args)
  os._exit(9)
checkpoint.write_atomically = die
checkpoints.save(2, tree, {})
checkpoints.wait()
"""


@pytest.mark.seconds
@pytest.mark.parametrize('when', ['before', 'after'])
def test_killed_at_the_sums_of_a_checkpoint_it_is_not_there(tmp_path, when):
  found = subprocess.run(
    [sys.executable, '-c', KILLED, tmp_path / 'c', when], capture_output=True, text=True
  )
  assert found.returncode == 9, found.stderr
  assert (tmp_path / 'c-sums/2.json').exists() == (when == 'after')
  with Checkpoints(tmp_path / 'c', warn=pytest.fail) as checkpoints:
    assert checkpoints.steps() == [1]
    checkpoints.restore_latest(LIKE)
    checkpoints.save(2, tree_at(7), {})
  assert sorted(path.name for path in (tmp_path / 'c-sums').iterdir()) == ['1.json', '2.json']
  with Checkpoints(tmp_path / 'c', warn=pytest.fail) as checkpoints:
    assert_is(checkpoints.restore_latest(LIKE)[0], 7)


def test_a_disk_without_room_for_the_sums_is_one_line(tmp_path, monkeypatch):
  checkpoints = Checkpoints(tmp_path / 'c')
  checkpoints.save(1, tree_at(1), {})
  checkpoints.wait()

  def fail(*args):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(checkpoint, 'write_atomically', fail)
  checkpoints.save(2, tree_at(2), {})
  with pytest.raises(UserError, match='checkpoints to be read and written .*No space left'):
    checkpoints.wait()
  monkeypatch.undo()
  checkpoints.__exit__(UserError, None, None)
  with Checkpoints(tmp_path / 'c', warn=pytest.fail) as checkpoints:
    assert_is(checkpoints.restore_latest(LIKE)[0], 1)


def test_sums_that_are_not_there_are_said_to_be_missing(tmp_path):
  with Checkpoints(tmp_path / 'c') as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, tree_at(step), {})
  sums, half = tmp_path / 'c-sums', tmp_path / 'c-sums/.2.json.abcd'
  assert sorted(path.name for path in sums.iterdir()) == ['1.json', '2.json']
  half.write_text('{"sta')  # of a process that was killed
  for damage in ((sums / '2.json').unlink, lambda: (sums / '2.json').write_text('{"sta')):
    damage()
    warnings = []
    with Checkpoints(tmp_path / 'c', warn=warnings.append) as checkpoints:
      assert_is(checkpoints.restore_latest(LIKE)[0], 2)
    assert len(warnings) == 1
    assert 'checkpoint 2 is read unchecked, without its sums: ' in warnings[0]
  assert not half.exists()


def test_sums_of_another_save_of_the_step_do_not_count(tmp_path):
  with Checkpoints(tmp_path / 'c') as checkpoints:
    checkpoints.save(1, tree_at(1), {'done': []})
  with Checkpoints(tmp_path / 'c') as checkpoints:
    checkpoints.save(1, tree_at(7), {'done': ['line']})
  with Checkpoints(tmp_path / 'c', warn=pytest.fail) as checkpoints:
    tree, meta = checkpoints.restore_latest(LIKE)
  assert_is(tree, 7)
  assert meta == {'done': ['line']}


def test_sums_are_of_every_file_but_those_that_orbax_writes_later(tmp_path):
  with Checkpoints(tmp_path / 'c') as checkpoints:
    checkpoints.save(1, tree_at(1), {'step': 1}, score=0.5)
  there = {str(p.relative_to(tmp_path / 'c/1')) for p in tmp_path.glob('c/1/**/*') if p.is_file()}
  missing = there - json.loads((tmp_path / 'c-sums/1.json').read_text()).keys()
  assert {Path(name).name for name in missing} == {*checkpoint._WRITTEN_LATER}, (
    'orbax has renamed the file of its metadata: read the name in the new version, and correct '
    '_WRITTEN_LATER in csba_jax/run/checkpoint.py'
  )


def test_sums_go_with_their_checkpoints(tmp_path):
  with Checkpoints(tmp_path / 'c') as checkpoints:
    for step in range(1, 6):
      checkpoints.save(step, tree_at(step), {}, score=-step)
  assert sorted(path.stem for path in (tmp_path / 'c-sums').iterdir()) == ['1', '4', '5']


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_step_that_was_half_deleted_to_be_saved_anew(tmp_path, monkeypatch):
  with Checkpoints(tmp_path / 'c') as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, tree_at(step), {'step': step})
  checkpoints = Checkpoints(tmp_path / 'c')

  def die(step):
    (tmp_path / 'c' / str(step) / 'meta/metadata').unlink()
    raise OSError('killed')

  monkeypatch.setattr(checkpoints._manager, 'delete', die)
  with pytest.raises(UserError, match='killed'):
    checkpoints.save(2, tree_at(2), {'step': 2})
  checkpoints._manager.close()
  warnings = []
  with Checkpoints(tmp_path / 'c', warn=warnings.append) as checkpoints:
    assert_is(checkpoints.restore_latest(LIKE)[0], 1)
  assert len(warnings) == 1
  assert 'meta/metadata is missing' in warnings[0]


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_where_none_can_be_read_all_stay_where_they_are(tmp_path):
  with Checkpoints(tmp_path / 'c') as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, tree_at(step), {})
  other = LIKE | {'more': jax.ShapeDtypeStruct((2,), jnp.float32)}  # as after a change of the code
  with Checkpoints(tmp_path / 'c') as checkpoints:
    with pytest.raises(UserError, match='that can be read; found 2 that cannot, the newest'):
      checkpoints.restore_latest(other)
    assert checkpoints.steps() == [1, 2]
    assert_is(checkpoints.restore_latest(LIKE)[0], 2)


def test_where_no_score_can_be_read_all_stay_where_they_are(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, tree_at(1), {}, score=0.5)
  (tmp_path / '1/metrics/metrics').write_text('{"sco')
  with pytest.raises(UserError, match='that can be read; found .*metrics is unreadable'):
    Checkpoints(tmp_path)
  with pytest.raises(UserError, match='to be read and written'):
    Checkpoints(tmp_path, read_only=True)
  assert (tmp_path / '1').is_dir()


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='to be read and written in .*file'):
    Checkpoints(tmp_path / 'file')


def test_a_checkpoint_of_another_shape(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, tree_at(1), {})
    checkpoints.wait()
    other = LIKE | {'more': jax.ShapeDtypeStruct((2,), jnp.float32)}
    with pytest.raises(UserError, match='a whole checkpoint at step 1'):
      checkpoints.restore(1, other)


def test_reading_only_leaves_the_folder_alone(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, tree_at(1), {})
  half = tmp_path / '2.orbax-checkpoint-tmp'  # of a run that may be saving right now, or was killed
  shutil.copytree(tmp_path / '1', half)
  before = sorted(tmp_path.rglob('*'))
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.steps() == [1]
    assert_is(checkpoints.restore(1, LIKE)[0], 1)
  assert sorted(tmp_path.rglob('*')) == before
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [1]
    checkpoints.save(2, tree_at(2), {})
  assert not half.exists()  # the half checkpoint makes room for the whole one
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert_is(checkpoints.restore(2, LIKE)[0], 2)


def test_an_error_under_way_is_not_hidden_by_a_failing_save(tmp_path, monkeypatch):
  checkpoints = Checkpoints(tmp_path)

  def fail():
    raise OSError('full')

  monkeypatch.setattr(checkpoints._manager, 'close', fail)
  checkpoints.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
  with pytest.raises(UserError, match='checkpoints to be read and written .*found OSError: full'):
    checkpoints.__exit__(None, None, None)


def test_a_save_that_fails_is_one_line(tmp_path, monkeypatch):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(4, tree_at(4), {})
    checkpoints.wait()

    def fail(*args, **kwargs):
      raise OSError(28, 'No space left on device')

    monkeypatch.setattr(checkpoints._manager, 'save', fail)
    with pytest.raises(
      UserError, match='checkpoints to be read and written .*No space left.* whole checkpoint'
    ):
      checkpoints.save(5, tree_at(5), {})


def test_a_save_that_is_late_is_tried_again(tmp_path, monkeypatch):
  """A clock that is set forward ends orbax's waiting; launchers start a run again after 75."""
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(4, tree_at(4), {})
    checkpoints.wait()
    with monkeypatch.context() as patch:
      turns = itertools.count()
      forward = types.SimpleNamespace(time=lambda: next(turns) * 400 * 86400.0)
      patch.setattr(signaling_client, 'time', forward)
      client = signaling_client.ThreadSafeKeyValueSignalingClient()
      patch.setattr(
        checkpoints._manager,
        'wait_until_finished',
        lambda: client.blocking_key_value_get('never set', 600),
      )
      with pytest.raises(TryAgain, match='found TimeoutError: Timeout waiting') as caught:
        checkpoints.wait()
      assert caught.value.exit_code == 75
      patch.setattr(distributed, 'count', lambda: 2)  # the others would leave with 1
      with pytest.raises(UserError, match='found TimeoutError') as caught:
        checkpoints.wait()
      assert caught.value.exit_code == 1


def test_what_an_older_orbax_left_of_a_save_is_removed(tmp_path):
  """Its unfinished folders had the time in their names, and could stand beside the new ones."""
  left = tmp_path / 'c/4.orbax-checkpoint-tmp-1690000000/state'
  left.mkdir(parents=True)
  (left / 'manifest').write_text('half')
  with Checkpoints(tmp_path / 'c', read_only=True) as checkpoints:
    assert checkpoints.steps() == []
  assert left.exists()  # whoever only reads leaves it
  with Checkpoints(tmp_path / 'c') as checkpoints:
    assert not left.exists()
    checkpoints.save(4, tree_at(4), {})
    checkpoints.wait()
    assert_is(checkpoints.restore(4, LIKE)[0], 4)
  assert [path.name for path in (tmp_path / 'c').iterdir()] == ['4']


LOST = 'INTERNAL: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:1234'


@pytest.mark.parametrize(
  ('count', 'message', 'raised'),
  [
    (2, LOST, jax.errors.JaxRuntimeError),
    (2, 'RESOURCE_EXHAUSTED: out of memory', UserError),
    (1, LOST, UserError),
  ],
)
def test_a_lost_process_is_no_fault_of_the_disk(tmp_path, monkeypatch, count, message, raised):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, tree_at(1), {})
    checkpoints.wait()

    def fail(*args, **kwargs):
      raise jax.errors.JaxRuntimeError(message)

    with monkeypatch.context() as patch:
      patch.setattr(checkpoints._manager, 'wait_until_finished', fail)
      patch.setattr(checkpoints._manager, 'restore', fail)
      patch.setattr(distributed, 'together', lambda action: action())
      patch.setattr(distributed, 'count', lambda: count)
      with pytest.raises(raised, match=message[:8]):
        checkpoints.wait()
      with pytest.raises(raised, match=message[:8]):
        checkpoints.restore(1, LIKE)


@pytest.mark.seconds
@pytest.mark.parametrize(
  ('message', 'code', 'said'),
  [
    (LOST, -signal.SIGABRT, f'another process of the run is lost: {LOST}'),
    ('RESOURCE_EXHAUSTED: out of memory', 1, 'Traceback'),
  ],
)
def test_how_a_process_leaves_after_an_error_that_nothing_handles(message, code, said):
  program = f"""
import sys, jax
from csba_jax.run import checkpoint
from csba_jax.runtime import distributed
distributed.count = lambda: 2
sys.excepthook = distributed._leave_after_a_loss
raise jax.errors.JaxRuntimeError({message!r})
"""
  found = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
  assert found.returncode == code
  assert said in found.stderr
  assert ('Traceback' in found.stderr) == (code == 1)


@pytest.mark.seconds
def test_a_file_written_after_a_failed_save_is_not_reported():
  program = """
import asyncio, sys, tensorstore
from csba_jax.run import checkpoint
async def wait_for(future):
  await future
def finish(result):
  promise, future = tensorstore.Promise.new()
  loop = asyncio.new_event_loop()
  task = loop.create_task(wait_for(future))
  loop.run_until_complete(asyncio.sleep(0.01))  # now the task waits
  loop.close()
  promise.set_result(result)
  return task
class Other:
  def __init__(self, action):
    self.action = action
  def __del__(self):
    self.action()
tasks = [finish(i) for i in range(2)]
closed = asyncio.new_event_loop()
closed.close()
Other(lambda: closed.call_soon_threadsafe(print))  # an object of this program
sys.stderr.flush()
import os; os._exit(0)
"""
  found = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
  assert found.returncode == 0
  assert found.stderr.count('Traceback') == 1
  assert 'in <lambda>' in found.stderr
  assert found.stderr.endswith('RuntimeError: Event loop is closed\n')


@pytest.mark.seconds
def test_a_second_write_that_failed_is_not_reported(tmp_path):
  """Only that of orbax: another future that nobody waited for is still reported."""
  source = 'def write(error):\n  raise error\n'
  (tmp_path / 'orbax').mkdir()
  for name in ('orbax/path.py', 'other.py'):
    (tmp_path / name).write_text(source)
  program = f"""
import asyncio
from csba_jax.run import checkpoint
async def main():
  for name in ('orbax/path.py', 'other.py'):
    scope, path = {{}}, {str(tmp_path)!r} + '/' + name
    exec(compile(open(path).read(), path, 'exec'), scope)
    for hidden in (False, True):
      future = asyncio.get_running_loop().create_future()
      try:
        try:
          scope['write'](OSError(28, 'full: ' + name))
        except OSError as error:
          if hidden:  # behind another error
            raise ValueError('not written')
          raise
      except Exception as error:
        future.set_exception(error)
      del future
  for name in ('a.orbax-checkpoint-tmp', 'other.py'):
    future = asyncio.get_running_loop().create_future()
    future.set_exception(ValueError('full: ' + name))  # it has no traceback
    del future
asyncio.run(main())
"""
  found = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
  assert found.returncode == 0, found.stderr
  assert found.stderr.count('never retrieved') == 3
  assert found.stderr.count('full: other.py') >= 3
  assert 'orbax' not in found.stderr
