"""A run's config: its fields with their defaults, checks, differences, and recipes by name."""

import difflib
import functools
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from csba_jax import config_file
from csba_jax.errors import UserError, shown, words_of
from csba_jax.fields import RANGES
from csba_jax.files import expanded


def _recipes() -> Path:
  """Folder of the recipes that ship: inside an installed package, beside that of a source tree."""
  package = Path(__file__).parent
  inside = package / 'configs'
  return inside if inside.is_dir() else package.parent / 'configs'


RECIPES = _recipes()


def default() -> ml_collections.ConfigDict:
  """Every field with its default: the only place where defaults live. Locked against new fields.

  What each field is, and which values it takes: `csba_jax.fields`.
  """
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.deterministic = False

  config.data = ml_collections.ConfigDict()
  config.data.seed = 0
  config.data.source = 'digits'
  config.data.name = ''
  config.data.train_split = 'train'
  config.data.test_split = 'test'
  config.data.dir = ''
  config.data.cache_dir = ''
  config.data.input = 'auto'
  config.data.image_size = 8
  config.data.channels = 1
  config.data.num_classes = 10
  config.data.profile = 'exp'
  config.data.imbalance_factor = 1.0
  config.data.class_order = 'index'
  config.data.largest_class = 0
  config.data.disjoint_subsets = 0
  config.data.val_fraction = 0.1
  config.data.test_fraction = 0.2
  config.data.folds = 0
  config.data.fold = 0
  config.data.layout = 'auto'
  config.data.strict = False
  config.data.manifest = ''
  config.data.group_column = ''
  config.data.group_copies = True

  config.augment = ml_collections.ConfigDict()
  config.augment.crop_padding = 0
  config.augment.flip = False
  config.augment.policy = 'none'
  config.augment.randaugment_ops = 2
  config.augment.randaugment_magnitude = 14
  config.augment.cutout = 0

  config.model = ml_collections.ConfigDict()
  config.model.name = 'multibranch'
  config.model.attention = 'csba'
  config.model.gate = 'identity'
  config.model.head = 'linear'
  config.model.scale = 30.0
  config.model.width = 1.0
  config.model.depth = 1
  config.model.norm = 'batch'
  config.model.init = ''
  config.model.dtype = 'float32'

  _add_methods(config)
  _add_training(config)
  return config.lock()


def _add_methods(config: ml_collections.ConfigDict) -> None:
  config.loss = ml_collections.ConfigDict()
  config.loss.name = 'cross_entropy'
  config.loss.tau = 1.0
  config.loss.smoothing = 0.1
  config.loss.smoothing_tail = 0.0
  config.loss.gamma = 2.0
  config.loss.max_margin = 0.5
  config.loss.weights = 'none'
  config.loss.beta = 0.9999
  config.loss.weights_start = 0.0
  config.loss.post_hoc_tau = 0.0

  config.sampler = ml_collections.ConfigDict({'name': 'instance', 'start': 0.0})

  config.mixing = ml_collections.ConfigDict()
  config.mixing.name = 'none'
  config.mixing.alpha = 1.0
  config.mixing.kappa = 3.0
  config.mixing.tau = 0.5
  config.mixing.probability = 1.0
  config.mixing.start = 0.0
  config.mixing.stop = 1.0

  stage = {'method': 'none', 'source': '', 'checkpoint': 'best', 'tau': -1.0}
  config.stage = ml_collections.ConfigDict(stage)


def _add_training(config: ml_collections.ConfigDict) -> None:
  config.surgery = ml_collections.ConfigDict()
  config.surgery.name = 'none'
  config.surgery.every = 100
  config.surgery.batches = 4
  config.surgery.images = 16
  config.surgery.layers = ''
  config.surgery.certain = True
  config.surgery.keep_length = True
  config.surgery.c = 0.5
  config.surgery.beta = 0.01
  config.surgery.alpha = 1.5
  config.surgery.rate = 0.1
  config.surgery.share = 1.0
  config.surgery.protect = 'minority'
  config.surgery.source = ''

  config.train = ml_collections.ConfigDict()
  config.train.batch_size = 128
  config.train.epochs = 10
  config.train.optimizer = 'sgd'
  config.train.schedule = 'cosine'
  config.train.learning_rate = 0.1
  config.train.pretrained_rate = 1.0
  config.train.frozen = 0.0
  config.train.momentum = 0.9
  config.train.weight_decay = 2e-4
  config.train.warmup_fraction = 0.025
  config.train.ema_decay = 0.0
  config.train.log_every = 50
  config.train.eval_every = 1
  config.train.save_every = 1000

  # where a run is done: these fields may change when a run is continued
  config.parallel = ml_collections.ConfigDict()
  config.parallel.devices = 0
  config.parallel.fsdp = 1
  config.parallel.fake_devices = 0
  config.parallel.hardware = 'h100'

  config.diagnostics = ml_collections.ConfigDict()
  config.diagnostics.every = 0
  config.diagnostics.statistics = 'auto'
  config.diagnostics.batches = 16
  config.diagnostics.images = 8
  config.diagnostics.snapshots = ''
  config.diagnostics.loss_levels = ''


def step_at(share: float, total_steps: int) -> int:
  """First step at which `share` of the run is done; the same whole number on host and device."""
  return math.ceil(share * total_steps - 1e-6)


def sibling(file: str, name: str) -> ml_collections.ConfigDict:
  """get_config() of the config `name`.py beside `file`: how a child config names its parent."""
  return config_file.get_config(Path(file).with_name(f'{name}.py'))


def recipe_file(recipe: str) -> Path:
  """The file of a recipe: a path that ends in .py as it is, a bare name among those that ship.

  Args:
    recipe: 'digits_lt', or the path of a config file such as 'mine/photos.py'.

  Raises:
    UserError: there is no such file, or no recipe of that name ships.
  """
  known = {path.stem: path for path in RECIPES.glob('*.py')}
  if recipe in known:
    return known[recipe]
  path = Path(recipe)
  if path.suffix == '.py' and path.is_file():
    return path
  near = difflib.get_close_matches(path.stem, sorted(known), n=3, cutoff=0.4)
  raise UserError(
    "the name of a recipe that ships, the path of one that ends in .py, or of a run's config.json",
    repr(recipe),
    f'use {" or ".join(near)}' if near else f'use the name of a file in {RECIPES}',
  )


def load(name: str) -> ml_collections.ConfigDict:
  """get_config() of a recipe, or the config of a run. You may change it before you run it.

  Args:
    name: of a recipe that ships, or the path of a config file, see `recipe_file`; or the path of a
      run's config.json.

  Raises:
    UserError: there is no such recipe, or it cannot be run.

  Example:
    >>> load('digits_lt').data.imbalance_factor
    20.0
  """
  path = expanded(name)
  if path.suffix == '.json' and path.is_file():
    return _of_run(path)
  return config_file.get_config(recipe_file(name))


def _of_run(path: Path) -> ml_collections.ConfigDict:
  """The config in a run's config.json; fields that are newer than it say what was done then."""
  config = default().lock()
  try:
    config.update(completed(json.loads(path.read_bytes())['config']))
  except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
    raise UserError(
      "a run's config.json, of this version", f'{path}: {words_of(error)}', 'name another file'
    ) from error
  return config.unlock()


# Fields that were renamed: {old: new}. Stored configs are read under both names.
RENAMED = {'diagnostics.moments': 'diagnostics.snapshots'}


def check(config: ml_collections.ConfigDict) -> None:
  """Raises UserError for a missing or unknown field, a wrong type or a value out of range."""
  if 'base' in config and 'variants' in config:
    raise UserError('the config of a run', 'that of a study', 'use csba-study for it')
  expected, found = flatten(default()), flatten(config)
  for field in sorted(found.keys() & RENAMED.keys()):
    raise UserError(
      f'the field under its new name {RENAMED[field]}',
      field,
      f'set --config.{RENAMED[field]}=... and remove {field}',
    )
  for field in sorted(expected.keys() ^ found.keys()):
    have = 'missing' if field in expected else 'a field that nothing reads'
    near = [] if field in expected else nearest(field, expected)
    raise UserError(
      'the fields of csba_jax.config.default()',
      f'{field}: {have}',
      f'correct the config: did you mean {" or ".join(near)}?' if near else 'correct the config',
    )
  for field, value in found.items():
    kind = type(expected[field])
    if type(value) is not kind and not (kind is float and type(value) is int):
      raise UserError(f'{field} of type {kind.__name__}', shown(value), f'set --config.{field}=...')
  for field, (wanted, test) in RANGES.items():
    if not test(found[field]):
      raise UserError(f'{field}: {wanted}', shown(found[field]), f'set --config.{field}=...')
  for field, value in found.items():
    if type(value) is int and abs(value) >= 2**31:  # more than arrays of positions can hold
      raise UserError(f'{field} below 2**31', shown(value), f'set --config.{field}=...')
  start, stop = found['mixing.start'], found['mixing.stop']
  if start >= stop:
    raise UserError(
      'mixing.start < mixing.stop', f'start {start}, stop {stop}', 'set --config.mixing.stop=...'
    )
  folds, fold = found['data.folds'], found['data.fold']
  if fold >= max(folds, 1):
    raise UserError(
      f'data.fold below data.folds = {folds}', f'{fold}', 'set --config.data.fold=0 or more folds'
    )
  if folds and found['data.source'] == 'tfds' and found['data.test_split']:
    raise UserError(
      'data.folds of a source without a test part of its own',
      f'data.test_split {found["data.test_split"]!r}',
      "set --config.data.test_split='', or --config.data.folds=0",
    )
  subsets, seed = found['data.disjoint_subsets'], found['data.seed']
  if subsets and seed >= subsets:
    raise UserError(
      f'data.seed below data.disjoint_subsets = {subsets}: it says which of them',
      f'{seed}',
      'set --config.data.seed=0 or a larger --config.data.disjoint_subsets; in a study, set '
      f'--config.subsets to at most {subsets}',
    )
  of_a_profile = (found['data.largest_class'], subsets)
  if found['data.profile'] == 'natural' and any(of_a_profile):
    raise UserError(
      "data.largest_class and data.disjoint_subsets of 0 with data.profile='natural', which keeps "
      'every image',
      f'{of_a_profile[0]} and {subsets}',
      'set --config.data.profile=exp, or both to 0',
    )
  side, cutout = found['data.image_size'], found['augment.cutout']
  if cutout > side:
    raise UserError(
      f'augment.cutout of at most data.image_size = {side} pixels',
      f'{cutout}',
      'set --config.augment.cutout=...',
    )


def nearest(field: str, fields: Collection[str]) -> list[str]:
  """Fields that somebody may have meant: of the same name in other sections, else of a near name.

  Example:
    >>> nearest('epochs', ['seed', 'train.epochs'])
    ['train.epochs']
  """
  name = field.rpartition('.')[2]
  if same := [known for known in fields if known.rpartition('.')[2] == name]:
    return same
  if near := difflib.get_close_matches(field, fields, n=1, cutoff=0.75):
    return near
  by_name: dict[str, list[str]] = {}
  for known in fields:
    by_name.setdefault(known.rpartition('.')[2], []).append(known)
  near = difflib.get_close_matches(name, by_name, n=1, cutoff=0.7)
  return by_name[near[0]] if near else []


def flatten(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """{'train.epochs': 10, ...} from a nested config or dict."""
  flat: dict[str, Any] = {}
  for key, value in config.items():
    nested = isinstance(value, Mapping | ml_collections.ConfigDict)
    flat |= flatten(value, f'{prefix}{key}.') if nested else {f'{prefix}{key}': value}
  return flat


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
  """A config as nested dicts. Fields that were added after it was stored say what was done then."""
  return _merged(_merged(_plain_default(), _BEFORE), with_new_names(config))


def with_new_names(config: Mapping[str, Any]) -> dict[str, Any]:
  """A stored config as nested dicts, its fields under the names that they have today."""
  config = {
    key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()
  }
  for old, new in RENAMED.items():
    section, _, name = old.partition('.')
    if name in config.get(section, {}):
      config[section][new.partition('.')[2]] = config[section].pop(name)
  return config


@functools.cache
def _plain_default() -> dict[str, Any]:
  return default().to_dict()


def _merged(like: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
  merged = {}
  for key in [*like, *(key for key in config if key not in like)]:
    value = config.get(key, like.get(key))
    nested = isinstance(value, Mapping | ml_collections.ConfigDict)
    merged[key] = _merged(like.get(key) or {}, value) if nested else value
  return merged


_WHERE = ('parallel.', 'data.input', 'data.cache_dir')  # where a run is done, not what it is
# What it does shows in the splits, whose digests are compared. So a run from before this field goes
# on with its default where there are no copies.
_IN_SPLITS = ('data.group_copies',)
# what was done before there was the field, where today's default is something else
_BEFORE = {
  'data': {'group_copies': False},
  'diagnostics': {'statistics': 'frozen'},
  'model': {'gate': 'half'},
}


def differences(
  there: Mapping[str, Any], here: Mapping[str, Any], everything: bool = False
) -> list[str]:
  """Fields in which two configs differ, as 'field: THERE there, HERE here'.

  Fields that say where a run is done, not what it is, count with `everything` only; so do those
  whose effect is compared as splits.
  """
  there, here = flatten(there), flatten(here)
  fields = sorted(there.keys() | here.keys())
  if not everything:
    fields = [field for field in fields if not field.startswith((*_WHERE, *_IN_SPLITS))]
  return [
    f'{field}: {there.get(field, "absent")!r} there, {here.get(field, "absent")!r} here'
    for field in fields
    if there.get(field, '<absent>') != here.get(field, '<absent>')
  ]
