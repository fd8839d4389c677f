"""Compares the conflict of the gradient that training takes with that of the network as it is used.

  python -m benchmarks.batch_and_frozen --workdirs=RUN,RUN,... [--batches=64] [--checkpoint=latest]

Of each run it measures the conflict matrix of the shared layers twice: of training batches with the
statistics of each batch, and of every training image with running statistics. It prints the rank
correlation of their cosines over pairs of classes, the share of pairs with the same sign, and the
interference with the minority of both. Only pairs that the batches resolve count.
"""

import os
import statistics

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import numpy as np
import scipy.stats
from absl import app, flags

from csba_jax.measure import diagnose, training_conflict
from csba_jax.run import restore

_WORKDIRS = flags.DEFINE_list('workdirs', None, 'Runs, with a comma between them.')
_BATCHES = flags.DEFINE_integer('batches', 64, 'Training batches of a measurement.', 2)
_CHECKPOINT = flags.DEFINE_string('checkpoint', 'latest', 'Of each run: init, best, latest, STEP.')


def compare(workdir: str, which: str, batches: int) -> tuple[float, float, float, float, int]:
  """(rank correlation, share of equal signs, interference of batch and of frozen, pairs)."""
  run = restore.load_run(workdir, which)
  frozen = diagnose.diagnose_run(run, diagnose.Sampling(exact=True))
  batch = training_conflict.of_run(run, which, training_conflict.Batches(batches))
  known = np.triu(batch.resolvable(), 1)
  ours, theirs = (found.cosine()[known] for found in (batch, frozen))
  interference = (found.summary()['minority_interference'] for found in (batch, frozen))
  rank = scipy.stats.spearmanr(ours, theirs).statistic if len(ours) > 2 else np.nan
  return rank, np.mean((ours < 0) == (theirs < 0)), *interference, len(ours)


def main(_: list[str]) -> None:
  """Prints a line a run, and means."""
  print('run  rank correlation  same sign  interference batch, frozen  pairs')
  rows = []
  for workdir in _WORKDIRS.value:
    rows.append(compare(workdir, _CHECKPOINT.value, _BATCHES.value))
    name = os.path.basename(os.path.normpath(workdir))
    rank, same, *interference, pairs = rows[-1]
    of_both = ', '.join(f'{x:.2f}' for x in interference)
    print(f'{name}  {rank:+.2f}  {same:.0%}  {of_both}  {pairs}', flush=True)
  means = [
    statistics.fmean(x for x in column if not np.isnan(x)) for column in zip(*rows, strict=True)
  ]
  print('mean  {:+.2f}  {:.0%}  {:.2f}, {:.2f}  {:.0f}'.format(*means))


if __name__ == '__main__':
  flags.mark_flag_as_required('workdirs')
  app.run(main)
