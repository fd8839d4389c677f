"""The runs of a study before one of them begins: checked, listed, and whether they are enough."""

from collections.abc import Sequence

import ml_collections

from csba_jax.errors import UserError
from csba_jax.study import grid, protocol, results, tuning
from csba_jax.training import preflight


def all_runs(study: ml_collections.ConfigDict) -> list[grid.Run]:
  """The runs of a study, with the rates that it is tuned by; none is left that cannot begin.

  Raises:
    UserError: as `grid.runs`; or parts of a run's config that do not go together.
  """
  grid.check(study)
  runs = grid.runs(study, tuning.chosen_rates(study))
  for run in {run.shape: run for run in runs}.values():  # others differ in seeds alone
    try:
      preflight.check(run.config)
    except UserError as error:
      found = f'{error.found} in run {run.name}'
      raise UserError(error.expected, found, error.do.replace('config.', 'config.base.')) from error
  return runs


def too_few_seeds(study: ml_collections.ConfigDict, runs: Sequence[grid.Run]) -> list[str]:
  """A line if no seed of the study can make a comparison of its family significant; else none."""
  if study.base.data.folds or protocol.redraws(study.base.data) or not study.test:
    return []
  cells = {results.cell({'axes': run.axes}) for run in runs}
  pairs = [pair for pair in protocol.family(study) if set(pair) <= set(study.variants)]
  tests = len(cells) * len(pairs)
  shared = 1 < study.subsets < study.seeds
  units = (study.subsets, 'subset') if shared else (study.seeds, 'seed')
  words = protocol.too_few_seeds(tests, *units) if tests else ''
  return [words] if words else []


def describe(study: ml_collections.ConfigDict, shard: str) -> str:
  """Names of the runs of a shard, 'i/n', one a line; then their number and notes on the study."""
  runs = all_runs(study)
  names = [run.name for run in grid.shard(runs, *grid.parse_shard(shard))]
  return '\n'.join(
    [*names, f'{len(names)} runs', *too_few_seeds(study, runs), *tuning.at_ends(study)]
  )
