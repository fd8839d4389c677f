"""Times the start of a run on a folder of photos: cold with an empty cache, warm with a full one.

  python -m benchmarks.start --dir=PHOTOS [--image_size=64] [--turns=5]

It prints the median, fastest and slowest seconds of `cache.load_arrays`, which reads the checksums
of the files, decodes the photos or reads the decoded ones, and verifies them. The photos are in the
system's page cache.
"""

import statistics
import tempfile
import time

from absl import app, flags

from csba_jax.data import cache
from csba_jax.data.image_folder import ImageFolderSource

_DIR = flags.DEFINE_string('dir', None, 'Folder of CLASS/photo files.', required=True)
_IMAGE_SIZE = flags.DEFINE_integer('image_size', 64, 'Side of the decoded photos.', 1)
_TURNS = flags.DEFINE_integer('turns', 5, 'Number of timings.', 1)


def seconds(cache_dir: str) -> float:
  """Seconds until the decoded photos are in memory."""
  begin = time.perf_counter()
  cache.load_arrays(ImageFolderSource(_DIR.value, _IMAGE_SIZE.value), cache_dir, lambda line: None)
  return time.perf_counter() - begin


def main(_) -> None:
  """Prints both rows."""
  with tempfile.TemporaryDirectory() as folder:
    seconds(folder)  # imports, and the photos into the page cache
  cold, warm = [], []
  for _ in range(_TURNS.value):
    with tempfile.TemporaryDirectory() as folder:
      cold.append(seconds(folder))
      warm.append(seconds(folder))
  for name, found in (('cold', cold), ('warm', warm)):
    print(f'{name} {statistics.median(found):.3f} s ({min(found):.3f} to {max(found):.3f})')


if __name__ == '__main__':
  app.run(main)
