"""Predicts classes of photos: python predict.py PHOTO ...

It needs jax, flatbuffers and Pillow. It prints the probability, the class (- below the least
confidence) and the file. Photos with transparency or with 16 bits a sample are for csba-predict.
"""

import json
import pathlib
import sys

import jax.export
import numpy as np
from PIL import Image, ImageOps


def pixels_of(path: str, size: int, mode: str) -> np.ndarray:
  """The centre square of a photo, upright, at the size of the net: uint8 [1, H, W, channels]."""
  with Image.open(path) as photo:
    photo.draft(None, (2 * size, 2 * size))  # a JPEG is decoded at about twice the size
    image = ImageOps.exif_transpose(photo).convert(mode)
  side = min(image.size)
  left, top = ((n - side) // 2 for n in image.size)
  box = (left, top, left + side, top + side)
  image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
  return np.asarray(image).reshape(1, size, size, -1)


def main(folder: pathlib.Path, paths: list[str]) -> None:
  """Prints a line for each photo."""
  about = json.loads((folder / 'model.json').read_text(encoding='utf-8'))
  net = jax.export.deserialize(bytearray((folder / 'model.jax').read_bytes()))
  for path in paths:
    pixels = pixels_of(path, about['image_size'], about['mode'])
    probabilities = np.asarray(net.call(pixels))[0]
    best = int((probabilities * about['class_weights']).argmax())
    sure = probabilities[best] >= about['min_confidence']
    print(f'{probabilities[best]:.3f}', about['class_names'][best] if sure else '-', path, sep='  ')


if __name__ == '__main__':
  main(pathlib.Path(__file__).parent, sys.argv[1:])
