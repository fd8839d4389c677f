"""The flags of csba-train that take a folder of photos in place of a recipe."""

import ml_collections
from absl import flags

from csba_jax.bin import _main
from csba_jax.errors import UserError
from csba_jax.runtime.distributed import Launch

_DATA = flags.DEFINE_string(
  'data', None, 'Folder, CLASS/photo.jpg. It takes the place of --config: settings are chosen.'
)
_MINUTES = flags.DEFINE_float('minutes', 8.0, 'About how long training may take.', lower_bound=0.1)
RECIPES = {'data': 'image_folder'}  # as of `_main.run`


def with_settings(
  config: ml_collections.ConfigDict, workdir: flags.FlagHolder, dry_run: bool, launch: Launch
) -> ml_collections.ConfigDict:
  """The config; with --data after an audit, with settings for its folder, which are printed.

  Args:
    config: of the recipe.
    workdir: the flag; not read with `dry_run`, which writes nothing.
    dry_run: whether nothing is trained.
    launch: of this process.

  Raises:
    UserError: flags that do not go together, or as of `photos.configure`.
  """
  if _DATA.value is None:
    if _MINUTES.present:
      do = 'remove --minutes, or add --data=FOLDER'
      raise UserError('--minutes with --data', 'it without', do)
    return config
  if launch.several:
    raise UserError(
      '--data with one process',
      'several',
      'run csba-audit, then start all with --config=image_folder and --config.data.dir',
    )
  where = None if dry_run else _main.required(workdir, 'runs/photos')

  from csba_jax.data.audit import audit_folder
  from csba_jax.planning import photos
  from csba_jax.runtime.progress import say

  folder, given = _DATA.value, _main.given_fields(config)
  photos.check(config, given, folder, where)
  if kept := photos.resume(config, given, folder, where):
    say(f'the run of {where} goes on with its settings; the folder is not audited again')
    return kept
  audit = _main.unless_stopped(
    lambda tick: audit_folder(folder, config.data.layout, tick), 'stopped: nothing was written'
  )
  config, text = photos.configure(config, given, audit, where, _MINUTES.value)
  print(text, flush=True)
  return config
