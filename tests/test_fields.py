"""Every field has one line that says what it is, and --list_fields prints all of them."""

import pytest

from csba_jax import config as config_lib
from csba_jax import fields as fields_lib
from csba_jax.models import registry
from csba_jax.planning import hardware
from csba_jax.report.terminal import fields
from csba_jax.study import grid
from csba_jax.training import preflight

DEFAULTS = config_lib.flatten(config_lib.default())


def test_every_field_of_a_run_has_its_line():
  assert fields_lib.FIELDS.keys() == DEFAULTS.keys()


def test_every_field_of_a_study_has_its_line():
  assert grid.FIELDS.keys() == set(grid.default()) - {'base'}
  assert grid.fields() == [*grid.FIELDS, *(f'base.{field}' for field in DEFAULTS)]


@pytest.mark.parametrize('table', [fields_lib.FIELDS, grid.FIELDS])
def test_lines_are_short_sentences(table):
  assert len(set(table.values())) == len(table)
  for line in table.values():
    assert 5 < len(line) <= 90
    assert line.endswith('.')


def test_every_text_field_that_is_a_choice_says_its_values():
  free = {'data.name', 'data.test_split', 'data.dir', 'data.cache_dir', 'data.manifest'}
  free |= {'data.group_column', 'stage.source', 'model.init', 'surgery.source', 'surgery.layers'}
  texts = {field for field, value in DEFAULTS.items() if isinstance(value, str)}
  assert texts - free == texts & preflight.choices().keys()


def test_the_accelerators_are_those_of_the_table():
  wanted, test = fields_lib.RANGES['parallel.hardware']
  assert wanted.replace(' or ', ', ').split(', ') == list(hardware.HARDWARE)
  assert all(map(test, hardware.HARDWARE))


def test_a_list_has_name_value_meaning_and_range_of_every_field():
  config = config_lib.load('digits_lt')
  config.data.dir = 'x' * 30
  lines = fields.of_run(config).splitlines()
  assert [line.split()[0] for line in lines[:-1]] == list(fields_lib.FIELDS)
  by_name = {line.split()[0]: line for line in lines}
  assert by_name['train.epochs'].split()[1] == '30*'
  assert by_name['train.epochs'].endswith(
    'Epochs of ceil(images / batch_size) full batches. [at least 1]'
  )
  assert by_name['train.momentum'].split()[1] == '0.9'
  assert by_name['augment.flip'].endswith('[True or False]')
  assert by_name['model.name'].endswith(f'[{", ".join(registry.MODELS)}]')
  assert f"'{'x' * 30}'*" in by_name['data.dir']  # whole, and before its meaning
  assert lines[-1] == '* differs from the default'
  plain = fields.of_run(None).splitlines()
  assert len(plain) == len(DEFAULTS)
  assert not [line for line in plain if '*' in line.split()[1]]


def test_the_list_of_a_study_has_its_own_fields_and_those_of_its_runs():
  study = grid.default()
  study.seeds, study.base.train.epochs = 3, 7
  lines = fields.of_study(study).splitlines()
  assert [line.split()[0] for line in lines[: len(grid.FIELDS)]] == list(grid.FIELDS)
  found = {line.split()[0]: line.split()[1] for line in lines if line}
  assert (found['seeds'], found['train.epochs'], found['margin']) == ('3*', '7*', '0.02')
  assert 'Of all runs, --config.base.FIELD:' in lines
  assert f'[1 to {grid.MOST}]' in next(line for line in lines if line.startswith('seeds'))


def test_a_field_that_nothing_reads_is_listed_as_one():
  config = config_lib.default()
  with config.unlocked():
    config.train.epoch = 3
  assert 'train.epoch ' in fields.of_run(config)
  assert 'a field that nothing reads' in fields.of_run(config)


@pytest.mark.parametrize(
  ('field', 'expected'),
  [
    ('epochs', ['train.epochs']),
    ('epoch', ['train.epochs']),
    ('train.epoch', ['train.epochs']),
    ('trian.epochs', ['train.epochs']),
    ('tau', ['loss.tau', 'mixing.tau', 'stage.tau']),
    ('learningrate', ['train.learning_rate']),
    ('zzzz', []),
  ],
)
def test_what_a_wrong_field_may_have_meant(field, expected):
  assert sorted(config_lib.nearest(field, list(DEFAULTS))) == expected


def test_a_run_for_a_study_and_a_study_for_a_run():
  with pytest.raises(
    ValueError, match='^expected the config of a study; found that of a run; to fix'
  ):
    grid.check(config_lib.default())
  with pytest.raises(
    ValueError, match='^expected the config of a run; found that of a study; to fix'
  ):
    config_lib.check(grid.default())


def test_a_misspelt_field_of_a_stored_config_names_the_nearest():
  config = config_lib.default()
  with config.unlocked():
    config.train.epoch = 3
  with pytest.raises(
    ValueError, match=r'train\.epoch: a field that nothing reads; .* train\.epochs\?$'
  ):
    config_lib.check(config)
  study = grid.default()
  with study.unlocked():
    study.seed = 3
  with pytest.raises(ValueError, match=r'seed: a field that nothing reads; .*base\.seed'):
    grid.check(study)
