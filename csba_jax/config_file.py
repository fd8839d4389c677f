"""Config files are code of the user's: what goes wrong in one is one line with file and line."""

import inspect
import traceback
import types
from pathlib import Path
from typing import Any, NoReturn

import ml_collections

from csba_jax.errors import UserError, shown, words_of


class ConfigFileError(UserError):
  """An error in a config file; `found` names the file and the line."""


def get_config(path: Path) -> ml_collections.ConfigDict:
  """The config that get_config() of a file returns.

  Raises:
    ConfigFileError: the file cannot be run, or it has no get_config() that returns a config.
  """
  module = types.ModuleType(f'csba_jax_config_{path.stem}')
  module.__file__ = str(path)
  try:
    exec(compile(path.read_bytes(), str(path), 'exec'), module.__dict__)
  except (Exception, SystemExit) as error:  # not only errors: sys.exit(0) would look like success
    _report(error, path)
  function = getattr(module, 'get_config', None)
  if not inspect.isfunction(function):
    raise ConfigFileError(
      f'a function get_config() in {path}', 'none', 'define it: it returns the config'
    )
  line = function.__code__.co_firstlineno
  try:
    inspect.signature(function).bind()
  except TypeError as error:
    raise ConfigFileError(
      'get_config() that takes no arguments',
      f'{error} in {path}, line {line}',
      'give each argument a default, or remove it',
    ) from error
  try:
    config = function()
  except (Exception, SystemExit) as error:
    _report(error, path)
  if not isinstance(config, ml_collections.ConfigDict):
    raise ConfigFileError(
      'get_config() that returns the config',
      f'{shown(config)} from {path}, line {line}',
      'end it with: return c, where c is config.default() with your changes',
    )
  _to_plain_types(config)
  return config


def _report(error: BaseException, path: Path) -> NoReturn:
  """Raises ConfigFileError for what was raised while a config file ran."""
  if isinstance(error, ConfigFileError):  # of a file that this one reads
    raise error
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == str(path)]
  where = f'{path}, line {lines[-1]}' if lines else str(path)
  if isinstance(error, SyntaxError) and error.filename:  # of this file, or of one it imports
    where = f'{error.filename}, line {error.lineno}'
  do = 'correct the file'
  if isinstance(error, SystemExit):
    found = f'sys.exit({shown(error.code)}) in {where}'
    do = 'remove it: a config file only returns a config'
  elif isinstance(error, UserError):
    found = f'{error} ({where})'
  else:
    found = f'{_words(error)} in {where}'
  raise ConfigFileError('a config file that runs', found, do) from error


def _words(error: BaseException) -> str:
  """Type and text of an error in one line, without the listing of fields in ConfigDict's."""
  text = error.msg if isinstance(error, SyntaxError) else words_of(error)
  before, listing, after = text.partition(' Other fields present:')
  if listing:
    text = before + ' Did you mean'.join(['', *after.rpartition('Did you mean')[2:]])
  text = text if len(text) <= 300 else f'{text[:300]}...'
  return f'{type(error).__name__}: {text}' if text else type(error).__name__


def _to_plain_types(config: Any) -> None:
  """Makes numbers of NumPy that are Python floats too plain ones, in place."""
  for key, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      _to_plain_types(value)
    elif isinstance(value, float) and type(value) is not float:
      with config.ignore_type():  # that of the field is NumPy's by now
        config[key] = float(value)
