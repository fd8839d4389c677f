"""What every binary does: parse flags, call main, and turn an error of the user's into one line."""

import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from csba_jax.errors import UserError
from csba_jax.runtime import distributed, signals


def run(main: Callable[[], int | None]) -> None:
  """Runs main() under absl flags and exits with its code; 1 and one line for a UserError."""
  name = sys.argv[0].rsplit('/', 1)[-1]
  signals.leave_when_told()  # until a StopRequest takes it
  logging.set_verbosity(logging.ERROR)  # what JAX and orbax say below that is not for users
  try:
    app.run(lambda _: main(), flags_parser=_parse)
  except UserError as error:
    if distributed.count() > 1 and not isinstance(error, distributed.AgreedError):
      distributed.leave(error)  # the others wait for this process somewhere
    print(f'{name}: {error}', file=sys.stderr, flush=True)
    sys.exit(1)


def _parse(argv: list[str]) -> list[str]:
  """FLAGS(argv), with every way in which that can fail as a UserError."""
  try:
    rest = flags.FLAGS(argv)
    if 'config' in flags.FLAGS and flags.FLAGS.config is not None:
      dir(flags.FLAGS.config.keys)  # a file that is not there is reported on first use only
  except UserError:
    raise
  except Exception as error:  # a config is code of the user's: it can raise anything
    raise UserError('flags as --help lists them', str(error), 'correct the command line') from error
  if len(rest) > 1:
    raise UserError('flags only', ' '.join(rest[1:]), 'write --flag=value')
  return rest


def define_config() -> flags.FlagHolder:
  """--config=configs/NAME.py, and --config.field=value for each of its fields."""
  return config_flags.DEFINE_config_file('config', None, 'Recipe, a file under configs/.')


def required(holder: flags.FlagHolder, example: str) -> object:
  """The value of a flag that must be given.

  Raises:
    UserError: it was not.
  """
  if not holder.value:
    raise UserError(f'--{holder.name}', 'none', f'add e.g. --{holder.name}={example}')
  return holder.value
