"""Compares the rate of streamed batches with that of the training step; memory over many steps.

  python -m benchmarks.input_pipeline --config=configs/cifar10_lt.py [--out=FILE.json]
  python -m benchmarks.input_pipeline --config=configs/image_folder.py --config.data.image_size=224

It measures images/s of `streaming.Feed` alone, with its file in the system's page cache and (cold)
after dropping it from that cache; of the compiled training step on one batch on the device; and of
the step on the batches of the feed. Then it records resident memory while 10,000 batches go through
a small compiled function.
"""

import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from benchmarks import environment
from csba_jax.data import pipeline, streaming
from csba_jax.runtime import backend, text_table
from csba_jax.training.job import Job

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Recipe.')
_TURNS = flags.DEFINE_integer('turns', 7, 'Number of timings of each side.', 1)
_SECONDS = flags.DEFINE_float('seconds', 2.0, 'Seconds of the feed in each timing.')
_STEPS = flags.DEFINE_integer('steps', 5, 'Training steps in each timing.', 1)
_MEMORY_STEPS = flags.DEFINE_integer('memory_steps', 10_000, 'Steps while memory is recorded.', 100)
_OUT = flags.DEFINE_string('out', None, 'JSON file for the result.')

ENDLESS = 10**9  # steps of a feed; the benchmark ends earlier


def rate(job: Job, step: Callable[[], object], seconds: float, steps: int) -> float:
  """Images/s of a function that does one step, over at least so many steps and seconds."""
  start, done = time.perf_counter(), 0
  while done < steps or time.perf_counter() - start < seconds:
    step()
    done += 1
  return done * job.batch_size / (time.perf_counter() - start)


def feed_of(job: Job, start: int = 0) -> streaming.Feed:
  """The feed of a run of one process."""
  return streaming.Feed(job.data.train, job.streams, np.arange(job.batch_size), start, ENDLESS)


def cold_rate(job: Job, cache_dir: str) -> float:
  """Images/s of a pass over data outside the page cache; at most 200 steps."""
  for path in Path(cache_dir).glob('*/images.npy'):
    with path.open('rb') as file:
      os.fsync(file.fileno())
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
  steps = min(200, len(job.data.train) // job.batch_size)
  with feed_of(job) as feed:
    return rate(job, lambda: next(feed), 0, steps)


def trained(job: Job) -> Callable[[dict[str, np.ndarray]], None]:
  """A function that does one training step on a batch and waits for it."""
  state, _ = job.begin()
  options = backend.compiler_options()
  step_fn = jax.jit(job.program.step_fn, donate_argnums=0, compiler_options=options)

  def step(batch):
    nonlocal state
    state, found = step_fn(state, jax.device_put(batch), job.key)
    jax.device_get(found)

  return step


def resident_mebibytes() -> float:
  """Resident memory of this process now, MiB."""
  pages = int(Path('/proc/self/statm').read_text().split()[1])
  return pages * os.sysconf('SC_PAGE_SIZE') / 2**20


def memory(job: Job) -> list[float]:
  """Resident memory, MiB, after each hundredth of the steps."""
  consume = jax.jit(lambda batch: jax.tree.map(lambda x: x.mean(), batch))
  every, found = _MEMORY_STEPS.value // 100, []
  with feed_of(job) as feed:
    for step, batch in enumerate(itertools.islice(feed, _MEMORY_STEPS.value), start=1):
      jax.block_until_ready(consume(batch))
      if step % every == 0:
        found.append(resident_mebibytes())
  return found


def measure(job: Job, cache_dir: str) -> dict[str, list[float]]:
  """Images/s of each side, which alternate, and memory."""
  found = {side: [] for side in ('feed', 'feed, cold', 'step', 'step on the feed')}
  train_on = trained(job)
  with feed_of(job, ENDLESS // 2) as steady:  # its buffer is full at its turn
    on_device = jax.device_put(next(steady))
    train_on(on_device)
    for turn in range(_TURNS.value):
      found['feed, cold'].append(cold_rate(job, cache_dir))
      with feed_of(job, turn * 10_000) as feed:
        next(feed)
        found['feed'].append(rate(job, lambda feed=feed: next(feed), _SECONDS.value, 1))
      found['step'].append(rate(job, lambda: train_on(on_device), 0, _STEPS.value))
      on_feed = rate(job, lambda: train_on(next(steady)), 0, _STEPS.value)
      found['step on the feed'].append(on_feed)
  return {'images_per_second': found, 'resident_mebibytes': memory(job)}


def main(_) -> None:
  """Measures, prints a table, writes the JSON file."""
  config = _CONFIG.value
  with tempfile.TemporaryDirectory() as cache_dir:
    config.data.update(input='stream', cache_dir=cache_dir)
    job = Job.of(config, pipeline.load(config, print))
    record = {
      'source': config.data.name or config.data.source,
      'image_shape': job.data.image_shape,
      'images': len(job.data.train),
      'batch_size': job.batch_size,
      'width': config.model.width,
      **measure(job, cache_dir),
      'environment': environment.describe(),
    }
  rates = record['images_per_second']
  medians = {side: statistics.median(found) for side, found in rates.items()}
  rows = [['side', 'images/s', 'slowest', 'fastest', 'against-the-step']]
  for side, found in rates.items():
    values = (medians[side], min(found), max(found))
    row = [*(f'{value:.0f}' for value in values), f'{medians[side] / medians["step"]:.2f}']
    rows.append([side.replace(' ', '-'), *row])
  print(text_table.align(rows))
  resident = record['resident_mebibytes']
  print(
    f'memory after 1, 10, 50 and 100 % of {_MEMORY_STEPS.value} steps: '
    f'{", ".join(f"{resident[i]:.0f}" for i in (0, 9, 49, 99))} MiB (most: {max(resident):.0f})'
  )
  print(json.dumps(record['environment']))
  if _OUT.value:
    Path(_OUT.value).write_text(json.dumps(record, indent=1))


if __name__ == '__main__':
  app.run(main)
