"""What every binary does: print its help, parse flags, call main, report an error in one line."""

import io
import sys
from collections.abc import Callable, Iterable
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from csba_jax import config as config_lib
from csba_jax.bin import _help
from csba_jax.errors import UserError
from csba_jax.runtime import distributed, signals

Tick = Callable[[int, int], None]  # (done, total) of some work


def run(main: Callable[[], int | None]) -> None:
  """Runs main() under absl flags and exits with its code; 1 and one line for a UserError."""
  _print_anything()
  name = sys.argv[0].rsplit('/', 1)[-1]
  signals.leave_when_told()  # until a StopRequest takes over
  logging.set_verbosity(logging.ERROR)  # JAX and Orbax log below that, and not for users
  try:
    if _help.is_asked_for(sys.argv[1:]):
      print(_help.text(main, flags.FLAGS))
      sys.exit(0)
    app.run(lambda _: main(), flags_parser=_parse)
  except UserError as error:
    if distributed.count() > 1 and not isinstance(error, distributed.AgreedError):
      distributed.leave(error)  # the other processes wait for this one
    print(f'{name}: {error}', file=sys.stderr, flush=True)
    sys.exit(1)


def _print_anything() -> None:
  """Letters that a terminal cannot show are printed as escapes: an error would end the work."""
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):  # not where it was closed or replaced
      stream.reconfigure(errors='backslashreplace')


def _parse(argv: list[str]) -> list[str]:
  """FLAGS(argv). Every way in which parsing can fail becomes a UserError."""
  try:
    rest = flags.FLAGS(_with_recipe_files(argv))
    if 'config' in flags.FLAGS and flags.FLAGS.config is not None:
      dir(flags.FLAGS.config.keys)  # ml_collections reports a broken file on first use only
  except UserError:
    raise
  except Exception as error:  # a config is code of the user's: it can raise anything
    raise UserError('flags as --help lists them', str(error), 'correct the command line') from error
  if len(rest) > 1:
    raise UserError('flags only', ' '.join(rest[1:]), 'write --flag=value')
  return rest


def _with_recipe_files(argv: list[str]) -> list[str]:
  """The command line with the file of each recipe in place of its name."""
  found = list(argv)
  for i, word in enumerate(argv):
    flag, equals, recipe = word.partition('=')
    if flag not in ('--config', '-config'):
      continue
    if equals and recipe:
      found[i] = f'{flag}={config_lib.recipe_file(recipe)}'
    elif not equals and i + 1 < len(argv):  # --config NAME
      found[i + 1] = str(config_lib.recipe_file(argv[i + 1]))
  return found


def define_config(kind: str, example: str) -> flags.FlagHolder:
  """--config=NAME, and --config.FIELD=VALUE for each field of the recipe or study."""
  return config_flags.DEFINE_config_file(
    'config',
    None,
    f'{kind}: a file of configs/ without .py, such as {example}, or the path of one.',
  )


def without(holders: Iterable[flags.FlagHolder], chosen: str) -> None:
  """Raises UserError if one of these flags was given, since nothing reads it with `chosen`."""
  given = [f'--{holder.name}' for holder in holders if holder.present]
  if given:
    names, flag = ' and '.join(given), chosen.partition('=')[0]
    found = 'it set' if len(given) == 1 else 'them set'
    raise UserError(f'{names} not set with {chosen}', found, f'remove {names}, or change {flag}')


def unless_stopped(work: Callable[[Tick], Any], stopped: str) -> Any:
  """work(tick) beside a progress bar; leaves with the exit code of a signal that comes.

  Args:
    work: calls tick(done, total) now and then, which raises once a signal has come.
    stopped: is said when a signal ends the work.
  """
  from csba_jax.runtime.progress import WorkBar, say

  with signals.StopRequest() as stop:
    try:
      stop.check()  # a signal to one of several processes has waited for this
      with WorkBar(stop.check) as bar:
        return work(bar.update)
    except signals.Stopped:
      say(stopped)
      sys.exit(stop.exit_code)


def required(holder: flags.FlagHolder, example: str) -> Any:
  """The value of a flag that must be given.

  Raises:
    UserError: it was not.
  """
  if not holder.value:
    raise UserError(f'--{holder.name}', 'none', f'add e.g. --{holder.name}={example}')
  return holder.value
