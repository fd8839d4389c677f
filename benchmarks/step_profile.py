"""Says where the time of a training step goes, here and in PyTorch.

  python -m benchmarks.step_profile --net=resnet32 --batch=128 [--repeats=7] [--out=FILE.json]

Convolutions and matrix products are taken out of the step's jaxpr, and each one is compiled and
timed alone, on random values of its shapes: this says what they cost, and which of the three passes
they belong to. What stands between them is read off the profile of the whole step (jax.profiler):
core-milliseconds of its fusions, by their names (a `transpose_copy_fusion` may compute something
too). The two do not add up to the step exactly, since
XLA may fuse or overlap what is timed alone here. PyTorch's side is torch.profiler's own time by
operator. Convolutions are told apart by their dimension numbers: in the input gradient the input
and output channels of the kernel are swapped, and the weight gradient contracts the images.
Convolutions of 1x1 are matrix products here.
"""

import collections
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import numpy as np
from absl import app, flags

from benchmarks import environment, training_sides
from csba_jax.methods import optimizers
from csba_jax.run import state as state_lib
from csba_jax.runtime import backend, sharding, text_table
from csba_jax.training import step as step_lib

_NET = flags.DEFINE_enum('net', 'multibranch', training_sides.NETS, 'Which net.')
_ATTENTION = flags.DEFINE_enum('attention', 'csba', ['none', 'csba'], 'Of the multi-branch net.')
_BATCH = flags.DEFINE_integer('batch', 128, 'Images a step.', 2)
_REPEATS = flags.DEFINE_integer('repeats', 7, 'Timed calls.', 1)
_TORCH = flags.DEFINE_boolean('torch', True, 'Profile PyTorch too.')
_OUT = flags.DEFINE_string('out', None, 'JSON file for the results.')
SINGLE = ('conv_general_dilated', 'dot_general')
# what the name of a fusion or thunk says, the first pattern that is found
KINDS = {
  'transposes and copies': r'transpose|copy|bitcast',
  'reductions': r'reduce|ynn',
  'pads, slices, concatenations': r'pad|slice|concatenate|gather|scatter|reverse',
  'elementwise': r'fusion|add|multiply|select|convert|broadcast|maximum|compare',
}
TORCH_KINDS = {
  'convolutions': r'conv|mkldnn',
  'norms': r'batch_norm',
  'products': r'mm|linear|matmul',
  'pooling': r'pool',
  'copies': r'copy|clone|contiguous|cat|pad|slice',
  'elementwise and rest': r'.',
}


def seconds_of(call: Callable[[], Any]) -> list[float]:
  """Seconds of the timed calls, after one that compiles."""
  jax.block_until_ready(call())
  found = []
  for _ in range(_REPEATS.value):
    start = time.perf_counter()
    jax.block_until_ready(call())
    found.append(time.perf_counter() - start)
  return found


def spread(seconds: list[float]) -> str:
  """'median (fastest to slowest)' in milliseconds."""
  return (
    f'{1e3 * statistics.median(seconds):.1f} ({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f})'
  )


def equations(jaxpr: Any) -> Iterator[Any]:
  """All of SINGLE in a jaxpr and in what it calls; loops once."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in SINGLE:
      yield eqn
    for value in eqn.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          yield from equations(inner)


def pass_of(eqn: Any) -> str:
  """Which pass a convolution or product belongs to."""
  if eqn.primitive.name == 'dot_general':
    return 'products'
  numbers = eqn.params['dimension_numbers']
  if numbers.lhs_spec[0] != 0:
    return 'convolutions: weight gradient'
  if numbers.rhs_spec[0] == len(numbers.rhs_spec) - 1:  # [height, width, in, out]: as it is stored
    return 'convolutions: forward'
  return 'convolutions: input gradient'


def alone(step: Callable[..., Any], *arguments: Any) -> dict[str, list[float]]:
  """{pass: [seconds of all its operations one after the other, FLOPs]}."""
  found: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
  known: dict[str, tuple[float, float]] = {}
  rng = np.random.default_rng(0)
  for eqn in equations(jax.make_jaxpr(step)(*arguments).jaxpr):
    shapes = [var.aval for var in eqn.invars]
    key = f'{eqn.primitive.name} {shapes} {eqn.params}'
    if key not in known:
      values = [jax.numpy.asarray(rng.normal(size=s.shape), s.dtype) for s in shapes]
      one = backend.jit(lambda *v, eqn=eqn: eqn.primitive.bind(*v, **eqn.params))()
      flops = one.lower(*values).cost_analysis()['flops']
      taken = seconds_of(lambda one=one, values=values: one(*values))
      known[key] = statistics.median(taken), flops
    for i, number in enumerate(known[key]):
      found[pass_of(eqn)][i] += number
  return dict(found)


def between(call: Callable[[], Any]) -> dict[str, float]:
  """{kind of KINDS: core-seconds of one call in fusions of this kind}, from XLA's profile."""
  from jax.profiler import ProfileData

  jax.block_until_ready(call())
  found: dict[str, float] = collections.Counter()
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(_REPEATS.value):
        jax.block_until_ready(call())
    (path,) = Path(folder).rglob('*.xplane.pb')
    data = ProfileData.from_file(str(path))
    for plane in data.planes:
      for line in plane.lines:
        if not line.name.startswith('tf_XLA'):
          continue
        for event in line.events:
          if '::' in event.name or re.match(r'end: |conv(?!ert)|dot', event.name):
            continue
          kind = next((k for k, p in KINDS.items() if re.search(p, event.name)), 'other')
          found[kind] += event.duration_ns / 1e9 / _REPEATS.value
  return dict(found)


def ours(setting: training_sides.Setting) -> dict[str, Any]:
  """The profile of the step here."""
  config, model = setting.recipe(), setting.build()
  tx, _ = optimizers.build(config, total_steps=10_000)
  state = state_lib.create(model, tx, training_sides.SHAPE, 0)
  layout = sharding.layout(config)
  classes = np.ones(training_sides.CLASSES)
  step_fn = step_lib.make_step(config, model, tx, classes, 10_000, layout)
  images, labels = setting.images_and_labels()
  batch, key = {'image': images, 'label': labels}, jax.random.key(0)
  compiled = backend.jit(step_fn)()
  text = compiled.lower(state, batch, key).compile().as_text()
  kinds = ('transpose', 'copy', 'reverse', 'pad', 'fusion', 'convolution', 'dot')
  return {
    'seconds': seconds_of(lambda: compiled(state, batch, key)),
    'alone': alone(step_fn, state, batch, key),
    'between': between(lambda: compiled(state, batch, key)),
    'instructions': {kind: len(re.findall(rf'[\]}}] {kind}\(', text)) for kind in kinds},
  }


def theirs(setting: training_sides.Setting) -> dict[str, Any]:
  """The profile of PyTorch's step, eager, channels last."""
  from torch.profiler import ProfilerActivity, profile

  run = training_sides.torch_steps(setting, 'cpu', os.cpu_count() or 1)
  seconds = seconds_of(lambda: run(1))
  with profile(activities=[ProfilerActivity.CPU]) as found:
    run(_REPEATS.value)
  by_kind: dict[str, float] = collections.Counter()
  for event in found.key_averages():
    kind = next(k for k, pattern in TORCH_KINDS.items() if re.search(pattern, event.key))
    by_kind[kind] += event.self_cpu_time_total / 1e6 / _REPEATS.value
  return {'seconds': seconds, 'operators': dict(by_kind)}


def main(argv: list[str]) -> None:
  """Measures, prints, writes."""
  del argv
  attention = _ATTENTION.value if _NET.value == 'multibranch' else 'none'
  setting = training_sides.Setting(_NET.value, attention, batch=_BATCH.value)
  here = ours(setting)
  rows = [['here', 'ms', 'GFLOP/s']]
  rows.append(['whole step', spread(here['seconds']), ''])
  for name, (taken, flops) in sorted(here['alone'].items()):
    rows.append([f'  {name}, each alone', f'{1e3 * taken:.1f}', f'{flops / taken / 1e9:.0f}'])
  cores = os.cpu_count() or 1
  for name, taken in sorted(here['between'].items()):
    rows.append([f'  {name}, core-ms / {cores}', f'{1e3 * taken / cores:.1f}', ''])
  print(text_table.align(rows))
  print('instructions: ' + ', '.join(f'{n} {k}' for k, n in here['instructions'].items()))
  results = {'here': here}
  if _TORCH.value:
    there = results['torch'] = theirs(setting)
    rows = [['PyTorch', 'ms'], ['whole step', spread(there['seconds'])]]
    rows += [[f'  {k}', f'{1e3 * v:.1f}'] for k, v in sorted(there['operators'].items())]
    print(text_table.align(rows))
  about = environment.describe() | {'net': _NET.value, 'batch': _BATCH.value}
  print(json.dumps(about))
  if _OUT.value:
    Path(_OUT.value).write_text(json.dumps({'about': about, **results}, indent=1))


if __name__ == '__main__':
  app.run(main)
