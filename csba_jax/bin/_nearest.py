"""What somebody may have meant by a flag or a field that there is not."""

import difflib
from collections.abc import Collection, Iterator

import ml_collections

from csba_jax import config as config_lib
from csba_jax.errors import UserError

SHOWN = 6  # fields of a section that a message names
# What other programs call it: the flag or field here.
MEANT = {
  'dataset': '--config=RECIPE (a recipe has its data), or --config.data.name=NAME of a TFDS set',
  'lr': '--config.train.learning_rate=VALUE',
  'wd': '--config.train.weight_decay=VALUE',
  'bs': '--config.train.batch_size=VALUE',
  'batch': '--config.train.batch_size=VALUE',
  'imbalance': '--config.data.imbalance_factor=VALUE',
  'model': '--config.model.name=VALUE',
  'arch': '--config.model.name=VALUE',
  'loss': '--config.loss.name=VALUE',
  'gpu': '--config.parallel.devices=VALUE',
  'gpus': '--config.parallel.devices=VALUE',
}
FOLDERS = ('output', 'out', 'output_dir', 'outdir', 'logdir', 'log_dir', 'save_dir', 'dir')


def fields_of(config: ml_collections.ConfigDict, prefix: str = '') -> Iterator[str]:
  """Names of the fields of a config, of its sections too."""
  for key, value in config.items():
    yield f'{prefix}{key}'
    if isinstance(value, ml_collections.ConfigDict):
      yield from fields_of(value, f'{prefix}{key}.')


def check_field(field: str, config: ml_collections.ConfigDict) -> None:
  """Raises UserError for a field of a command line that a config has not, or that is a section."""
  known = list(fields_of(config))
  plain = field.partition('[')[0]  # one element of a tuple
  inside = [name for name in known if name.startswith(f'{plain}.')]
  if inside:
    raise UserError(
      f'a field of section {plain}, not the section',
      f'--config.{field}',
      f'set one of its fields: {_options(inside)}',
    )
  if plain in known:
    if not isinstance(_value(config, plain), dict):
      return
    raise UserError(
      f'{plain} in a config file', f'--config.{field}', 'write a config file that sets it'
    )
  leaves = [name for name in known if not any(other.startswith(f'{name}.') for other in known)]
  near = config_lib.nearest(plain, leaves)
  raise UserError(
    'a field of the config',
    f'--config.{field}',
    f'set {_options(near)}' if near else 'use a field that --list_fields names',
  )


def of_flag(name: str, flags: Collection[str], fields: Collection[str]) -> str:
  """What to do about a flag that there is not.

  Args:
    name: of the flag, without its dashes.
    flags: names of the binary's own flags.
    fields: of its config; none for a binary that takes no config.
  """
  if name.startswith('config.') and fields:
    return 'put --config=NAME before it'
  if name.startswith('config'):
    return 'remove it: the config is that of the workdir'
  if close := difflib.get_close_matches(name, flags, n=1, cutoff=0.8):
    return f'set --{close[0]}'
  if fields and name.lower() in MEANT:
    return f'set {MEANT[name.lower()]}'
  if name.lower() in FOLDERS and 'workdir' in flags:
    return 'set --workdir=DIR'
  if near := config_lib.nearest(name, fields):
    return f'set {_options(near)}'
  if close := difflib.get_close_matches(name, flags, n=1, cutoff=0.5):
    return f'set --{close[0]}'
  return 'use a flag that --help lists' + (', or a field of --list_fields' if fields else '')


def _options(fields: Collection[str]) -> str:
  named = [f'--config.{field}' for field in fields]
  more = f' or {len(named) - SHOWN} more' if len(named) > SHOWN else ''
  if more:
    return ', '.join(named[:SHOWN]) + more
  return ' or '.join(named)


def _value(config: ml_collections.ConfigDict, field: str) -> object:
  for part in field.split('.'):
    config = config[part]
  return config
