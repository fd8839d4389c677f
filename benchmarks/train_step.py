"""Times the full training step here and in PyTorch, alternating in one process.

  make bench          # or: python -m benchmarks.train_step [--net=resnet32] [--out=FILE.json]

The step is that of `benchmarks/training_sides.py`, in float32. Before timing, both nets get the
same weights and must agree on logits and gradients. With --compiled PyTorch is timed twice, eagerly
and with torch.compile, which needs a C++ compiler. The ratio is the median time of PyTorch's eager
step by that of a side. The time to the first step and peak memory are measured in a process for
each side.
"""

import json
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from absl import app, flags

from benchmarks import environment, training_sides
from csba_jax.runtime import text_table

_BATCH_SIZES = flags.DEFINE_list('batch_sizes', ['32', '64', '128'], 'Images a step.')
_NET = flags.DEFINE_enum('net', 'multibranch', training_sides.NETS, 'Which net.')
_ATTENTION = flags.DEFINE_enum('attention', 'csba', ['none', 'csba'], 'Of the multi-branch net.')
_WIDTH = flags.DEFINE_float('width', 1.0, 'Of the multi-branch net.')
_REPEATS = flags.DEFINE_integer('repeats', 15, 'Timed steps of each side and batch size.', 1)
_OUT = flags.DEFINE_string('out', None, 'JSON file for the results.')
_COMPILED = flags.DEFINE_bool('compiled', False, 'Also time PyTorch with torch.compile.')
_PROBE = flags.DEFINE_enum(
  'probe', None, ['jax', 'torch', 'torch.compile'], 'Measure one side alone (internal).'
)


def setting(batch: int) -> training_sides.Setting:
  """What is timed."""
  return training_sides.Setting(_NET.value, _ATTENTION.value, _WIDTH.value, batch=batch)


def steps_of(side: str, batch: int):
  """run(n) of one side."""
  if side == 'jax':
    return training_sides.jax_steps(setting(batch))
  compiled = side == 'torch.compile'
  return training_sides.torch_steps(setting(batch), 'cpu', os.cpu_count(), compiled)


def alternate(batch: int) -> dict[str, list[float]]:
  """Seconds of each timed step; the sides alternate."""
  names = ['jax', 'torch', *(['torch.compile'] * _COMPILED.value)]
  sides = {side: steps_of(side, batch) for side in names}
  for run in sides.values():
    run(2)
  seconds = {side: [] for side in sides}
  for _ in range(_REPEATS.value):
    for side, run in sides.items():
      start = time.perf_counter()
      run(1)
      seconds[side].append(time.perf_counter() - start)
  return seconds


def probe(side: str, batch: int) -> None:
  """Prints seconds from building the net to the end of the first step, and peak memory."""
  start = time.perf_counter()
  run = steps_of(side, batch)
  run(1)
  first = time.perf_counter() - start
  run(3)
  peak = environment.peak_mebibytes()
  print(json.dumps({'first_step_seconds': first, 'peak_mebibytes': peak}))


def probe_in_child(side: str, batch: int) -> dict[str, float]:
  """`probe` in a new process."""
  command = [sys.executable, '-m', 'benchmarks.train_step', f'--probe={side}']
  command += [f'--batch_sizes={batch}', f'--attention={_ATTENTION.value}']
  command += [f'--width={_WIDTH.value}', f'--net={_NET.value}']
  out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
  return json.loads(out.splitlines()[-1])


def main(_) -> None:
  """Checks, measures, prints a table, writes the JSON file."""
  batch_sizes = [int(size) for size in _BATCH_SIZES.value]
  if _PROBE.value:
    probe(_PROBE.value, batch_sizes[0])
    return
  model = setting(16).recipe().model  # ResNet-32 has neither attention nor another width
  record = {'net': model.name, 'attention': model.attention, 'width': model.width}
  record |= {'repeats': _REPEATS.value, 'parameters': training_sides.check_twins(setting(16))}
  record |= {'environment': environment.describe(), 'results': []}
  heads = 'batch side images/s slowest fastest ms/step first-step-s peak-MiB ratio'
  rows = [heads.split()]
  for batch_size in batch_sizes:
    seconds = alternate(batch_size)
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    for side, times in seconds.items():
      alone = probe_in_child(side, batch_size)
      record['results'].append({'batch': batch_size, 'side': side, 'seconds': times} | alone)
      rates = [batch_size / t for t in (medians[side], max(times), min(times))]
      rows.append([str(batch_size), side, *(f'{rate:.0f}' for rate in rates)])
      rows[-1] += [f'{1e3 * medians[side]:.1f}', f'{alone["first_step_seconds"]:.1f}']
      rows[-1] += [f'{alone["peak_mebibytes"]:.0f}', f'{medians["torch"] / medians[side]:.2f}']
  print(text_table.align(rows))
  print(json.dumps(record['environment']))
  if _OUT.value:
    with open(_OUT.value, 'w') as file:
      json.dump(record, file, indent=1)


if __name__ == '__main__':
  app.run(main)
