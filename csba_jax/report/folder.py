"""What csba-report says of a folder: the report of a study, or the result of a single run."""

from csba_jax.errors import UserError
from csba_jax.files import expanded
from csba_jax.report.study import write
from csba_jax.report.terminal import table
from csba_jax.run.workdir import read_result
from csba_jax.study import study_json


def describe(folder: str, pool: bool = False) -> str:
  """Writes the report of a study and returns its summary; of a run, the table of its result.

  Raises:
    UserError: neither is there, or as `write.write`; a run that is not finished.
  """
  path = expanded(folder)
  if (path / study_json.NAME).exists() or not (path / 'config.json').exists():
    return write.write(folder, pool)
  if pool:
    raise UserError('--pool with the folder of a study', f'a single run in {folder}', 'remove it')
  return f'{table.single(read_result(path))}\nworkdir: {folder}'
