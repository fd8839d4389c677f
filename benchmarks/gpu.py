"""All that waits for a GPU, in ten minutes of one; the JSON file is whole after every row.

  python -m benchmarks.gpu --out=benchmarks/results/gpu.json
  python -m benchmarks.gpu --rehearse --out=gpu.json      # small numbers, on any device

Rows, each in a process of its own, so that one that fails or takes too long costs no other:
  step    training steps of both nets, float32 and bfloat16, here (1 and 97 steps in one dispatch;
          97 are an epoch of CIFAR-10-LT) and in PyTorch (eager and torch.compile, channels last)
  grams   class Grams of ResNet-32 and one ordinary gradient, 10 and 100 classes
  recipe  CIFAR-10-LT on ResNet-32, 200 epochs: cross-entropy and balanced softmax. Needs CIFAR-10
          as array_record under $TFDS_DATA_DIR.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import app, flags

_OUT = flags.DEFINE_string('out', None, 'JSON file for the results.', required=True)
_MINUTES = flags.DEFINE_float('minutes', 10.0, 'For all rows; those that are left are not begun.')
_REHEARSE = flags.DEFINE_bool('rehearse', False, 'Small numbers, to see that every row works.')
_ROW = flags.DEFINE_string('row', None, 'JSON of the one row to measure (internal).')

RECIPES = {
  'cross_entropy': 'cifar10_lt_resnet32',
  'balanced_softmax': 'cifar10_lt_balanced_softmax',
}
EPOCH = 97  # steps of CIFAR-10-LT at batch 128
ROW_SECONDS = 240.0  # of one row at most; a whole recipe is one


def rows() -> list[dict[str, Any]]:
  """What is measured, in the order of its worth."""
  small = _REHEARSE.value
  nets, dtypes = ('resnet32', 'multibranch'), ('float32', 'bfloat16')
  sides = [('jax', 1), ('jax', 2 if small else EPOCH), ('torch', 1), ('torch compiled', 1)]
  found = [
    {'part': 'step', 'net': net, 'dtype': dtype, 'side': side, 'at_once': at_once}
    for net in nets
    for dtype in dtypes
    for side, at_once in sides
  ]
  found += [
    {'part': 'grams', 'classes': classes, 'strategy': strategy}
    for classes in ((2, 3) if small else (10, 100))
    for strategy in ('ordinary', 'stacked')
  ]
  recipes = [{'part': 'recipe', 'loss': loss} for loss in RECIPES]
  return [*found[:4], *recipes, *found[4:]]


def measure_step(row: dict[str, Any]) -> dict[str, Any]:
  """Images/s of a side: the median, slowest and fastest of some stretches of steps."""
  from benchmarks import training_sides

  batch, steps, repeats = (8, 2, 2) if _REHEARSE.value else (128, EPOCH, 7)
  width = 0.1 if _REHEARSE.value else 1.0
  setting = training_sides.Setting(row['net'], 'csba', width, row['dtype'], batch)
  if row['side'] == 'jax':
    run, dispatches = training_sides.jax_steps(setting, row['at_once']), steps // row['at_once']
  else:
    compiled = row['side'] == 'torch compiled'
    run, dispatches = training_sides.torch_steps(setting, os.cpu_count(), compiled), steps
  start = time.perf_counter()
  run(1)
  first = time.perf_counter() - start
  run(dispatches)
  rates = []
  for _ in range(repeats):
    start = time.perf_counter()
    loss = run(dispatches)
    rates.append(batch * dispatches * row['at_once'] / (time.perf_counter() - start))
  return {'batch': batch, 'first_call_seconds': first, 'last_loss': loss} | _spread(rates)


def measure_grams(row: dict[str, Any]) -> dict[str, Any]:
  """Seconds of a pass over 16 images of each class: the median, fastest and slowest of 7."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from csba_jax.gradients import class_grams
  from csba_jax.models import resnet

  classes, images = row['classes'], 2 if _REHEARSE.value else 16
  model = resnet.ResNet(classes)
  variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  shape = (classes, images, 32, 32, 3)
  batch = {
    'image': jnp.asarray(np.random.default_rng(0).standard_normal(shape, dtype=np.float32)),
    'label': np.repeat(np.arange(classes, dtype=np.int32)[:, None], images, 1),
  }

  def losses_fn(params, batch):
    logits = model.apply(variables | {'params': params}, batch['image'], train=False)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])

  flat = {key: jnp.asarray(x).reshape(-1, *x.shape[2:]) for key, x in batch.items()}
  gradient = jax.jit(jax.grad(lambda params: losses_fn(params, flat).mean()))

  def call():
    if row['strategy'] == 'ordinary':
      return jax.block_until_ready(gradient(variables['params']))
    options = {'num_classes': classes, 'head': '^head/', 'per_example': True}
    grams = class_grams(losses_fn, variables['params'], batch, strategy='stacked', **options)
    return jax.block_until_ready(grams.total)

  start = time.perf_counter()
  call()
  first, seconds = time.perf_counter() - start, []
  for _ in range(7):
    start = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - start)
  return {'images_of_a_class': images, 'first_call_seconds': first} | _spread(seconds)


def measure_recipe(row: dict[str, Any]) -> dict[str, Any]:
  """Accuracy, macro-F1 and seconds of csba-train with a whole recipe."""
  recipe = 'digits_lt' if _REHEARSE.value else RECIPES[row['loss']]
  more = [f'--config.loss.name={row["loss"]}', '--config.train.epochs=1'] * _REHEARSE.value
  with tempfile.TemporaryDirectory() as folder:
    workdir = Path(folder) / 'run'
    command = [sys.executable, '-m', 'csba_jax.bin.train', f'--config={recipe}', *more]
    start = time.perf_counter()
    subprocess.run([*command, f'--workdir={workdir}'], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    result = json.loads((workdir / 'result.json').read_text())
  kept = ('accuracy', 'macro_f1', 'balanced_accuracy', 'group_accuracy', 'timing')
  return {'recipe': recipe, 'seconds_in_all': seconds} | {name: result[name] for name in kept}


def _spread(values: list[float]) -> dict[str, float]:
  return {'median': statistics.median(values), 'lowest': min(values), 'highest': max(values)}


MEASURE = {'step': measure_step, 'grams': measure_grams, 'recipe': measure_recipe}


def measured(row: dict[str, Any], seconds: float) -> dict[str, Any]:
  """The row with what a process of its own measured, or with the reason why there is nothing."""
  command = [sys.executable, '-m', 'benchmarks.gpu', f'--out={_OUT.value}']
  command += [f'--row={json.dumps(row)}'] + ['--rehearse'] * _REHEARSE.value
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
  except subprocess.TimeoutExpired:
    return row | {'reason': f'not done after {seconds:.0f} s'}
  if done.returncode:
    return row | {'reason': (done.stderr.strip().splitlines() or ['no message'])[-1][:300]}
  return row | json.loads(done.stdout.splitlines()[-1])


def main(_) -> None:
  """Measures row by row, and writes what there is after each."""
  if _ROW.value:
    row = json.loads(_ROW.value)
    print(json.dumps(MEASURE[row['part']](row)))
    return
  from benchmarks import environment

  end = time.monotonic() + 60 * _MINUTES.value
  record = {'environment': environment.describe(), 'rehearsal': _REHEARSE.value, 'rows': []}
  for row in rows():
    left = end - time.monotonic()
    found = measured(row, min(left, ROW_SECONDS)) if left > 0 else row | {'reason': 'no time left'}
    print(json.dumps(found), flush=True)
    record['rows'].append(found)
    temporary = Path(f'{_OUT.value}.tmp')
    temporary.write_text(json.dumps(record, indent=1))
    temporary.replace(_OUT.value)


if __name__ == '__main__':
  app.run(main)
