"""Sources of images, read by index; the digits. See also `tfds_source` and `image_folder`."""

import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from csba_jax.data.decoding import DECODING_VERSION, Unreadable


class Source:
  """Images by index. A subclass has `__len__`, `__getitem__` and the attributes below.

  source[i] is {'image': uint8 [H, W, channels], 'label': int}; it raises Unreadable for an image
  that cannot be decoded. `data.cache.load_arrays` decodes each image once and leaves these out.

  Attributes:
    name: for messages and folder names.
    class_names: C names.
    image_shape: (H, W, channels) of every image.
    labels: [N] int32.
    groups: [N] int64, equal for duplicates; None when every image is on its own.
    names: N names, the same on every machine.
    fingerprint: hex digits that change with the files and with the decoding; quick to compute.
    strict: whether an unreadable image is an error.
    left_out: one line on files of the source that are not read; '' if there are none.
  """

  name: str
  class_names: tuple[str, ...]
  image_shape: tuple[int, int, int]
  groups: np.ndarray | None = None
  strict: bool = True
  left_out: str = ''

  if TYPE_CHECKING:  # properties, so that a subclass may compute them once they are asked for

    @property
    def labels(self) -> np.ndarray: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> dict: ...

  def read(self, positions: Sequence[int]) -> list[dict | Unreadable]:
    """The items at these positions, or Unreadable for an image that cannot be decoded."""
    return [or_unreadable(self.__getitem__, i) for i in positions]


class DigitsSource(Source):
  """The 1,797 handwritten digits of scikit-learn, 8x8 pixels, values 0..16 scaled to 0..255."""

  name = 'digits'
  class_names = tuple('0123456789')
  image_shape = (8, 8, 1)
  labels: np.ndarray
  names: tuple[str, ...]

  def __init__(self) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 16 -> 255; + 0.5 rounds to nearest
    self._images = (digits.images * (255 / 16) + 0.5).astype(np.uint8)[..., None]
    self.labels = digits.target.astype(np.int32)
    self.names = tuple(f'digits/{i:04d}' for i in range(len(self.labels)))

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, i: int) -> dict:
    return {'image': self._images[i], 'label': int(self.labels[i])}

  @property
  def fingerprint(self) -> str:
    """Digest of pixels and labels."""
    return digest(['digits', DECODING_VERSION, self._images.tobytes(), self.labels.tobytes()])


def or_unreadable(decode: Callable[..., dict], argument: object) -> dict | Unreadable:
  """decode(argument), or the Unreadable that it raises."""
  try:
    return decode(argument)
  except Unreadable as error:
    return error


def file_state(path: pathlib.Path) -> tuple[int, ...]:
  """(size, modification time, whether it is readable); empty for a broken link."""
  try:
    state = path.stat()
  except FileNotFoundError:
    return ()
  return state.st_size, state.st_mtime_ns, os.access(path, os.R_OK)


def digest(parts: Iterable) -> str:
  """Hex SHA-256 over the representations of the parts."""
  digest = hashlib.sha256()
  for part in parts:
    digest.update(repr(part).encode() + b'\0')
  return digest.hexdigest()
