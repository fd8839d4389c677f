"""Runs all measurements that need a GPU within so many minutes, and writes JSON after each row.

  python -m benchmarks.gpu --out=benchmarks/results/gpu.json
  python -m benchmarks.gpu --rehearse --out=gpu.json      # small numbers, on any device

It needs JAX for CUDA, PyTorch for CUDA, and a C compiler for torch.compile. All rows use the first
GPU. Each row runs in a process of its own: one that fails or takes too long does not spoil the
others. A row without a measurement has a reason. Float32 may be TF32 in products and convolutions.

  step    training steps of both nets, float32 and bfloat16, here (1 and 97 steps in one dispatch;
          97 are an epoch of CIFAR-10-LT) and in PyTorch (eager and torch.compile, channels last)
  grams   class Grams of ResNet-32 and one ordinary gradient, 10 and 100 classes
  recipe  CIFAR-10-LT on ResNet-32, 200 epochs: cross-entropy and balanced softmax. Needs CIFAR-10
          as array_record under $TFDS_DATA_DIR. The first one decodes the images, too.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import app, flags

_OUT = flags.DEFINE_string('out', None, 'JSON file for the results.', required=True)
_MINUTES = flags.DEFINE_float('minutes', 9.0, 'For all rows. No row begins later.')
_REHEARSE = flags.DEFINE_bool('rehearse', False, 'Small numbers, to see that every row works.')
_ROW = flags.DEFINE_string('row', None, 'JSON of the one row to measure (internal).')

RECIPES = {
  'cross_entropy': 'cifar10_lt_resnet32',
  'balanced_softmax': 'cifar10_lt_balanced_softmax',
}
EPOCH = 97  # steps of CIFAR-10-LT at batch 128
SECONDS = {'environment': 60.0, 'step': 60.0, 'grams': 60.0, 'recipe': 200.0}  # of a row, at most


def rows() -> list[dict[str, Any]]:
  """What is measured, in the order of its worth."""
  small = _REHEARSE.value
  grams = [
    {'part': 'grams', 'classes': classes, 'strategy': strategy}
    for classes in ((2, 3) if small else (10, 100))
    for strategy in ('ordinary', 'stacked')
  ]
  recipes = [{'part': 'recipe', 'loss': loss} for loss in RECIPES]
  return [*_steps_of('resnet32', small), *grams, *recipes, *_steps_of('multibranch', small)]


def _steps_of(net: str, small: bool) -> list[dict[str, Any]]:
  sides = [('jax', 1), ('jax', 2 if small else EPOCH), ('torch', 1), ('torch compiled', 1)]
  return [
    {'part': 'step', 'net': net, 'dtype': dtype, 'side': side, 'at_once': at_once}
    for dtype in ('float32', 'bfloat16')
    for side, at_once in sides
  ]


def measure_environment(_: dict[str, Any]) -> dict[str, Any]:
  """Devices and versions; an error where JAX has no accelerator and this is no rehearsal."""
  import jax

  from benchmarks import environment

  if jax.default_backend() == 'cpu' and not _REHEARSE.value:
    sys.exit('expected a GPU for JAX; found CPUs alone; to fix it: install JAX for CUDA')
  return {'backend': jax.default_backend()} | environment.describe()


def measure_step(row: dict[str, Any]) -> dict[str, Any]:
  """Images/s of a side: the median, slowest and fastest of some stretches of steps."""
  from benchmarks import training_sides

  batch, steps, repeats = (8, 2, 2) if _REHEARSE.value else (128, EPOCH, 7)
  width = 0.1 if _REHEARSE.value else 1.0
  setting = training_sides.Setting(row['net'], 'csba', width, row['dtype'], batch)
  if row['side'] == 'jax':
    run, dispatches = training_sides.jax_steps(setting, row['at_once']), steps // row['at_once']
  else:
    import torch

    device, compiled = 'cuda' if torch.cuda.is_available() else 'cpu', 'compiled' in row['side']
    if device == 'cpu' and not _REHEARSE.value:
      sys.exit('expected a GPU for PyTorch; found none; to fix it: install its build for CUDA')
    run = training_sides.torch_steps(setting, device, os.cpu_count(), compiled)
    dispatches = steps
  start = time.perf_counter()
  run(1)
  first = time.perf_counter() - start
  run(dispatches)
  rates = []
  for _ in range(repeats):
    start = time.perf_counter()
    loss = run(dispatches)
    rates.append(batch * dispatches * row['at_once'] / (time.perf_counter() - start))
  about = {'batch': batch, 'first_call_seconds': first, 'last_loss': loss}
  return about | {'images_per_second': _spread(rates)}


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
  gradient = jax.jit(jax.grad(lambda params, flat: losses_fn(params, flat).mean()))

  def call():
    if row['strategy'] == 'ordinary':
      return jax.block_until_ready(gradient(variables['params'], flat))
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
  about = {'images_of_a_class': images, 'first_call_seconds': first}
  return about | {'seconds': _spread(seconds)}


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


MEASURE = {
  'environment': measure_environment,
  'step': measure_step,
  'grams': measure_grams,
  'recipe': measure_recipe,
}


def measured(row: dict[str, Any], seconds: float) -> dict[str, Any]:
  """The row with what a process of its own measured, or with the reason why there is nothing."""
  command = [sys.executable, '-m', 'benchmarks.gpu', f'--out={_OUT.value}']
  command += [f'--row={json.dumps(row)}'] + ['--rehearse'] * _REHEARSE.value
  environment = {'CUDA_VISIBLE_DEVICES': '0'} | os.environ
  with tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+') as err:
    process = subprocess.Popen(
      command, stdout=out, stderr=err, env=environment, start_new_session=True
    )
    try:
      code = process.wait(seconds)
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, signal.SIGKILL)  # with what the row has started
      process.wait()
      return row | {'reason': f'not done after {seconds:.0f} s'}
    said = []
    for file in (out, err):
      file.seek(0)
      said.append(file.read().strip().splitlines())
  if code:
    return row | {'reason': said[1][-10:]}
  return row | json.loads(said[0][-1])


def main(_) -> None:
  """Measures row by row, and writes what there is after each."""
  if _ROW.value:
    row = json.loads(_ROW.value)
    print(json.dumps(MEASURE[row['part']](row)))
    return
  end = time.monotonic() + 60 * _MINUTES.value
  record: dict[str, Any] = {'rehearsal': _REHEARSE.value, 'rows': []}
  for row in ({'part': 'environment'}, *rows()):
    left = end - time.monotonic()
    limit = min(left, SECONDS[row['part']])
    found = measured(row, limit) if left > 0 else row | {'reason': 'no time left'}
    print(json.dumps(found), flush=True)
    record['rows'].append(found)
    temporary = Path(f'{_OUT.value}.tmp')
    temporary.write_text(json.dumps(record, indent=1))
    temporary.replace(_OUT.value)
    if row['part'] == 'environment' and 'reason' in found:
      sys.exit(f'benchmarks.gpu: {found["reason"][-1]}')


if __name__ == '__main__':
  app.run(main)
