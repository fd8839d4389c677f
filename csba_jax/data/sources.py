"""Sources of images, read by index; the digits. See also `tfds_source` and `image_folder`."""

import hashlib
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from csba_jax.data.decoding import DECODING_VERSION, Unreadable
from csba_jax.errors import UserError


class Source:
  """Images by index. A subclass has `__len__`, `__getitem__` and the attributes below.

  source[i] is {'image': uint8 [H, W, channels], 'label': int, 'sha256': bytes}, where sha256 is the
  `content_sum` of what the image was decoded from; it raises Unreadable for an image that cannot be
  decoded. `data.cache.load_arrays` decodes each image once and leaves these out.

  Attributes:
    name: for messages and folder names.
    class_names: C names.
    image_shape: (H, W, channels) of every image.
    labels: [N] int32.
    groups: [N] int64, equal for duplicates; None when every image is on its own.
    names: N names, the same on every machine.
    files: the files that hold the images; `data.file_sums` tells whether they have changed.
    fingerprint: hex digits that change with all that decides the images but the content of `files`:
      names, classes, groups, size and decoding; quick to compute.
    strict: whether an unreadable image is an error.
    left_out: one line on files of the source that are not read; '' if there are none.
    part_of: the part, 'train', 'val' or 'test', that the source gives each image; None if none.
  """

  name: str
  class_names: tuple[str, ...]
  image_shape: tuple[int, int, int]
  groups: np.ndarray | None = None
  files: Sequence[pathlib.Path] = ()
  strict: bool = True
  left_out: str = ''
  part_of: tuple[str, ...] | None = None

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
    image = self._images[i]
    return {
      'image': image,
      'label': int(self.labels[i]),
      'sha256': content_sum(image.tobytes()),
    }

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


def content_sum(data: bytes) -> bytes:
  """SHA-256 of an image before it is decoded, 32 bytes."""
  return hashlib.sha256(data).digest()


def disk_error(path: pathlib.Path, error: OSError) -> UserError:
  """A failing disk or network drive, which is not an unreadable image."""
  return UserError(f'to read {path}', str(error), 'check the disk or the network drive')


def digest(parts: Iterable) -> str:
  """Hex SHA-256 over the representations of the parts."""
  digest = hashlib.sha256()
  for part in parts:
    digest.update(repr(part).encode() + b'\0')
  return digest.hexdigest()
