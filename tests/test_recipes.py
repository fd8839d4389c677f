"""Recipes by name and by path."""

import json

import pytest

from csba_jax import config as config_lib
from csba_jax.errors import UserError


@pytest.mark.parametrize('name', ['digits_lt', 'cifar10_lt_cpu'])
def test_a_recipe_by_name_may_be_changed_and_run(name):
  config = config_lib.load(name)
  config_lib.check(config)
  assert config != config_lib.default()
  config.train.epochs = 3
  assert config_lib.load(name).train.epochs > 3  # another object each time


def test_an_unknown_recipe_names_the_nearest():
  with pytest.raises(UserError) as error:
    config_lib.load('digits')
  assert str(error.value).startswith(
    'expected the name of a recipe that ships, the path of one that ends in .py, or of a '
    "run's config.json; "
    "found 'digits'; to fix it: use digits_lt or "
  )
  with pytest.raises(UserError, match=r"found '\.\./setup\.cfg'"):
    config_lib.load('../setup.cfg')
  with pytest.raises(UserError, match=r'use the name of a file in .*configs$'):
    config_lib.load('zzzz')


def test_a_path_is_taken_as_it_is(tmp_path, monkeypatch):
  file = tmp_path / 'mine.py'
  text = "from csba_jax import config\n\ndef get_config():\n  c = config.load('digits_lt')\n"
  file.write_text(f'{text}  c.train.epochs = 77\n  return c\n')
  assert config_lib.recipe_file(str(file)) == file
  assert config_lib.load(str(file)).train.epochs == 77
  monkeypatch.chdir(tmp_path)
  assert config_lib.load('mine.py').train.epochs == 77
  with pytest.raises(UserError, match=r"found 'mine'"):  # a bare name is one that ships
    config_lib.load('mine')


def test_recipes_of_an_installed_package_come_first(tmp_path, monkeypatch):
  monkeypatch.setattr(config_lib, '__file__', str(tmp_path / 'csba_jax/config.py'))
  assert config_lib._recipes() == tmp_path / 'configs'  # beside the package, in a source tree
  (tmp_path / 'csba_jax/configs').mkdir(parents=True)
  assert config_lib._recipes() == tmp_path / 'csba_jax/configs'


def test_the_config_of_a_run_is_one(tmp_path):
  config = config_lib.load('digits_lt')
  config.loss.name, config.train.epochs = 'focal', 3
  path = tmp_path / 'config.json'
  path.write_text(json.dumps({'config': config.to_dict(), 'versions': {}}))
  assert config_lib.load(str(path)).to_dict() == config.to_dict()
  old = config.to_dict()
  del old['model']['norm']  # as a version before this field has written it
  path.write_text(json.dumps({'config': old}))
  assert config_lib.load(str(path)).model.norm == 'batch'


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('{', 'config.json: '),
    ('[]', 'config.json: '),
    ('{"config": 3}', 'config.json: '),
    ('{"config": {"train": {"epoch": 1}}}', 'epoch'),
    ('{"config": {"train": {"epochs": "x"}}}', 'epochs'),
  ],
)
def test_another_json_file_is_no_config(tmp_path, text, expected):
  path = tmp_path / 'config.json'
  path.write_text(text)
  with pytest.raises(UserError, match="expected a run's config.json, of this version; found ") as e:
    config_lib.load(str(path))
  assert expected in str(e.value)
  assert '\n' not in str(e.value)
