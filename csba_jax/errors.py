"""The one exception that a binary turns into a single line and an exit code, and what it shows."""

import ast
import contextlib


class UserError(ValueError):
  """An error that the user can correct. It says what was expected, what was found and what to do.

  Example:
    >>> str(UserError('imbalance_factor = n_max / n_min >= 1', '0.01', 'pass 1 / 0.01 = 100'))
    'expected imbalance_factor = n_max / n_min >= 1; found 0.01; to fix it: pass 1 / 0.01 = 100'
  """

  exit_code = 1

  def __init__(self, expected: str, found: str, do: str):
    parts = [' '.join(str(part).split()) for part in (expected, found, do)]  # one line, always
    self.expected, self.found, self.do = parts
    super().__init__('expected {}; found {}; to fix it: {}'.format(*parts))


class TryAgain(UserError):
  """An error that the same command will not meet when it is started again: launchers do that."""

  exit_code = 75  # EX_TEMPFAIL


class NotFinite(UserError):
  """A loss or a gradient that is NaN or infinite."""


def words_of(error: BaseException) -> str:
  """Text of an error in one line; without quotes and escapes where it is the repr of a text."""
  text = str(error)
  if text[:1] in ('"', "'"):  # as of a KeyError
    with contextlib.suppress(SyntaxError, ValueError):
      text = str(ast.literal_eval(text))
  return ' '.join(text.split())


def shown(value: object, longest: int = 80) -> str:
  """A value as a message shows it: its repr, cut where it is longer than that."""
  try:
    text = repr(value)
  except ValueError:  # Python writes no integer of more than 4,300 digits
    text = f'an integer of {value.bit_length()} bits' if isinstance(value, int) else '?'
  if len(text) <= longest:
    return text
  return f'{text[: longest // 2]}... ({len(text)} characters)'
