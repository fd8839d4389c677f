"""Encoded images to pixels: uint8, upright, square, without TensorFlow."""

import io

import numpy as np

PILLOW_FORMATS = ('BMP', 'GIF', 'JPEG', 'PNG', 'TIFF', 'WEBP')
DECODING_VERSION = 1  # part of every fingerprint: raise it when the pixels come out differently


class Unreadable(ValueError):
  """One image that cannot be decoded; the message is the reason."""


def decode_image(data: bytes, *, channels: int, image_size: int) -> np.ndarray:
  """Encoded bytes -> uint8 [H, W, channels]; with image_size > 0 upright and square.

  Args:
    data: BMP, GIF (first frame), JPEG, PNG, TIFF or WebP.
    channels: 3 (RGB) or 1 (grey).
    image_size: side of the square; 0 leaves size and orientation alone.

  Raises:
    Unreadable: empty, truncated, no such format, or pixels without a fixed range.
  """
  from PIL import Image, ImageOps, UnidentifiedImageError

  if not data:
    raise Unreadable('empty file')
  try:
    with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
      if image_size:
        # JPEG decodes large photos at 1/2, 1/4, 1/8: faster; twice the size is left to filter.
        image.draft(None, (2 * image_size, 2 * image_size))
        image = ImageOps.exif_transpose(image)
      image = _flatten(image, 'RGB' if channels == 3 else 'L')
      if image_size:
        image = _centre_square(image, image_size)
      pixels = np.array(image)
  except UnidentifiedImageError:
    raise Unreadable('not an image of a known format') from None  # its own text holds an address
  except (Unreadable, MemoryError):
    raise
  except Exception as error:  # Pillow raises a dozen types on damaged files
    raise Unreadable(f'{type(error).__name__}: {error}') from error
  return pixels if channels == 3 else pixels[..., None]


def _flatten(image, mode: str):
  """Any Pillow image as 8-bit 'RGB' or 'L', on white where it is transparent."""
  from PIL import Image

  if image.mode == 'F':
    raise Unreadable('floating-point pixels have no fixed range')
  if image.mode.startswith('I'):  # 16-bit grey, which Pillow would clip at 255: take the high byte
    values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
    image = Image.fromarray((values >> 8).astype(np.uint8))
  if image.mode in ('RGBA', 'RGBa', 'LA', 'La', 'PA') or 'transparency' in image.info:
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image.convert('RGBA'))
  return image.convert(mode)


def _centre_square(image, image_size: int):
  """The central square, scaled: one resampling, the same as scaling first and then cropping."""
  from PIL import Image

  width, height = image.size
  side = min(width, height)
  left, top = (width - side) // 2, (height - side) // 2
  box = (left, top, left + side, top + side)
  return image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)


def decoder_version() -> tuple[int, str]:
  """Pixels may change with our code or with Pillow."""
  import PIL

  return DECODING_VERSION, PIL.__version__
