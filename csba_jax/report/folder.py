"""What csba-report says of a folder: the report of a study, or the result of a single run."""

from csba_jax.errors import UserError
from csba_jax.files import expanded
from csba_jax.report.run import page
from csba_jax.report.study import write
from csba_jax.report.terminal import table
from csba_jax.run.workdir import read_result
from csba_jax.study import study_json


def is_run(folder: str) -> bool:
  """Whether it is the folder of a run, and not of a study."""
  path = expanded(folder)
  return (path / 'config.json').exists() and not (path / study_json.NAME).exists()


def of_study(folder: str, pool: bool = False) -> str:
  """Writes the report of a study and returns its summary.

  Raises:
    UserError: as `write.write`.
  """
  return write.write(folder, pool)


def of_run(folder: str) -> str:
  """Writes the page of a finished run, and returns the table of its result and the page's path.

  The numbers are known without the page: if it cannot be written, the last line says why.

  Raises:
    UserError: the run is not finished.
  """
  text = f'{table.single(read_result(folder))}\nworkdir: {folder}'
  try:
    return f'{text}\nwritten: {page.write(folder)}'
  except UserError as error:
    return f'{text}\nthe page was not written: {error}'
