"""Times how much longer training takes if the conflict is measured every 100 steps.

  python -m benchmarks.diagnostics --config=configs/cifar10_lt.py [--out=FILE.json]

Training steps and measurements by the probe of a run (compiled step, estimate, file, line)
alternate in one process. cost = seconds of a measurement / seconds of 100 steps. The first
measurement, which compiles, is reported separately.
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
from absl import app, flags
from ml_collections import config_flags

from benchmarks import environment
from csba_jax.data import pipeline, sampling
from csba_jax.measure import probe as probes
from csba_jax.training.job import Job
from csba_jax.training.step import compiled_steps

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Recipe.')
_EVERY = flags.DEFINE_integer('every', 100, 'Steps between measurements.', 1)
_TURNS = flags.DEFINE_integer('turns', 7, 'Measurements, each after --steps steps.', 1)
_STEPS = flags.DEFINE_integer('steps', 8, 'Timed steps before each measurement.', 1)
_OUT = flags.DEFINE_string('out', None, 'JSON file for the result.')


def main(_) -> None:
  """Measures, prints a line, writes the JSON file."""
  config = _CONFIG.value
  data = pipeline.load(config, print)
  job = Job.of(config, data)
  state, _ = job.begin()
  layout = job.layout
  on_device = layout.place({'image': data.train.images, 'label': data.train.labels})
  steps, probe = compiled_steps(), probes.of_config(job.net(state), config, data, layout)

  def step(number: int) -> float:
    nonlocal state
    start = time.perf_counter()
    indices = layout.place_batch(sampling.draw(job.streams, number, number + 1), axis=1)
    state, found = steps(
      state, on_device, indices, job.key, step_fn=job.program.step_fn, layout=layout
    )
    jax.device_get(found)
    return time.perf_counter() - start

  def measure(folder: str) -> float:
    start = time.perf_counter()
    conflict = probe.measure(state)
    conflict.save(Path(folder) / 'snapshot.npz')
    json.dumps(conflict.summary())
    return time.perf_counter() - start

  with tempfile.TemporaryDirectory() as folder:
    step(0)
    first = measure(folder)
    step_seconds, seconds = [], []
    for turn in range(_TURNS.value):
      step_seconds += [step(turn * _STEPS.value + i + 1) for i in range(_STEPS.value)]
      seconds.append(measure(folder))
  cost = statistics.median(seconds) / (_EVERY.value * statistics.median(step_seconds))
  record = {
    'attention': config.model.attention,
    'width': config.model.width,
    'batch_size': config.train.batch_size,
    'probe_images_per_class': config.diagnostics.images,
    'every': _EVERY.value,
    'step_seconds': step_seconds,
    'measurement_seconds': seconds,
    'first_measurement_seconds': first,
    'cost': cost,
    'environment': environment.describe(),
  }
  print(
    f'step {statistics.median(step_seconds):.3f} s, measurement {statistics.median(seconds):.3f} s '
    f'(first {first:.1f} s): {100 * cost:.2f} % more time at every={_EVERY.value}'
  )
  print(json.dumps(record['environment']))
  if _OUT.value:
    Path(_OUT.value).write_text(json.dumps(record, indent=1))


if __name__ == '__main__':
  app.run(main)
