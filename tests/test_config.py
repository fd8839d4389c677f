"""Every field is checked, read and documented; every recipe is whole."""

import ast
import importlib.util
import math
import re
from pathlib import Path

import ml_collections
import pytest

from csba_jax import config as config_lib
from csba_jax import fields
from csba_jax.data import mixing
from csba_jax.errors import UserError
from csba_jax.methods import losses, surgery
from csba_jax.models import multibranch

ROOT = Path(__file__).parents[1]
RECIPES = sorted(set((ROOT / 'configs').glob('*.py')) - set((ROOT / 'configs').glob('study_*')))
DEFAULTS = config_lib.flatten(config_lib.default())

BAD = {
  'seed': [-1, 2**31],
  'data.seed': [-1, 2**31],
  'data.source': ['cifar10', ''],
  'data.train_split': [''],
  'data.input': ['disk', ''],
  'data.layout': ['parts', ''],
  'data.image_size': [7, 257, 0],
  'data.channels': [0, 2, 4],
  'data.num_classes': [1, -1],
  'data.profile': ['linear', ''],
  'data.imbalance_factor': [0.99, 0.01, 0.0, -5.0, math.inf, math.nan],
  'data.class_order': ['random'],
  'data.largest_class': [-1],
  'data.disjoint_subsets': [-1, 1],
  'data.val_fraction': [-0.1, 1.0, math.nan],
  'data.test_fraction': [0.0, 1.0, -0.2, math.nan],
  'data.folds': [-1, 1],
  'data.fold': [-1],
  'augment.crop_padding': [-1, 65],
  'augment.randaugment_ops': [0, -1, 9],
  'augment.randaugment_magnitude': [-1, 31],
  'augment.cutout': [-1, 257],
  'model.scale': [0.0, -30.0, math.inf, math.nan],
  'model.width': [0.0, -1.0, 65.0, math.nan, math.inf],
  'model.depth': [0, 17],
  'model.norm': ['layer', ''],
  'model.gate': ['open', ''],
  'model.dtype': ['float16', 'float64', ''],
  'loss.tau': [-0.1, math.inf, math.nan],
  'loss.smoothing': [-0.1, 1.0, math.nan],
  'loss.smoothing_tail': [-0.1, 1.0, math.nan],
  'loss.gamma': [-0.5, math.inf, math.nan],
  'loss.max_margin': [-0.5, math.inf, math.nan],
  'loss.beta': [-0.1, 1.0, math.nan],
  'loss.weights_start': [-0.1, 1.0, 160.0, math.nan],
  'loss.post_hoc_tau': [-0.1, math.inf, math.nan],
  'sampler.start': [-0.1, 1.0, 160.0, math.nan],
  'mixing.alpha': [0.0, -1.0, math.inf, math.nan],
  'mixing.kappa': [0.9, math.inf, math.nan],
  'mixing.tau': [-0.1, 1.1, math.nan],
  'mixing.probability': [-0.1, 1.1, math.nan],
  'mixing.start': [-0.1, 1.0, math.nan],
  'mixing.stop': [0.0, 1.1, math.nan],
  'stage.checkpoint': ['', 'init', 'worst', '-1'],
  'stage.tau': [-0.5, -2.0, math.inf, math.nan],
  'surgery.every': [0],
  'surgery.batches': [1],
  'surgery.images': [3],
  'surgery.c': [-0.1, math.inf],
  'surgery.beta': [0.0, 1.1],
  'surgery.alpha': [-0.1, math.inf],
  'surgery.rate': [0.0, 1.1],
  'surgery.share': [-0.1, 1.1],
  'surgery.protect': ['minor', ''],
  'train.pretrained_rate': [-0.1, 1.1, math.nan],
  'train.frozen': [-0.1, 1.1, math.nan],
  'train.batch_size': [1, 0, -4],
  'train.epochs': [0, -1],
  'train.learning_rate': [0.0, -0.1, math.inf, math.nan],
  'train.momentum': [-0.1, 1.0, math.nan],
  'train.weight_decay': [-1e-4, math.inf, math.nan],
  'train.warmup_fraction': [-0.1, 1.0, math.nan],
  'train.ema_decay': [-0.1, 1.0, math.nan],
  'train.log_every': [0, -1],
  'train.eval_every': [0, -1],
  'train.save_every': [0, -1],
  'parallel.devices': [-1],
  'parallel.fsdp': [0, -1],
  'parallel.fake_devices': [-1, 5000],
  'parallel.hardware': ['', 'h1000'],
  'diagnostics.every': [-1],
  'diagnostics.images': [3, 0],
  'diagnostics.statistics': ['', 'running'],
  'diagnostics.batches': [1, 0],
  'diagnostics.snapshots': ['1.1', '-0.1', 'end', '0,,1', 'nan'],
  'diagnostics.loss_levels': ['-1', 'low', '1;2', 'nan'],
}
BORDERS = {
  'seed': [0, 2**31 - 1],
  'data.input': ['memory', 'stream', 'auto'],
  'data.layout': ['auto', 'classes'],
  'data.image_size': [8, 256],
  'data.num_classes': [0, 2],
  'data.imbalance_factor': [1.0, 1],
  'data.largest_class': [0, 500],
  'data.disjoint_subsets': [0, 2],
  'data.val_fraction': [0.0, 0.999],
  'augment.crop_padding': [0, 64],
  'augment.randaugment_ops': [1, 8],
  'augment.randaugment_magnitude': [0, 30],
  'augment.cutout': [0, 8],
  'model.width': [1e-3, 64.0],
  'model.norm': ['group'],
  'model.gate': ['half'],
  'model.dtype': ['bfloat16'],
  'loss.beta': [0.0, 0.99999],
  'loss.weights_start': [0.0, 0.99],
  'mixing.stop': [1.0, 0.01],
  'stage.tau': [-1.0, 0.0, 2.0],
  'stage.checkpoint': ['latest', '1200'],
  'train.batch_size': [2],
  'train.epochs': [1],
  'train.momentum': [0.0, 0],
  'train.weight_decay': [0.0],
  'data.folds': [0, 2],
  'parallel.fake_devices': [0, 1, 4096],
  'diagnostics.every': [0, 1],
  'diagnostics.images': [4],
  'diagnostics.statistics': ['auto', 'batch', 'frozen'],
  'diagnostics.batches': [2],
  'diagnostics.snapshots': ['', '0', '1', '0,0.5,1', '1,0'],
  'diagnostics.loss_levels': ['', '0', '2.5,0.1'],
  'train.warmup_fraction': [0.0],
}


def with_field(field, value):
  """The default config with one field set, whatever its type and whether or not it exists."""
  fields = config_lib.default().to_dict()
  *section, name = field.split('.')
  place = fields
  for part in section:
    place = place.setdefault(part, {})
  place[name] = value
  return ml_collections.ConfigDict(fields)


def pairs(table):
  return [(field, value) for field, values in table.items() for value in values]


def load(path):
  spec = importlib.util.spec_from_file_location(f'recipe_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_defaults_pass():
  config_lib.check(config_lib.default())


def test_every_range_is_tried_with_a_value_outside():
  assert BAD.keys() == fields.RANGES.keys()


def test_every_numeric_field_has_a_range():
  numeric = {field for field, value in DEFAULTS.items() if type(value) in (int, float)}
  assert numeric <= fields.RANGES.keys()
  assert fields.RANGES.keys() <= DEFAULTS.keys()


@pytest.mark.parametrize(('field', 'value'), pairs(BAD))
def test_value_out_of_range_names_field_range_value_and_remedy(field, value):
  wanted = fields.RANGES[field][0]
  with pytest.raises(UserError) as error:
    config_lib.check(with_field(field, value))
  assert str(error.value) == (
    f'expected {field}: {wanted}; found {value!r}; to fix it: set --config.{field}=...'
  )


def test_mixing_that_stops_before_it_starts():
  bad = config_lib.default()
  bad.mixing.update(start=0.5, stop=0.5)
  with pytest.raises(UserError, match=r'mixing\.start < mixing\.stop; found start 0\.5, stop 0\.5'):
    config_lib.check(bad)


@pytest.mark.parametrize(('folds', 'fold'), [(0, 1), (5, 5), (2, 7)])
def test_a_fold_that_is_none_of_the_folds(folds, fold):
  bad = config_lib.default()
  bad.data.update(folds=folds, fold=fold)
  with pytest.raises(UserError) as error:
    config_lib.check(bad)
  assert str(error.value) == (
    f'expected data.fold below data.folds = {folds}; found {fold}; '
    'to fix it: set --config.data.fold=0 or more folds'
  )
  bad.data.update(folds=fold + 2)
  config_lib.check(bad)


@pytest.mark.parametrize(('subsets', 'seed'), [(2, 2), (10, 500)])
def test_a_seed_that_is_none_of_the_disjoint_subsets(subsets, seed):
  bad = config_lib.default()
  bad.data.update(disjoint_subsets=subsets, seed=seed)
  with pytest.raises(UserError) as error:
    config_lib.check(bad)
  assert str(error.value) == (
    f'expected data.seed below data.disjoint_subsets = {subsets}: it says which of them; found '
    f'{seed}; to fix it: set --config.data.seed=0 or a larger --config.data.disjoint_subsets; in a '
    f'study, set --config.subsets to at most {subsets}'
  )
  bad.data.seed = subsets - 1
  config_lib.check(bad)


@pytest.mark.parametrize(('largest', 'subsets'), [(5, 0), (0, 2), (5, 2)])
def test_natural_is_neither_cut_nor_shared_out(largest, subsets):
  bad = config_lib.default()
  bad.data.update(profile='natural', largest_class=largest, disjoint_subsets=subsets)
  with pytest.raises(UserError) as error:
    config_lib.check(bad)
  assert str(error.value) == (
    "expected data.largest_class and data.disjoint_subsets of 0 with data.profile='natural', which "
    f'keeps every image; found {largest} and {subsets}; to fix it: set --config.data.profile=exp, '
    'or both to 0'
  )
  bad.data.profile = 'exp'
  config_lib.check(bad)


def test_folds_beside_a_test_split():
  bad = config_lib.default()
  bad.data.update(source='tfds', name='cifar10', folds=5)
  with pytest.raises(UserError) as error:
    config_lib.check(bad)
  assert str(error.value) == (
    "expected data.folds of a source without a test part of its own; found data.test_split 'test'; "
    "to fix it: set --config.data.test_split='', or --config.data.folds=0"
  )
  bad.data.test_split = ''
  config_lib.check(bad)
  bad.data.update(source='digits', test_split='test')  # which has no such split
  config_lib.check(bad)


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('', ()),
    ('0', (0.0,)),
    ('0,0.1,1', (0.0, 0.1, 1.0)),
    (' 1 , 2e-3', (1.0, 0.002)),
    ('0.5,0.5', (0.5, 0.5)),
  ],
)
def test_numbers(text, expected):
  assert fields.numbers(text) == expected


@pytest.mark.parametrize('text', ['x', '1,', ',', '1;2', '1 2', ' '])
def test_numbers_of_something_else(text):
  with pytest.raises(ValueError, match='could not convert'):
    fields.numbers(text)


def test_a_factor_in_the_inverse_style_is_explained():
  with pytest.raises(UserError, match=r'0\.01 in the inverse style is 1 / 0\.01 = 100'):
    config_lib.check(with_field('data.imbalance_factor', 0.01))


@pytest.mark.parametrize(('field', 'value'), pairs(BORDERS))
def test_borders_are_allowed(field, value):
  config_lib.check(with_field(field, value))


def test_the_smallest_image_is_the_nets():
  config_lib.check(with_field('data.image_size', multibranch.MIN_SIZE))
  with pytest.raises(UserError, match=f'{multibranch.MIN_SIZE} to 256 pixels'):
    config_lib.check(with_field('data.image_size', multibranch.MIN_SIZE - 1))


@pytest.mark.parametrize(
  ('field', 'value', 'kind'),
  [
    ('train.epochs', '10', 'int'),
    ('train.epochs', 10.0, 'int'),
    ('train.epochs', True, 'int'),
    ('train.momentum', '0.9', 'float'),
    ('train.momentum', True, 'float'),
    ('train.momentum', None, 'float'),
    ('augment.flip', 1, 'bool'),
    ('augment.flip', 'yes', 'bool'),
    ('model.name', 3, 'str'),
    ('data.dir', None, 'str'),
    ('seed', (1, 2), 'int'),
  ],
)
def test_wrong_type(field, value, kind):
  with pytest.raises(UserError) as error:
    config_lib.check(with_field(field, value))
  assert str(error.value) == (
    f'expected {field} of type {kind}; found {value!r}; to fix it: set --config.{field}=...'
  )


@pytest.mark.parametrize('field', sorted(DEFAULTS))
def test_missing_field(field):
  fields = config_lib.default().to_dict()
  *section, name = field.split('.')
  place = fields
  for part in section:
    place = place[part]
  del place[name]
  with pytest.raises(
    UserError,
    match=rf'^expected the fields of csba_jax\.config\.default\(\); found {field}: missing; '
    r'to fix it: correct the config$',
  ):
    config_lib.check(ml_collections.ConfigDict(fields))


@pytest.mark.parametrize('field', ['train.epoch', 'imbalance', 'optimizer.name'])
def test_unknown_field(field):
  with pytest.raises(UserError, match=f'found {field}: a field that nothing reads;'):
    config_lib.check(with_field(field, 1))


@pytest.mark.parametrize('case', [('train.epoch', 'train.epochs'), ('imbalance_factor', None)])
def test_unknown_field_names_the_nearest(case):
  field, nearest = case
  with pytest.raises(UserError, match=f'did you mean {nearest or "data." + field}[?]$'):
    config_lib.check(with_field(field, 1))


def test_section_that_is_a_value():
  fields = config_lib.default().to_dict()
  fields['model'] = 'csba'
  with pytest.raises(UserError, match='found model: a field that nothing reads'):
    config_lib.check(ml_collections.ConfigDict(fields))


def test_default_is_locked_and_typed_and_new_each_time():
  config = config_lib.default()
  for section in (config, config.data, config.augment, config.model, config.loss, config.train):
    with pytest.raises(AttributeError):
      section.brand_new = 1
  with pytest.raises(TypeError):
    config.train.epochs = 'many'
  config.train.epochs = 99
  assert config_lib.default().train.epochs == DEFAULTS['train.epochs']


def test_flatten():
  nested = {'a': 1, 'b': {'c': 2.0, 'd': {'e': 'x'}}, 'f': ml_collections.ConfigDict({'g': True})}
  assert config_lib.flatten(nested) == {'a': 1, 'b.c': 2.0, 'b.d.e': 'x', 'f.g': True}
  assert config_lib.flatten(ml_collections.ConfigDict(nested)) == config_lib.flatten(nested)
  assert config_lib.flatten({}) == {}


def test_differences():
  here = config_lib.default()
  there = here.to_dict()
  assert config_lib.differences(there, here) == []
  there['train']['epochs'] = 3
  there['model']['attention'] = 'se'
  there['loss'] = {k: v for k, v in there['loss'].items() if k != 'name'}
  there['old'] = {'field': None}
  assert config_lib.differences(there, here.to_dict()) == [
    "loss.name: 'absent' there, 'cross_entropy' here",
    "model.attention: 'se' there, 'csba' here",
    "old.field: None there, 'absent' here",
    'train.epochs: 3 there, 10 here',
  ]


def test_copies_are_compared_as_splits():
  """A run from before the field goes on where there are no copies; the splits decide."""
  stored = config_lib.default().to_dict()
  del stored['data']['group_copies']
  there, here = config_lib.completed(stored), config_lib.default().to_dict()
  assert (there['data']['group_copies'], here['data']['group_copies']) == (False, True)
  assert config_lib.differences(there, here) == []
  assert config_lib.differences(there, here, everything=True) == [
    'data.group_copies: False there, True here'
  ]


def test_a_field_that_says_absent_differs_from_an_absent_one():
  assert config_lib.differences({'data': {'name': 'absent'}}, {}) == [
    "data.name: 'absent' there, 'absent' here"
  ]


def test_a_completed_config_has_every_field_and_keeps_what_it_had():
  there = config_lib.default().to_dict()
  there['train']['epochs'], there['old'] = 3, {'field': None}
  del there['loss']['tau'], there['mixing']
  found = config_lib.completed(there)
  assert config_lib.flatten(found) == DEFAULTS | {'train.epochs': 3, 'old.field': None}
  found['mixing']['name'] = found['loss']['tau'] = 'changed'
  before = {'data.group_copies': False, 'diagnostics.statistics': 'frozen', 'model.gate': 'half'}
  assert config_lib.flatten(config_lib.completed({})) == DEFAULTS | before
  assert config_lib.completed(config_lib.default()) == config_lib.default().to_dict()
  assert 'mixing' not in there


def test_sibling_loads_the_config_beside_the_file(tmp_path):
  (tmp_path / 'parent.py').write_text(
    'from csba_jax import config\n\ndef get_config():\n'
    '  c = config.default()\n  c.train.epochs = 77\n  return c\n'
  )
  child = config_lib.sibling(str(tmp_path / 'child.py'), 'parent')
  assert child.train.epochs == 77
  child.train.epochs = 5
  assert config_lib.sibling(str(tmp_path / 'child.py'), 'parent').train.epochs == 77


def test_there_are_recipes():
  names = {path.stem for path in RECIPES}
  assert {'digits_lt', 'cifar10_lt', 'cifar10_lt_cpu', 'image_folder'} <= names


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_passes_and_documents_itself(path):
  module = load(path)
  config_lib.check(module.get_config())
  text = module.__doc__
  assert f'csba-train --config=configs/{path.name}' in text
  assert '--workdir=runs/' in text
  assert re.search(r'Results?: .*(not yet run|README|docs/)|macro-F1 0\.\d', text, re.DOTALL) or (
    re.search(r'results: README', text)
  ), 'a recipe says its result, where it is, or that it has not been run'


def test_child_differs_from_its_parent_where_it_says():
  parent, child = (
    load(ROOT / 'configs' / f'{name}.py').get_config() for name in ('cifar10_lt', 'cifar10_lt_cpu')
  )
  assert child.data.to_dict() == parent.data.to_dict()
  assert (parent.model.width, child.model.width) == (1.0, 0.5)
  assert child.train.epochs * 10 == parent.train.epochs


def attributes_read():
  """(section, field) of every `section.field` or `config.field` that csba_jax reads."""
  found = set()
  for path in (ROOT / 'csba_jax').rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        owner = node.value
        name = getattr(owner, 'attr', getattr(owner, 'id', None))
        if path.name != 'config.py':  # where fields are made, not used
          found.add((name, node.attr))
  return found


def test_where_a_run_runs_is_no_difference_of_what_it_is():
  here, there = config_lib.default(), config_lib.default()
  here.parallel.devices, here.data.input, here.data.cache_dir = 4, 'stream', '/elsewhere'
  here.seed = 1
  assert config_lib.differences(there, here) == ['seed: 0 there, 1 here']
  found = config_lib.differences(there, here, everything=True)
  assert [line.split(':')[0] for line in found] == [
    'data.cache_dir',
    'data.input',
    'parallel.devices',
    'seed',
  ]


def test_every_field_is_read_somewhere():
  read = attributes_read()
  for section, table in (('loss', losses.LOSSES), ('mixing', mixing.MIXINGS)):
    read |= {(section, option) for kind in table.values() for option in kind.options}
  read |= {('surgery', option) for options in surgery.SETTINGS.values() for option in options}
  fields = {tuple(field.split('.')) if '.' in field else ('config', field) for field in DEFAULTS}
  assert fields - read == set(), 'a field that nothing reads promises what does not happen'


def test_a_field_under_its_old_name_is_told_its_new_one():
  config = config_lib.default().to_dict()
  config['diagnostics']['moments'] = config['diagnostics'].pop('snapshots')
  with pytest.raises(
    UserError,
    match=r'its new name diagnostics.snapshots; found diagnostics.moments; to fix it: set --config',
  ):
    config_lib.check(ml_collections.ConfigDict(config))


def test_a_stored_config_without_a_choice_is_what_it_was():
  """Conflict was measured with running statistics before there was another way."""
  assert config_lib.completed({'seed': 3})['diagnostics']['statistics'] == 'frozen'
  assert config_lib.completed({'model': {'attention': 'csba'}})['model']['gate'] == 'half'
  found = config_lib.completed({'diagnostics': {'every': 2}})
  assert found['diagnostics']['statistics'] == 'frozen'
  stored = config_lib.default().to_dict()
  assert config_lib.completed(stored)['diagnostics']['statistics'] == 'auto'


def test_a_stored_config_is_read_under_old_names():
  stored = {'diagnostics': {'moments': '0,1'}, 'seed': 3}
  found = config_lib.completed(stored)
  assert found['diagnostics']['snapshots'] == '0,1'
  assert 'moments' not in found['diagnostics']
  assert stored == {'diagnostics': {'moments': '0,1'}, 'seed': 3}  # which is the caller's
  config_lib.check(ml_collections.ConfigDict(found))
