"""csba-report --workdirs=RUN,RUN,... | --workdir=RUN | --workdir=STUDY [--pool] | --readme=PAGE

Compares finished runs in one table; or writes the report of a study, or of one run, as a page.
Example: csba-report --workdirs=runs/none,runs/csba
"""

from absl import flags

from csba_jax.bin import _main
from csba_jax.errors import UserError

_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Folder of a study, or of one run: writes report.html there, and report.md of a study.',
)
_POOL = flags.DEFINE_bool(
  'pool', False, 'Pool runs of different versions or machines. The report says so.'
)
_WORKDIRS = flags.DEFINE_list(
  'workdirs',
  None,
  'Folders of finished runs, with commas between them. The first is the reference.',
)
_README = flags.DEFINE_string(
  'readme', None, 'A page, such as results/README.md. Replaces its section of results.'
)
_RESULTS = flags.DEFINE_string('results', 'results', 'With --readme: folder of the studies.')


def main() -> int:
  """The report of a study, one table of a few runs, or the results section of a page."""
  asked = [flag.name for flag in (_WORKDIR, _WORKDIRS, _README) if flag.value]
  if len(asked) != 1:
    raise UserError(
      '--workdir=STUDY, --workdirs=RUN,RUN or --readme=results/README.md',
      ' and '.join(f'--{name}' for name in asked) or 'none',
      'give one of them, such as --workdir=results/digits',
    )
  for flag, of in ((_POOL, ('workdir', 'readme')), (_RESULTS, ('readme',))):
    if flag.present and asked[0] not in of:
      wanted = f'--{flag.name} with --{" or --".join(of)} alone'
      raise UserError(wanted, f'it with --{asked[0]}', f'leave out --{flag.name}')
  if _WORKDIR.value:
    from csba_jax.report import folder

    print(folder.describe(_WORKDIR.value, _POOL.value))
  elif _README.value:
    from csba_jax.report.study import readme

    print(readme.update(_README.value, _RESULTS.value, _POOL.value))
  else:
    from csba_jax.report.terminal import by_net

    print(by_net.of_workdirs(_WORKDIRS.value))
  return 0


def cli() -> None:
  """Entry point of the console script."""
  _main.run(main)


if __name__ == '__main__':
  cli()
