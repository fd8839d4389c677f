"""Records memory of a long training run, with evaluations, checkpoints and diagnostics.

  python -m benchmarks.long_run [--epochs=1800] [--arenas=1] [--out=FILE.json]

It trains a narrow net on the digits with csba-train and reads resident memory twice a second.
Target: no growth from the second quarter of the steps to the last.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

from benchmarks import environment

_EPOCHS = flags.DEFINE_integer('epochs', 1800, 'Epochs, of six steps each.', 1)
_ARENAS = flags.DEFINE_integer(
  'arenas', None, 'Most heaps of malloc (MALLOC_ARENA_MAX); the default of the system.', 1
)
_OUT = flags.DEFINE_string('out', None, 'JSON file for the result.')
QUARTERS = 4


def main(_) -> None:
  """Measures, prints a line, writes the JSON file."""
  with tempfile.TemporaryDirectory() as folder:
    samples = run(Path(folder) / 'run')
  last = samples[-1][0]
  means = []
  for quarter in range(QUARTERS):
    low, high = (last * part / QUARTERS for part in (quarter, quarter + 1))
    inside = [mebibytes for step, mebibytes in samples if low < step <= high]
    means.append(round(sum(inside) / len(inside)))
  record = {'steps': last, 'malloc_arenas': _ARENAS.value, 'mean_mebibytes_of_quarters': means}
  record |= environment.describe()
  print(f'{last} steps, resident memory by quarter in MiB: {means}')
  if _OUT.value:
    Path(_OUT.value).write_text(json.dumps(record, indent=1) + '\n')


def run(workdir: Path) -> list[tuple[int, float]]:
  """(step, MiB) of a training process, twice a second, from its first line of metrics on."""
  command = [sys.executable, '-m', 'csba_jax.bin.train', '--config=configs/digits_lt.py']
  command += [f'--workdir={workdir}', '--config.model.width=0.05', '--config.train.save_every=600']
  command += [f'--config.train.epochs={_EPOCHS.value}', '--config.train.eval_every=100']
  command += ['--config.diagnostics.every=1000']
  own = {'MALLOC_ARENA_MAX': str(_ARENAS.value)} if _ARENAS.value else {}
  quiet = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
  samples = []
  with subprocess.Popen(command, env=os.environ | own, **quiet) as process:
    while process.poll() is None:
      time.sleep(0.5)
      try:
        lines = (workdir / 'metrics.jsonl').read_text().splitlines()
        status = Path(f'/proc/{process.pid}/status').read_text()
      except FileNotFoundError:  # not started yet, or finished
        continue
      resident = [line for line in status.splitlines() if line.startswith('VmRSS')]
      if lines and resident:
        samples.append((json.loads(lines[-1])['step'], int(resident[0].split()[1]) / 1024))
  if process.returncode:
    raise SystemExit(f'csba-train ended with {process.returncode}')
  return samples


if __name__ == '__main__':
  app.run(main)
