"""Times the training step and the class Grams with several Pythons, whose JAX versions differ.

  python -m benchmarks.versions --pythons=.venv/bin/python,.venv-oldest/bin/python [--out=FILE.json]

Each Python runs one process for each measurement, with the code of this checkout. The processes
alternate, call by call, so that other work on the machine affects all of them alike. Training step:
the multi-branch net with csba, float32, 32x32 images. Class Grams: ten classes of 16 images, frozen
BatchNorm statistics, strategy 'stacked'.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from absl import app, flags

_PYTHONS = flags.DEFINE_list('pythons', [sys.executable], 'Interpreters to compare.')
_REPEATS = flags.DEFINE_integer('repeats', 15, 'Timed calls of each process.', 1)
_OUT = flags.DEFINE_string('out', None, 'JSON file for the results.')
_CHILD = flags.DEFINE_string('child', None, 'Measure this one alone (internal).')

IMAGE = (32, 32, 3)
MEASUREMENTS = (
  *(f'step-{batch}' for batch in (32, 64, 128)),
  *(f'grams-{net}' for net in ('multibranch', 'resnet32')),
)


def make_call(name: str) -> Callable[[], object]:
  """A function that does the work once and waits for it; compiled at its first call."""
  kind, _, size = name.partition('-')
  return training_step(int(size)) if kind == 'step' else grams(size)


def training_step(batch_size: int) -> Callable[[], object]:
  """A function that does one training step of the default config; data is on the device."""
  import jax
  import numpy as np

  from csba_jax import config as config_lib
  from csba_jax.methods import optimizers
  from csba_jax.models import registry
  from csba_jax.run import state as state_lib
  from csba_jax.runtime import sharding
  from csba_jax.training import step as step_lib

  config = config_lib.default()
  model = registry.build(config.model, 10, IMAGE)
  tx, _ = optimizers.build(config, total_steps=10_000)
  state, layout = state_lib.create(model, tx, IMAGE, 0), sharding.layout(config)
  step_fn = step_lib.make_step(config, model, tx, np.ones(10), 10_000, layout)
  rng = np.random.default_rng(0)
  data = {
    'image': rng.integers(0, 256, (batch_size, *IMAGE), dtype=np.uint8),
    'label': rng.integers(0, 10, batch_size, dtype=np.int32),
  }
  data, key = jax.device_put(data), jax.random.key(0)
  inputs = {'own': np.arange(batch_size, dtype=np.int32)[None]}

  def call():
    nonlocal state
    found = step_lib.compiled_steps()(state, data, inputs, key, step_fn=step_fn, layout=layout)
    state, _ = jax.block_until_ready(found)

  return call


def grams(net: str) -> Callable[[], object]:
  """Class Grams of a net at its start."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from csba_jax.gradients import class_grams
  from csba_jax.models import multibranch, resnet

  if net == 'resnet32':
    model = resnet.ResNet(10)
  else:
    model = multibranch.build(10, IMAGE, 'csba', 1.0, jnp.float32)
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *IMAGE)))
  images = np.random.default_rng(0).standard_normal((10, 16, *IMAGE), dtype=np.float32)
  labels = np.broadcast_to(np.arange(10, dtype=np.int32)[:, None], (10, 16))
  batch = {'image': jnp.asarray(images), 'label': labels}

  def losses_fn(params, batch):
    logits = model.apply(variables | {'params': params}, batch['image'], train=False)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])

  options = {'num_classes': 10, 'head': '^head/', 'strategy': 'stacked', 'per_example': True}
  return lambda: jax.block_until_ready(
    class_grams(losses_fn, variables['params'], batch, **options)
  )


def serve(name: str) -> None:
  """Prints versions and seconds to the end of the first call, then makes a call for each line."""
  start = time.perf_counter()
  call = make_call(name)
  call()
  first = time.perf_counter() - start
  call()
  from csba_jax.run import workdir

  print(json.dumps({'first': first, 'versions': workdir.versions()}), flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    call()
    print(time.perf_counter() - start, flush=True)


def compare(name: str, pythons: list[str]) -> list[dict[str, object]]:
  """Seconds of each call with each Python; the Pythons alternate."""
  children, found = [], []
  for python in pythons:  # one after the other: compilation would disturb the others
    child = subprocess.Popen(
      [python, '-m', 'benchmarks.versions', f'--child={name}'],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | {'PYTHONPATH': os.getcwd(), 'JAX_ENABLE_COMPILATION_CACHE': 'false'},
    )
    children.append(child)
    found.append(json.loads(child.stdout.readline()) | {'measurement': name, 'seconds': []})
  for _ in range(_REPEATS.value):
    for child, record in zip(children, found, strict=True):
      child.stdin.write('go\n')
      child.stdin.flush()
      record['seconds'].append(float(child.stdout.readline()))
  for child in children:
    child.communicate()
  return found


def main(_) -> None:
  """Compares, prints a table, writes the JSON file."""
  if _CHILD.value:
    serve(_CHILD.value)
    return
  from benchmarks import environment
  from csba_jax.runtime import text_table

  rows = [['measurement', 'Python', 'JAX', 'ms', 'fastest', 'slowest', 'first call, s']]
  results = []
  for name in MEASUREMENTS:
    for record in compare(name, _PYTHONS.value):
      results.append(record)
      seconds, versions = record['seconds'], record['versions']
      times = (statistics.median(seconds), min(seconds), max(seconds))
      milliseconds = [f'{1e3 * s:.0f}' for s in times]
      head = [name, versions['python'], versions['jax']]
      rows.append([*head, *milliseconds, f'{record["first"]:.1f}'])
  print(text_table.align(rows))
  if _OUT.value:
    with open(_OUT.value, 'w') as file:
      json.dump({'environment': environment.describe(), 'results': results}, file, indent=1)


if __name__ == '__main__':
  app.run(main)
