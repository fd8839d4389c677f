"""Content sums: unchanged files are read once, changed ones again, and no cache is stale."""

import hashlib
import os
import shutil
import threading

import numpy as np
import pytest
from PIL import Image

from csba_jax.data import cache, file_sums
from csba_jax.data.image_folder import ImageFolderSource
from csba_jax.errors import UserError


@pytest.fixture
def files(tmp_path):
  """Three files in two folders."""
  found = [tmp_path / 'photos' / name for name in ('a/1', 'a/2', 'b/1')]
  for path in found:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(str(path).encode())
  return found


@pytest.fixture
def reads(monkeypatch):
  """The names of the files that are read; files of this moment count as settled."""
  found, read = [], file_sums._read
  monkeypatch.setattr(
    file_sums, '_read', lambda file: found.append(f'{file.parent.name}/{file.name}') or read(file)
  )
  monkeypatch.setattr(file_sums, 'SETTLED_NS', 0)
  return found


def sums_of(files, root, lines=None):
  """The sums, which are checked against the files."""
  found = file_sums.read(files, root, (lambda line: None) if lines is None else lines.append)
  expected = [hashlib.sha256(f.read_bytes()).digest() for f in files]
  assert list(found.sums) == expected
  assert found.changed() == []
  return found.sums


def rewrite(path, data):
  """Changes a file in place as `cp -p` does: the same inode, length and mtime."""
  before = path.stat()
  assert len(data) == before.st_size
  path.write_bytes(data)
  os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
  after = path.stat()
  assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
  assert after.st_ctime_ns > before.st_ctime_ns


def test_a_file_is_read_once(files, tmp_path, reads):
  for _ in range(3):
    sums_of(files, tmp_path / 'cache')
  assert sorted(reads) == ['a/1', 'a/2', 'b/1']
  assert len(list((tmp_path / 'cache').glob('sums-*.npz'))) == 1


def test_a_changed_file_is_read_again(files, tmp_path, reads):
  sums_of(files, tmp_path)
  del reads[:]
  rewrite(files[1], files[1].read_bytes()[::-1])
  sums_of(files, tmp_path)
  assert reads == ['a/2']
  other = files[0].with_name('other')
  other.write_bytes(b'x')
  os.replace(other, files[0])
  os.chmod(files[2], 0o600)  # changes its ctime alone
  sums_of(files, tmp_path)
  assert reads == ['a/2', 'a/1', 'b/1']


def test_of_the_same_folder_what_is_new_is_read_and_what_is_gone_is_dropped(files, tmp_path, reads):
  sums_of(files[:2], tmp_path)  # whose common folder is another one
  del reads[:]
  sums_of([files[0], files[2]], tmp_path)
  sums_of(files, tmp_path)
  assert reads == ['a/1', 'b/1', 'a/2']
  files[0].unlink()
  new = files[2].with_name('2')
  new.write_bytes(b'x')
  sums_of([files[1], files[2], new], tmp_path)
  assert reads[3:] == ['b/2']
  kept = max(map(file_sums._load, tmp_path.glob('sums-*.npz')), key=len)
  assert sorted(kept) == sorted(map(os.fsencode, [files[1], files[2], new]))


def test_a_file_that_changed_just_now_is_not_trusted(files, tmp_path, reads, monkeypatch):
  monkeypatch.setattr(file_sums, 'SETTLED_NS', 10**12)
  for _ in range(2):
    sums_of(files, tmp_path)
  assert len(reads) == 6
  assert list(tmp_path.glob('sums-*.npz')) == []


def test_every_file_is_read_when_asked(files, tmp_path, reads, monkeypatch):
  sums_of(files, tmp_path)
  monkeypatch.setenv('CSBA_VERIFY_CACHE', '1')
  sums_of(files, tmp_path)
  assert len(reads) == 6


@pytest.mark.parametrize('keep', [0, 100, -1])
def test_damaged_sums_are_made_again(files, tmp_path, reads, keep):
  sums_of(files, tmp_path)
  (kept,) = tmp_path.glob('sums-*.npz')
  kept.write_bytes(kept.read_bytes()[:keep])
  sums_of(files, tmp_path)
  sums_of(files, tmp_path)
  assert len(reads) == 6


def test_names_of_any_bytes(tmp_path, reads):
  folder = tmp_path / 'photos'
  folder.mkdir()
  names = ['é\n', os.fsdecode(b'\xff'), ' ']
  for name in names:
    (folder / name).write_bytes(b'x')
  for _ in range(2):
    sums_of([folder / name for name in names], tmp_path)
  assert len(reads) == 3


def test_files_that_cannot_be_read(files, tmp_path, reads, monkeypatch):
  files[0].unlink()
  files[0].symlink_to(tmp_path / 'nowhere')
  found = file_sums.read(files, tmp_path, print)
  assert found.sums[0] == file_sums.UNREAD
  assert found.states[0] == file_sums.NO_FILE
  assert found.changed() == []
  files[0].unlink()
  files[0].write_bytes(b'x')
  assert found.changed() == [files[0]]
  sums_of(files, tmp_path)
  assert reads[3:] == ['a/1']


def test_a_failing_disk(files, tmp_path, monkeypatch):
  def failing(*_):
    raise OSError(5, 'Input/output error')

  monkeypatch.setattr(file_sums.hashlib, 'file_digest', failing)
  with pytest.raises(
    UserError, match=r'to read .*photos/a/1; found .*Input/output.*check the disk'
  ):
    file_sums.read(files, tmp_path, print)
  monkeypatch.setattr(file_sums.os, 'stat', failing)
  with pytest.raises(UserError, match=r'to read .*photos/a/1; found .*Input/output'):
    file_sums._state(files[0])


def test_sums_that_cannot_be_kept_are_one_warning(files, tmp_path, reads):
  (tmp_path / 'file').write_text('in the way')
  lines = []
  for times in (1, 2):
    sums_of(files, tmp_path / 'file/cache', lines)
    assert len(lines) == times
  assert lines[0].startswith(f'no file sums at {tmp_path}/file/cache/sums-')
  assert lines[0].endswith('the files will be read in every run')
  assert len(reads) == 6


def test_of_many_at_once_one_reads(files, tmp_path, reads):
  barrier = threading.Barrier(4)

  def read():
    barrier.wait()
    sums_of(files, tmp_path)

  threads = [threading.Thread(target=read) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(reads) == 3


def test_progress(files, tmp_path, monkeypatch):
  clock = iter(range(0, 1000, 4))
  monkeypatch.setattr(file_sums.time, 'monotonic', lambda: next(clock))
  lines = []
  sums_of(files, tmp_path, lines)
  assert lines == ['read 2 of 3 files, to tell later whether they have changed']


def test_no_files(tmp_path):
  assert file_sums.read((), tmp_path, print).sums == ()
  assert list(tmp_path.iterdir()) == []


# ---- through the cache


def write_photos(folder, seed):
  """Two classes of two photos each: equal names, lengths and times for every seed."""
  rng = np.random.default_rng(seed)
  for name in ('a/1.bmp', 'a/2.bmp', 'b/1.bmp', 'b/2.bmp'):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8)).save(folder / name)
    os.utime(folder / name, (1, 1))
  return folder


def load(folder, root, mapped=False):
  """The images of a folder through the cache, which must be those of its files."""
  source, lines = ImageFolderSource(folder, 4), []
  arrays = cache.load_arrays(source, root, lines.append, mapped=mapped)
  assert arrays.images.tolist() == [source[i]['image'].tolist() for i in range(len(source))]
  assert [row.tobytes() for row in arrays.sums] == [source[i]['sha256'] for i in range(4)]
  return any(line.startswith('decoding') for line in lines)


@pytest.mark.parametrize('mapped', [False, True])
def test_a_cache_belongs_to_the_content_of_the_files(tmp_path, reads, mapped):
  root = tmp_path / 'cache'
  first, second = (write_photos(tmp_path / v / 'photos', i) for i, v in enumerate(('v1', 'v2')))
  assert [load(first, root, mapped), load(second, root, mapped)] == [True, True]
  assert [load(first, root, mapped), load(second, root, mapped)] == [False, False]
  shutil.copytree(first, tmp_path / 'moved' / 'photos')  # with other times and inodes
  assert not load(tmp_path / 'moved/photos', root, mapped)
  data = (second / 'a/1.bmp').read_bytes()
  rewrite(first / 'a/1.bmp', data)
  assert load(first, root, mapped)
  assert not load(first, root, mapped)


@pytest.mark.parametrize('mapped', [False, True])
def test_a_file_that_changes_while_it_is_decoded(tmp_path, mapped):
  folder, root = write_photos(tmp_path / 'photos', 0), tmp_path / 'cache'

  class Slow(ImageFolderSource):
    def __getitem__(self, i):
      if i == 2:
        (folder / 'a/2.bmp').write_bytes((folder / 'b/1.bmp').read_bytes())
      return super().__getitem__(i)

  with pytest.raises(UserError) as error:
    cache.load_arrays(Slow(folder, 4), root, print, mapped=mapped)
  assert str(error.value) == (
    'expected files of photos that stay as they are while they are decoded; found 1 that changed, '
    f'such as {folder}/a/2.bmp; to fix it: start again once nothing writes to them'
  )
  assert [path for path in root.iterdir() if path.is_dir()] == []
  assert load(folder, root, mapped)
