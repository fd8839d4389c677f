"""What was measured of single runs: snapshots, and conflict by its measures."""

import functools
from collections.abc import Sequence

import numpy as np

from csba_jax.analysis import wording
from csba_jax.analysis.comparisons import NAN, Study
from csba_jax.gradients import conflict as conflict_lib
from csba_jax.study import results as results_lib
from csba_jax.study.results import Record


def snapshots(records: Sequence[Record]) -> list[str]:
  """Snapshots of these runs: shares of the run in order, then losses from high to low."""
  found = {entry['at'] for record in records for entry in record.get('conflict') or ()}
  return sorted(found, key=wording.by_snapshot)


class Measured:
  """Conflict of single runs, each Gram looked at once."""

  def __init__(self, study: Study):
    self.study = study
    self._values = functools.cache(self._uncached)
    self._runs = {(record['study'], record['run']): record for record in study.results.done}

  def value(self, record: Record, at: str, part: str, scope: str, measure: str) -> float:
    """One measure of one run; NaN where it was not taken or is undefined."""
    return self._values((record['study'], record['run']), at, part, scope).get(measure, NAN)

  def _uncached(self, run: tuple[str, str], at: str, part: str, scope: str) -> dict[str, float]:
    record = self._runs[run]
    entry = results_lib.conflict_entry(record, at, part)
    if entry is None:
      return {}
    if scope not in (entry.get('grams') or {}):
      kept = (entry.get('scopes') or {}).get(scope) or {}
      return {name: NAN if value is None else float(value) for name, value in kept.items()}
    counts = np.array(record['result']['class_counts'])
    prior = np.array(entry['prior'], np.float64)
    return conflict_lib.summary(results_lib.gram(entry, scope), counts, prior)
