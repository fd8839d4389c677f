"""The cache: images are decoded once and verified, processes may race, a failure is no error."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from csba_jax.data import cache, locks
from csba_jax.data.decoding import Unreadable
from csba_jax.data.image_folder import ImageFolderSource
from csba_jax.data.sources import DigitsSource, Source, content_sum, digest
from csba_jax.data.tfds_source import TfdsSource
from csba_jax.errors import UserError


class FakeSource(Source):
  """Ten 2x3 images of two classes; all pixels of image i are i. It counts what it decodes."""

  name = 'fake set/train'
  class_names = ('cat', 'dog')
  image_shape = (2, 3, 1)

  def __init__(self, *, bad=(), strict=True, fingerprint='f' * 64, groups=True):
    self.bad, self.strict, self.fingerprint = bad, strict, fingerprint
    self.labels = np.arange(10, dtype=np.int32) % 2
    self.groups = np.arange(10, dtype=np.int64) // 2 if groups else None
    self.names = tuple(f'é{i}' for i in range(10))
    self.decoded = 0

  def __len__(self):
    return 10

  def __getitem__(self, i):
    self.decoded += 1
    if i in self.bad:
      raise Unreadable(f'bad {i}')
    image = np.full(self.image_shape, i, np.uint8)
    return {'image': image, 'label': int(self.labels[i]), 'sha256': content_sum(bytes([i]))}


FOLDER = 'fake-set-train-' + digest(['f' * 64])[:16]  # of its cache


class Lines(list):
  """A log that keeps its lines."""

  def __call__(self, line):
    assert '\n' not in line
    self.append(line)


def assert_same(a, b):
  assert a.images.tolist() == b.images.tolist()
  assert a.labels.tolist() == b.labels.tolist()
  assert (a.groups is None) == (b.groups is None)
  if a.groups is not None:
    assert a.groups.tolist() == b.groups.tolist()
  assert a.sums.tolist() == b.sums.tolist()
  assert (a.class_names, a.names, a.skipped) == (b.class_names, b.names, b.skipped)


def cache_folder(tmp_path):
  (folder,) = tmp_path.iterdir()
  return folder


def test_first_load_decodes_and_second_does_not(tmp_path):
  source, lines = FakeSource(), Lines()
  first = cache.load_arrays(source, tmp_path, lines)
  assert source.decoded == 10
  assert lines == ['decoding 10 images of fake set/train: 0.0 MB']
  assert cache_folder(tmp_path).name == FOLDER
  again = cache.load_arrays(source, tmp_path, lines)
  assert source.decoded == 10
  assert len(lines) == 1
  assert_same(first, again)
  for arrays in (first, again):
    assert arrays.images[:, 0, 0, 0].tolist() == list(range(10))
    assert arrays.images.shape == (10, 2, 3, 1)
    assert [a.dtype for a in (arrays.images, arrays.labels, arrays.groups)] == [
      np.uint8,
      np.int32,
      np.int64,
    ]
    assert arrays.names == source.names
    assert arrays.class_names == ('cat', 'dog')
    assert arrays.skipped == ()
    with pytest.raises(ValueError, match='read-only'):
      arrays.images[0] = 0


def test_more_images_than_a_block_stay_in_order(tmp_path, monkeypatch):
  monkeypatch.setattr(cache, 'BLOCK', 3)
  arrays = cache.load_arrays(FakeSource(bad=(4,), strict=False), tmp_path, Lines())
  assert arrays.images[:, 1, 2, 0].tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
  ('block', 'multiple', 'lengths'),
  [(7, 1, [7, 3]), (7, 3, [6, 4]), (3, 3, [3, 3, 3, 1]), (2, 3, [2] * 5), (128, 4, [10])],
)
def test_blocks_are_of_whole_batches_where_they_hold_one(monkeypatch, block, multiple, lengths):
  monkeypatch.setattr(cache, 'BLOCK', block)
  found = list(cache.decoded(FakeSource(), Lines(), multiple))
  assert [len(one.images) for one in found] == lengths
  images = np.concatenate([one.images for one in found])
  np.testing.assert_array_equal(images, cache.decode_all(FakeSource(), Lines()).images)


def test_progress(tmp_path, monkeypatch):
  clock = iter(range(0, 1000, 4))
  monkeypatch.setattr(cache, 'BLOCK', 3)
  monkeypatch.setattr(cache.time, 'monotonic', lambda: next(clock))
  lines = Lines()
  cache.decode_all(FakeSource(), lines)
  assert lines[1:] == ['decoded 6 of 10 images', 'decoded 10 of 10 images']


def test_without_groups(tmp_path):
  for _ in range(2):
    assert cache.load_arrays(FakeSource(groups=False), tmp_path, Lines()).groups is None


def test_another_fingerprint_is_another_cache(tmp_path):
  cache.load_arrays(FakeSource(), tmp_path, Lines())
  source = FakeSource(fingerprint='0' * 64)
  cache.load_arrays(source, tmp_path, Lines())
  assert source.decoded == 10
  assert len(list(tmp_path.iterdir())) == 2


def test_bad_images_are_left_out_and_the_rest_stays_aligned(tmp_path, monkeypatch):
  lines = Lines()
  for times in (1, 2):
    arrays = cache.load_arrays(FakeSource(bad=(0, 7), strict=False), tmp_path, lines)
    assert arrays.skipped == (('é0', 'bad 0'), ('é7', 'bad 7'))
    assert arrays.images[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6, 8, 9]
    assert arrays.labels.tolist() == [1, 0, 1, 0, 1, 0, 0, 1]
    assert arrays.groups.tolist() == [0, 1, 1, 2, 2, 3, 4, 4]
    expected = [content_sum(bytes([i])) for i in (1, 2, 3, 4, 5, 6, 8, 9)]
    assert [row.tobytes() for row in arrays.sums] == expected
    assert arrays.names == ('é1', 'é2', 'é3', 'é4', 'é5', 'é6', 'é8', 'é9')
    assert lines.count('2 of 10 images cannot be decoded and are left out:') == times
    assert lines.count('  é0 (bad 0)') == lines.count('  é7 (bad 7)') == times
  monkeypatch.setattr(cache, 'NAMED', 1)
  cache.load_arrays(FakeSource(bad=(0, 7), strict=False), tmp_path, lines)
  assert lines[-2:] == ['  é0 (bad 0)', '  and 1 more']


def test_a_strict_source_refuses_bad_images_with_and_without_cache(tmp_path):
  message = r'10 readable images in fake set/train; found 1 unreadable, such as é7 \(bad 7\)'
  with pytest.raises(UserError, match=message):
    cache.load_arrays(FakeSource(bad=(7,)), tmp_path / 'new', Lines())
  cache.load_arrays(FakeSource(bad=(7,), strict=False), tmp_path / 'old', Lines())
  source = FakeSource(bad=(7,))
  with pytest.raises(UserError, match=message):
    cache.load_arrays(source, tmp_path / 'old', Lines())
  assert source.decoded == 0


def test_a_class_without_a_readable_image(tmp_path):
  with pytest.raises(UserError, match=r'none in dog: 5 unreadable, such as é1 \(bad 1\)'):
    cache.load_arrays(FakeSource(bad=(1, 3, 5, 7, 9), strict=False), tmp_path, Lines())


def test_nothing_readable(tmp_path):
  with pytest.raises(UserError, match='none in cat, dog: 10 unreadable'):
    cache.load_arrays(FakeSource(bad=range(10), strict=False), tmp_path, Lines())


def test_cache_dir_comes_from_the_environment(tmp_path, monkeypatch):
  monkeypatch.setenv('CSBA_CACHE_DIR', str(tmp_path / 'env'))
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  cache.load_arrays(FakeSource(), '', Lines())
  assert len(list((tmp_path / 'env').iterdir())) == 1
  monkeypatch.delenv('CSBA_CACHE_DIR')
  cache.load_arrays(FakeSource(), '', Lines())
  assert len(list((tmp_path / 'home/.cache/csba_jax').iterdir())) == 1


FILES = ('images.npy', 'labels.npy', 'groups.npy', 'sums.npy', 'index.json')


def damage(path, kind):
  data = path.read_bytes()
  match kind:
    case 'truncated':
      path.write_bytes(data[:-1])
    case 'empty':
      path.write_bytes(b'')
    case 'missing':
      path.unlink()
    case 'flipped':  # a byte of the data, or of the index's own sha256
      path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])


@pytest.mark.parametrize('kind', ['truncated', 'empty', 'missing', 'flipped'])
@pytest.mark.parametrize('file', FILES)
def test_a_damaged_cache_is_built_again(tmp_path, file, kind):
  good = cache.load_arrays(FakeSource(), tmp_path, Lines())
  folder = cache_folder(tmp_path)
  assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
  damage(folder / file, kind)
  source, lines = FakeSource(), Lines()
  assert_same(cache.load_arrays(source, tmp_path, lines), good)
  assert source.decoded == 10
  assert len(lines) == 2
  assert lines[0].startswith(f'cache {folder} is damaged (')
  assert_same(cache.load_arrays(source, tmp_path, lines), good)
  assert source.decoded == 10
  assert cache_folder(tmp_path) == folder  # and nothing else is left


def test_a_changed_index_is_damage_too(tmp_path):
  good = cache.load_arrays(FakeSource(), tmp_path, Lines())
  index = cache_folder(tmp_path) / 'index.json'
  index.write_text(index.read_text().replace('"cat"', '"car"'))
  lines = Lines()
  assert_same(cache.load_arrays(FakeSource(), tmp_path, lines), good)
  assert 'index.json does not match its sha256' in lines[0]


def test_index_tells_dtype_shape_and_sha256(tmp_path):
  import hashlib

  cache.load_arrays(FakeSource(), tmp_path, Lines())
  folder = cache_folder(tmp_path)
  files = json.loads((folder / 'index.json').read_text())['content']['files']
  assert {name: (f['dtype'], f['shape']) for name, f in files.items()} == {
    'images.npy': ('uint8', [10, 2, 3, 1]),
    'labels.npy': ('int32', [10]),
    'groups.npy': ('int64', [10]),
    'sums.npy': ('uint8', [10, 32]),
  }
  for name, described in files.items():
    assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == described['sha256']


def test_an_unwritable_cache_dir_is_no_obstacle(tmp_path):
  (tmp_path / 'file').write_text('in the way')
  source, lines = FakeSource(), Lines()
  for _ in range(2):
    arrays = cache.load_arrays(source, tmp_path / 'file/cache', lines)
    assert len(arrays.images) == 10
  assert source.decoded == 20
  assert lines[1].startswith(f'no cache at {tmp_path}/file/cache/{FOLDER}')
  assert 'Not a directory' in lines[1]


@pytest.mark.parametrize('at', ['labels', 'index'])
def test_a_full_disk_is_no_obstacle_and_leaves_nothing(tmp_path, monkeypatch, at):
  def full(*_, **__):
    raise OSError(28, 'No space left on device')

  save = np.save
  if at == 'labels':
    monkeypatch.setattr(
      np, 'save', lambda p, *a, **k: (full if 'labels' in str(p) else save)(p, *a, **k)
    )
  else:
    monkeypatch.setattr(cache.pathlib.Path, 'write_text', full)
  lines = Lines()
  arrays = cache.load_arrays(FakeSource(), tmp_path, lines)
  assert len(arrays.images) == 10
  assert 'No space left on device' in lines[1]
  assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
  def interrupt(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(cache, '_put_in_place', interrupt)
  with pytest.raises(KeyboardInterrupt):
    cache.load_arrays(FakeSource(), tmp_path, Lines())
  assert list(tmp_path.iterdir()) == []


def test_the_slower_of_two_processes_keeps_the_cache_of_the_faster(tmp_path, monkeypatch):
  write, places = cache._write, []

  def overtaken(folder, arrays):
    write(folder, arrays)
    monkeypatch.setattr(cache, '_write', write)
    cache.load_arrays(FakeSource(), tmp_path, Lines())  # another process, between write and rename
    places.extend(p.stat().st_ino for p in tmp_path.iterdir() if not p.name.startswith('.'))

  monkeypatch.setattr(cache, '_write', overtaken)
  lines = Lines()
  arrays = cache.load_arrays(FakeSource(), tmp_path, lines)
  assert len(lines) == 1  # no warning
  assert places == [cache_folder(tmp_path).stat().st_ino]
  assert_same(arrays, cache.load_arrays(FakeSource(), tmp_path, lines))


def test_many_at_once_all_end_well(tmp_path):
  for start in ('absent', 'damaged'):
    if start == 'damaged':
      damage(cache_folder(tmp_path) / 'images.npy', 'truncated')
    found, barrier = [], threading.Barrier(6)

    def load(found=found, barrier=barrier):
      barrier.wait()
      found.append(cache.load_arrays(FakeSource(), tmp_path, Lines()))

    threads = [threading.Thread(target=load) for _ in range(6)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert len(found) == 6
    for arrays in found:
      assert_same(arrays, found[0])
    source = FakeSource()
    cache.load_arrays(source, tmp_path, Lines())
    assert source.decoded == 0
    cache_folder(tmp_path)


def test_digits_through_the_cache(tmp_path):
  digits = DigitsSource()
  for _ in range(2):
    arrays = cache.load_arrays(digits, tmp_path, Lines())
    assert arrays.images.shape == (1797, 8, 8, 1)
    assert arrays.images[1000].tolist() == digits[1000]['image'].tolist()


def test_folder_with_broken_files_through_the_cache(tmp_path):
  root = tmp_path / 'photos'
  for i, name in enumerate(('a/1.png', 'a/2.png', 'b/1.png', 'b/3.png')):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (5, 5), (i, i, i)).save(root / name)
  (root / 'a/2.png').write_bytes((root / 'a/2.png').read_bytes()[:50])
  (root / 'b/2.jpg').write_bytes(b'')
  manifest = tmp_path / 'manifest.csv'
  manifest.write_text('file,dup\na/2.png,x\nb/1.png,x\nb/2.jpg,y\nb/3.png,y\n')
  options = {'manifest': manifest, 'group_column': 'dup'}
  for _ in range(2):
    arrays = cache.load_arrays(ImageFolderSource(root, 4, **options), tmp_path / 'cache', Lines())
    assert arrays.names == ('a/1.png', 'b/1.png', 'b/3.png')
    assert arrays.images[:, 0, 0, 0].tolist() == [0, 2, 3]
    assert arrays.labels.tolist() == [0, 1, 1]
    assert arrays.groups.tolist() == [0, 1, 2]
    assert [name for name, _ in arrays.skipped] == ['a/2.png', 'b/2.jpg']
    assert arrays.skipped[1][1] == 'empty file'
  with pytest.raises(UserError, match=r'2 unreadable, such as a/2\.png .*data\.strict=False'):
    cache.load_arrays(
      ImageFolderSource(root, 4, strict=True, **options), tmp_path / 'cache', Lines()
    )


def test_a_repaired_file_comes_back(tmp_path):
  root = tmp_path / 'photos'
  for name in ('a/1.png', 'b/1.png', 'b/2.png'):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (5, 5)).save(root / name)
  good = (root / 'b/2.png').read_bytes()
  (root / 'b/2.png').write_bytes(b'')
  assert len(cache.load_arrays(ImageFolderSource(root, 4), tmp_path / 'cache', Lines()).images) == 2
  (root / 'b/2.png').write_bytes(good)
  assert len(cache.load_arrays(ImageFolderSource(root, 4), tmp_path / 'cache', Lines()).images) == 3


@pytest.mark.seconds
def test_real_photos_through_the_cache(photo_folder, tmp_path):
  manifest = os.path.join(photo_folder, 'manifest.csv')
  source = ImageFolderSource(photo_folder, 32, manifest=manifest, group_column='dup_group')
  first = cache.load_arrays(source, tmp_path, Lines())
  assert first.images.shape == (878, 32, 32, 3)
  assert first.skipped == ()
  assert first.images[500].tolist() == source[500]['image'].tolist()
  assert_same(first, cache.load_arrays(source, tmp_path, Lines()))


def load_mapped(source, folder, lines=None):
  return cache.load_arrays(source, folder, Lines() if lines is None else lines, mapped=True)


def content(folder):
  """Name and bytes of each file of the cache in a folder."""
  (found,) = (path for path in folder.iterdir() if not path.name.startswith('.'))
  return {path.name: path.read_bytes() for path in found.iterdir()}


def left_behind(folder):
  """The content of a folder without the lock."""
  return [path.name for path in folder.iterdir() if not path.name.endswith('.lock')]


@pytest.mark.parametrize('groups', [True, False])
@pytest.mark.parametrize('bad', [(), (0, 7), (9,)])
def test_mapped_is_the_same_arrays_and_the_same_cache(tmp_path, monkeypatch, bad, groups):
  monkeypatch.setattr(cache, 'BLOCK', 3)
  options = {'bad': bad, 'strict': False, 'groups': groups}
  memory = cache.load_arrays(FakeSource(**options), tmp_path / 'memory', Lines())
  source, lines = FakeSource(**options), Lines()
  for _ in range(2):
    mapped = load_mapped(source, tmp_path / 'mapped', lines)
    assert_same(mapped, memory)
    assert isinstance(mapped.images, np.memmap)
    with pytest.raises(ValueError, match='read-only'):
      mapped.images[0] = 0
  assert source.decoded == 10
  assert lines.count('decoding 10 images of fake set/train: 0.0 MB') == 1
  assert content(tmp_path / 'mapped') == content(tmp_path / 'memory')


def test_a_cache_written_in_one_mode_is_read_in_the_other(tmp_path):
  for first, second in ((False, True), (True, False)):
    folder, source = tmp_path / str(first), FakeSource()
    a = cache.load_arrays(source, folder, Lines(), mapped=first)
    b = cache.load_arrays(source, folder, Lines(), mapped=second)
    assert source.decoded == 10
    assert_same(a, b)


def test_mapped_images_that_cannot_be_read(tmp_path):
  with pytest.raises(UserError, match='10 readable images in fake set/train; found 1 unreadable'):
    load_mapped(FakeSource(bad=(7,)), tmp_path / 'strict')
  with pytest.raises(UserError, match='none in cat, dog: 10 unreadable'):
    load_mapped(FakeSource(bad=range(10), strict=False), tmp_path / 'none')


@pytest.mark.parametrize('kind', ['truncated', 'empty', 'missing', 'longer'])
@pytest.mark.parametrize('file', FILES)
def test_a_damaged_mapped_cache_is_built_again(tmp_path, file, kind):
  good = load_mapped(FakeSource(), tmp_path)
  good = dataclasses.replace(good, images=np.array(good.images))  # whose file is cut below
  (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
  if kind == 'longer':
    (folder / file).write_bytes((folder / file).read_bytes() + b'x')
  else:
    damage(folder / file, kind)
  source, lines = FakeSource(), Lines()
  assert_same(load_mapped(source, tmp_path, lines), good)
  assert source.decoded == 10
  assert len(lines) == 2
  assert lines[0].startswith(f'cache {folder} is damaged (')
  load_mapped(source, tmp_path, lines)
  assert source.decoded == 10
  assert left_behind(tmp_path) == [folder.name]


def test_pixels_of_a_mapped_cache_are_verified_when_asked(tmp_path, monkeypatch):
  load_mapped(FakeSource(), tmp_path)
  (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
  damage(folder / 'images.npy', 'flipped')
  source, lines = FakeSource(), Lines()
  assert load_mapped(source, tmp_path, lines).images[9, 0, 2, 0] == 9
  assert (source.decoded, lines) == (0, [])  # the length is right: nobody looks
  monkeypatch.setenv('CSBA_VERIFY_CACHE', '1')
  load_mapped(source, tmp_path, lines)
  assert source.decoded == 10
  assert 'images.npy does not match its sha256' in lines[0]
  load_mapped(source, tmp_path, lines)
  assert source.decoded == 10


def test_a_header_of_another_shape_is_damage(tmp_path):
  load_mapped(FakeSource(), tmp_path)
  (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
  path = folder / 'images.npy'
  path.write_bytes(path.read_bytes().replace(b'(10, 2, 3, 1)', b'(10, 3, 2, 1)'))
  lines = Lines()
  load_mapped(FakeSource(), tmp_path, lines)
  assert 'images.npy holds uint8 (10, 3, 2, 1)' in lines[0]


def test_a_mapped_cache_needs_room_and_says_so_before_decoding(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=2**19)
  monkeypatch.setattr(cache.shutil, 'disk_usage', lambda path: usage)
  source = FakeSource()
  with pytest.raises(UserError) as error:
    load_mapped(source, tmp_path)
  assert str(error.value) == (
    f'expected space in {tmp_path} for the decoded images of fake set/train, which '
    'data.input=stream reads; found 0.000524 GB free of 0.00105 GB; to fix it: free some space, '
    'set --config.data.cache_dir or $CSBA_CACHE_DIR to a folder on a larger disk, or set '
    '--config.data.input=memory'
  )
  assert source.decoded == 0
  assert left_behind(tmp_path) == []
  cache.load_arrays(source, tmp_path, Lines())  # in memory it goes without a check, as ever


def test_a_mapped_cache_needs_a_folder_to_write_to(tmp_path):
  (tmp_path / 'file').write_text('in the way')
  source = FakeSource()
  with pytest.raises(UserError, match=rf'space in {tmp_path}/file/cache for .*Not a directory'):
    load_mapped(source, tmp_path / 'file/cache')
  assert source.decoded == 0


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_a_mapped_cache_in_a_read_only_folder(tmp_path):
  tmp_path.chmod(0o500)
  source = FakeSource()
  with pytest.raises(UserError, match='Permission denied'):
    load_mapped(source, tmp_path)
  assert source.decoded == 0


class Larger(FakeSource):
  """Images of 100 kB."""

  image_shape = (100, 1000, 1)


def test_a_disk_that_fills_up_while_decoding_leaves_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(cache, 'BLOCK', 1)
  source, limits = Larger(), resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (350_000, limits[1]))
  try:
    with pytest.raises(UserError, match=r'found \[Errno 27\] File too large; to fix it: free some'):
      load_mapped(source, tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert source.decoded >= 3
  assert left_behind(tmp_path) == []


def test_an_error_while_decoding_to_disk_leaves_nothing(tmp_path):
  class Broken(FakeSource):
    def __getitem__(self, i):
      if i == 5:
        raise UserError('to read it', 'a disk error', 'check the disk')
      return super().__getitem__(i)

  with pytest.raises(UserError, match='found a disk error'):
    load_mapped(Broken(), tmp_path)
  assert left_behind(tmp_path) == []


def test_killed_while_decoding_to_disk_there_is_no_half_cache(tmp_path):
  code = """
import importlib.util, os, signal, sys
from csba_jax.data import cache, locks
spec = importlib.util.spec_from_file_location('test_cache', sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
class Killed(tests.Larger):
  def __getitem__(self, i):
    if i == 7:
      os.kill(os.getpid(), signal.SIGKILL)
    return super().__getitem__(i)
cache.BLOCK = 1
cache.load_arrays(Killed(), sys.argv[2], print, mapped=True)
"""
  command = [sys.executable, '-c', code, __file__, str(tmp_path)]
  ended = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, check=False)
  assert ended.returncode == -signal.SIGKILL, ended.stderr
  (part,) = left_behind(tmp_path)
  assert part.startswith('.fake-set-train-')
  source, lines = Larger(), Lines()
  arrays = load_mapped(source, tmp_path, lines)
  assert source.decoded == 10
  assert len(lines) == 1
  assert arrays.images[:, 0, 0, 0].tolist() == list(range(10))
  assert left_behind(tmp_path) == [FOLDER]


def test_of_many_at_once_one_decodes_to_disk_and_the_others_wait(tmp_path):
  for start in ('absent', 'damaged'):
    if start == 'damaged':
      damage(tmp_path / left_behind(tmp_path)[0] / 'images.npy', 'truncated')
    source, lines, found, barrier = FakeSource(), Lines(), [], threading.Barrier(6)

    def load(found=found, barrier=barrier, source=source, lines=lines):
      barrier.wait()
      found.append(load_mapped(source, tmp_path, lines))

    threads = [threading.Thread(target=load) for _ in range(6)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert len(found) == 6
    assert source.decoded == 10
    for arrays in found:
      assert_same(arrays, found[0])
    assert len(left_behind(tmp_path)) == 1


def test_who_waits_says_so(tmp_path):
  with cache._alone(tmp_path / 'x', Lines()):
    lines, done = Lines(), threading.Event()

    def other():
      with cache._alone(tmp_path / 'x', lines):
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    assert not done.wait(0.2)
  thread.join()
  assert lines == [f'waiting for another process that decodes into {tmp_path / "x"}']


def test_without_locks_each_decodes_for_itself(tmp_path, monkeypatch):
  def unsupported(*_):
    raise OSError(95, 'Operation not supported')

  monkeypatch.setattr(locks.fcntl, 'flock', unsupported)
  source = FakeSource()
  assert len(load_mapped(source, tmp_path).images) == source.decoded == 10


@pytest.mark.slow
def test_real_cifar10_through_the_cache(data_root, tmp_path):
  source, lines = TfdsSource('cifar10', 'train', data_root), Lines()
  first = cache.load_arrays(source, tmp_path, lines)
  again = cache.load_arrays(source, tmp_path, lines)
  assert first.images.shape == (50000, 32, 32, 3)
  assert np.bincount(first.labels).tolist() == [5000] * 10
  assert (first.images == again.images).all()
  assert again.images[43210].tolist() == source[43210]['image'].tolist()
  assert sum(line.startswith('decoding ') for line in lines) == 1
  for path in tmp_path.glob('*/'):
    shutil.rmtree(path)
