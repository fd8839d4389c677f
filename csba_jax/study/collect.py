"""From the workdir of a finished run to its line in results.jsonl."""

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from csba_jax.fields import numbers
from csba_jax.gradients import conflict as conflict_lib
from csba_jax.gradients.conflict import Conflict
from csba_jax.measure import diagnose
from csba_jax.run.records import TESTED, snapshot_file
from csba_jax.run.restore import config_of
from csba_jax.run.workdir import read_result

BRANCH = 'branch'  # what names of branches begin with
DIGITS = 5  # significant ones kept of every measured number
# no number of the test part: of images, not of what a net made of them
OF_TUNING: tuple[str, ...] = (
  'validation_macro_f1',
  'checkpoint_step',
  'parameters',
  'class_counts',
  'surgery',
  'timing',
  'splits_sha256',
  'source_sha256',
  'content_sha256',
)


def collect(workdir: Path, test: bool = True) -> dict[str, Any]:
  """What a study keeps of a finished run: result, conflict and branches at its snapshots.

  Args:
    workdir: of the run.
    test: False keeps no number of the test part, for runs that choose hyper-parameters.

  Returns:
    'result': content of result.json.
    'conflict': for each snapshot and part: at, step, part, statistics (of BatchNorm), loss (mean
      over the part, classes by their share in it), losses, counts, prior, 'grams' {scope: upper
      triangle} of the scopes shared and common, of the last snapshot and the training part also of
      each branch, and 'scopes' {scope: summary} also of stages and branches.
    'branches': for each snapshot and part what `branch_similarity.measure` found; the gates of the
      last snapshot alone, which are many numbers.
    The last snapshot is the end of the run; after it comes that of the tested checkpoint.
    All numbers rounded to DIGITS significant digits but those of the result.
  """
  result, config = read_result(workdir), config_of(workdir)
  if not test:
    return {'result': {name: result[name] for name in OF_TUNING if name in result}}
  size, channels = config.data.image_size, config.data.channels
  classes = len(result['class_names'])
  common = set(diagnose.common_layers(config, classes, (size, size, channels)))
  found: dict[str, Any] = {'result': result, 'conflict': [], 'branches': []}
  shares = [f'{share:g}' for share in sorted(numbers(config.diagnostics.snapshots))]
  levels = [f'loss {level:g}' for level in numbers(config.diagnostics.loss_levels)]
  for name in [*levels, *shares, TESTED]:
    last = name in shares[-1:]
    for part in ('train', 'val'):
      path = workdir / 'conflict' / snapshot_file(name, part)
      if not path.with_name(f'{path.name}.npz').exists():
        continue  # a loss that was not reached, or no validation part
      conflict = Conflict.load(path.with_name(f'{path.name}.npz'))
      at = {'at': name, 'step': conflict.about['step'], 'part': part}
      statistics = {'statistics': conflict.about.get('statistics', 'frozen')}
      branches_too = last and part == 'train'
      found['conflict'].append(at | statistics | _summary(conflict, common, branches_too))
      branches = json.loads(path.with_name(f'{path.name}.json').read_text())
      if not last:
        del branches['gates']
      found['branches'].append(at | _rounded(branches))
  return found


def hardware() -> str:
  """The device in words: the accelerator, or the processor and how many of its cores."""
  device = jax.devices()[0]
  if device.platform != 'cpu':
    return f'{len(jax.devices())} x {device.device_kind}'
  name = platform.processor() or platform.machine()
  if os.path.exists('/proc/cpuinfo'):
    with open('/proc/cpuinfo') as file:
      models = [line for line in file if line.startswith('model name')]
    name = models[0].split(':')[1].strip() if models else name
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  return f'{name}, {cores} of {os.cpu_count()} cores'


def _summary(conflict: Conflict, common: set[str], branches_too: bool) -> dict[str, Any]:
  """One measurement of conflict, as the contract of `collect` has it."""
  upper = np.triu_indices(len(conflict.class_names))
  scopes = _scopes(conflict.layers, common)
  grams = {'shared': conflict.gram('shared')}
  grams |= {name: _union(conflict, layers) for name, layers in scopes.items() if layers}
  kept = ('shared', 'common', *(_branches(scopes) if branches_too else ()))
  there = conflict.counts > 0
  loss = float(conflict.losses @ conflict.counts / max(conflict.counts.sum(), 1))
  return _rounded(
    {
      'loss': loss,
      'losses': np.where(there, conflict.losses, np.nan).tolist(),
      'counts': conflict.counts.tolist(),
      'prior': conflict.prior.tolist(),
      'grams': {scope: grams[scope][upper].tolist() for scope in kept if scope in grams},
      'scopes': {
        name: conflict_lib.summary(gram, conflict.class_counts, conflict.prior)
        for name, gram in grams.items()
      },
    }
  )


def _scopes(layers: Sequence[str], common: set[str]) -> dict[str, list[str]]:
  """Layers by scope: common, then every stage, then every branch, without attention and head."""
  shared = [layer for layer in layers if layer in common]
  found: dict[str, list[str]] = {'common': shared}
  for layer in shared:
    found.setdefault(layer.split('/')[0], []).append(layer)
  branches: dict[str, list[str]] = {}
  for layer in shared:
    for word in layer.split('/'):
      if word.startswith(BRANCH):
        branches.setdefault(word, []).append(layer)
  return found | dict(sorted(branches.items()))


def _branches(scopes: Iterable[str]) -> list[str]:
  return [scope for scope in scopes if scope.startswith(BRANCH)]


def _union(conflict: Conflict, layers: Sequence[str]) -> np.ndarray:
  """The Gram of several layers together: Grams of layers add up."""
  grams = [conflict.gram(layer) for layer in layers]
  return sum(grams, np.zeros_like(grams[0]))


def _rounded(value: Any) -> Any:
  """The same with floats of DIGITS significant digits, and NaN as None."""
  if isinstance(value, Mapping):
    return {key: _rounded(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_rounded(item) for item in value]
  if isinstance(value, float):
    return float(f'{value:.{DIGITS}g}') if np.isfinite(value) else None
  return value
