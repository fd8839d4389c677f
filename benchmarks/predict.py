"""Times csba-predict's loop over photos against what it cannot do without.

  python -m benchmarks.predict --workdir=RUN --photos=FOLDER [--repeats=5] [--out=FILE.json]

Three sides take turns in one process, each with all photos: `decode` reads and decodes them in the
threads of csba-predict, `forward` runs the net on images that are decoded already, and `predict` is
the loop itself (files in, calibrated probabilities out). Prints photos/s, median (slowest to
fastest), and how much longer `predict` takes than `forward`. Decoding and the net share the cores,
so that `predict` cannot take less than both together where both use all of them.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from benchmarks import environment
from csba_jax.data import cache
from csba_jax.data.folder_listing import images_below
from csba_jax.measure import predict
from csba_jax.runtime import text_table

_WORKDIR = flags.DEFINE_string('workdir', None, 'A run.', required=True)
_PHOTOS = flags.DEFINE_string('photos', None, 'A folder of photos.', required=True)
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed calls of each side.', 1)
_OUT = flags.DEFINE_string('out', None, 'JSON file for the results.')


def sides(predictor: predict.Predictor, files: list[Path]) -> dict[str, Callable[[], object]]:
  """{side: a call that takes all photos}."""
  source = predict._Photos(files, predictor.net.metadata.image_shape)

  def decode() -> list[cache.Block]:
    return list(cache.decoded(source, lambda line: None))

  images = np.concatenate([block.images for block in decode()])
  return {
    'decode': decode,
    'forward': lambda: predict._logits(predictor.net, images),
    'predict': lambda: list(predictor.predict(files)),
  }


def main(argv: list[str]) -> None:
  """Measures, prints, and writes."""
  del argv
  predictor = predict.Predictor.load(_WORKDIR.value)
  files = images_below(Path(_PHOTOS.value))
  calls = sides(predictor, files)
  seconds: dict[str, list[float]] = {side: [] for side in calls}
  for repeat in range(1 + _REPEATS.value):
    for side, call in calls.items():
      start = time.perf_counter()
      call()
      if repeat:  # the first one compiles
        seconds[side].append(time.perf_counter() - start)
  forward = statistics.median(seconds['forward'])
  rows = [['side', 'photos/s', 'times forward']]
  for side, taken in seconds.items():
    rates = [len(files) / s for s in taken]
    middle = f'{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})'
    rows.append([side, middle, f'{statistics.median(taken) / forward:.2f}'])
  print(text_table.align(rows))
  about = environment.describe() | {
    'photos': len(files),
    'pixels': predictor.net.metadata.image_shape[0],
    'parameters': sum(x.size for x in jax.tree.leaves(predictor.net.params)),
  }
  print(json.dumps(about))
  if _OUT.value:
    with open(_OUT.value, 'w') as file:
      json.dump({'about': about, 'seconds': seconds}, file, indent=1)


if __name__ == '__main__':
  app.run(main)
