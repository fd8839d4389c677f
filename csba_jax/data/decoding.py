"""Decodes image files to pixels (uint8, upright, square) without TensorFlow."""

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
  from PIL.Image import Image as PillowImage

PILLOW_FORMATS = ('BMP', 'GIF', 'JPEG', 'PNG', 'TIFF', 'WEBP')
DECODING_VERSION = 2  # part of every fingerprint: increase it when a change alters the pixels
# Pixels that all threads together decode at a time, and so the largest image. Pillow takes up to 16
# bytes for each of them (4 a copy, and four copies where transparency is removed): 1.6 GB in all.
PIXELS_AT_ONCE = 100_000_000
_BITS_PER_SAMPLE, _MAX_SAMPLE_VALUE, _SAMPLE_FORMAT, _SIGNED = 258, 281, 339, 2  # of TIFF


class Unreadable(ValueError):
  """One image that cannot be decoded; the message is the reason."""


class PixelBudget:
  """Lets threads decode as long as their images have at most `total` pixels together."""

  def __init__(self, total: int):
    self.total = total
    self._taken = 0
    self._freed = threading.Condition()

  @contextlib.contextmanager
  def take(self, pixels: int) -> Iterator[None]:
    """Waits until `pixels` are free; Unreadable if there are never so many."""
    if pixels > self.total:
      raise Unreadable(_too_large(f'{pixels / 1e6:.0f}'))
    with self._freed:
      self._freed.wait_for(lambda: self._taken + pixels <= self.total)
      self._taken += pixels
    try:
      yield
    finally:
      with self._freed:
        self._taken -= pixels
        self._freed.notify_all()


_budget = PixelBudget(PIXELS_AT_ONCE)


def decode_image(data: bytes, *, channels: int, image_size: int) -> np.ndarray:
  """Encoded bytes -> uint8 [H, W, channels]; with image_size > 0 upright and square.

  Images of more than 8 bits a sample are made 8-bit by their upper bits. What range they have:
    - The bits that the file declares: 0 to 65535 for 16 bits, 0 to 4095 for TIFF of 12 bits, 0 to
      32767 for signed 16 bits. It does not matter which values occur.
    - If a TIFF declares its largest value (MaxSampleValue): as many bits as that value needs.
    - Else, for grey TIFF of 32 bits, which have no usual range: the smallest of 8, 12 and 16 bits
      that holds all values of the image. With a value outside 0 to 65535 it is unreadable.
    - Floating point: unreadable.
  Pillow reduces colour images of 16 bits a sample to their upper 8 bits.

  All threads together decode at most PIXELS_AT_ONCE pixels at a time; others wait.

  Args:
    data: BMP, GIF (first frame), JPEG, PNG, TIFF or WebP.
    channels: 3 (RGB) or 1 (grey).
    image_size: side of the square; with 0 size and orientation are not changed.

  Raises:
    Unreadable: empty, truncated, another format, more than PIXELS_AT_ONCE pixels, or pixels without
      a fixed range.
  """
  from PIL import Image, UnidentifiedImageError

  if not data:
    raise Unreadable('empty file')
  try:
    with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
      whole = image.width * image.height
      if image_size:
        # JPEG can decode at 1/2, 1/4 or 1/8 of the size, which is faster; twice the size is kept.
        image.draft(None, (2 * image_size, 2 * image_size))
      pixels = image.width * image.height
      if image.info.get('progressive'):  # whose coefficients are kept whole, in up to 6 bytes each
        pixels = max(pixels, whole // 2)
      with _budget.take(pixels):
        found = _pixels(image, 'RGB' if channels == 3 else 'L', image_size)
  except UnidentifiedImageError:
    raise Unreadable('not an image of a known format') from None  # its text holds a memory address
  except Image.DecompressionBombError:  # Pillow's own limit, which also holds for JPEG
    raise Unreadable(_too_large(f'over {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f}')) from None
  except (Unreadable, MemoryError):
    raise
  except Exception as error:  # Pillow raises a dozen types on damaged files
    raise Unreadable(f'{type(error).__name__}: {error}') from error
  return found if channels == 3 else found[..., None]


@contextlib.contextmanager
def without_warnings_of_pillow() -> Iterator[None]:
  """Silences Pillow's warnings of large images and odd metadata, with lines of its code in them.

  `decode_image` has a limit of its own, and names what it cannot decode.
  """
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', module=r'PIL\.')
    yield


def _too_large(megapixels: str) -> str:
  return (
    f'{megapixels} megapixels, and at most {PIXELS_AT_ONCE / 1e6:.0f} are decoded: make it smaller'
  )


def _pixels(image: 'PillowImage', mode: str, image_size: int) -> np.ndarray:
  """The pixels of an opened image, as `decode_image` describes them: [H, W, 3] or [H, W]."""
  from PIL import ImageOps

  if image_size:
    ImageOps.exif_transpose(image, in_place=True)
  image = _flatten(image, mode)
  if image_size:
    image = _centre_square(image, image_size)
  return np.array(image)


def _flatten(image: 'PillowImage', mode: str) -> 'PillowImage':
  """A Pillow image as 8-bit 'RGB' or 'L'; transparent pixels become white."""
  from PIL import Image

  if image.mode == 'F':
    raise Unreadable('floating-point pixels have no fixed range')
  if image.mode.startswith('I'):  # grey of more than 8 bits, at which Pillow would clip
    image = _upper_bits(image)
  if image.mode in ('RGBA', 'RGBa', 'LA', 'La', 'PA') or 'transparency' in image.info:
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, _converted(image, 'RGBA'))
  return _converted(image, mode)


def _upper_bits(image: 'PillowImage') -> 'PillowImage':
  """A grey image of 16 or 32 bits as 8-bit grey; see `decode_image` for its range."""
  from PIL import Image

  values = np.array(image, np.int32)
  smallest, largest = int(values.min()), int(values.max())
  bits, declared = _declared(image)
  if declared >= largest > 0:
    bits = declared.bit_length()
  elif bits > 16:
    if smallest < 0 or largest > 65535:
      raise Unreadable(
        f'32-bit pixels from {smallest} to {largest} have no fixed range: save it as 16-bit'
      )
    bits = next(n for n in (8, 12, 16) if largest < 1 << n)
  np.clip(values, 0, (1 << bits) - 1, out=values)
  values >>= max(bits - 8, 0)
  return Image.fromarray(values.astype(np.uint8))


def _declared(image: 'PillowImage') -> tuple[int, int]:
  """(bits of a grey sample without the sign, largest value; 0 if none is declared)."""
  tags = getattr(image, 'tag_v2', None)
  if not tags:  # PNG: 16 bits
    return 16, 0
  bits, kind, largest = (
    max(found) if isinstance(found := tags.get(tag, 0), tuple) else found
    for tag in (_BITS_PER_SAMPLE, _SAMPLE_FORMAT, _MAX_SAMPLE_VALUE)
  )
  return bits - (kind == _SIGNED and bits <= 16), largest


def _converted(image: 'PillowImage', mode: str) -> 'PillowImage':
  """The image in a mode; no copy if it has the mode."""
  return image if image.mode == mode else image.convert(mode)


def _centre_square(image: 'PillowImage', image_size: int) -> 'PillowImage':
  """Crops to the centre square and scales it, in one resampling."""
  from PIL import Image

  width, height = image.size
  side = min(width, height)
  left, top = (width - side) // 2, (height - side) // 2
  box = (left, top, left + side, top + side)
  return image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)


def decoder_version() -> tuple[int, str]:
  """Versions of what decides the pixels: this module and Pillow."""
  import PIL

  return DECODING_VERSION, PIL.__version__
