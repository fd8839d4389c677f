"""Photos with a heat map over them, as PNG files in a new folder."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from csba_jax.errors import UserError

if TYPE_CHECKING:
  from PIL.Image import Image as PillowImage

SIDE = 256  # pixels of the shorter side, at least
STRENGTH = 0.55  # of the colour where the map is 1


class Overlays:
  """Called with (file, image, map), it writes FOLDER/PATH.png, PATH below the folder of photos.

  Args:
    folder: is made with the first picture.
    photos: the folder, or the one photo, that the files are from.
  """

  def __init__(self, folder: Path, photos: Path):
    self._folder, self._photos = folder, photos

  def __call__(self, file: Path, image: np.ndarray, heat: np.ndarray) -> None:
    """Writes one picture.

    Args:
      file: of the photo.
      image: [H, W, channels] uint8.
      heat: [h, w] in 0..1.

    Raises:
      UserError: it cannot be written.
    """
    below = file.relative_to(self._photos) if self._photos in file.parents else Path(file.name)
    path = self._folder / below.with_name(f'{below.name}.png')  # a.jpg and a.png are two photos
    try:
      os.makedirs(path.parent, exist_ok=True)
      overlay(image, heat).save(path)
    except OSError as error:
      do = 'make room there, or set another --grad_cam'
      raise UserError(f'to write {path}', str(error), do) from error


def overlay(image: np.ndarray, heat: np.ndarray) -> 'PillowImage':
  """The image with the map in the colours of 'inferno' over it."""
  from matplotlib import colormaps
  from PIL import Image

  photo = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert('RGB')
  times = max(1, -(-SIDE // min(photo.size)))
  photo = photo.resize([times * n for n in photo.size], Image.Resampling.NEAREST)
  grey = Image.fromarray((255 * np.clip(heat, 0, 1)).astype(np.uint8))
  smooth = np.asarray(grey.resize(photo.size, Image.Resampling.BICUBIC), np.float32) / 255
  colours = colormaps['inferno'](smooth)[..., :3] * 255
  share = STRENGTH * smooth[..., None]
  mixed = (1 - share) * np.asarray(photo, np.float32) + share * colours
  return Image.fromarray(mixed.round().astype(np.uint8))
