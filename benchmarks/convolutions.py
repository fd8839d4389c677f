"""Times 3x3 convolutions and other ways to compute them, each alone.

  GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.convolutions --batch=128

By default those of the three stages of ResNet-32: the forward pass, the gradient of the input, and
the gradient of the kernel, as XLA has them and in other ways (benchmarks/convolution_ways.py). All
are checked against XLA's, to 1e-5 of the largest value. They take turns. Milliseconds: median
(fastest to slowest).
"""

import json
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import Array

from benchmarks import environment
from benchmarks.convolution_ways import WAYS
from csba_jax.runtime import backend, text_table

_BATCH = flags.DEFINE_integer('batch', 128, 'Images.', 1)
_REPEATS = flags.DEFINE_integer('repeats', 9, 'Timed calls of each.', 1)
_SHAPES = flags.DEFINE_list(
  'shapes', ['32x16x16', '16x32x32', '8x64x64'], 'Pixels a side x channels in x channels out.'
)


def seconds_of(ways: list[Callable[[Array, Array], Array]], *values: Array) -> list[list[float]]:
  """Seconds of the timed calls of each way; checks that all give the same."""
  compiled = [backend.jit(way)() for way in ways]
  first, *others = [np.asarray(call(*values)) for call in compiled]
  for other in others:
    np.testing.assert_allclose(other, first, rtol=0, atol=1e-5 * abs(first).max())
  found: list[list[float]] = [[] for _ in ways]
  for _ in range(_REPEATS.value):
    for call, seconds in zip(compiled, found, strict=True):
      start = time.perf_counter()
      jax.block_until_ready(call(*values))
      seconds.append(time.perf_counter() - start)
  return found


def main(argv: list[str]) -> None:
  """Measures and prints a table."""
  del argv
  rng = np.random.default_rng(0)

  def draw(*shape: int) -> Array:
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  table = [['pass', 'way', *_SHAPES.value]]
  columns: list[list[str]] = []
  for shape in _SHAPES.value:
    side, into, out = map(int, shape.split('x'))
    x, g = (draw(_BATCH.value, side, side, channels) for channels in (into, out))
    kernel, column = draw(3, 3, into, out), []
    given = {'forward': (x, kernel), 'input gradient': (g, kernel), 'kernel gradient': (x, g)}
    for name, ways in WAYS.items():
      for seconds in seconds_of(ways, *given[name]):
        low, high = 1e3 * min(seconds), 1e3 * max(seconds)
        column.append(f'{1e3 * statistics.median(seconds):.1f} ({low:.1f} to {high:.1f})')
    columns.append(column)
  names = [(name, way.__name__) for name, ways in WAYS.items() for way in ways]
  table += [[*name, *cells] for name, *cells in zip(names, *columns, strict=True)]
  print(text_table.align(table))
  print(json.dumps(environment.describe() | {'batch': _BATCH.value}))


if __name__ == '__main__':
  app.run(main)
