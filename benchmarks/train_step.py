"""Times the full training step here and in PyTorch, alternating in one process.

  make bench          # or: python -m benchmarks.train_step [--attention=none] [--out=FILE.json]

A step converts uint8 images to float, runs forward and backward, updates batch statistics, and
takes a step of SGD with Nesterov momentum and weight decay, in float32 and without augmentation.
Before timing, both nets get the same weights and must agree on logits and gradients. The time to
the first step and peak memory are measured in a process for each side.
"""

import json
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import environment
from csba_jax import config as config_lib
from csba_jax.methods import losses, optimizers
from csba_jax.models import multibranch, registry
from csba_jax.run import state as state_lib
from csba_jax.runtime import sharding, text_table
from csba_jax.training import step as step_lib

_BATCH_SIZES = flags.DEFINE_list('batch_sizes', ['32', '64', '128'], 'Images a step.')
_ATTENTION = flags.DEFINE_enum('attention', 'csba', ['none', 'csba'], 'Attention of both nets.')
_WIDTH = flags.DEFINE_float('width', 1.0, 'Width of both nets.')
_REPEATS = flags.DEFINE_integer('repeats', 15, 'Timed steps of each side and batch size.', 1)
_OUT = flags.DEFINE_string('out', None, 'JSON file for the results.')
_PROBE = flags.DEFINE_enum('probe', None, ['jax', 'torch'], 'Measure one side alone (internal).')

CHANNELS, SIZE, CLASSES = 3, 32, 10


def recipe():
  """The default config, with the attention and width of this benchmark."""
  config = config_lib.default()
  config.model.attention, config.model.width = _ATTENTION.value, _WIDTH.value
  return config


def images_and_labels(batch_size: int):
  """Random uint8 images and labels."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (batch_size, SIZE, SIZE, CHANNELS), dtype=np.uint8)
  return images, rng.integers(0, CLASSES, batch_size, dtype=np.int32)


def build_model(dtype: str = 'float32') -> multibranch.MultiBranch:
  """The net under test."""
  config = recipe()
  config.model.dtype = dtype
  return registry.build(config.model, CLASSES, (SIZE, SIZE, CHANNELS))


def jax_step(batch_size: int):
  """A function that does one step in JAX and waits for it."""
  config, model = recipe(), build_model()
  tx, _ = optimizers.build(config, total_steps=10_000)
  state = state_lib.create(model, tx, (SIZE, SIZE, CHANNELS), 0)
  layout = sharding.layout(config)
  step_fn = step_lib.make_step(config, model, tx, np.ones(CLASSES), 10_000, layout)
  images, labels = images_and_labels(batch_size)
  data = jax.device_put({'image': images, 'label': labels})
  indices, key = {'own': np.arange(batch_size, dtype=np.int32)[None]}, jax.random.key(0)

  def step():
    nonlocal state
    state, metrics = step_lib.compiled_steps()(
      state, data, indices, key, step_fn=step_fn, layout=layout
    )
    return float(jax.block_until_ready((state, metrics))[1]['loss'][0])

  return step


def torch_step(batch_size: int):
  """A function that does one step in PyTorch, channels last, its fastest layout here."""
  import torch

  from benchmarks import torch_multibranch as twin

  torch.set_num_threads(os.cpu_count())
  net = twin.Net(build_model()).to(memory_format=torch.channels_last)
  sgd = twin.optimizer(net, recipe().train)
  images, labels = images_and_labels(batch_size)
  images = torch.from_numpy(images).permute(0, 3, 1, 2)  # channels last already
  labels = torch.from_numpy(labels.astype(np.int64))

  def step():
    sgd.zero_grad()
    loss = torch.nn.functional.cross_entropy(net(images.float() / 127.5 - 1), labels)
    loss.backward()
    sgd.step()
    return loss.item()

  return step


def check_twins() -> int:
  """Asserts that both nets give the same in float64; returns the number of parameters."""
  import torch

  from benchmarks import torch_multibranch as twin

  images, labels = images_and_labels(16)
  with jax.enable_x64(True):
    model = build_model('float64')
    variables = model.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, CHANNELS)))
    variables = jax.tree.map(lambda x: x.astype(jnp.float64), variables)

    def objective(params):
      inputs = jnp.asarray(images) / 127.5 - 1
      mutable = {'params': params, 'batch_stats': variables['batch_stats']}
      logits, _ = model.apply(mutable, inputs, train=True, mutable=['batch_stats'])
      return losses.cross_entropy(logits, labels).mean(), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(variables['params'])
    expected = twin.from_flax(grads)
  net = twin.Net(model).double()
  net.load_state_dict(twin.from_flax(variables['params']), strict=False)
  theirs = net(torch.from_numpy(images).permute(0, 3, 1, 2).double() / 127.5 - 1)
  torch.nn.functional.cross_entropy(theirs, torch.from_numpy(labels).long()).backward()
  np.testing.assert_allclose(theirs.detach().numpy(), logits, rtol=1e-6, atol=1e-6)
  assert expected.keys() == dict(net.named_parameters()).keys()
  for name, parameter in net.named_parameters():
    error = (parameter.grad - expected[name]).norm() / expected[name].norm()
    assert error < 1e-5, (name, error)  # our classifier computes in float32
  return sum(x.size for x in jax.tree.leaves(variables['params']))


def alternate(batch_size: int) -> dict[str, list[float]]:
  """Seconds of each timed step; the two sides alternate."""
  steps = {'jax': jax_step(batch_size), 'torch': torch_step(batch_size)}
  for step in steps.values():
    step(), step()
  seconds = {side: [] for side in steps}
  for _ in range(_REPEATS.value):
    for side, step in steps.items():
      start = time.perf_counter()
      step()
      seconds[side].append(time.perf_counter() - start)
  return seconds


def probe(side: str, batch_size: int) -> None:
  """Prints seconds from building the net to the end of the first step, and peak memory."""
  start = time.perf_counter()
  step = {'jax': jax_step, 'torch': torch_step}[side](batch_size)
  step()
  first = time.perf_counter() - start
  for _ in range(3):
    step()
  peak = environment.peak_mebibytes()
  print(json.dumps({'first_step_seconds': first, 'peak_mebibytes': peak}))


def probe_in_child(side: str, batch_size: int) -> dict[str, float]:
  """`probe` in a new process."""
  command = [sys.executable, '-m', 'benchmarks.train_step', f'--probe={side}']
  command += [f'--batch_sizes={batch_size}', f'--attention={_ATTENTION.value}']
  command += [f'--width={_WIDTH.value}']
  out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
  return json.loads(out.splitlines()[-1])


def main(_) -> None:
  """Checks, measures, prints a table, writes the JSON file."""
  batch_sizes = [int(size) for size in _BATCH_SIZES.value]
  if _PROBE.value:
    probe(_PROBE.value, batch_sizes[0])
    return
  record = {'attention': _ATTENTION.value, 'width': _WIDTH.value, 'repeats': _REPEATS.value}
  record |= {'parameters': check_twins(), 'environment': environment.describe(), 'results': []}
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
