"""Images of a file by index, as from an array; errors of the file raise."""

import errno
import gc
import os

import numpy as np
import pytest

from csba_jax.data.rows import Rows
from csba_jax.errors import UserError

SHAPE = (20, 3, 4, 2)


@pytest.fixture
def mapped(tmp_path):
  """A memory map of twenty images."""
  images = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
  np.save(tmp_path / 'images.npy', images)
  return np.load(tmp_path / 'images.npy', mmap_mode='r')


@pytest.mark.parametrize(
  'key',
  [
    3,
    -1,
    np.int32(2),
    slice(None),
    slice(2, 9, 3),
    slice(5, 5),
    slice(None, None, -1),
    [0, 0, 4],
    np.array([4, -2, 1], np.int32),
    np.array([[1, 2, 3], [3, 2, 1]]),
    np.array([], np.int64),
    np.arange(10) % 3 == 0,
  ],
  ids=str,
)
def test_indexing_is_an_arrays(mapped, key):
  index = np.array([7, 3, 3, 19, 0, 12, 5, 11, 2, 18])
  rows, expected = Rows(mapped, index), np.asarray(mapped)[index]
  assert (rows.shape, rows.dtype, len(rows)) == (expected.shape, expected.dtype, len(expected))
  found, expected = rows[key], expected[key]
  assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
  assert found.tobytes() == expected.tobytes()
  assert found.flags.writeable
  assert found.flags.owndata or found.base.flags.owndata


def test_without_an_index_all_rows(mapped):
  assert Rows(mapped)[:].tobytes() == mapped.tobytes()


@pytest.mark.parametrize('key', [10, -11, [3, 10]])
def test_beyond_the_end(mapped, key):
  with pytest.raises(IndexError, match='out of bounds'):
    Rows(mapped, np.arange(10))[key]


def test_it_never_becomes_an_array_by_accident(mapped):
  with pytest.raises(TypeError, match='may not fit in memory: index them'):
    np.asarray(Rows(mapped))


def test_reads_cut_short_go_on(mapped, monkeypatch):
  whole = os.preadv
  monkeypatch.setattr(os, 'preadv', lambda f, b, at: whole(f, [b[0][:5]], at))
  assert Rows(mapped)[:].tobytes() == mapped.tobytes()


def test_a_deleted_file_can_still_be_read(mapped):
  rows = Rows(mapped)
  os.unlink(mapped.filename)
  assert rows[:].tobytes() == mapped.tobytes()
  with pytest.raises(
    UserError, match=r'the decoded images in the cache .*images\.npy; found .*No su'
  ):
    Rows(mapped)


def test_a_file_that_was_cut(mapped):
  rows = Rows(mapped)
  with open(mapped.filename, 'r+b') as file:
    file.truncate(mapped.offset + 10 * mapped[0].nbytes + 1)
  assert rows[9].tolist() == mapped[9].tolist()
  with pytest.raises(UserError) as error:
    rows[10]
  folder = os.path.dirname(mapped.filename)
  assert str(error.value) == (
    f'expected to read the decoded images in the cache {mapped.filename}; '
    'found the end of the file before image 10; '
    f'to fix it: check the disk and start again; if that does not help, delete {folder}'
  )


def test_a_disk_that_fails(mapped, monkeypatch):
  def fail(*_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))

  rows = Rows(mapped)
  monkeypatch.setattr(os, 'preadv', fail)
  with pytest.raises(UserError, match=r'found \[Errno 5\] Input/output error'):
    rows[0]


def test_files_are_closed(mapped):
  def open_files():
    return len(os.listdir('/proc/self/fd'))

  gc.collect()
  before = open_files()
  kept = [Rows(mapped) for _ in range(5)]
  assert open_files() == before + 5
  del kept
  gc.collect()
  assert open_files() == before
