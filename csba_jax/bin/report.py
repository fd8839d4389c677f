"""csba-report --workdirs=DIR,DIR,...: results of finished runs side by side."""

import os

from absl import flags

from csba_jax.bin import run
from csba_jax.errors import UserError
from csba_jax.report import table
from csba_jax.workdir import read_result

_WORKDIRS = flags.DEFINE_list('workdirs', None, 'Folders of finished runs on the same data.')


def main() -> int:
  """Prints one table, a column for each run under its folder's name."""
  workdirs = [path.rstrip('/') for path in run.required(_WORKDIRS, 'runs/a,runs/b')]
  titles = [os.path.basename(path) for path in workdirs]
  if len(set(titles)) < len(titles):
    titles = workdirs
  results = {title: read_result(path) for title, path in zip(titles, workdirs, strict=True)}
  splits = {(result['splits_sha256'], result['source_sha256']) for result in results.values()}
  if len(splits) > 1:
    raise UserError('runs on the same splits', 'different ones', 'compare runs of one data config')
  print(table.comparison(results))
  print(f'workdirs: {" ".join(workdirs)}')
  return 0


def cli() -> None:
  """Entry point of the console script."""
  run.run(main)


if __name__ == '__main__':
  cli()
