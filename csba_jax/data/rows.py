"""Images of a file, read when they are asked for: data that does not fit in memory."""

import os
import pathlib
import weakref

import numpy as np

from csba_jax.errors import UserError


class Rows:
  """Some images of a file, indexed like an array [n, H, W, ch] uint8; indexing reads them.

  It reads with pread and not through the memory map: a disk that fails or a file that was cut then
  raises instead of killing the process (SIGBUS), and what was read lies in the system's cache, not
  in the memory of the process. Any number of threads may read; the file stays open, so that
  deleting the folder does not end a run.

  Args:
    images: [N, H, W, ch] uint8, the map of the file.
    index: [n] int, the images in their order; None for all.
  """

  def __init__(self, images: np.memmap, index: np.ndarray | None = None):
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

  def __getitem__(self, key) -> np.ndarray:
    """Whatever numpy's first axis takes, as a new array: an int, a slice, ints or booleans."""
    rows = np.asarray(self._index[key])
    found = np.empty((rows.size, *self.shape[1:]), self.dtype)
    for row, image in zip(rows.flat, found, strict=True):
      self._read(int(row), image)
    return found.reshape(*rows.shape, *self.shape[1:])

  def __array__(self, *_, **__):
    raise TypeError('these images are too many for one array: index them')

  def _read(self, row: int, image: np.ndarray) -> None:
    """Fills in one image."""
    # one call but where a signal or a network drive cuts it short
    bytes_left, at = memoryview(image).cast('B'), self._offset + row * image.nbytes
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
      f'check the disk, then start again; if that does not help, delete {self._path.parent}',
    )
