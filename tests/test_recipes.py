"""Recipes by name."""

import pytest

from csba_jax import config as config_lib
from csba_jax import recipes
from csba_jax.errors import UserError


@pytest.mark.parametrize('name', ['digits_lt', 'cifar10_lt_cpu'])
def test_a_recipe_by_name_may_be_changed_and_run(name):
  config = recipes.load(name)
  config_lib.check(config)
  assert config != config_lib.default()
  config.train.epochs = 3
  assert recipes.load(name).train.epochs > 3  # another object each time


def test_an_unknown_recipe_lists_those_there_are():
  with pytest.raises(UserError, match=r"a recipe of .*cifar10_lt.*digits_lt.*found 'digits'"):
    recipes.load('digits')
  with pytest.raises(UserError, match=r"found '\.\./setup'"):
    recipes.load('../setup')


def test_a_package_without_its_source_tree(tmp_path):
  with pytest.raises(UserError, match=r'none: the package alone .* a clone of the repository'):
    recipes.load('digits_lt', tmp_path / 'configs')
