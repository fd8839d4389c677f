"""Times class gradients and their Grams: ours and the peers in PyTorch, alternating in one process.

  python -m benchmarks.class_gradients --net=multibranch --classes=10 --images=16 [--out=FILE.json]

BatchNorm statistics are frozen, dtype is float32, images are random. Every side gets the same
weights and the same class-stacked batch [C, n], and must give the same Gram. The ratio compares
with one ordinary gradient of the same net and batch in the same framework. The first call (with
compilation) and peak memory are measured in a process for each side. If the second call there takes
longer than --limit seconds, it is the only time of that side.

Peers: pip install torchjd==0.18.0; pip install --no-deps backpack-for-pytorch==1.7.1
unfoldNd==0.2.3 opacus==1.6.0. A peer that is not installed is left out. (The wheel of Opacus has a
package named benchmarks, which hides this one: remove it from site-packages.)
"""

import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from benchmarks import environment
from csba_jax.gradients import class_grams
from csba_jax.models import multibranch, resnet
from csba_jax.runtime import backend, text_table

_NET = flags.DEFINE_enum('net', 'multibranch', ['multibranch', 'resnet32'], 'Which net.')
_CLASSES = flags.DEFINE_integer('classes', 10, 'Number of classes, C.', 2)
_IMAGES = flags.DEFINE_integer('images', 16, 'Images of each class, n.', 1)
_WIDTH = flags.DEFINE_float('width', 1.0, 'Width of the multi-branch net.')
_REPEATS = flags.DEFINE_integer('repeats', 9, 'Timed calls of each side.', 1)
_LIMIT = flags.DEFINE_float('limit', 20.0, 'Seconds after which a side is timed only once.')
_GIBIBYTES = flags.DEFINE_integer('gibibytes', 20, 'Memory limit of a side.', 1)
_SIDES = flags.DEFINE_list('sides', None, 'Sides, such as jax:stacked,torch:class_slices.')
_OUT = flags.DEFINE_string('out', None, 'JSON file for the results.')
_PROBE = flags.DEFINE_string('probe', None, 'Measure one side alone (internal).')

OURS = {'ordinary': None, 'stacked': True, 'masked': False}
AGREEMENT = 1e-2  # of Grams across frameworks: in float32 a ReLU near 0 may differ


def build() -> tuple[dict, object]:
  """Returns (variables, Flax model)."""
  from benchmarks import torch_class_gradients

  if _NET.value == 'resnet32':
    model = resnet.ResNet(_CLASSES.value)
  else:
    model = multibranch.build(_CLASSES.value, (32, 32, 3), 'csba', _WIDTH.value, jnp.float32)
  return torch_class_gradients.variables_of(model), model


def images_and_labels() -> tuple[np.ndarray, np.ndarray]:
  """[C, n, 32, 32, 3] float32 and [C, n] int32."""
  shape = (_CLASSES.value, _IMAGES.value)
  images = np.random.default_rng(0).standard_normal((*shape, 32, 32, 3), dtype=np.float32)
  return images, np.broadcast_to(np.arange(shape[0], dtype=np.int32)[:, None], shape)


def our_call(name: str, variables: dict, model: object) -> Callable[[], np.ndarray]:
  """A function that makes one pass in JAX and returns the total Gram; [1, 1] for `ordinary`."""
  images, labels = images_and_labels()
  batch = {'image': jnp.asarray(images), 'label': labels}

  def losses_fn(params, batch):
    logits = model.apply(variables | {'params': params}, batch['image'], train=False)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])

  params = variables['params']
  if name == 'ordinary':
    flat = {k: jnp.asarray(v).reshape(-1, *v.shape[2:]) for k, v in batch.items()}
    gradient = backend.jit(jax.grad(lambda params: losses_fn(params, flat).mean()))
    return lambda: jax.block_until_ready(gradient()(params)) and np.zeros((1, 1))
  call = functools.partial(class_grams, losses_fn, num_classes=_CLASSES.value, head='^head/')
  options = {'strategy': name, 'per_example': True}
  return lambda: np.asarray(jax.block_until_ready(call(params, batch, **options)).total)


def peer_call(name: str, variables: dict, model: object) -> Callable[[], np.ndarray]:
  """The same in PyTorch, channels last."""
  import torch

  from benchmarks import torch_class_gradients, torch_multibranch, torch_resnet

  torch.set_num_threads(os.cpu_count())
  twin = torch_resnet.Net if _NET.value == 'resnet32' else torch_multibranch.Net
  net = twin(model)
  net.load_state_dict(torch_resnet.state_from_flax(variables), strict=False)
  net = net.eval().to(memory_format=torch.channels_last)
  images, labels = images_and_labels()
  x, y = torch.from_numpy(images).permute(0, 1, 4, 2, 3), torch.from_numpy(labels.astype(np.int64))
  function = torch_class_gradients.PEERS[name][0]

  def call():
    found = function(net, x, y)
    return np.zeros((1, 1)) if name == 'ordinary' else sum(found.values()).numpy()

  return call


def make_call(side: str) -> Callable[[], np.ndarray]:
  """The call for 'jax:NAME' or 'torch:NAME'."""
  framework, name = side.split(':')
  return (our_call if framework == 'jax' else peer_call)(name, *build())


def sides() -> list[str]:
  """All sides, or those of --sides."""
  from benchmarks import torch_class_gradients

  every = [f'jax:{name}' for name in OURS] + [f'torch:{n}' for n in torch_class_gradients.PEERS]
  return _SIDES.value or every


def probe(side: str) -> None:
  """Prints the seconds of the first and the second call, and peak memory of this process."""
  limit = _GIBIBYTES.value * 2**30
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))  # an error, not a machine without memory
  seconds = []
  call = make_call(side)
  before = environment.peak_mebibytes()
  for _ in range(2):
    start = time.perf_counter()
    gram = call()
    seconds.append(time.perf_counter() - start)
  peak = environment.peak_mebibytes()
  record = {'first': seconds[0], 'second': seconds[1], 'peak_mebibytes': peak}
  print(json.dumps(record | {'before_mebibytes': before, 'gram': gram.tolist()}))


def probe_in_child(side: str) -> dict:
  """`probe` in a new process; 'reason' if the side fails."""
  command = [sys.executable, '-m', 'benchmarks.class_gradients', f'--probe={side}']
  command += [f'--net={_NET.value}', f'--classes={_CLASSES.value}', f'--images={_IMAGES.value}']
  run = subprocess.run([*command, f'--width={_WIDTH.value}'], capture_output=True, text=True)
  if run.returncode:
    return {'reason': run.stderr.strip().splitlines()[-1][:200]}
  return json.loads(run.stdout.splitlines()[-1])


def check(alone: dict[str, dict]) -> None:
  """Asserts that all sides with a Gram give the same one."""
  grams = {side: np.array(r['gram']) for side, r in alone.items() if len(r.get('gram', [])) > 1}
  first = next(iter(grams.values()))
  scale = np.sqrt(np.outer(np.diagonal(first), np.diagonal(first)))
  for side, gram in grams.items():
    alone[side]['difference'] = float((np.abs(gram - first) / scale).max())
    assert alone[side]['difference'] < AGREEMENT, (side, alone[side]['difference'])


def alternate(calls: dict[str, Callable[[], np.ndarray]]) -> dict[str, list[float]]:
  """Seconds of the calls of each side, which alternate after one warm-up call each."""
  for call in calls.values():
    call()
  seconds = {side: [] for side in calls}
  for _ in range(_REPEATS.value):
    for side, call in calls.items():
      start = time.perf_counter()
      call()
      seconds[side].append(time.perf_counter() - start)
  return seconds


def main(_) -> None:
  """Measures, checks, prints a table, writes the JSON file."""
  if _PROBE.value:
    probe(_PROBE.value)
    return
  alone = {side: probe_in_child(side) for side in sides()}
  check(alone)
  quick = [side for side, r in alone.items() if r.get('second', np.inf) <= _LIMIT.value]
  seconds = alternate({side: make_call(side) for side in quick})
  rows = [['side', 'median-s', 'fastest', 'slowest', 'ratio', 'compile-s', 'peak-MiB']]
  results = []
  for side, found in alone.items():
    found.pop('gram', None)
    if 'reason' in found:
      rows.append([side, found['reason']])
      results.append({'side': side} | found)
      continue
    times = seconds.get(side, [found['second']])
    median = statistics.median(times)
    base = f'{side.split(":")[0]}:ordinary'
    ratio = median / statistics.median(seconds.get(base, [np.nan]))
    rows.append([side, *(f'{t:.3f}' for t in (median, min(times), max(times))), f'{ratio:.2f}'])
    rows[-1] += [f'{found["first"] - found["second"]:.1f}', f'{found["peak_mebibytes"]:.0f}']
    known = ratio if np.isfinite(ratio) else None  # without an ordinary gradient of its framework
    results.append({'side': side, 'seconds': times, 'ratio': known} | found)
  setting = {'net': _NET.value, 'classes': _CLASSES.value, 'images': _IMAGES.value}
  record = setting | {'width': _WIDTH.value, 'environment': environment.describe()}
  print(json.dumps(record))
  print(text_table.align(rows), flush=True)
  if _OUT.value:
    with open(_OUT.value, 'w') as file:
      json.dump(record | {'results': results}, file, indent=1)


if __name__ == '__main__':
  app.run(main)
