"""A run's config: its fields with their defaults, checks, differences, and recipes by name."""

import difflib
import functools
import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from csba_jax.errors import UserError


def _recipes() -> Path:
  """Folder of the recipes that ship: inside an installed package, beside that of a source tree."""
  package = Path(__file__).parent
  inside = package / 'configs'
  return inside if inside.is_dir() else package.parent / 'configs'


RECIPES = _recipes()


def default() -> ml_collections.ConfigDict:
  """Every field with its default: the only place where defaults live. Locked against new fields."""
  config = ml_collections.ConfigDict()
  config.seed = 0  # decides the initial weights, the batches and the augmentation
  config.deterministic = False  # GPU: the same bits every time, but slower

  config.data = ml_collections.ConfigDict()
  config.data.seed = 0  # decides which images form the subset and the parts
  config.data.source = 'digits'  # digits | tfds | image_folder
  config.data.name = ''  # tfds: name of the set, e.g. cifar10
  config.data.train_split = 'train'  # tfds: name or slice, such as train[:80%]
  config.data.test_split = 'test'  # tfds; '' = carve data.test_fraction from train_split
  config.data.dir = ''  # tfds: '' = $TFDS_DATA_DIR; image_folder: '' = $CSBA_IMAGE_FOLDER
  config.data.cache_dir = ''  # decoded images; '' = $CSBA_CACHE_DIR, else ~/.cache/csba_jax
  # where training images are: memory | stream (in the cache on disk, read batch by batch) | auto:
  # stream if those of the source take more than backend.IN_MEMORY_BYTES (4 GiB) decoded
  config.data.input = 'auto'
  config.data.image_size = 8  # pixels a side; images of another size are resized and cropped
  config.data.channels = 1
  config.data.num_classes = 10  # 0 = as many as the data has
  config.data.profile = 'exp'  # exp | step | natural (every image of the source)
  config.data.imbalance_factor = 1.0  # n_max / n_min >= 1
  config.data.class_order = 'index'  # which class is the head: index | frequency
  config.data.val_fraction = 0.1  # of the long-tail subset; 0 = no selection, last checkpoint
  config.data.test_fraction = 0.2  # of a source without a test part of its own
  config.data.folds = 0  # of cross-validation, in place of test_fraction; 0 = none
  config.data.fold = 0  # which of them is the test part; data.seed draws the folds
  config.data.strict = False  # image_folder: an unreadable file ends the run
  # image_folder: CSV file in the folder, or a path; columns `file` and group_column
  config.data.manifest = ''
  config.data.group_column = ''  # duplicates of one group stay on one side of every split
  config.data.group_copies = True  # so do byte-identical images, also without a manifest

  config.augment = ml_collections.ConfigDict()
  config.augment.crop_padding = 0  # pixels of zero padding for random crops
  config.augment.flip = False  # random horizontal flips
  config.augment.policy = 'none'  # none | autoaugment (CIFAR-10's) | randaugment
  config.augment.randaugment_ops = 2  # operations on each image, one after the other
  config.augment.randaugment_magnitude = 14  # of each, on the paper's scale 0..30
  config.augment.cutout = 0  # side of the square in pixels; 0 = off

  config.model = ml_collections.ConfigDict()
  config.model.name = 'multibranch'  # multibranch | resnet32 | resnet32_branches | vit
  config.model.attention = 'csba'  # csba | csba_class | se | cbam | none | none_wide
  config.model.head = 'linear'  # linear | cosine (for ldam) | scaled (for lws)
  config.model.scale = 30.0  # of the cosines of a cosine classifier
  config.model.width = 1.0  # multiplies every number of channels
  config.model.depth = 1  # multiplies the number of blocks
  config.model.norm = (
    'batch'  # batch (BatchNorm) | group (GroupNorm): images do not depend on others
  )
  config.model.dtype = 'float32'  # of the computation: float32 | bfloat16; parameters: float32

  _add_methods(config)
  _add_training(config)
  return config.lock()


def _add_methods(config: ml_collections.ConfigDict) -> None:
  config.loss = ml_collections.ConfigDict()
  config.loss.name = 'cross_entropy'  # a row of csba_jax.methods.losses.LOSSES
  config.loss.tau = 1.0  # logit_adjustment, vector_scaling: weight of the log prior
  config.loss.smoothing = 0.1  # label_smoothing; label_aware_smoothing: of the largest class
  config.loss.smoothing_tail = 0.0  # label_aware_smoothing: of the smallest class
  config.loss.gamma = 2.0  # focal, dual_focal, vector_scaling: exponent
  config.loss.max_margin = 0.5  # ldam: of the smallest class
  config.loss.weights = 'none'  # of classes: none | inverse | effective
  config.loss.beta = 0.9999  # effective
  config.loss.weights_start = 0.0  # share of the run after which they count (deferred: 0.8)
  config.loss.post_hoc_tau = 0.0  # times the log prior is subtracted from the logits in
  # evaluation, in addition to what the loss has corrected already

  config.sampler = ml_collections.ConfigDict()
  config.sampler.name = 'instance'  # instance | class | square_root | progressive | reversed
  config.sampler.start = 0.0  # share of the run after which it is used; before it: instance

  config.mixing = ml_collections.ConfigDict()
  config.mixing.name = 'none'  # none | mixup | remix | cutmix | cmo
  config.mixing.alpha = 1.0  # of the Beta distribution of the shares
  config.mixing.kappa = 3.0  # remix: ratio of class sizes from which the label goes one way
  config.mixing.tau = 0.5  # remix: share of the larger class below which it does
  config.mixing.probability = 1.0  # that a batch is mixed
  config.mixing.start = 0.0  # share of the run before which nothing is mixed
  config.mixing.stop = 1.0  # share of the run after which nothing is mixed

  config.stage = ml_collections.ConfigDict()
  config.stage.method = 'none'  # none | crt | lws | label_aware | tau_norm
  config.stage.source = ''  # workdir of the first stage
  config.stage.checkpoint = 'best'  # of the first stage: best | latest | STEP
  config.stage.tau = -1.0  # tau_norm; -1: the best of 0, 0.1, ... 2 on the validation part


def _add_training(config: ml_collections.ConfigDict) -> None:
  config.train = ml_collections.ConfigDict()
  config.train.batch_size = 128  # images
  config.train.epochs = 10  # an epoch is ceil(images / batch_size) full batches
  config.train.optimizer = 'sgd'  # sgd | adamw
  config.train.schedule = 'cosine'  # cosine (to 0) | steps (/ 100 at 80 % and 90 % of the run)
  config.train.learning_rate = 0.1  # peak, after a linear warm-up
  config.train.momentum = 0.9  # Nesterov's; adamw: b1
  config.train.weight_decay = 2e-4  # not on norms and biases
  config.train.warmup_fraction = 0.025  # of the run
  config.train.ema_decay = 0.0  # of the averages that are evaluated, a step; 0 = no averages
  config.train.log_every = 50  # steps; also the longest chain of steps in one dispatch
  config.train.eval_every = 1  # epochs between evaluations on the validation part, and checkpoints
  config.train.save_every = 1000  # steps between checkpoints, beside those after evaluations

  # where a run is done: these fields may change when a run is continued
  config.parallel = ml_collections.ConfigDict()
  config.parallel.devices = 0  # 0 = all there are, of every process; they share each batch
  config.parallel.fsdp = 1  # devices that share one copy of parameters and optimiser state
  config.parallel.fake_devices = 0  # --dry_run for a mesh that is not there; 0 = what is there
  config.parallel.hardware = 'h100'  # --dry_run: a row of csba_jax.planning.hardware.HARDWARE

  config.diagnostics = ml_collections.ConfigDict()
  config.diagnostics.every = 0  # steps between measurements of class-gradient conflict; 0 = never
  config.diagnostics.images = 8  # of each class in the fixed probe that is measured
  # shares of the run, such as '0,0.5,1', after which conflict is measured on every training and
  # validation image. With any of them, the net that is tested is measured too.
  config.diagnostics.snapshots = ''
  # losses, such as '1,0.3': conflict is also measured when the mean loss over the training images
  # first reaches a level. It is computed at log lines whose own mean is within twice the level.
  config.diagnostics.loss_levels = ''


def numbers(text: str) -> tuple[float, ...]:
  """'0,0.1' -> (0.0, 0.1); ValueError for anything but numbers with commas between them."""
  return tuple(float(word) for word in text.split(',')) if text else ()


def step_at(share: float, total_steps: int) -> int:
  """First step at which `share` of the run is done; the same whole number on host and device."""
  return math.ceil(share * total_steps - 1e-6)


def _are_numbers(low: float, high: float) -> Callable[[str], bool]:
  def test(text: str) -> bool:
    try:
      return all(low <= number <= high for number in numbers(text))
    except ValueError:
      return False

  return test


def sibling(file: str, name: str) -> ml_collections.ConfigDict:
  """get_config() of the config `name`.py beside `file`: how a child config names its parent."""
  path = Path(file).with_name(f'{name}.py')
  spec = importlib.util.spec_from_file_location(f'csba_jax_config_{name}', path)
  if spec is None or spec.loader is None:
    raise ImportError(f'{path} is no Python file')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


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
    'the name of a recipe that ships, or the path of a config file that ends in .py',
    repr(recipe),
    f'use {" or ".join(near)}' if near else f'use the name of a file in {RECIPES}',
  )


def load(name: str) -> ml_collections.ConfigDict:
  """get_config() of a recipe. You may change the config before you run it.

  Args:
    name: of a recipe that ships, or the path of a config file; see `recipe_file`.

  Raises:
    UserError: there is no such recipe.

  Example:
    >>> load('digits_lt').data.imbalance_factor
    20.0
  """
  path = recipe_file(name)
  return sibling(str(path), path.stem)


# Fields that were renamed: {old: new}. Stored configs are read under both names.
RENAMED = {'diagnostics.moments': 'diagnostics.snapshots'}
# field: (what is expected, test); every numeric field is here, and names that no table checks
_RANGES = {
  'seed': ('a whole number from 0 to 2**31 - 1', lambda v: 0 <= v < 2**31),
  'data.seed': ('a whole number from 0 to 2**31 - 1', lambda v: 0 <= v < 2**31),
  'data.source': ('digits, tfds or image_folder', ('digits', 'tfds', 'image_folder').__contains__),
  'data.train_split': ('a split', bool),
  'data.input': ('memory, stream or auto', ('memory', 'stream', 'auto').__contains__),
  'data.image_size': ('8 to 256 pixels', lambda v: 8 <= v <= 256),
  'data.channels': ('1 or 3', (1, 3).__contains__),
  'data.num_classes': ('0 (as in the data) or at least 2', lambda v: v == 0 or v >= 2),
  'data.profile': ('exp, step or natural', ('exp', 'step', 'natural').__contains__),
  'data.imbalance_factor': (
    'n_max / n_min >= 1 (0.01 in the inverse style is 1 / 0.01 = 100)',
    lambda v: 1 <= v < math.inf,
  ),
  'data.class_order': ('index or frequency', ('index', 'frequency').__contains__),
  'data.val_fraction': ('0 <= fraction < 1', lambda v: 0 <= v < 1),
  'data.test_fraction': ('0 < fraction < 1', lambda v: 0 < v < 1),
  'data.folds': ('0 (none) or at least 2', lambda v: v == 0 or v >= 2),
  'data.fold': ('0 or more', lambda v: v >= 0),
  'augment.crop_padding': ('0 to 64 pixels', lambda v: 0 <= v <= 64),
  'augment.randaugment_ops': ('1 to 8 operations', lambda v: 1 <= v <= 8),
  'augment.randaugment_magnitude': ('0 to 30', lambda v: 0 <= v <= 30),
  'augment.cutout': ('0 (off) to 256 pixels', lambda v: 0 <= v <= 256),
  'model.scale': ('a finite number > 0', lambda v: 0 < v < math.inf),
  'model.width': ('0 < width <= 64', lambda v: 0 < v <= 64),
  'model.depth': ('1 to 16', lambda v: 1 <= v <= 16),
  'model.norm': ('batch or group', ('batch', 'group').__contains__),
  'model.dtype': ('float32 or bfloat16', ('float32', 'bfloat16').__contains__),
  'loss.tau': ('a finite number >= 0', lambda v: 0 <= v < math.inf),
  'loss.smoothing': ('0 <= smoothing < 1', lambda v: 0 <= v < 1),
  'loss.smoothing_tail': ('0 <= smoothing < 1', lambda v: 0 <= v < 1),
  'loss.gamma': ('a finite number >= 0', lambda v: 0 <= v < math.inf),
  'loss.max_margin': ('a finite number >= 0', lambda v: 0 <= v < math.inf),
  'loss.beta': ('0 <= beta < 1', lambda v: 0 <= v < 1),
  'loss.weights_start': ('0 <= share of the run < 1', lambda v: 0 <= v < 1),
  'loss.post_hoc_tau': ('a finite number >= 0', lambda v: 0 <= v < math.inf),
  'sampler.start': ('0 <= share of the run < 1', lambda v: 0 <= v < 1),
  'mixing.alpha': ('a finite number > 0', lambda v: 0 < v < math.inf),
  'mixing.kappa': ('a finite number >= 1', lambda v: 1 <= v < math.inf),
  'mixing.tau': ('0 <= tau <= 1', lambda v: 0 <= v <= 1),
  'mixing.probability': ('0 <= probability <= 1', lambda v: 0 <= v <= 1),
  'mixing.start': ('0 <= share of the run < 1', lambda v: 0 <= v < 1),
  'mixing.stop': ('0 < share of the run <= 1', lambda v: 0 < v <= 1),
  'stage.checkpoint': ('best, latest or a step', lambda v: v in ('best', 'latest') or v.isdigit()),
  'stage.tau': (
    '-1 (chosen on the validation part) or >= 0',
    lambda v: v == -1 or 0 <= v < math.inf,
  ),
  'train.batch_size': ('at least 2 images', lambda v: v >= 2),
  'train.epochs': ('at least 1', lambda v: v >= 1),
  'train.learning_rate': ('a finite number > 0', lambda v: 0 < v < math.inf),
  'train.momentum': ('0 <= momentum < 1', lambda v: 0 <= v < 1),
  'train.weight_decay': ('a finite number >= 0', lambda v: 0 <= v < math.inf),
  'train.warmup_fraction': ('0 <= fraction < 1', lambda v: 0 <= v < 1),
  'train.ema_decay': ('0 (off) <= decay < 1', lambda v: 0 <= v < 1),
  'train.log_every': ('at least 1 step', lambda v: v >= 1),
  'train.eval_every': ('at least 1 epoch', lambda v: v >= 1),
  'train.save_every': ('at least 1 step', lambda v: v >= 1),
  'parallel.devices': ('0 (all) or at least 1', lambda v: v >= 0),
  'parallel.fsdp': ('at least 1 device', lambda v: v >= 1),
  'parallel.fake_devices': ('0 (none) to 4096', lambda v: 0 <= v <= 4096),
  'diagnostics.every': ('0 (never) or at least 1 step', lambda v: v >= 0),
  'diagnostics.snapshots': ("shares of the run from 0 to 1, such as '0,0.1,1'", _are_numbers(0, 1)),
  'diagnostics.loss_levels': ("losses >= 0, such as '1,0.3'", _are_numbers(0, 1e9)),
  'diagnostics.images': ('at least 4 images, one for each fold', lambda v: v >= 4),
}


def check(config: ml_collections.ConfigDict) -> None:
  """Raises UserError for a missing or unknown field, a wrong type or a value out of range."""
  expected, found = flatten(default()), flatten(config)
  for field in sorted(found.keys() & RENAMED.keys()):
    raise UserError(
      f'the field under its new name {RENAMED[field]}',
      field,
      f'set --config.{RENAMED[field]}=... and remove {field}',
    )
  for field in sorted(expected.keys() ^ found.keys()):
    have = 'missing' if field in expected else 'a field that nothing reads'
    raise UserError(
      'the fields of csba_jax.config.default()', f'{field}: {have}', 'correct the config'
    )
  for field, value in found.items():
    kind = type(expected[field])
    if type(value) is not kind and not (kind is float and type(value) is int):
      raise UserError(f'{field} of type {kind.__name__}', repr(value), f'set --config.{field}=...')
  for field, (wanted, test) in _RANGES.items():
    if not test(found[field]):
      raise UserError(f'{field}: {wanted}', repr(found[field]), f'set --config.{field}=...')
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
  side, cutout = found['data.image_size'], found['augment.cutout']
  if cutout > side:
    raise UserError(
      f'augment.cutout of at most data.image_size = {side} pixels',
      f'{cutout}',
      'set --config.augment.cutout=...',
    )


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
_BEFORE = {'data': {'group_copies': False}}


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
