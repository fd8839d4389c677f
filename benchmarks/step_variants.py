"""Times a training step under other settings of malloc, of XLA, and of the network's sums.

  python -m benchmarks.step_variants --net=resnet32 --variants=small,huge [--batch=128]

Each variant runs in a process of its own, since malloc reads its settings when a program starts;
the variants take turns, `--rounds` times. Printed for each: the median of its steps (fastest to
slowest), page faults and seconds of the system a step, and the time to the end of the first step.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import numpy as np
from absl import app, flags

from benchmarks import convolution_ways, environment
from csba_jax import config as config_lib
from csba_jax.methods import optimizers
from csba_jax.models import layers, registry
from csba_jax.run import state as state_lib
from csba_jax.runtime import backend, huge_pages, sharding, text_table
from csba_jax.training import step as step_lib

HUGE = {huge_pages.VARIABLE: f'{huge_pages.SETTING}=1'}
ONE_HEAP = 'glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2000000000'
YNN = 'xla_cpu_experimental_ynn_fusion_type'
# {variant: environment of its process}; `set_up` changes the rest
VARIANTS = {
  'small': {huge_pages.VARIABLE: f'{huge_pages.SETTING}=0'},
  'huge': HUGE,
  'one_heap': {huge_pages.VARIABLE: ONE_HEAP},
  'recomputed': HUGE,
  'ynn_convolutions': HUGE,
  'ynn_elementwise': HUGE,
  'winograd': HUGE,
}
_NET = flags.DEFINE_enum('net', 'resnet32', list(registry.MODELS), 'Which network.')
_ATTENTION = flags.DEFINE_string('attention', 'none', 'Its attention.')
_BATCH = flags.DEFINE_integer('batch', 128, 'Images a step.', 2)
_SIZE = flags.DEFINE_integer('image_size', 32, 'Pixels a side.', 8)
_STEPS = flags.DEFINE_integer('steps', 7, 'Timed steps of a process.', 1)
_ROUNDS = flags.DEFINE_integer('rounds', 2, 'Processes of each variant.', 1)
_VARIANTS = flags.DEFINE_list(
  'variants',
  ['small', 'huge'],
  'small, huge: pages of 4 KiB and 2 MiB. one_heap: all threads share one heap, and it stays'
  ' theirs. recomputed: huge, and sums of blocks are computed anew. ynn_convolutions,'
  " ynn_elementwise: huge, with these operations in XLA's YNN library. winograd: huge, with"
  " Winograd's products for 3x3 convolutions of at least --winograd_from channels.",
)
_WINOGRAD_FROM = flags.DEFINE_integer('winograd_from', 64, 'Channels in and out.', 1)
SIZES = (_NET, _ATTENTION, _BATCH, _SIZE, _WINOGRAD_FROM)
_CHILD = flags.DEFINE_string('child', None, 'Measure this variant here (internal).')


def set_up(variant: str) -> None:
  """What a variant changes in this process."""
  if variant == 'recomputed':
    layers.stored = lambda x: x
  if variant == 'winograd':
    plain = layers.convolve

    def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
      suited = kernel.shape[:2] == (3, 3) and stride == 1 and not (x.shape[1] | x.shape[2]) % 2
      if suited and min(kernel.shape[2:]) >= _WINOGRAD_FROM.value:
        return convolution_ways.by_winograd(x, kernel)
      return plain(x, kernel, stride)

    layers.convolve = convolve
  if variant.startswith('ynn_'):
    kind = {'convolutions': 'INDIVIDUAL_CONVOLUTION', 'elementwise': 'ELTWISE'}
    more = kind[variant.removeprefix('ynn_')]
    options = {YNN: f'LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_{more}'}
    backend.compiler_options = lambda: options


def measure() -> dict[str, float | list[float]]:
  """The step of this process."""
  config = config_lib.default()
  config.model.name, config.model.attention = _NET.value, _ATTENTION.value
  config.train.batch_size = _BATCH.value
  shape = (_SIZE.value, _SIZE.value, 3)
  model = registry.build(config.model, 10, shape)
  tx, _ = optimizers.build(config, total_steps=10_000)
  state = state_lib.create(model, tx, shape, 0)
  step_fn = step_lib.make_step(config, model, tx, np.ones(10), 10_000, sharding.layout(config))
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.integers(0, 256, (_BATCH.value, *shape), np.uint8),
    'label': rng.integers(0, 10, _BATCH.value, np.int32),
  }
  compiled, key = backend.jit(step_fn)(), jax.random.key(0)
  start = time.perf_counter()
  jax.block_until_ready(compiled(state, batch, key))
  first, seconds = time.perf_counter() - start, []
  before = resource.getrusage(resource.RUSAGE_SELF)
  for _ in range(_STEPS.value):
    start = time.perf_counter()
    jax.block_until_ready(compiled(state, batch, key))
    seconds.append(time.perf_counter() - start)
  after = resource.getrusage(resource.RUSAGE_SELF)
  return {
    'first': first,
    'seconds': seconds,
    'faults': (after.ru_minflt - before.ru_minflt) / _STEPS.value,
    'system': (after.ru_stime - before.ru_stime) / _STEPS.value,
    'peak': environment.peak_mebibytes(),
  }


def in_child(variant: str) -> dict[str, float | list[float]]:
  """`measure` in a new process."""
  command = [sys.executable, '-m', 'benchmarks.step_variants', f'--child={variant}']
  command += [f'--{f.name}={f.value}' for f in (*SIZES, _STEPS)]
  setting = os.environ | VARIANTS[variant]
  run = subprocess.run(command, check=True, capture_output=True, text=True, env=setting)
  return json.loads(run.stdout.splitlines()[-1])


def main(argv: list[str]) -> None:
  """Measures and prints a table."""
  del argv
  if _CHILD.value:
    set_up(_CHILD.value)
    print(json.dumps(measure()))
    return
  rows = [['variant', 'ms', 'fastest', 'slowest']]
  rows[0] += ['faults a step', 'system, ms', 'first step, s', 'peak, MiB']
  for _ in range(_ROUNDS.value):
    for variant in _VARIANTS.value:
      found = in_child(variant)
      seconds = found['seconds']
      times = (statistics.median(seconds), min(seconds), max(seconds))
      rows.append([variant, *(f'{1e3 * s:.0f}' for s in times)])
      rows[-1] += [f'{found["faults"]:.0f}', f'{1e3 * found["system"]:.0f}']
      rows[-1] += [f'{found["first"]:.1f}', f'{found["peak"]:.0f}']
  print(text_table.align(rows))
  print(json.dumps(environment.describe() | {'net': _NET.value, 'batch': _BATCH.value}))


if __name__ == '__main__':
  app.run(main)
