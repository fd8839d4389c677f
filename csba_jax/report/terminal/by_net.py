"""Runs of several nets, each trained with several seeds, in one table: means and their spread."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from csba_jax import config as config_lib
from csba_jax.errors import UserError
from csba_jax.report.terminal import same_splits, seeds, table
from csba_jax.run.workdir import read_config, read_result
from csba_jax.runtime import text_table
from csba_jax.study import protocol

SEEDS = ('seed', 'data.seed', 'data.fold')  # fields in which runs of one net may differ


def of_workdirs(workdirs: Sequence[str]) -> str:
  """Finished runs side by side: a column for each run, or for each net if a net has several seeds.

  Raises:
    UserError: a folder without a result, nets with different seeds, or runs on different splits.
  """
  found = {path: read_result(path) for path in workdirs}
  nets: dict[str, dict[tuple[int, ...], str]] = {}  # workdirs of a net by seeds
  for path in workdirs:
    fields = config_lib.flatten(read_config(path))
    chosen = tuple(fields.pop(name) for name in SEEDS)
    of_net = nets.setdefault(repr(sorted(fields.items())), {})
    if chosen in of_net:  # the same run twice
      return table.of_workdirs(workdirs)
    of_net[chosen] = path
  if all(len(of_net) == 1 for of_net in nets.values()):
    return table.of_workdirs(workdirs)
  if len({frozenset(of_net) for of_net in nets.values()}) > 1:
    numbers = [f'{len(of_net)} of {next(iter(of_net.values()))}' for of_net in nets.values()]
    raise UserError(
      'the same seeds for every net', ', '.join(numbers), 'train what is missing, or leave it out'
    )
  paths = [[of_net[chosen] for chosen in sorted(of_net)] for of_net in nets.values()]
  results = {_name(of_net): [found[path] for path in of_net] for of_net in paths}
  if len(results) < len(paths):
    results = {of_net[0]: [found[path] for path in of_net] for of_net in paths}
  for of_seed in zip(*paths, strict=True):
    same_splits.check({path: found[path] for path in of_seed})
  same_splits.check_images(found)
  return describe(results, _overlap(paths[0], found))


def describe(
  results: Mapping[str, Sequence[Mapping[str, Any]]], overlap: seeds.Overlap | None = None
) -> str:
  """Table of means and standard deviations over seeds, then what the seeds say of macro-F1.

  Args:
    results: content of result.json by net and seed, the same seeds in the same order. The first
      net is the one that the others are compared with.
    overlap: as in `seeds.describe`.
  """
  first = next(iter(results.values()))
  rows = [['F1 of class', 'training images', *table.titles(results, first[0])]]
  for c, name in table.names_in_order(first[0]):
    f1 = [_cell([r['per_class']['f1'][c] for r in of_net]) for of_net in results.values()]
    rows.append([name, _range([r['class_counts'][c] for r in first]), *f1])
  rows.append([])
  for title, key in table.HEADLINES:
    rows.append([title, '', *(_cell([r[key] for r in of_net]) for of_net in results.values())])
  lines = [text_table.align(rows), '', f'Mean ± standard deviation over {len(first)} seeds.']
  control, *others = results
  lines += [seeds.describe(results[net], first, (net, control), overlap) for net in others]
  return '\n'.join(lines)


def _overlap(
  workdirs: Sequence[str], results: Mapping[str, Mapping[str, Any]]
) -> seeds.Overlap | None:
  """How runs of a net share images; None with one drawing for all, or another one for each.

  Several drawings with a separate test set share images only where they are the same.
  """
  data = read_config(workdirs[0])['data']
  splits = tuple(results[path]['splits_sha256'] for path in workdirs)
  if len(set(splits)) == 1:
    return None
  if not (data['folds'] or protocol.redraws(data)):
    different = len(set(splits)) == len(splits)
    return None if different else seeds.Overlap(None, 'subsets', splits)
  units = 'folds' if data['folds'] else 'seeds'
  return seeds.Overlap(protocol.test_to_rest(data), units, splits)


def _name(workdirs: Sequence[str]) -> str:
  """Name of a net: what its folders are called without the seed."""
  return re.sub(r'[-_]?s(eed)?\d+$', '', Path(workdirs[0]).name) or Path(workdirs[0]).name


def _cell(values: Sequence[float | None]) -> str:
  known = np.array([value for value in values if value is not None], np.float64)
  if len(known) < len(values):
    return '-'
  return f'{known.mean():.3f} ± {known.std(ddof=1):.3f}'


def _range(counts: Sequence[int]) -> str:
  low, high = min(counts), max(counts)
  return f'{low}' if low == high else f'{low}-{high}'
