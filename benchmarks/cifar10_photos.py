"""Writes a long-tailed part of CIFAR-10 as a folder of JPEG files, CLASS/number.jpg.

  python -m benchmarks.cifar10_photos --out=FOLDER [--head=1000] [--imbalance=20]

It is a second real folder for the commands that take one: small pictures of ten classes, where the
panels are large photos of six. Needs CIFAR-10 in $TFDS_DATA_DIR.
"""

from pathlib import Path

import numpy as np
from absl import app, flags
from PIL import Image

from csba_jax import config as config_lib
from csba_jax.data import pipeline
from csba_jax.data.class_counts import profile_counts

_OUT = flags.DEFINE_string('out', None, 'A folder that is not there yet.', required=True)
_HEAD = flags.DEFINE_integer('head', 1000, 'Pictures of the largest class.', 1, 5000)
_IMBALANCE = flags.DEFINE_float('imbalance', 20, 'Largest class over smallest.', 1)


def main(argv: list[str]) -> None:
  """Reads, chooses, writes."""
  del argv
  config = config_lib.load('cifar10_lt')
  config.data.imbalance_factor, config.data.val_fraction = 1.0, 0.0
  part = pipeline.load(config, print)
  names, out = part.class_names, Path(_OUT.value)
  out.mkdir(parents=True)
  wanted = profile_counts(_HEAD.value, len(names), _IMBALANCE.value, 'exp')
  for label, (name, number) in enumerate(zip(names, wanted, strict=True)):
    (out / name).mkdir()
    for i in np.flatnonzero(part.train.labels == label)[:number]:
      Image.fromarray(part.train.images[i]).save(out / name / f'{i:05d}.jpg', quality=95)
  print(f'{out}: ' + ', '.join(f'{n} {c}' for n, c in zip(names, wanted, strict=True)))


if __name__ == '__main__':
  app.run(main)
