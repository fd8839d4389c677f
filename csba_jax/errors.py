"""The one exception that a binary turns into a single line and an exit code."""


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
