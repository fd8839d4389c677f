"""The runs of a study, as configs: variants x methods x imbalance factors x seeds or folds."""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from csba_jax import config as config_lib
from csba_jax.errors import UserError, shown
from csba_jax.study import declared, protocol

# fields that say where things lie: two runs that differ in these alone are of one study
PLACES = ('data.dir', 'data.cache_dir')
# fields of the base that the grid sets in every run, and the axes that say to what
_SET = {'seed': 'first_seed', 'data.seed': 'first_seed', 'data.fold': 'repeats'}
_SET |= {'model.attention': 'variants'} | dict.fromkeys(protocol.PLAIN, 'methods')
# and those that it sets where an axis has values, or for single cells: nothing else in the configs
# of a study's runs differs
OF_RUN = (
  *_SET,
  *('model.name', 'model.width', 'model.depth', 'train.learning_rate'),
  *('data.imbalance_factor', 'data.profile'),
  *('data.manifest', 'data.group_column', 'data.group_copies'),
)


def fields_of_runs(study: Mapping[str, Any]) -> frozenset[str]:
  """The fields in which configs of a study's runs may differ: OF_RUN, and those of own_methods.

  Args:
    study: its config, also as study.json has it.
  """
  own = study.get('own_methods') or {}
  return frozenset((*OF_RUN, *(field for changes in own.values() for field in changes)))


def is_place(field: str) -> bool:
  """Whether a field of a run's config says where the run is done, and not what it is."""
  return field in PLACES or field.startswith('parallel.')


def default() -> ml_collections.ConfigDict:
  """Every field of a study with its default; `base` is the config of its runs (config.default)."""
  c = ml_collections.ConfigDict(convert_dict=False)  # the keys of own_methods have dots in them
  c.name = 'study'
  c.base = config_lib.default()
  c.variants = ('none', 'none_wide', 'csba')
  c.methods = ('cross_entropy',)
  c.own_methods = {}
  c.pairs = ()
  c.method_pairs = ()
  c.models = ()
  c.imbalance_factors = ()
  c.widths = ()
  c.depths = ()
  c.learning_rates = ()
  c.seeds = 10
  c.first_seed = 0
  c.subsets = 0
  c.repeats = 1
  c.naive_repeats = 0
  c.naive_variants = ()
  c.naive_methods = ()
  c.tuned_by = ''
  c.test = True
  c.outcome = 'macro_f1'
  c.margin = 0.02
  c.smallest_effect = 0.01
  c.threads = 1
  return c.lock()


# What each field is, in one line; csba-study --list_fields prints them. Those of `base` are in
# csba_jax.fields.
FIELDS = {
  'name': 'Name of the study, in reports.',
  'variants': 'Values of base.model.attention.',
  'methods': 'Rows of csba_jax.study.protocol.METHODS, or names of own_methods.',
  'own_methods': "In a file: {name: {field: value}}, such as {'ldam': {'loss.name': 'ldam'}}.",
  'pairs': '(treatment, control) of variants, the first decides; (): those of the protocol.',
  'method_pairs': '(treatment, control) of methods, compared within each variant; (): none.',
  'models': 'Values of base.model.name; (): that of the base.',
  'imbalance_factors': 'Values of base.data.imbalance_factor; (): that of the base.',
  'widths': 'Values of base.model.width; (): that of the base.',
  'depths': 'Values of base.model.depth; (): that of the base.',
  'learning_rates': 'Values of base.train.learning_rate; (): that of the base, or as tuned.',
  'seeds': 'Seeds of initial weights and batches; without `subsets` each draws its own subset.',
  'first_seed': 'The first seed.',
  'subsets': 'Draw only so many subsets, which the seeds take in turn; 0: one for each seed.',
  'repeats': 'Of the cross-validation, where base.data.folds > 0: in place of seeds.',
  'naive_repeats': 'Of it with duplicates on both sides, to show what that is worth.',
  'naive_variants': 'Variants that naive folds are run with; (): all.',
  'naive_methods': 'Methods that naive folds are run with; (): all.',
  'tuned_by': 'Folder of the study whose validation scores choose the learning rates.',
  'test': 'False: the runs only tune, and no number of their test part is kept.',
  'outcome': 'Primary outcome.',
  'margin': 'Margin of non-inferiority, of accuracy and head F1.',
  'smallest_effect': 'Smallest effect of interest on the primary outcome.',
  'threads': 'Of XLA in each run, on CPUs: they decide the last bits, whatever --jobs is.',
}
MOST = 10_000  # seeds or repeats: lists of runs are made of them

RANGES = {
  'variants': ('at least one', len),
  'methods': ('at least one', len),
  'imbalance_factors': ('n_max / n_min >= 1', lambda v: all(1 <= f < 2**31 for f in v)),
  'widths': ('widths > 0', lambda v: all(0 < w <= 64 for w in v)),
  'depths': ('1 to 16', lambda v: all(isinstance(d, int) and 1 <= d <= 16 for d in v)),
  'learning_rates': ('rates > 0', lambda v: all(0 < r < 2**31 for r in v)),
  'seeds': (f'1 to {MOST}', lambda v: 1 <= v <= MOST),
  'first_seed': ('0 to 2**30', lambda v: 0 <= v <= 2**30),
  'subsets': (f'0 (one for each seed) to {MOST}', lambda v: 0 <= v <= MOST),
  'repeats': (f'1 to {MOST}', lambda v: 1 <= v <= MOST),
  'naive_repeats': (f'0 to {MOST}', lambda v: 0 <= v <= MOST),
  'outcome': ('macro_f1 or f1:CLASS', lambda v: v == 'macro_f1' or v[:3] == 'f1:' != v),
  'margin': ('0 < margin < 1', lambda v: 0 < v < 1),
  'smallest_effect': ('0 <= effect < 1', lambda v: 0 <= v < 1),
  'threads': ('at least 1', lambda v: v >= 1),
}


_LISTS = (
  'variants',
  'naive_variants',
  'naive_methods',
  'methods',
  'models',
  'imbalance_factors',
  'widths',
  'depths',
  'learning_rates',
)


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """One run of a grid."""

  name: str  # unique in the study; its folder
  axes: Mapping[str, Any]  # model, variant, method, ..., split, repeat, fold, seed
  config: ml_collections.ConfigDict

  @property
  def shape(self) -> str:
    """Equal for runs that one compiled program can train."""
    return json.dumps({k: v for k, v in self.axes.items() if k not in ('repeat', 'fold', 'seed')})


def fields() -> list[str]:
  """Names of all fields of a study: its own, then base.FIELD."""
  return [*FIELDS, *(f'base.{field}' for field in config_lib.flatten(config_lib.default()))]


def check(study: ml_collections.ConfigDict) -> None:
  """Raises UserError for a study config with a wrong field, type or value."""
  if 'base' not in study and 'train' in study:
    raise UserError('the config of a study', 'that of a run', 'use csba-train for it')
  like = default()
  for field in sorted(set(like) ^ set(study)):
    have = 'missing' if field in like else 'a field that nothing reads'
    near = [] if field in like else config_lib.nearest(field, fields())
    raise UserError(
      'the fields of csba_jax.study.grid.default()',
      f'{field}: {have}',
      f'correct the config: did you mean {" or ".join(near)}?' if near else 'correct the config',
    )
  for field, value in study.items():
    kind = type(like[field])
    value = tuple(value) if isinstance(value, list) else value
    value = value.to_dict() if kind is dict and hasattr(value, 'to_dict') else value
    fits = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
    if not fits and not (kind is float and type(value) is int):
      raise UserError(f'{field} of type {kind.__name__}', shown(value), f'set --config.{field}=...')
  for field, (wanted, test) in RANGES.items():
    if not _holds(test, study[field]):
      raise UserError(f'{field}: {wanted}', shown(study[field]), f'set --config.{field}=...')
  for field in _LISTS:
    if any(value in study[field][:i] for i, value in enumerate(study[field])):
      raise UserError(f'{field} without repetitions', repr(study[field]), 'name each once')
  config_lib.check(study.base)
  _check_unread(study)
  declared.check_methods(study, functools.partial(_not_of_a_method, study))
  declared.check_pairs(study)
  declared.check_method_pairs(study)
  declared.check_naive(study)
  folds = study.base.data.folds
  if not folds and (study.repeats > 1 or study.naive_repeats):
    raise UserError(
      'base.data.folds for repeats of a cross-validation', 'none', 'set --config.base.data.folds=5'
    )
  data = study.base.data
  if study.naive_repeats and not (data.group_column or data.group_copies):
    raise UserError(
      'duplicates that the naive split can ignore (base.data.group_copies or group_column)',
      'none',
      'set --config.naive_repeats=0, or --config.base.data.group_copies=True',
    )


def _check_unread(study: ml_collections.ConfigDict) -> None:
  """Raises UserError for a field that would be set without any effect."""
  base, default_base = config_lib.flatten(study.base), config_lib.flatten(config_lib.default())
  for field, axis in _SET.items():
    if base[field] != default_base[field]:
      raise UserError(
        f'base.{field} as by default ({default_base[field]!r}), which every run gets from {axis}',
        repr(base[field]),
        f'remove it, and set --config.{axis}=...',
      )
  by_default = default()
  for field in ('seeds', 'subsets'):
    if study.base.data.folds and study[field] != by_default[field]:
      raise UserError(
        f'{field} as by default ({by_default[field]}) with base.data.folds, whose units are folds',
        repr(study[field]),
        'remove it, and set --config.repeats=...',
      )


def _not_of_a_method(study: ml_collections.ConfigDict, field: str) -> str:
  """Why a method may not set a field, in words; '' where it may."""
  axis = {'model.name': 'models', 'model.width': 'widths', 'model.depth': 'depths'}.get(field)
  if field == 'train.learning_rate':
    axis = 'learning_rates' if study.learning_rates else 'tuned_by' if study.tuned_by else None
  elif field in _SET and field not in protocol.PLAIN:
    axis = _SET[field]
  elif field in ('data.imbalance_factor', 'data.profile'):
    axis = 'imbalance_factors'
  if axis:
    return f'every run gets it from {axis}'
  if field.startswith('data.'):
    return 'all runs of a unit have the same images'
  return 'it says where a run is done, not what it is' if is_place(field) else ''


def _holds(test: Callable[[Any], bool], value: Any) -> bool:
  """Whether a value passes a test; what cannot be compared, such as a word, does not."""
  try:
    return bool(test(value))
  except TypeError:
    return False


def runs(study: ml_collections.ConfigDict, rates: Mapping[str, float] | None = None) -> list[Run]:
  """Every run of a study; runs of one shape come one after the other.

  Args:
    study: see `default`.
    rates: learning rate by `rate_key`, where another study has chosen them.

  Raises:
    UserError: as `check`, also of the run's config; a cell without a chosen rate.
  """
  check(study)
  base = study.base
  axes = {
    'model': study.models or (base.model.name,),
    'variant': study.variants,
    'method': study.methods,
    'imbalance_factor': study.imbalance_factors or (base.data.imbalance_factor,),
    'width': study.widths or (base.model.width,),
    'depth': study.depths or (base.model.depth,),
  }
  if study.learning_rates:
    axes['learning_rate'] = study.learning_rates
  varying = [name for name, values in axes.items() if len(values) > 1]
  found = []
  for values in itertools.product(*axes.values()):
    at = dict(zip(axes, values, strict=True))
    for unit in units(study):
      if unit['split'] == 'naive' and not declared.runs_naive(study, at):
        continue
      config = _config(study, at, unit, rates)
      name = '-'.join([*(_word(axis, at[axis]) for axis in varying), *_unit_words(study, unit)])
      found.append(Run(name, at | unit, config))
  return found


def rate_key(axes: Mapping[str, Any]) -> str:
  """What a learning rate is chosen for: all axes of a run but the rate and those of its unit."""
  left_out = ('learning_rate', 'split', 'repeat', 'fold', 'seed')
  return ' '.join(f'{axis}={axes[axis]}' for axis in sorted(axes) if axis not in left_out)


def placeless(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """A run's config as JSON has it, without the places of this machine."""
  plain = json.loads(json.dumps(config.to_dict()))
  for field in PLACES:
    section, name = field.split('.')
    plain[section][name] = ''
  return plain


# what a base without the field meant when digests began, where today's default is something else
_WHEN_DIGESTS_BEGAN = {'model.gate': 'half'}


def digest(study: ml_collections.ConfigDict) -> str:
  """Hex SHA-256 of what all runs of a study have in common, wherever their data lies.

  Of fields that are not at their default, so that it stays as configs get new ones.
  """
  by_default = config_lib.flatten(config_lib.default()) | _WHEN_DIGESTS_BEGAN
  stored = {new: old for old, new in config_lib.RENAMED.items()}  # as when digests began
  kept = {
    stored.get(field, field): value
    for field, value in config_lib.flatten(study.base).items()
    if value != by_default[field] and not is_place(field)
  }
  return hashlib.sha256(json.dumps([kept, study.test], sort_keys=True).encode()).hexdigest()


def shard(all_runs: list[Run], index: int, number: int) -> list[Run]:
  """Part `index` of `number`: neighbours, so that few shapes have to be compiled in each."""
  ends = [len(all_runs) * i // number for i in (index, index + 1)]
  return all_runs[ends[0] : ends[1]]


def parse_shard(text: str) -> tuple[int, int]:
  """'2/8' -> (2, 8), parts counted from 0; UserError for anything else."""
  index, _, number = text.partition('/')
  if index.isdecimal() and number.isdecimal() and int(index) < int(number):
    return int(index), int(number)
  raise UserError('--shard=i/n with 0 <= i < n', repr(text), 'set it to 0/4, 1/4, 2/4 or 3/4, say')


def units(study: ml_collections.ConfigDict) -> list[dict[str, Any]]:
  """What variants are compared over: seeds, or folds of repeated cross-validations."""
  folds = study.base.data.folds
  if not folds:
    seeds = range(study.first_seed, study.first_seed + study.seeds)
    return [{'split': 'grouped', 'repeat': 0, 'fold': 0, 'seed': seed} for seed in seeds]
  times = [('grouped', study.repeats), ('naive', study.naive_repeats)]
  return [
    {
      'split': split,
      'repeat': repeat,
      'fold': fold,
      'seed': study.first_seed + repeat * folds + fold,
    }
    for split, number in times
    for repeat in range(number)
    for fold in range(folds)
  ]


def data_seed(study: ml_collections.ConfigDict, unit: Mapping[str, Any]) -> int:
  """The seed of a unit's subset, parts and folds."""
  if study.base.data.folds:
    return study.first_seed + unit['repeat']
  return unit['seed'] % study.subsets if study.subsets else unit['seed']


def _config(
  study: ml_collections.ConfigDict,
  at: Mapping[str, Any],
  unit: Mapping[str, Any],
  rates: Mapping[str, float] | None,
) -> ml_collections.ConfigDict:
  """The config of one run."""
  config = study.base.copy_and_resolve_references()
  config.model.name, config.model.attention = at['model'], at['variant']
  config.model.width, config.model.depth = float(at['width']), at['depth']
  declared.apply(config, declared.methods(study)[at['method']])
  factor = float(at['imbalance_factor'])
  config.data.imbalance_factor = factor
  if factor == 1 and not (config.data.largest_class or config.data.disjoint_subsets):
    config.data.profile = 'natural'
  elif config.data.profile == 'natural':
    config.data.profile = 'exp'
  config.seed = unit['seed']
  if config.data.folds:
    config.data.fold = unit['fold']
  config.data.seed = data_seed(study, unit)
  if unit['split'] == 'naive':
    config.data.manifest = config.data.group_column = ''
    config.data.group_copies = False
  if 'learning_rate' in at:
    config.train.learning_rate = float(at['learning_rate'])
  elif rates is not None:
    key = rate_key(at)
    if key not in rates:
      raise UserError(
        f'a learning rate chosen in {study.tuned_by} for {key}',
        'none',
        'run that study for it, or set --config.tuned_by=',
      )
    config.train.learning_rate = rates[key]
  config_lib.check(config)
  return config


_SHORT: dict[str, Callable[[Any], str]] = {
  'imbalance_factor': lambda v: f'if{v:g}',
  'width': lambda v: f'w{v:g}',
  'depth': lambda v: f'd{v}',
  'learning_rate': lambda v: f'lr{v:g}',
}


def _word(axis: str, value: Any) -> str:
  return _SHORT.get(axis, str)(value)


def _unit_words(study: ml_collections.ConfigDict, unit: Mapping[str, Any]) -> list[str]:
  if not study.base.data.folds:
    return [f's{unit["seed"]}']
  words = [f'r{unit["repeat"]}', f'f{unit["fold"]}']
  return words if unit['split'] == 'grouped' else ['naive', *words]
