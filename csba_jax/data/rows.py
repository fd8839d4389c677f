"""Reads images from a file when they are indexed, for data that does not fit in memory."""

import os
import pathlib
import weakref
from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from csba_jax.errors import UserError


class Rows:
  """Some images of a file, as an array [n, H, W, ch] uint8 that is read when it is indexed.

  It reads with pread and not through the memory map. So a failing disk or a truncated file raises
  an error and does not kill the process (SIGBUS), and the images count as the system's cache and
  not as memory of the process. Any number of threads may read. The file stays open, so that a run
  goes on if its folder is deleted.

  Args:
    images: [N, H, W, ch] uint8, a memory map of the file.
    index: [n] int, the images in their order; None for all.
  """

  def __init__(self, images: np.memmap, index: np.ndarray | None = None):
    assert images.filename is not None
    self._path = pathlib.Path(images.filename)
    self._offset = images.offset
    self._index = np.arange(len(images)) if index is None else np.asarray(index)
    self.shape = (len(self._index), *images.shape[1:])
    self.dtype = images.dtype
    try:
      self._file = os.open(self._path, os.O_RDONLY)
    except OSError as error:
      raise self._lost(str(error)) from error
    weakref.finalize(self, os.close, self._file)

  def __len__(self) -> int:
    return len(self._index)

  def __getitem__(self, key: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
    """A new array; the key is an int, a slice, ints or booleans, as for a NumPy array."""
    rows = np.asarray(self._index[key])
    found = np.empty((rows.size, *self.shape[1:]), self.dtype)
    for row, image in zip(rows.flat, found, strict=True):
      self._read(int(row), image)
    return found.reshape(*rows.shape, *self.shape[1:])

  def __array__(self, *_: object, **__: object) -> NoReturn:
    raise TypeError('these images may not fit in memory: index them')

  def _read(self, row: int, image: np.ndarray) -> None:
    """Reads one image into an array."""
    # one call is enough, unless a signal or a network drive cuts it short
    bytes_left, at = image.data.cast('B'), self._offset + row * image.nbytes
    while bytes_left:
      try:
        done = os.preadv(self._file, [bytes_left], at)
      except OSError as error:
        raise self._lost(str(error)) from error
      if not done:
        raise self._lost(f'the end of the file before image {row}')
      bytes_left, at = bytes_left[done:], at + done

  def _lost(self, found: str) -> UserError:
    return UserError(
      f'to read the decoded images in the cache {self._path}',
      found,
      f'check the disk and start again; if that does not help, delete {self._path.parent}',
    )
