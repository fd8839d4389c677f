"""How the cost of a conflict matrix grows with classes, parameters, images: docs/images/scale.png

  python -m benchmarks.scale --out=benchmarks/results/scale.json
  python -m benchmarks.scale --draw=benchmarks/results/scale.json

Measures the layer-wise Grams of all class gradients of the multi-branch net with CSBA (frozen
BatchNorm statistics, float32, random images of 32x32), beside one ordinary gradient of the same
images. Each line runs in a process of its own, where the two take turns. The fourth part of the
figure, the cost by devices, is not measured: it comes from compiled programs (benchmarks.scaling).
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from absl import app, flags

from benchmarks import environment
from csba_jax.runtime import huge_pages, text_table

_OUT = flags.DEFINE_string('out', None, 'JSON file for the results.')
_DRAW = flags.DEFINE_string('draw', None, 'Draw the figure from this file, and measure nothing.')
_LINE = flags.DEFINE_string('line', None, 'CLASSES,IMAGES,WIDTH: measure this here (internal).')
_REPEATS = flags.DEFINE_integer('repeats', 3, 'Timed calls of each.', 1)
ROOT = Path(__file__).parents[1]
PICTURE, BY_DEVICES = ROOT / 'docs/images/scale.png', ROOT / 'benchmarks/results/scaling.json'
# {what grows: [(classes, images of each class, width of the net)]}
LINES = {
  'classes': [(c, 4, 0.25) for c in (2, 5, 10, 30, 100, 300, 1000)],
  'parameters': [(10, 4, width) for width in (0.25, 0.5, 1.0, 1.75, 3.25, 7.5)],
  'images': [(10, n, 0.5) for n in (1, 2, 4, 8, 16, 32, 64)],
}
COLORS = {'grams': '#1f77b4', 'ordinary': '#8c96a3'}
NAMES = {'grams': 'Grams of all class gradients', 'ordinary': 'one gradient of the same images'}


def measure(classes: int, images: int, width: float) -> dict[str, Any]:
  """Seconds of both, parameters, and peak memory of this process."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from csba_jax.gradients import class_grams
  from csba_jax.models import multibranch
  from csba_jax.runtime import backend

  model = multibranch.build(classes, (32, 32, 3), 'csba', width, jnp.float32)
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  rng = np.random.default_rng(0)
  batch = {
    'image': jnp.asarray(rng.standard_normal((classes, images, 32, 32, 3), np.float32)),
    'label': np.broadcast_to(np.arange(classes, dtype=np.int32)[:, None], (classes, images)),
  }

  def losses_fn(params: Any, batch: Any) -> jax.Array:
    logits = model.apply(variables | {'params': params}, batch['image'], train=False)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])

  flat = {name: jnp.asarray(v).reshape(-1, *v.shape[2:]) for name, v in batch.items()}
  gradient = backend.jit(jax.grad(lambda params: losses_fn(params, flat).mean()))
  options = {'num_classes': classes, 'head': '^head/', 'per_example': True}
  params = variables['params']
  calls = {
    'ordinary': lambda: gradient()(params),
    'grams': lambda: class_grams(losses_fn, params, batch, strategy='stacked', **options).total,
  }
  seconds: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(_REPEATS.value + 1):  # the first one compiles
    for name, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      seconds[name].append(time.perf_counter() - start)
  return {
    'parameters': sum(x.size for x in jax.tree.leaves(params)),
    'first': {name: found[0] for name, found in seconds.items()},
    'seconds': {name: found[1:] for name, found in seconds.items()},
    'peak_mebibytes': environment.peak_mebibytes(),
  }


def in_child(line: tuple[int, int, float]) -> dict[str, Any]:
  """`measure` in a new process."""
  words = ','.join(map(str, line))
  command = [sys.executable, '-m', 'benchmarks.scale', f'--line={words}']
  command.append(f'--repeats={_REPEATS.value}')
  run = subprocess.run(command, check=True, capture_output=True, text=True)
  found = json.loads(run.stdout.splitlines()[-1])
  return dict(zip(('classes', 'images', 'width'), line, strict=True)) | found


def draw(path: str) -> None:
  """The figure: three measured parts, and one from compiled programs."""
  from matplotlib.figure import Figure

  results = json.loads(Path(path).read_text())
  figure = Figure(figsize=(12, 8), layout='constrained')
  parts = figure.subplots(2, 2).flat
  fixed = {
    'classes': '4 images a class, 0.1 to 0.2 M parameters',
    'parameters': '10 classes, 4 images each',
    'images': '10 classes, 0.4 M parameters',
  }
  for axes, (what, rest) in zip(parts, fixed.items(), strict=False):
    lines = results['lines'][what]
    for name, color in COLORS.items():
      medians = [statistics.median(line['seconds'][name]) for line in lines]
      axes.plot([line[what] for line in lines], medians, 'o-', color=color, label=NAMES[name])
    label = {'images': 'images of each class, n', 'classes': 'classes, C'}.get(what, what)
    axes.set(xscale='log', yscale='log', xlabel=label, ylabel='seconds')
    axes.set_title(f'{label} ({rest}): measured, two CPU cores', fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
  _draw_devices(parts[3])
  figure.savefig(PICTURE, dpi=100)
  print(PICTURE)


def _draw_devices(axes: Any) -> None:
  """What a probe of 1,000 classes needs on each device."""
  lines = json.loads(BY_DEVICES.read_text())['lines']
  lines = [line for line in lines if line['case'] == 'imagenet_lt' and 'probe' in line]
  lines = sorted({line['devices']: line for line in lines}.values(), key=lambda x: x['devices'])
  devices = [line['devices'] for line in lines]
  for kind, style in (('h100', 'o-'), ('v5e', 's--')):
    seconds = [line['probe']['on'][kind]['seconds'] for line in lines]
    axes.plot(devices, seconds, style, color=COLORS['grams'], label=f'seconds on {kind}')
  held = [line['probe']['held'] / 1e9 for line in lines]
  axes.plot(devices, held, '^:', color='#d2691e', label='GB on each device')
  axes.set(xscale='log', yscale='log', xlabel='devices', ylabel='seconds, GB')
  axes.set_title('devices (ImageNet-LT, C = 1,000): from compiled programs', fontsize=10)
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)


def main(argv: list[str]) -> None:
  """Measures and prints a table, or draws."""
  del argv
  if _LINE.value:
    classes, images, width = _LINE.value.split(',')
    print(json.dumps(measure(int(classes), int(images), float(width))))
    return
  if _DRAW.value:
    draw(_DRAW.value)
    return
  huge_pages.ask_for()  # of the processes
  rows = [['grows', 'C', 'n', 'parameters', 'ordinary, s', 'Grams, s', 'ratio', 'peak, MiB']]
  found: dict[str, list[dict[str, Any]]] = {}
  for what, lines in LINES.items():
    for line in lines:
      one = in_child(line)
      found.setdefault(what, []).append(one)
      base, grams = (statistics.median(one['seconds'][name]) for name in ('ordinary', 'grams'))
      row = [what, str(one['classes']), str(one['images']), f'{one["parameters"]:,}']
      rows.append([*row, f'{base:.3f}', f'{grams:.3f}', f'{grams / base:.2f}'])
      rows[-1].append(f'{one["peak_mebibytes"]:.0f}')
  print(text_table.align(rows))
  about = environment.describe()
  print(json.dumps(about))
  if _OUT.value:
    Path(_OUT.value).write_text(json.dumps({'about': about, 'lines': found}, indent=1))


if __name__ == '__main__':
  app.run(main)
