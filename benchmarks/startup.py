"""Times how long commands and the library take to start, each in a new process.

  python -m benchmarks.startup [--repeats=5] [--out=FILE.json]

`import jax`, `import csba_jax.gradients` and `csba-train --help` take turns. The first training
step is that of `benchmarks/training_sides.py` with 32 images, from the start of building the net to
the end of the step: with an empty cache of compiled programs, and again with the cache that this
leaves. Targets: help under 1 s; the library at most 0.3 s more than JAX; the first step under 5 s
and, with a cache, under 2 s.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from absl import app, flags

from benchmarks import environment
from csba_jax.runtime import text_table

_REPEATS = flags.DEFINE_integer('repeats', 5, 'Processes of each kind.', 1)
_OUT = flags.DEFINE_string('out', None, 'JSON file for the results.')

PROCESSES = {
  'import jax': [sys.executable, '-c', 'import jax'],
  'import csba_jax.gradients': [sys.executable, '-c', 'import csba_jax.gradients'],
  'csba-train --help': [sys.executable, '-m', 'csba_jax.bin.train', '--help'],
}
STEP = [sys.executable, '-m', 'benchmarks.train_step', '--probe=jax', '--batch_sizes=32']
NETS = {'none': ['--attention=none'], 'csba': ['--attention=csba'], 'ResNet-32': ['--net=resnet32']}


def seconds_of(command: list[str]) -> float:
  """From the start of a process to its end."""
  start = time.perf_counter()
  subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
  return time.perf_counter() - start


def first_steps(net: str) -> tuple[float, float]:
  """Seconds to the end of the first step, with an empty cache and with the one that it leaves."""
  with tempfile.TemporaryDirectory() as cache:
    own = os.environ | {
      'JAX_COMPILATION_CACHE_DIR': cache,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    found = []
    for _ in range(2):
      out = subprocess.run([*STEP, *NETS[net]], env=own, check=True, capture_output=True, text=True)
      found.append(json.loads(out.stdout.splitlines()[-1])['first_step_seconds'])
  return found[0], found[1]


def main(_) -> None:
  """Measures, prints a table, writes the JSON file."""
  seconds: dict[str, list[float]] = {name: [] for name in PROCESSES}
  for command in PROCESSES.values():
    seconds_of(command)  # files are read from the disk once
  for _ in range(_REPEATS.value):
    for name, command in PROCESSES.items():
      seconds[name].append(seconds_of(command))
  for net in NETS:
    pairs = [first_steps(net) for _ in range(_REPEATS.value)]
    seconds[f'first step, {net}, empty cache'] = [cold for cold, _ in pairs]
    seconds[f'first step, {net}, full cache'] = [warm for _, warm in pairs]
  rows = [['what', 'median-s', 'fastest', 'slowest']]
  rows += [
    [name, *(f'{x:.2f}' for x in (statistics.median(times), min(times), max(times)))]
    for name, times in seconds.items()
  ]
  print(text_table.align(rows))
  if _OUT.value:
    with open(_OUT.value, 'w') as file:
      json.dump({'seconds': seconds, 'environment': environment.describe()}, file, indent=1)


if __name__ == '__main__':
  app.run(main)
