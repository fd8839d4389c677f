"""Runs that share a subset of the training images: one value a subset, the mean of its runs."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from csba_jax.study import results
from csba_jax.study.results import Record, Unit


def of_units(records: Iterable[Record]) -> dict[Unit, int]:
  """data.seed of each unit, which says the subset; the seed in records that do not have it."""
  return {
    results.unit(record): record['config'].get('data', {}).get('seed', record['axes']['seed'])
    for record in records
  }


def are_shared(subset_of: Mapping[Unit, int]) -> bool:
  """Whether some units have one subset, and others another one."""
  return 1 < len(set(subset_of.values())) < len(subset_of)


def means(values: np.ndarray, units: Sequence[Unit], subset_of: Mapping[Unit, int]) -> np.ndarray:
  """Means over the units of each subset that have a value; NaN where none has.

  [n, ...] of n units -> [number of subsets, ...]
  """
  subset = np.array([subset_of[unit] for unit in units])
  groups = [values[subset == number] for number in dict.fromkeys(subset.tolist())]
  there = [~np.isnan(group) for group in groups]
  return np.array(
    [
      np.where(known, group, 0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)
      for group, known in zip(groups, there, strict=True)
    ]
  )
