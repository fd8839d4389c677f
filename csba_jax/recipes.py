"""The recipes of configs/ by name, for callers that have no command line."""

from pathlib import Path

import ml_collections

import csba_jax
from csba_jax import config
from csba_jax.errors import UserError

FOLDER = Path(csba_jax.__file__).parents[1] / 'configs'  # of a source tree; wheels have none


def load(name: str, folder: Path | None = None) -> ml_collections.ConfigDict:
  """get_config() of a recipe, a config that may be changed before it is run.

  Args:
    name: of the file, without '.py'.
    folder: where it is; configs/ of the source tree by default.

  Raises:
    UserError: no such recipe, or a package that was installed without its source tree.

  Example:
    >>> load('digits_lt').data.imbalance_factor
    20.0
  """
  folder = FOLDER if folder is None else folder
  known = sorted(path.stem for path in folder.glob('*.py'))
  if not known:
    raise UserError(
      f'recipes in {folder}',
      'none: the package alone is installed',
      'install it from a clone of the repository with pip install --editable',
    )
  if name not in known:
    raise UserError(f'a recipe of {folder}: {", ".join(known)}', repr(name), 'name one of these')
  return config.sibling(str(folder / name), name)
