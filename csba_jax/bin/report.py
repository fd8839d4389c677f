"""csba-report --workdir=STUDY | --workdirs=RUN,RUN,... | --readme=README.md [--results=DIR]"""

import os

from absl import flags

from csba_jax.bin import run
from csba_jax.errors import UserError

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a study: writes its report there.')
_POOL = flags.DEFINE_bool('pool', False, 'Take runs of different versions or configs together.')
_WORKDIRS = flags.DEFINE_list('workdirs', None, 'Folders of finished runs on the same data.')
_README = flags.DEFINE_string('readme', None, 'README whose section of results is made anew.')
_RESULTS = flags.DEFINE_string('results', 'results', 'Folder of the studies, with --readme.')


def main() -> int:
  """The report of a study, one table of a few runs, or the results section of a README."""
  asked = [flag for flag in (_WORKDIR, _WORKDIRS, _README) if flag.value]
  if len(asked) != 1:
    raise UserError(
      '--workdir=STUDY, --workdirs=RUN,RUN or --readme=README.md',
      ' and '.join(f'--{flag.name}' for flag in asked) or 'none',
      'give one of them, such as --workdir=results/digits',
    )
  if _WORKDIR.value:
    from csba_jax.report import study

    print(study.write(_WORKDIR.value, _POOL.value))
  elif _README.value:
    from csba_jax.report import readme

    print(readme.update(_README.value, _RESULTS.value))
  else:
    print(compared([path.rstrip('/') for path in _WORKDIRS.value]))
  return 0


def compared(workdirs: list[str]) -> str:
  """One table, a column for each run under its folder's name."""
  from csba_jax.report import table
  from csba_jax.workdir import read_result

  titles = [os.path.basename(path) for path in workdirs]
  if len(set(titles)) < len(titles):
    titles = workdirs
  results = {title: read_result(path) for title, path in zip(titles, workdirs, strict=True)}
  splits = {(result['splits_sha256'], result['source_sha256']) for result in results.values()}
  if len(splits) > 1:
    raise UserError('runs on the same splits', 'different ones', 'compare runs of one data config')
  return f'{table.comparison(results)}\nworkdirs: {" ".join(workdirs)}'


def cli() -> None:
  """Entry point of the console script."""
  run.run(main)


if __name__ == '__main__':
  cli()
