"""Times a training step with gradient surgery against the plain one, and a measurement for it.

  python -m benchmarks.surgery [--norm=group] [--classes=10] [--out=FILE.json]

The multi-branch net with csba, float32, images of 32x32, batches of 128 labels that are drawn from
long-tailed classes (imbalance factor 100). The steps alternate, so that other work on the machine
affects all of them alike.

- plain: the ordinary gradient.
- weighted: the weights of the last measurement multiply the losses of their classes.
- exact: weights from the batch's own class gradients, `upgrad`.
- measurement: what surgery.every = K pays every K steps.
"""

import json
import os
import statistics
import time
import types
from collections.abc import Callable

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags

from benchmarks import environment
from csba_jax import config as config_lib
from csba_jax.data.class_counts import profile_counts
from csba_jax.data.pipeline import Part
from csba_jax.methods import optimizers
from csba_jax.methods import surgery as methods
from csba_jax.models import registry
from csba_jax.run import state as state_lib
from csba_jax.run.net import Metadata, Net
from csba_jax.runtime import sharding, text_table
from csba_jax.training import step as step_lib
from csba_jax.training import surgery

_NORM = flags.DEFINE_enum('norm', 'group', ['group', 'batch'], 'Norm of the net.')
_CLASSES = flags.DEFINE_integer('classes', 10, 'Number of classes.', 2)
_BATCH = flags.DEFINE_integer('batch', 128, 'Images of a step.', 2)
_REPEATS = flags.DEFINE_integer('repeats', 7, 'Timed calls of each.', 1)
_LAYERS = flags.DEFINE_string('layers', '', 'surgery.layers of the measurement.')
_OUT = flags.DEFINE_string('out', None, 'JSON file for the results.')

IMAGE, IMBALANCE = (32, 32, 3), 100.0
WAYS = {  # name: (surgery.name, surgery.every)
  'plain': ('none', 100),
  'weighted': ('upgrad', 100),
  'exact': ('upgrad', 1),
}


def recipe(way: str) -> ml_collections.ConfigDict:
  """The default config with the net and the surgery that is timed."""
  config = config_lib.default()
  config.model.norm, config.train.batch_size = _NORM.value, _BATCH.value
  config.surgery.name, config.surgery.every = WAYS[way]
  config.surgery.layers = _LAYERS.value
  return config


def made_up() -> types.SimpleNamespace:
  """Random images of long-tailed classes."""
  rng = np.random.default_rng(0)
  counts = profile_counts(500, _CLASSES.value, IMBALANCE, 'exp')
  labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
  images = rng.integers(0, 256, (len(labels), *IMAGE), dtype=np.uint8)
  return types.SimpleNamespace(train=Part(images, labels), class_counts=counts)


def step_of(way: str, data: types.SimpleNamespace) -> Callable[[], object]:
  """A function that does one step and waits for it; the next call takes other images."""
  config, classes = recipe(way), _CLASSES.value
  model = registry.build(config.model, classes, IMAGE)
  tx, _ = optimizers.build(config, total_steps=10_000)
  state = state_lib.create(model, tx, IMAGE, 0).replace(surgery=methods.initial(config, classes))
  layout = sharding.layout(config)
  step_fn = step_lib.make_step(config, model, tx, data.class_counts, 10_000, layout)
  on_device = jax.device_put({'image': data.train.images, 'label': data.train.labels})
  key, rng = jax.random.key(0), np.random.default_rng(1)

  def call() -> object:
    nonlocal state
    index = rng.choice(len(data.train), _BATCH.value, replace=False).astype(np.int32)
    state, found = jax.block_until_ready(
      step_lib.compiled_steps()(
        state, on_device, {'own': index[None]}, key, step_fn=step_fn, layout=layout
      )
    )
    return found

  return call


def measurement(data: types.SimpleNamespace) -> Callable[[], object]:
  """A function that measures once, and chooses weights."""
  config, classes = recipe('weighted'), _CLASSES.value
  model = registry.build(config.model, classes, IMAGE)
  tx, _ = optimizers.build(config, total_steps=10_000)
  state = state_lib.create(model, tx, IMAGE, 0).replace(surgery=methods.initial(config, classes))
  names = tuple(map(str, range(classes)))
  net = Net.of_shapes(model, Metadata(names, data.class_counts, IMAGE))
  cut = methods.build(config, data.class_counts)
  found = surgery.Measurement(cut, net, config, data, sharding.layout(config))
  steps = iter(range(10**6))
  return lambda: found.renew(state.replace(step=jnp.int32(next(steps))))


def main(_: list[str]) -> None:
  """Times everything in turn, prints a table, writes the JSON file."""
  data = made_up()
  calls = {way: step_of(way, data) for way in WAYS} | {'measurement': measurement(data)}
  first, seconds = {}, {name: [] for name in calls}
  for name, call in calls.items():
    began = time.perf_counter()
    call()
    first[name] = time.perf_counter() - began
    call()
  for _ in range(_REPEATS.value):
    for name, call in calls.items():
      began = time.perf_counter()
      call()
      seconds[name].append(time.perf_counter() - began)
  plain = statistics.median(seconds['plain'])
  rows = [['', 'ms', 'fastest', 'slowest', 'plain steps', 'first call, s']]
  for name, times in seconds.items():
    middle = statistics.median(times)
    shown = [f'{1e3 * s:.0f}' for s in (middle, min(times), max(times))]
    rows.append([name, *shown, f'{middle / plain:.2f}', f'{first[name]:.1f}'])
  print(text_table.align(rows))
  if _OUT.value:
    settings = {name: flags.FLAGS[name].value for name in ('norm', 'classes', 'batch', 'layers')}
    found = {'settings': settings, 'seconds': seconds, 'first': first}
    with open(_OUT.value, 'w') as file:
      json.dump({'environment': environment.describe(), **found}, file, indent=1)


if __name__ == '__main__':
  app.run(main)
