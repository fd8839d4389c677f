"""What every binary does: print its help, parse flags, call main, report an error in one line."""

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from csba_jax import config as config_lib
from csba_jax.bin import _help, _nearest
from csba_jax.errors import UserError, shown, words_of
from csba_jax.fields import RANGES
from csba_jax.runtime import console, distributed, huge_pages, signals

_CORRECT = 'correct the command line'
# a flag of two binaries; each defines it, so that its --help lists it
LIST_FIELDS = ('list_fields', False, 'List the fields of the config with values and ranges.')
Tick = Callable[[int, int], None]  # (done, total) of some work


def run(
  main: Callable[..., int | None], operand: str = '', recipes: Mapping[str, str] | None = None
) -> None:
  """Runs main() under absl flags and exits with its code; a UserError is one line and its code.

  Args:
    main: the program.
    operand: what the one argument is that is no flag, such as 'FOLDER', and that `main` takes; ''
      if there is none.
    recipes: {flag: the recipe that it takes in place of --config}.
  """
  name = sys.argv[0].rsplit('/', 1)[-1]
  report = console.secure(name)
  signals.leave_when_told()  # until a StopRequest takes over
  logging.set_verbosity(logging.ERROR)  # JAX and Orbax log below that, and not for users
  try:
    if _help.is_asked_for(sys.argv[1:]):
      print(_help.text(main, flags.FLAGS))
      if _help.is_asked_for(sys.argv[1:], _help.ASKS_ALL):
        print(f'\nFlags of all libraries:\n{flags.FLAGS.get_help()}')
      sys.exit(0)
    parse = functools.partial(_parse, operand=operand, recipes=recipes or {})
    app.run(lambda argv: main(*argv[1:]), flags_parser=parse)
  except UserError as error:
    if distributed.count() > 1 and not isinstance(error, distributed.AgreedError):
      distributed.leave(error)  # the other processes wait for this one
    print(f'{name}: {error}', file=sys.stderr, flush=True)
    code: int = error.exit_code
  except SystemExit as end:  # of absl, with what main() returns
    code = end.code if isinstance(end.code, int) else int(end.code is not None)
    if isinstance(end.code, str):
      print(end.code, file=sys.stderr, flush=True)
  if distributed.count() > 1:
    distributed.meet_at_the_end()
    report()
    os._exit(code)  # at an end of Python, JAX may wait for a process that has left
  sys.exit(code)


def _parse(argv: list[str], operand: str, recipes: Mapping[str, str]) -> list[str]:
  """FLAGS(argv). Every way in which parsing can fail becomes a UserError."""
  try:
    argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
    rest = flags.FLAGS(_with_recipe(argv, recipes))
  except flags.Error as error:
    raise _explained(error) from error
  except UserError:
    raise
  except Exception as error:  # of ml_collections, for a flag that it cannot set
    raise UserError('flags as --help lists them', words_of(error), _CORRECT) from error
  if len(rest) > 1 and not operand:
    raise UserError('flags only', ' '.join(rest[1:]), 'write --flag=value')
  if operand and (len(rest) != 2 or not rest[1]):
    found = ' '.join(rest[1:]) or 'none'
    raise UserError(f'one {operand}', found, 'name it, and write all else as --flag=value')
  return rest


def _with_recipe(argv: list[str], recipes: Mapping[str, str]) -> list[str]:
  """The command line with --config, which --config.FIELD needs, where another flag implies it."""
  names = {word.lstrip('-').partition('=')[0] for word in argv[1:] if word.startswith('-')}
  for flag in sorted(names & set(recipes)):
    if 'config' in names:
      raise UserError(
        f'--{flag}, which chooses the settings, or --config',
        'both',
        f'remove --config; or remove --{flag} and set --config.data.dir',
      )
    return [argv[0], f'--config={recipes[flag]}', *argv[1:]]
  return argv


def given_fields(config: Any) -> dict[str, Any]:
  """{field: value} of the config's fields that the command line or a --flagfile sets."""
  flat = config_lib.flatten(config)
  return {name: flat[name] for name in flat if _is_given(f'config.{name}')}


def _is_given(flag: str) -> bool:
  return flag in flags.FLAGS and flags.FLAGS[flag].present > 0


def _explained(error: flags.Error) -> UserError:
  """What is wrong with a flag, in the words of this program."""
  if isinstance(error.__context__, UserError):  # absl takes it for any ValueError
    return error.__context__
  values = flags.FLAGS
  takes_config = 'config' in values
  if isinstance(error, flags.UnrecognizedFlagError):
    name, fields = error.flagname, _fields() if takes_config else ()
    own = [flag.name for flag in _help.own_flags(values)]
    return UserError('flags as --help lists them', f'--{name}', _nearest.of_flag(name, own, fields))
  illegal = re.match(r'flag --([^=]+)=(.*?): ', str(error), re.DOTALL)
  if illegal and isinstance(error, flags.IllegalFlagValueError):
    name, value = illegal.groups()
    return UserError(f'--{name}: {_takes(name)}', shown(value), f'correct --{name}=...')
  return UserError('flags as --help lists them', words_of(error), _CORRECT)


def _fields() -> list[str]:
  """Fields that --config.FIELD may name, for the binary's kind of config."""
  config = flags.FLAGS['config'].value
  return list(_nearest.fields_of(config_lib.default() if config is None else config))


def _takes(name: str) -> str:
  """What values a flag takes, in words."""
  flag = flags.FLAGS[name]
  if isinstance(flag.parser, flags.EnumParser):
    return ' or '.join(flag.parser.enum_values)
  found = flag.parser.syntactic_help or flag.flag_type()
  field = name.removeprefix('config.').removeprefix('base.')
  if name.startswith('config.') and field in RANGES:
    return f'{found}: {RANGES[field][0]}'
  return found


class _RecipeParser(flags.ArgumentParser):
  """The config of a recipe's name or path; fields that the command line sets must exist."""

  def parse(self, recipe: str) -> Any:
    """The config, locked; UserError for a file that cannot be run or a field that it has not."""
    config = config_lib.load(recipe).lock()
    for word in sys.argv[1:]:
      if field := re.match(r'--?(?:no)?config\.([^=]+)', word):
        _nearest.check_field(field[1], config)
    return config


def define_config(kind: str, example: str) -> flags.FlagHolder:
  """--config=NAME, and --config.FIELD=VALUE for each field of the recipe or study."""
  try:  # ml_collections looks for --config in a --flagfile already here
    holder = config_flags.DEFINE_config_file(
      'config',
      None,
      f'{kind}: a file of configs/ without .py, such as {example}, or the path of one.',
    )
  except flags.Error as error:
    sys.exit(f'{sys.argv[0].rsplit("/", 1)[-1]}: {_explained(error)}')
  flags.FLAGS['config'].parser = _RecipeParser()
  return holder


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
        result = work(bar.update)
      stop.check()
      return result
    except signals.Stopped:
      say(stopped)
      sys.exit(stop.exit_code)


def required(holder: flags.FlagHolder, example: str, computes: bool = False) -> Any:
  """The value of a flag that must be given.

  Args:
    holder: the flag.
    example: a value, for the message.
    computes: whether the program computes from now on; then it starts again with huge pages.

  Raises:
    UserError: it was not given.
  """
  if not holder.value:
    raise UserError(f'--{holder.name}', 'none', f'add e.g. --{holder.name}={example}')
  if computes:
    huge_pages.restart()
  return holder.value
