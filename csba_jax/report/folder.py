"""What csba-report says of a folder: the report of a study, or of a single run."""

from csba_jax.errors import UserError
from csba_jax.files import expanded
from csba_jax.report.run import page
from csba_jax.report.study import write
from csba_jax.report.terminal import table
from csba_jax.run.workdir import read_result
from csba_jax.runtime import backend, jax_setup
from csba_jax.study import study_json


def describe(folder: str, pool: bool = False) -> str:
  """Writes the report of a study, or the page of a run, and returns its summary.

  The numbers of a run are known without its page: if that cannot be written, the last line says
  why.

  Raises:
    UserError: neither is there, or as `write.write`; a run that is not finished.
  """
  path = expanded(folder)
  if (path / study_json.NAME).exists() or not (path / 'config.json').exists():
    return write.write(folder, pool)
  if pool:
    raise UserError('--pool with the folder of a study', f'a single run in {folder}', 'remove it')
  text = f'{table.single(read_result(path))}\nworkdir: {folder}'
  jax_setup.prepare()  # the page shows mistakes on the test images
  backend.start()
  try:
    return f'{text}\nwritten: {page.write(folder)}'
  except UserError as error:
    return f'{text}\nthe page was not written: {error}'
