"""The grid: every run once, under a name of its own, with the config that its axes say."""

import ast
import importlib.util
import itertools
import json
import math
import re
from pathlib import Path

import ml_collections
import pytest

from csba_jax import config as config_lib
from csba_jax.errors import UserError
from csba_jax.study import grid, protocol

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / 'results'
STUDIES = sorted((ROOT / 'configs').glob('study_*.py'))

BAD = {
  'variants': [()],
  'methods': [()],
  'imbalance_factors': [(0.5,), (10.0, math.inf), (math.nan,), ('ten',)],
  'widths': [(0.0,), (1.0, -1.0), (65.0,), (math.nan,), ('wide',)],
  'depths': [(17,), (0,), (1, 1.5), (-1,), ('two',)],
  'learning_rates': [(0.0,), (-0.1,), (math.inf,), (math.nan,), (None,)],
  'seeds': [0, -1, 10_001],
  'first_seed': [-1, 2**31],
  'subsets': [-1, 10_001],
  'repeats': [0, 10_001],
  'naive_repeats': [-1, 10_001],
  'outcome': ['', 'accuracy', 'f1', 'f1:', 'head_f1'],
  'margin': [0.0, 1.0, -0.1, math.nan],
  'smallest_effect': [-0.01, 1.0, math.nan],
  'threads': [0, -1],
}
BORDERS = {
  'imbalance_factors': [(1,), (1.0, 500.0)],
  'widths': [(64.0,), (1,)],
  'depths': [(1, 16)],
  'smallest_effect': [0.0, 0],
  'outcome': ['f1:Physical-Damage'],
  'first_seed': [0],
  'variants': [['none', 'csba']],  # a list, as JSON gives it
}


def with_fields(**fields):
  """A default study with fields set, base__data__folds=5 those of its base."""
  c = grid.default()
  for name, value in fields.items():
    *sections, field = name.split('__')
    target = c
    for section in sections:
      target = target[section]
    target[field] = value
  return c


def cross_validated(**fields):
  data = {'source': 'image_folder', 'manifest': 'm.csv', 'group_column': 'dup', 'folds': 3}
  return with_fields(**{f'base__data__{k}': v for k, v in data.items()} | fields)


def unchecked(field, value):
  """A default study with one field set, whatever its type and whether or not it exists."""
  fields = {name: grid.default()[name] for name in grid.default()}
  return ml_collections.ConfigDict(fields | {field: value})


def load(path):
  spec = importlib.util.spec_from_file_location(f'study_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def pairs(table):
  return [(field, value) for field, values in table.items() for value in values]


def fields_of(run):
  return config_lib.flatten(run.config)


# ---- check


def test_every_range_is_tried_with_a_value_outside():
  assert BAD.keys() == grid.RANGES.keys()


def test_every_field_that_is_a_number_or_an_axis_has_a_range():
  wanted = {k for k, v in grid.default().items() if isinstance(v, int | float | tuple)}
  # a model's name is its registry's, these are checked against the variants or the methods
  checked = {'pairs', 'method_pairs', 'naive_variants', 'naive_methods'}
  assert wanted - checked - {'test', 'models'} <= grid.RANGES.keys()


@pytest.mark.parametrize(('field', 'value'), pairs(BAD))
def test_value_out_of_range_names_field_range_value_and_remedy(field, value):
  with pytest.raises(UserError) as error:
    grid.check(unchecked(field, value))
  assert str(error.value) == (
    f'expected {field}: {grid.RANGES[field][0]}; found {value!r}; '
    f'to fix it: set --config.{field}=...'
  )


@pytest.mark.parametrize(('field', 'value'), pairs(BORDERS))
def test_borders_are_allowed(field, value):
  grid.check(unchecked(field, value))


@pytest.mark.parametrize(
  ('field', 'value', 'kind'),
  [
    ('name', 3, 'str'),
    ('variants', 'none', 'tuple'),
    ('seeds', '10', 'int'),
    ('seeds', 2.0, 'int'),
    ('seeds', True, 'int'),
    ('test', 1, 'bool'),
    ('margin', '0.1', 'float'),
    ('margin', True, 'float'),
    ('widths', 0.5, 'tuple'),
    ('base', 'digits', 'ConfigDict'),
  ],
)
def test_wrong_type(field, value, kind):
  with pytest.raises(UserError) as error:
    grid.check(unchecked(field, value))
  assert str(error.value) == (
    f'expected {field} of type {kind}; found {value!r}; to fix it: set --config.{field}=...'
  )


@pytest.mark.parametrize('field', sorted(grid.default()))
def test_missing_field(field):
  fields = {name: grid.default()[name] for name in grid.default() if name != field}
  with pytest.raises(
    UserError,
    match=rf'the fields of csba_jax\.study\.grid\.default\(\); found {field}: missing; .* correct',
  ):
    grid.check(ml_collections.ConfigDict(fields))


def test_unknown_field():
  with pytest.raises(UserError, match='found varaints: a field that nothing reads;'):
    grid.check(unchecked('varaints', ('none',)))


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('variants', ('none', 'csba', 'none')),
    ('methods', ('drw', 'drw')),
    ('models', ('vit', 'vit')),
    ('imbalance_factors', (10, 10.0)),
    ('widths', (0.5, 0.5)),
    ('depths', (1, 1)),
    ('learning_rates', (0.1, 0.2, 0.1)),
  ],
)
def test_repetitions(field, value):
  with pytest.raises(UserError) as error:
    grid.check(unchecked(field, value))
  assert str(error.value) == (
    f'expected {field} without repetitions; found {value!r}; to fix it: name each once'
  )


def test_the_base_is_checked():
  with pytest.raises(UserError, match='train.epochs: at least 1; found 0'):
    grid.check(with_fields(base__train__epochs=0))


UNREAD = {
  'seed': (1, 'first_seed'),
  'data.seed': (1, 'first_seed'),
  'model.attention': ('none', 'variants'),
  'loss.name': ('focal', 'methods'),
  'loss.weights': ('inverse', 'methods'),
  'loss.weights_start': (0.5, 'methods'),
  'sampler.name': ('class', 'methods'),
  'sampler.start': (0.5, 'methods'),
}


@pytest.mark.parametrize('field', UNREAD)
def test_a_field_of_the_base_that_the_grid_sets_is_refused(field):
  value, axis = UNREAD[field]
  with pytest.raises(UserError) as error:
    grid.check(with_fields(**{f'base__{field.replace(".", "__")}': value}))
  default = config_lib.flatten(config_lib.default())[field]
  assert str(error.value) == (
    f'expected base.{field} as by default ({default!r}), which every run gets from {axis}; '
    f'found {value!r}; to fix it: remove it, and set --config.{axis}=...'
  )


def test_a_fold_of_the_base_is_refused():
  with pytest.raises(UserError, match=r'base\.data\.fold .* set --config\.repeats='):
    grid.check(cross_validated(base__data__fold=1))


def test_nothing_that_the_grid_sets_is_forgotten():
  """Whatever differs between a run and its base, or between two runs, is in one of the tables."""
  c = cross_validated(
    variants=('none', 'se'),
    methods=tuple(protocol.METHODS),
    imbalance_factors=(1.0, 20.0),
    widths=(0.25, 0.5),
    depths=(2, 3),
    models=('vit',),
    learning_rates=(0.3, 0.4),
    naive_repeats=1,
    first_seed=3,
  )
  base = config_lib.flatten(c.base)
  runs = [fields_of(run) for run in grid.runs(c)]
  different = {f for run in runs for f, value in run.items() if value != base[f]}
  assert different == {*grid.OF_RUN} - {'sampler.start'}  # which no method defers
  assert {*UNREAD, 'data.fold'} == grid._SET.keys()


@pytest.mark.parametrize(
  ('fields', 'axis'), [({'seeds': 5}, 'repeats'), ({'subsets': 2}, 'repeats')]
)
def test_seeds_and_subsets_of_a_cross_validation_are_refused(fields, axis):
  with pytest.raises(UserError) as error:
    grid.check(cross_validated(**fields))
  ((field, value),) = fields.items()
  assert str(error.value) == (
    f'expected {field} as by default ({grid.default()[field]}) with base.data.folds, whose units '
    f'are folds; found {value}; to fix it: remove it, and set --config.{axis}=...'
  )


@pytest.mark.parametrize('field', ['repeats', 'naive_repeats'])
def test_repeats_of_no_cross_validation(field):
  with pytest.raises(
    UserError,
    match=r'base\.data\.folds for repeats .*; found none; .* set --config\.base\.data\.folds=5',
  ):
    grid.check(with_fields(**{field: 2}))


def test_naive_folds_without_groups_to_ignore():
  c = cross_validated(naive_repeats=1)
  grid.check(c)
  c.base.data.manifest = c.base.data.group_column = ''
  grid.check(c)  # the copies that have the same bytes are ignored
  c.base.data.group_copies = False
  with pytest.raises(
    UserError, match=r'duplicates that .*; found none; .* set --config\.naive_repeats=0'
  ):
    grid.check(c)


def test_default_is_locked_and_passes_and_is_new_each_time():
  c = grid.default()
  grid.check(c)
  with pytest.raises(AttributeError):
    c.brand_new = 1
  c.seeds = 99
  c.base.train.epochs = 99
  assert grid.default().seeds == 10
  assert grid.default().base.train.epochs == config_lib.default().train.epochs


# ---- runs


@pytest.mark.seconds
def test_a_run_for_each_point_of_the_grid():
  c = with_fields(
    variants=('none', 'csba', 'se'),
    methods=tuple(protocol.METHODS),
    imbalance_factors=(1.0, 10.0),
    widths=(0.25, 0.5),
    depths=(1, 2),
    learning_rates=(0.1, 0.2),
    models=('multibranch', 'vit'),
    seeds=2,
    first_seed=7,
  )
  runs = grid.runs(c)
  assert len(runs) == 3 * 4 * 2 * 2 * 2 * 2 * 2 * 2
  assert len({run.name for run in runs}) == len(runs)
  expected = itertools.product(
    c.models, c.variants, c.methods, c.imbalance_factors, c.widths, c.depths, c.learning_rates
  )
  axes = ('model', 'variant', 'method', 'imbalance_factor', 'width', 'depth', 'learning_rate')
  for (values, seed), run in zip(itertools.product(expected, (7, 8)), runs, strict=True):
    unit = {'split': 'grouped', 'repeat': 0, 'fold': 0, 'seed': seed}
    assert run.axes == dict(zip(axes, values, strict=True)) | unit
    found = fields_of(run)
    assert found['model.name'] == run.axes['model']
    assert found['model.attention'] == run.axes['variant']
    assert found['model.width'] == run.axes['width']
    assert found['model.depth'] == run.axes['depth']
    assert found['train.learning_rate'] == run.axes['learning_rate']
    assert found['data.imbalance_factor'] == run.axes['imbalance_factor']
    assert (found['seed'], found['data.seed']) == (seed, seed)
    config_lib.check(run.config)


def test_names_say_what_varies():
  def names(**fields):
    return [run.name for run in grid.runs(with_fields(**fields))]

  assert names(variants=('none',), seeds=2) == ['s0', 's1']
  assert names(seeds=1) == ['none-s0', 'none_wide-s0', 'csba-s0']
  assert names(
    variants=('csba',),
    methods=('drw', 'cross_entropy'),
    imbalance_factors=(1, 12.5),
    widths=(0.25, 1),
    depths=(1, 2),
    learning_rates=(1e-3, 0.5),
    models=('vit', 'multibranch'),
    seeds=1,
    first_seed=3,
  )[:3] == [
    'vit-drw-if1-w0.25-d1-lr0.001-s3',
    'vit-drw-if1-w0.25-d1-lr0.5-s3',
    'vit-drw-if1-w0.25-d2-lr0.001-s3',
  ]


def test_without_axes_a_run_is_the_base_but_for_seeds():
  c = with_fields(variants=('se',), seeds=1, first_seed=4)
  (run,) = grid.runs(c)
  expected = c.base.copy_and_resolve_references()
  expected.model.attention = 'se'
  expected.seed = expected.data.seed = 4
  expected.data.profile = 'natural'  # which factor 1 is
  assert config_lib.differences(expected, run.config) == []
  assert 'learning_rate' not in run.axes


def test_a_run_has_a_config_of_its_own():
  c = with_fields(seeds=2)
  runs = grid.runs(c)
  runs[0].config.train.epochs = 77
  assert runs[1].config.train.epochs == c.base.train.epochs == 10


@pytest.mark.parametrize('method', sorted(protocol.METHODS))
def test_a_method_sets_what_any_method_sets(method):
  assert protocol.METHODS[method].keys() == protocol.METHODS['cross_entropy'].keys()


@pytest.mark.parametrize('method', sorted(protocol.METHODS))
def test_methods_change_their_fields_alone(method):
  first, second = (
    grid.runs(with_fields(variants=('csba',), methods=(m,), seeds=1))[0].config
    for m in ('cross_entropy', method)
  )
  changed = {
    field: value
    for field, value in config_lib.flatten(second).items()
    if value != config_lib.flatten(first)[field]
  }
  expected = {
    'cross_entropy': {},
    'balanced_softmax': {'loss.name': 'balanced_softmax'},
    'class_balanced': {'sampler.name': 'class'},
    'drw': {'loss.weights': 'effective', 'loss.weights_start': 0.8},
  }
  assert changed == expected[method]


@pytest.mark.parametrize(
  ('base', 'factor', 'expected'),
  [
    ('exp', 1.0, 'natural'),
    ('step', 1, 'natural'),
    ('natural', 1.0, 'natural'),
    ('natural', 20.0, 'exp'),
    ('exp', 20.0, 'exp'),
    ('step', 20.0, 'step'),
  ],
)
def test_profile_of_a_factor(base, factor, expected):
  c = with_fields(base__data__profile=base, imbalance_factors=(factor,), seeds=1)
  for run in grid.runs(c):
    assert run.config.data.profile == expected
    assert run.config.data.imbalance_factor == factor
    assert type(run.config.data.imbalance_factor) is float


def test_subsets_take_turns():
  runs = grid.runs(with_fields(variants=('none',), seeds=5, first_seed=10, subsets=3))
  assert [run.config.seed for run in runs] == [10, 11, 12, 13, 14]
  assert [run.config.data.seed for run in runs] == [1, 2, 0, 1, 2]
  assert [run.axes['seed'] for run in runs] == [10, 11, 12, 13, 14]


def test_folds_of_repeated_cross_validations():
  c = cross_validated(variants=('none', 'csba'), repeats=2, naive_repeats=1, first_seed=100)
  runs = grid.runs(c)
  assert len(runs) == 2 * 3 * 3
  of_none = [run for run in runs if run.axes['variant'] == 'none']
  assert [run.name for run in of_none] == [
    *('none-r0-f0', 'none-r0-f1', 'none-r0-f2'),
    *('none-r1-f0', 'none-r1-f1', 'none-r1-f2'),
    *('none-naive-r0-f0', 'none-naive-r0-f1', 'none-naive-r0-f2'),
  ]
  assert [run.config.data.fold for run in of_none] == 3 * [0, 1, 2]
  assert [run.config.data.seed for run in of_none] == [100] * 3 + [101] * 3 + [100] * 3
  assert [run.config.seed for run in of_none] == [*range(100, 106), *range(100, 103)]
  for run in of_none:
    naive = run.axes['split'] == 'naive'
    assert run.axes['seed'] == run.config.seed
    assert (run.axes['repeat'], run.axes['fold']) == (
      run.config.data.seed - 100,
      run.config.data.fold,
    )
    assert run.config.data.manifest == ('' if naive else 'm.csv')
    assert run.config.data.group_column == ('' if naive else 'dup')
    assert run.config.data.group_copies == (not naive)
    assert run.config.data.folds == 3


def test_naive_folds_of_some_variants_and_methods():
  both = {'variants': ('none', 'csba'), 'methods': ('cross_entropy', 'balanced_softmax')}
  c = cross_validated(**both, naive_repeats=1)
  every = [run.name for run in grid.runs(c)]
  c.naive_variants = ('none',)
  assert [run.name for run in grid.runs(c)] == [
    name for name in every if not ('naive' in name and 'csba' in name)
  ]
  c.naive_methods = ('balanced_softmax',)
  found = [run.name for run in grid.runs(c)]
  assert [name for name in found if 'naive' in name] == [
    f'none-balanced_softmax-naive-r0-f{fold}' for fold in range(3)
  ]
  assert [name for name in found if 'naive' not in name] == [
    name for name in every if 'naive' not in name
  ]
  c.naive_variants, c.naive_methods = both['variants'], both['methods']
  assert [run.name for run in grid.runs(c)] == every


@pytest.mark.parametrize('axis', ['variants', 'methods'])
@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      {'naive_AXIS': ('A',)},
      "naive_AXIS only with naive_repeats of 1 or more; found naive_AXIS=('A',), naive_repeats=0; "
      'to fix it: remove naive_AXIS, or set --config.naive_repeats=1',
    ),
    (
      {'naive_repeats': 1, 'test': False},
      'naive folds in a study with a test part: they show what a leak into it is worth; found '
      'naive_repeats=1, test=False; to fix it: set --config.naive_repeats=0 or --config.test=True',
    ),
    (
      {'naive_AXIS': (['A'],), 'naive_repeats': 1},
      "naive_AXIS: some of the AXIS (A, B); found ['A']; to fix it: add it to AXIS, or remove it",
    ),
    (
      {'naive_AXIS': ('C',), 'naive_repeats': 1},
      "naive_AXIS: some of the AXIS (A, B); found 'C'; to fix it: add it to AXIS, or remove it",
    ),
    (
      {'naive_AXIS': ('A', 'A'), 'naive_repeats': 1},
      "naive_AXIS without repetitions; found ('A', 'A'); to fix it: name each once",
    ),
  ],
)
def test_what_the_naive_folds_cannot_be_limited_to(axis, fields, message):
  a, b, c = {
    'variants': ('none', 'csba', 'se'),
    'methods': ('cross_entropy', 'balanced_softmax', 'drw'),
  }[axis]
  names = {'A': a, 'B': b, 'C': c}

  def filled(value):
    if isinstance(value, tuple | list):
      return type(value)(map(filled, value))
    return names.get(value, value)

  with pytest.raises(UserError) as error:
    grid.check(
      cross_validated(
        **{axis: (a, b)},
        **{name.replace('AXIS', axis): filled(value) for name, value in fields.items()},
      )
    )
  words = re.sub(r'\b[ABC]\b', lambda found: names[found[0]], message.replace('AXIS', axis))
  assert str(error.value) == f'expected {words}'


def test_a_balanced_cell_of_subsets_keeps_its_profile():
  fields = {'imbalance_factors': (1.0, 5.0), 'base__data__source': 'tfds'}
  for cut in ({'base__data__largest_class': 50}, {'base__data__disjoint_subsets': 4}, {}):
    runs = grid.runs(with_fields(**fields, **cut, base__data__name='cifar10', seeds=2, subsets=2))
    profiles = {run.axes['imbalance_factor']: run.config.data.profile for run in runs}
    assert profiles == {1.0: 'exp' if cut else 'natural', 5.0: 'exp'}


@pytest.mark.parametrize(
  ('name', 'subsets'),
  [('study_cifar10_small', [*range(10)]), ('study_cifar10_small_tuning', [10, 11, 12])],
)
def test_the_small_study_and_its_tuning_share_no_subset(name, subsets):
  study = load(ROOT / f'configs/{name}.py').get_config()
  study.tuned_by = ''
  runs = grid.runs(study)
  assert {run.config.data.disjoint_subsets for run in runs} == {13}
  assert sorted({run.config.data.seed for run in runs}) == subsets


def test_folds_and_seeds_are_the_same_for_every_variant():
  runs = grid.runs(cross_validated(variants=('none', 'csba', 'se'), repeats=2))
  by_variant = {}
  for run in runs:
    unit = (run.config.seed, run.config.data.seed, run.config.data.fold)
    by_variant.setdefault(run.axes['variant'], []).append(unit)
  assert by_variant['none'] == by_variant['csba'] == by_variant['se']
  assert len(set(by_variant['none'])) == 6


def test_seeds_do_not_count_for_folds():
  names = [run.name for run in grid.runs(cross_validated(variants=('none',)))]
  assert names == ['r0-f0', 'r0-f1', 'r0-f2']


# ---- learning rates


def test_tuned_rates_are_applied_by_all_axes_but_the_unit():
  c = with_fields(variants=('none', 'csba'), methods=('cross_entropy', 'drw'), seeds=2)
  runs = grid.runs(c)
  keys = list(dict.fromkeys(grid.rate_key(run.axes) for run in runs))
  assert len(keys) == 4
  assert keys[0] == (
    'depth=1 imbalance_factor=1.0 method=cross_entropy model=multibranch variant=none width=1.0'
  )
  rates = {key: 0.01 * (i + 1) for i, key in enumerate(keys)}
  for run in grid.runs(c, rates):
    assert run.config.train.learning_rate == rates[grid.rate_key(run.axes)]
    assert 'learning_rate' not in run.axes
  assert {run.config.train.learning_rate for run in runs} == {0.1}  # the base's


def test_a_rate_that_was_not_chosen():
  c = with_fields(variants=('none', 'csba'), seeds=1, tuned_by='runs/tuning')
  keys = [grid.rate_key(run.axes) for run in grid.runs(c)]
  with pytest.raises(UserError) as error:
    grid.runs(c, {keys[0]: 0.1})
  assert str(error.value) == (
    f'expected a learning rate chosen in runs/tuning for {keys[1]}; found none; '
    'to fix it: run that study for it, or set --config.tuned_by='
  )


def test_rate_keys_of_a_tuning_study_are_those_of_the_study():
  tuning = cross_validated(learning_rates=(0.1, 0.2), first_seed=100)
  later = cross_validated(repeats=2, naive_repeats=1)
  assert {grid.rate_key(run.axes) for run in grid.runs(tuning)} == {
    grid.rate_key(run.axes) for run in grid.runs(later)
  }


def test_rates_as_an_axis_go_before_chosen_ones():
  c = with_fields(variants=('none',), seeds=1, learning_rates=(0.5, 1))
  runs = grid.runs(c, {})
  assert [run.config.train.learning_rate for run in runs] == [0.5, 1.0]


# ---- shapes and shards


def test_runs_of_one_shape_are_neighbours():
  for c in (with_fields(seeds=4, widths=(0.5, 1.0)), cross_validated(naive_repeats=1, repeats=2)):
    shapes = [run.shape for run in grid.runs(c)]
    runs_of = [shape for shape, _ in itertools.groupby(shapes)]
    assert len(runs_of) == len(set(shapes))


def test_shape_leaves_out_seeds_alone():
  runs = grid.runs(with_fields(variants=('none', 'csba'), seeds=3, learning_rates=(0.1, 0.2)))
  assert len({run.shape for run in runs}) == 4
  for a, b in itertools.combinations(runs, 2):
    same = all(a.axes[k] == b.axes[k] for k in ('variant', 'learning_rate'))
    assert (a.shape == b.shape) == same


@pytest.mark.parametrize('number', [1, 2, 3, 7, 30, 31, 40])
def test_shards_are_a_partition_into_neighbours_of_even_size(number):
  runs = grid.runs(with_fields())
  assert len(runs) == 30
  parts = [grid.shard(runs, index, number) for index in range(number)]
  assert [run.name for part in parts for run in part] == [run.name for run in runs]
  sizes = [len(part) for part in parts]
  assert max(sizes) - min(sizes) <= 1


def test_parse_shard():
  assert grid.parse_shard('0/1') == (0, 1)
  assert grid.parse_shard('12/13') == (12, 13)


@pytest.mark.parametrize(
  'text', ['', '1', '1/1', '2/1', '0/0', '-1/2', 'a/b', '1/2/3', '0.5/2', ' 0/2', '/', '0/', '²/3']
)
def test_parse_shard_of_something_else(text):
  with pytest.raises(UserError) as error:
    grid.parse_shard(text)
  assert str(error.value) == (
    f'expected --shard=i/n with 0 <= i < n; found {text!r}; '
    'to fix it: set it to 0/4, 1/4, 2/4 or 3/4, say'
  )


# ---- digest


def test_digest_is_of_what_all_runs_share():
  expected = grid.digest(with_fields())
  same = {
    'base__data__dir': '/elsewhere',
    'base__data__cache_dir': '/cache',
    'seeds': 3,
    'first_seed': 9,
    'variants': ('se',),
    'learning_rates': (0.1,),
    'name': 'other',
  }
  for field, value in same.items():
    assert grid.digest(with_fields(**{field: value})) == expected, field
  assert len(expected) == 64


@pytest.mark.parametrize(
  'field', sorted(f for f in config_lib.flatten(config_lib.default()) if not grid.is_place(f))
)
def test_digest_knows_each_field_of_the_base(field):
  c = with_fields()
  *sections, name = field.split('.')
  target = c.base
  for section in sections:
    target = target[section]
  value = target[name]
  target[name] = (not value) if type(value) is bool else value + type(value)(1)
  assert grid.digest(c) != grid.digest(with_fields())


def test_digest_of_a_base_without_a_field_that_is_new_and_at_its_default(monkeypatch):
  """What a study was called before does not change as configs grow."""
  c = with_fields(base__train__epochs=7)
  before, default = grid.digest(c), config_lib.default

  def grown():
    new = default()
    with new.unlocked():
      new.loss.brand_new, new.section = 0.5, ml_collections.ConfigDict({'field': 'none'})
    return new

  monkeypatch.setattr(config_lib, 'default', grown)
  c = with_fields(base__train__epochs=7)
  assert c.base.section.field == 'none'
  assert grid.digest(c) == before
  c.base.section.field = 'other'
  assert grid.digest(c) != before


@pytest.mark.parametrize('name', ['digits', 'digits_tuning', 'solar'])
def test_digest_is_the_one_that_committed_results_have(name):
  """With gates that start as the identity, and (solar) from before there was a choice."""
  c = config_lib.load(f'study_{name}')
  with (RESULTS / name / 'results.jsonl').open() as lines:
    assert {json.loads(line)['config_sha256'] for line in lines} == {grid.digest(c)}


def test_digest_knows_whether_the_test_part_counts():
  assert grid.digest(with_fields(test=False)) != grid.digest(with_fields())


# ---- the studies of the repository


def test_there_are_studies():
  names = {path.stem for path in STUDIES}
  assert {'study_digits', 'study_solar', 'study_cifar10_lt'} <= names


@pytest.mark.parametrize('path', STUDIES, ids=lambda path: path.stem)
def test_study_loads_passes_lists_its_runs_and_documents_itself(path):
  module = load(path)
  c = module.get_config()
  grid.check(c)
  with c.unlocked():
    c.tuned_by = ''
  runs = grid.runs(c)
  assert len({run.name for run in runs}) == len(runs)
  assert f'csba-study --config=configs/{path.name} --workdir=' in module.__doc__


@pytest.mark.seconds
def test_the_docstring_of_a_study_says_how_many_runs_it_has():
  for path in STUDIES:
    said = re.search(r'\b(\d+) runs', load(path).__doc__)
    c = load(path).get_config()
    c.tuned_by = ''
    assert not said or int(said.group(1)) == len(grid.runs(c)), path.stem


def test_the_study_of_cifar_can_support_something_and_its_tuning_has_three_seeds():
  main, tuning = (
    load(ROOT / f'configs/study_{stem}.py').get_config()
    for stem in ('cifar10_lt', 'cifar10_lt_tuning')
  )
  tests = 4 * len(main.methods)
  assert tests * 2.0 ** (1 - main.seeds) < 0.05
  runs = grid.runs(main, {grid.rate_key(run.axes): 0.1 for run in grid.runs(tuning)})
  assert len({run.config.data.seed for run in runs}) == main.seeds  # a subset for each
  assert tuning.seeds >= 3


@pytest.mark.parametrize('path', STUDIES, ids=lambda path: path.stem)
def test_studies_choose_their_checkpoint_on_a_validation_part(path):
  assert load(path).get_config().base.data.val_fraction > 0


def test_names_of_studies_differ():
  names = [load(path).get_config().name for path in STUDIES]
  assert len(set(names)) == len(names)


@pytest.mark.seconds
@pytest.mark.parametrize('name', ['digits', 'solar', 'cifar10_lt'])
def test_a_tuning_study_has_every_rate_its_study_needs_and_none_of_its_units(name):
  main, tuning = (
    load(ROOT / f'configs/study_{stem}.py').get_config() for stem in (name, f'{name}_tuning')
  )
  assert not tuning.test
  assert not tuning.tuned_by
  assert Path(main.tuned_by).name.removeprefix('study_') == f'{name}_tuning'
  asked, given = ({grid.rate_key(run.axes) for run in grid.runs(c, None)} for c in (main, tuning))
  assert asked <= given
  units = [
    {(run.config.seed, run.config.data.seed) for run in grid.runs(c)} for c in (main, tuning)
  ]
  if not main.subsets:
    assert not units[0] & units[1]
  seeds = [{run.config.seed for run in grid.runs(c)} for c in (main, tuning)]
  data_seeds = [{run.config.data.seed for run in grid.runs(c)} for c in (main, tuning)]
  assert not seeds[0] & seeds[1]
  assert not data_seeds[0] & data_seeds[1]


def test_every_field_is_read_somewhere():
  """As study.FIELD, or as [...]['FIELD'] where the study comes from study.json."""
  read = set()
  for path in (ROOT / 'csba_jax').rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Attribute) and ast.unparse(node.value) == 'study':
        read.add(node.attr)
      if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        read.add(node.slice.value)
  assert set(grid.default()) - read == set(), 'a field that nothing reads promises too much'
