"""Times training steps of the nets that have pretrained weights, whole and frozen, and predictions.

  python -m benchmarks.photo_nets [--nets=efficientnet_lite0,resnet18] [--sizes=96,128]

Weights are random: they do not change the time. A frozen step computes the gradient of the
classifier alone, and BatchNorm keeps its statistics. Prints images/s, median (slowest to fastest),
and seconds of compilation.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import environment
from csba_jax import config as config_lib
from csba_jax.methods import optimizers
from csba_jax.models import registry
from csba_jax.run import state as state_lib
from csba_jax.run.net import Preprocessing
from csba_jax.runtime import backend, sharding, text_table
from csba_jax.training import step

_NETS = flags.DEFINE_list('nets', ['efficientnet_lite0', 'resnet18'], 'Values of model.name.')
_SIZES = flags.DEFINE_list('sizes', ['96', '128'], 'Pixels a side.')
_BATCH = flags.DEFINE_integer('batch', 32, 'Images at a time.', 1)
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed calls.', 1)
_OUT = flags.DEFINE_string('out', None, 'JSON file for the results.')
CLASSES = 6


def calls_of(net: str, size: int) -> dict[str, Callable[[], Any]]:
  """{what: a call that does it once and waits}."""
  config = config_lib.load('image_folder')
  config.data.image_size, config.data.num_classes = size, CLASSES
  config.model.update({'name': net, 'attention': 'none', 'width': 1.0})
  shape, counts = (size, size, 3), np.full(CLASSES, 100)
  model = registry.build(config.model, CLASSES, shape)
  tx, _ = optimizers.build(config, 100)
  layout, key = sharding.layout(config), jax.random.key(0)
  state = state_lib.create(model, tx, shape, 0, False)
  rng = np.random.default_rng(0)
  batch = {
    'image': jnp.asarray(rng.integers(0, 256, (_BATCH.value, *shape), np.uint8)),
    'label': jnp.asarray(rng.integers(0, CLASSES, _BATCH.value, np.int32)),
  }
  found: dict[str, Callable[[], Any]] = {}
  for what in ('step', 'frozen step'):
    one = step.make_step(config, model, tx, counts, 100, layout, frozen=what == 'frozen step')
    compiled = backend.jit(one)()
    found[what] = lambda compiled=compiled: compiled(state, batch, key)
  preprocessing = Preprocessing.of(config.model)

  def predict(params: Any, batch_stats: Any, images: jax.Array) -> jax.Array:
    variables = {'params': params, 'batch_stats': batch_stats}
    return model.apply(variables, preprocessing(images), train=False)

  compiled = backend.jit(predict)()
  found['prediction'] = lambda: compiled(state.params, state.batch_stats, batch['image'])
  return found


def timed(call: Callable[[], Any]) -> tuple[float, list[float]]:
  """Seconds of the first call, with its compilation, and of each repeat."""
  seconds = []
  for _ in range(1 + _REPEATS.value):
    start = time.perf_counter()
    jax.block_until_ready(call())
    seconds.append(time.perf_counter() - start)
  return seconds[0], seconds[1:]


def main(argv: list[str]) -> None:
  """Measures, prints, and writes."""
  del argv
  rows, records = [], []
  for net in _NETS.value:
    for size in map(int, _SIZES.value):
      for what, call in calls_of(net, size).items():
        first, seconds = timed(call)
        rates = [_BATCH.value / s for s in seconds]
        middle = f'{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})'
        rows.append([net, str(size), what, middle, f'{first:.0f}'])
        records.append(
          {'net': net, 'pixels': size, 'what': what, 'seconds': seconds, 'first': first}
        )
  head = ['net', 'pixels', 'what', 'images/s', 'first call, s']
  print(text_table.align([head, *rows]))
  about = environment.describe() | {'batch': _BATCH.value}
  print(json.dumps(about))
  if _OUT.value:
    with open(_OUT.value, 'w') as file:
      json.dump({'about': about, 'results': records}, file, indent=1)


if __name__ == '__main__':
  app.run(main)
