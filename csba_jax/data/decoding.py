"""Decodes image files to pixels (uint8, upright, square) without TensorFlow."""

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
  from PIL.Image import Image as PillowImage

PILLOW_FORMATS = ('BMP', 'GIF', 'JPEG', 'PNG', 'TIFF', 'WEBP')
DECODING_VERSION = 1  # part of every fingerprint: increase it when a change alters the pixels


class Unreadable(ValueError):
  """One image that cannot be decoded; the message is the reason."""


def decode_image(data: bytes, *, channels: int, image_size: int) -> np.ndarray:
  """Encoded bytes -> uint8 [H, W, channels]; with image_size > 0 upright and square.

  Args:
    data: BMP, GIF (first frame), JPEG, PNG, TIFF or WebP.
    channels: 3 (RGB) or 1 (grey).
    image_size: side of the square; with 0 size and orientation are not changed.

  Raises:
    Unreadable: empty, truncated, another format, or pixels without a fixed range.
  """
  from PIL import Image, ImageOps, UnidentifiedImageError

  if not data:
    raise Unreadable('empty file')
  try:
    with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
      if image_size:
        # JPEG can decode at 1/2, 1/4 or 1/8 of the size, which is faster; twice the size is kept.
        image.draft(None, (2 * image_size, 2 * image_size))
        image = ImageOps.exif_transpose(image)
      image = _flatten(image, 'RGB' if channels == 3 else 'L')
      if image_size:
        image = _centre_square(image, image_size)
      pixels = np.array(image)
  except UnidentifiedImageError:
    raise Unreadable('not an image of a known format') from None  # its text holds a memory address
  except (Unreadable, MemoryError):
    raise
  except Exception as error:  # Pillow raises a dozen types on damaged files
    raise Unreadable(f'{type(error).__name__}: {error}') from error
  return pixels if channels == 3 else pixels[..., None]


def _flatten(image: 'PillowImage', mode: str) -> 'PillowImage':
  """A Pillow image as 8-bit 'RGB' or 'L'; transparent pixels become white."""
  from PIL import Image

  if image.mode == 'F':
    raise Unreadable('floating-point pixels have no fixed range')
  if image.mode.startswith('I'):  # 16-bit grey: take the high byte; Pillow would clip at 255
    values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
    image = Image.fromarray((values >> 8).astype(np.uint8))
  if image.mode in ('RGBA', 'RGBa', 'LA', 'La', 'PA') or 'transparency' in image.info:
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image.convert('RGBA'))
  return image.convert(mode)


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
