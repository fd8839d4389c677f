"""Streamed batches: equal to those from memory, to the bit; resumable; in bounded memory."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from csba_jax import config as config_lib
from csba_jax.data import mixing, pipeline, sampling, streaming
from csba_jax.data.rows import Rows
from csba_jax.errors import UserError
from csba_jax.run import restore
from csba_jax.run.checkpoint import Checkpoints
from csba_jax.runtime import backend
from csba_jax.runtime.signals import StopRequest
from csba_jax.training import loop

ROOT = Path(__file__).parents[2]
BATCH, STEPS, ALL = 8, 40, np.arange(8)


@pytest.fixture
def parts(tmp_path):
  """(in memory, streamed): the same 61 images of four classes, from the middle of a file."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (80, 5, 4, 3), dtype=np.uint8)
  labels = np.repeat(np.arange(4, dtype=np.int32), [50, 20, 7, 3])
  index = np.sort(rng.choice(80, 61, replace=False))
  (tmp_path / 'cache').mkdir()
  np.save(tmp_path / 'cache' / 'images.npy', images)
  mapped = np.load(tmp_path / 'cache' / 'images.npy', mmap_mode='r')
  return tuple(pipeline.Part(x, labels[index]) for x in (images[index], Rows(mapped, index)))


def streams_of(part, sampler='instance', start=0.0, mixing_name='none', seed=3):
  config = config_lib.default()
  config.sampler.update(name=sampler, start=start)
  config.mixing.name = mixing_name
  own = sampling.Stream.of(config.sampler, part.labels, BATCH, STEPS, seed)
  partner = mixing.partners(config.mixing, own)
  return {'own': own} | ({'partner': partner} if partner else {})


def gathered(part, streams, step):
  """The batch that training from memory gathers: data[name][index]."""
  data = {'image': part.images, 'label': part.labels}
  batch = {name: values[streams['own'].positions(step)] for name, values in data.items()}
  if 'partner' in streams:
    index = streams['partner'].positions(step)
    batch |= {f'partner_{name}': values[index] for name, values in data.items()}
  return batch


def assert_same(found, expected):
  assert found.keys() == expected.keys()
  for name, values in expected.items():
    assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape)
    assert found[name].tobytes() == values.tobytes(), name


@pytest.mark.parametrize('threads', [0, 1, 4])
@pytest.mark.parametrize('mixing_name', ['none', 'cmo'])
@pytest.mark.parametrize('sampler', sampling.SAMPLERS)
def test_batches_are_those_of_the_in_memory_path(parts, sampler, mixing_name, threads):
  memory, streamed = parts
  streams = streams_of(memory, sampler, mixing_name=mixing_name)
  with streaming.Feed(streamed, streams, ALL, 0, STEPS, threads) as feed:
    found = list(feed)
  assert len(found) == STEPS
  assert found[0]['image'].shape == (BATCH, 5, 4, 3)
  assert ('partner_image' in found[0]) == (mixing_name == 'cmo')
  for step, batch in enumerate(found):
    assert_same(batch, gathered(memory, streams, step))


def test_a_deferred_sampler(parts):
  memory, streamed = parts
  streams = streams_of(memory, 'class', start=0.5)
  with streaming.Feed(streamed, streams, ALL, 15, STEPS) as feed:
    for step in range(15, 25):
      assert_same(next(feed), gathered(memory, streams, step))


def test_data_in_memory_may_be_fed_too(parts):
  memory, _ = parts
  streams = streams_of(memory)
  with streaming.Feed(memory, streams, ALL, 0, STEPS) as feed:
    assert_same(next(feed), gathered(memory, streams, 0))


def test_steps_of_one_dispatch_are_stacked(parts):
  memory, streamed = parts
  streams = streams_of(memory, mixing_name='cmo')
  with streaming.Feed(streamed, streams, ALL, 0, STEPS) as feed:
    for start, end in ((0, 1), (1, 8), (8, 40)):
      found = feed.take(end - start)
      expected = [gathered(memory, streams, step) for step in range(start, end)]
      assert_same(found, {name: np.stack([b[name] for b in expected]) for name in expected[0]})
      assert feed.step == end
    with pytest.raises(ValueError, match='1 steps from 40 of 40'):
      feed.take(1)


def test_the_rows_of_all_processes_are_the_batch_and_each_reads_its_own(parts, monkeypatch):
  memory, streamed = parts
  streams = streams_of(memory, 'class', mixing_name='cmo')
  read, lock, whole = [], threading.Lock(), Rows._read

  def counted(self, row, image):
    with lock:
      read.append(row)
    whole(self, row, image)

  monkeypatch.setattr(Rows, '_read', counted)
  for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [1, 6]):
    rows = np.asarray(rows)
    read.clear()
    with streaming.Feed(streamed, streams, rows, 0, STEPS) as feed:
      found = feed.take(STEPS)
    for step in range(STEPS):
      expected = {name: x[rows] for name, x in gathered(memory, streams, step).items()}
      assert_same({name: x[step] for name, x in found.items()}, expected)
    assert len(read) == 2 * STEPS * len(rows)


@pytest.mark.parametrize('threads', [0, 4])
@pytest.mark.parametrize('at', [0, 1, 7, 39, 40])
def test_resumed_from_its_state_it_goes_on_as_if_nothing_had_happened(parts, at, threads):
  memory, streamed = parts
  streams = streams_of(memory, 'progressive', mixing_name='cmo')
  with streaming.Feed(streamed, streams, ALL, 0, STEPS, threads) as feed:
    for _ in range(at):
      next(feed)
    state = json.loads(json.dumps(feed.state()))
    rest = list(feed)
  assert state['step'] == at
  with streaming.Feed(streamed, streams, ALL, at, STEPS, threads) as again:
    again.restore(state)
    for expected in rest:
      assert_same(next(again), expected)
    assert list(again) == []


def test_other_rows_may_go_on_from_a_state(parts):
  memory, streamed = parts
  streams = streams_of(memory)
  with streaming.Feed(streamed, streams, ALL, 0, STEPS) as feed:
    feed.take(5)
    state = feed.state()
  rows = np.array([2, 3])
  with streaming.Feed(streamed, streams, rows, 5, STEPS) as feed:
    feed.restore(state)
    expected = gathered(memory, streams, 5)
    assert_same(next(feed), {name: x[rows] for name, x in expected.items()})


@pytest.mark.parametrize(
  ('state', 'found'),
  [
    ({'step': 4, 'grain': {'next_index': 4}}, r"one of step 4, with \{'next_index': 4\}"),
    ({'step': 5, 'grain': {'next_index': 6}}, r"one of step 5, with \{'next_index': 6\}"),
    ({'step': 5, 'grain': {'next_index': 99}}, r'.*\(IndexError: .*out of range'),
    ({'step': 5, 'grain': {}}, r'.*\(KeyError: '),
    ({'step': 5}, r".*\(KeyError: 'grain'\)"),
    ({}, r"\{\} \(KeyError: 'step'\)"),
    (None, r'None \(TypeError: '),
  ],
)
def test_a_state_of_another_step_is_refused(parts, state, found):
  _, streamed = parts
  with (
    streaming.Feed(streamed, streams_of(streamed), ALL, 5, STEPS) as feed,
    pytest.raises(
      UserError, match=f'the state of the input at step 5; found {found}.*; to fix it: '
    ),
  ):
    feed.restore(state)


def reading_threads():
  return [t for t in threading.enumerate() if t.name.startswith('grain-prefetch')]


def test_closing_ends_the_threads(parts):
  _, streamed = parts
  with streaming.Feed(streamed, streams_of(streamed), ALL, 0, STEPS) as feed:
    next(feed)
    assert reading_threads()
  for _ in range(500):
    if not reading_threads():
      break
    time.sleep(0.01)
  assert not reading_threads()
  with pytest.raises(ValueError, match='closed'):
    next(feed)
  feed.close()


def test_batches_are_read_before_they_are_asked_for_and_not_all_of_them(parts, monkeypatch):
  _, streamed = parts
  streams = streams_of(streamed)
  monkeypatch.setattr(backend, 'READ_AHEAD_BYTES', 3 * BATCH * 60)
  seen, ready = set(), threading.Event()
  whole = sampling.Stream.positions

  def positions(self, step):
    seen.add(step)
    if len(seen) == 4:  # the threads take the steps in order, and may come here in another
      ready.set()
    return whole(self, step)

  monkeypatch.setattr(sampling.Stream, 'positions', positions)
  with streaming.Feed(streamed, streams, ALL, 0, STEPS) as feed:
    next(feed)
    assert ready.wait(30)
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize(
  ('images', 'side', 'ahead'), [(128, 32, 64), (128, 224, 13), (4096, 224, 2), (0, 32, 64)]
)
def test_what_is_read_ahead_has_a_limit_in_bytes(images, side, ahead):
  part = pipeline.Part(np.broadcast_to(np.uint8(0), (5, side, side, 3)), np.arange(5))
  assert streaming.batches_ahead(part, images) == ahead


@pytest.mark.parametrize('threads', [0, 2])
def test_a_file_that_is_cut_ends_in_one_line_that_names_it(parts, tmp_path, threads):
  _, streamed = parts
  path = tmp_path / 'cache' / 'images.npy'
  with streaming.Feed(streamed, streams_of(streamed), ALL, 0, STEPS, threads) as feed:
    os.truncate(path, 200)
    with pytest.raises(UserError, match=rf'the cache {path}; found the end of the file') as error:
      next(feed)
  assert '\n' not in str(error.value)


def test_a_disk_that_fails_ends_in_one_line(parts, monkeypatch, tmp_path):
  _, streamed = parts

  def fail(*_):
    raise OSError(5, 'Input/output error')

  with streaming.Feed(streamed, streams_of(streamed), ALL, 0, STEPS) as feed:
    monkeypatch.setattr(os, 'preadv', fail)
    with pytest.raises(
      UserError, match=rf'the cache {tmp_path}/cache/images.npy; found .*Input/out'
    ):
      feed.take(3)


def loaded(**fields):
  config = config_lib.default()
  config.data.update(**fields)
  return pipeline.load(config, lambda line: None)


def assert_same_data(memory, streamed):
  for name in ('train', 'val', 'test'):
    a, b = getattr(memory, name), getattr(streamed, name)
    assert (a.streamed, b.streamed) == (False, True)
    assert a.labels.tolist() == b.labels.tolist()
    assert a.images.shape == b.images.shape
    assert a.images.tobytes() == b.images[:].tobytes()
  assert memory.splits.sha256 == streamed.splits.sha256
  assert memory.splits.source_sha256 == streamed.splits.source_sha256
  assert memory.image_shape == streamed.image_shape


def test_data_is_the_same_in_memory_and_streamed(tmp_path):
  memory, streamed = (
    loaded(cache_dir=str(tmp_path / name), input=name, imbalance_factor=10.0)
    for name in ('memory', 'stream')
  )
  assert_same_data(memory, streamed)


def test_auto_streams_what_is_larger_than_the_limit(tmp_path, monkeypatch):
  size = 1797 * 8 * 8
  for limit, streams in ((size, False), (size - 1, True)):
    monkeypatch.setattr(backend, 'IN_MEMORY_BYTES', limit)
    assert loaded(cache_dir=str(tmp_path), input='auto').train.streamed == streams


def test_photos_are_the_same_in_memory_and_streamed(photo_folder, tmp_path):
  fields = {
    'source': 'image_folder',
    'dir': photo_folder,
    'image_size': 32,
    'channels': 3,
    'num_classes': 0,
    'profile': 'natural',
    'cache_dir': str(tmp_path),
  }
  memory, streamed = (loaded(input=name, **fields) for name in ('memory', 'stream'))
  assert_same_data(memory, streamed)


def run_python(code, *arguments):
  return subprocess.run(
    [sys.executable, '-c', code, *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout


def test_grain_comes_with_the_first_feed_and_tensorflow_never(tmp_path):
  np.save(tmp_path / 'images.npy', np.zeros((9, 8, 8, 1), np.uint8))
  code = """
import sys
import numpy as np
from csba_jax.data import pipeline, sampling, streaming
assert 'grain' not in sys.modules
mapped = np.load(sys.argv[1], mmap_mode='r')
part = pipeline.Part(pipeline.Rows(mapped), np.arange(9) % 3)
stream = sampling.Stream('instance', 0, part.labels, 4, 5, 0)
with streaming.Feed(part, {'own': stream}, np.arange(4), 0, 5) as feed:
  next(feed)
assert 'grain' in sys.modules
assert not {'tensorflow', 'torch', 'matplotlib'} & set(sys.modules)
"""
  run_python(code, tmp_path / 'images.npy')


@pytest.mark.seconds
def test_memory_stays_flat_while_decoding_and_streaming(tmp_path):
  code = r"""
import re, sys
import numpy as np
from csba_jax.runtime import backend
from csba_jax.data import cache, pipeline, sampling, streaming
from csba_jax.data.rows import Rows
import grain

class Large(cache.Source):
  name, class_names, image_shape = 'large', ('a', 'b'), (224, 224, 3)
  labels = np.arange(2000, dtype=np.int32) % 2
  names = tuple(map(str, range(2000)))
  fingerprint = 'f' * 64
  def __len__(self): return 2000
  def __getitem__(self, i):
    return {'image': np.full(self.image_shape, i % 251, np.uint8), 'sha256': bytes(32)}

def peak():
  with open('/proc/self/status') as file:
    return int(re.search(r'VmHWM:\s+(\d+)', file.read())[1]) >> 10

backend.READ_AHEAD_BYTES = 20 * 2**20
before = peak()
arrays = cache.load_arrays(Large(), sys.argv[1], print, mapped=True)
decoded = peak()
part = pipeline.Part(Rows(arrays.images), arrays.labels)
stream = sampling.Stream('class', 0, part.labels, 16, 1000, 0)
with streaming.Feed(part, {'own': stream}, np.arange(16), 0, 1000) as feed:
  for _ in range(50): next(feed)
  warm = peak()
  for _ in range(400): next(feed)
print(before, decoded, warm, peak())
"""
  found = run_python(code, tmp_path).splitlines()[-1]
  before, decoded, warm, end = map(int, found.split())
  size = 2000 * 224 * 224 * 3 >> 20  # 287 MiB
  assert size > 280
  assert decoded - before < 150, found
  assert end - before < 200, found
  assert end - warm < 40, found


def test_state_of_processes_is_the_same(parts):
  _, streamed = parts
  states = []
  for rows in ([0, 1], [2, 3]):
    with streaming.Feed(streamed, streams_of(streamed), np.array(rows), 0, STEPS) as feed:
      feed.take(3)
      states.append(feed.state())
  assert states[0] == states[1]


def test_a_part_knows_whether_it_is_streamed(parts):
  memory, streamed = parts
  assert (memory.streamed, streamed.streamed) == (False, True)
  assert len(dataclasses.replace(streamed).images) == len(streamed) == 61


# ---- whole runs


def run_here(driver, workdir, **fields):
  with StopRequest() as stop:
    assert loop.train_and_evaluate(driver.tiny_config(**fields), str(workdir), stop)


def end_of(driver, workdir):
  """(bytes of the last checkpoint's arrays, metric lines, result) of a run, and where it was."""
  config, lines, result = driver.records_of(workdir)
  state = restore.load_state(str(workdir), 'latest')
  found = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
  return (found, lines, result), config['config']['data']['input']


@pytest.fixture(scope='module')
def in_memory(driver, tmp_path_factory):
  """The end of a run of 36 steps with images in memory."""
  workdir = tmp_path_factory.mktemp('memory') / 'run'
  run_here(driver, workdir, data__input='memory')
  end, where = end_of(driver, workdir)
  assert where == 'memory'
  return end


@pytest.mark.seconds
def test_a_streamed_run_is_that_from_memory_to_the_bit(driver, in_memory, tmp_path):
  run_here(driver, tmp_path / 'run', data__input='stream')
  assert end_of(driver, tmp_path / 'run') == (in_memory, 'stream')


@pytest.mark.slow
def test_partners_are_streamed_to_the_bit_too(driver, tmp_path):
  ends = []
  for place in ('memory', 'stream'):
    fields = {'mixing__name': 'cmo', 'sampler__name': 'progressive', 'train__epochs': 1}
    run_here(driver, tmp_path / place, data__input=place, **fields)
    ends.append(end_of(driver, tmp_path / place)[0])
  assert ends[0] == ends[1]


@pytest.mark.seconds
def test_a_killed_stream_goes_on_from_disk_or_from_memory(driver, in_memory, tmp_path):
  """kill -9 in the third epoch: streamed or from memory, the restarted run ends the same."""
  streamed = '--config.data.input="stream"'
  code, _, err = driver.finish(driver.start(tmp_path / 'run', streamed, '--end=after-step:30'))
  assert code == -signal.SIGKILL, err
  with Checkpoints(tmp_path / 'run/checkpoints', read_only=True) as checkpoints:
    assert 12 in checkpoints.steps()  # the second may be under way
  shutil.copytree(tmp_path / 'run', tmp_path / 'moved')
  for name, place in (('run', 'stream'), ('moved', 'memory')):
    run_here(driver, tmp_path / name, data__input=place)
    assert end_of(driver, tmp_path / name)[0] == in_memory


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_stream_their_own_rows_to_the_bit(driver, tmp_path):
  """Two processes of four devices: from memory, streamed, and streamed with kill -9 of both."""

  def run(name, place, *arguments):
    children = driver.start_all(
      tmp_path / name, f'--config.data.input="{place}"', '--peer_timeout=30', *arguments
    )
    ends = [driver.finish(child) for child in children]
    return [code for code, *_ in ends], ends

  for name in ('memory', 'stream'):
    codes, ends = run(name, name)
    assert codes == [0, 0], ends
  codes, ends = run('killed', 'stream', '--end=after-step:30')
  assert -signal.SIGKILL in codes, ends
  assert 0 not in codes, ends  # the one that dies later may have lost the other
  codes, ends = run('killed', 'stream')
  assert codes == [0, 0], ends
  assert 'going on from the checkpoint at step' in ends[0][2]
  expected, _ = end_of(driver, tmp_path / 'memory')
  for name in ('stream', 'killed'):
    assert end_of(driver, tmp_path / name) == (expected, 'stream')
