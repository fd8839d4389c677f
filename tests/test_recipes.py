"""Recipes by name."""

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


def test_an_unknown_recipe_lists_those_there_are():
  with pytest.raises(UserError, match=r"a recipe of .*cifar10_lt.*digits_lt.*found 'digits'"):
    config_lib.load('digits')
  with pytest.raises(UserError, match=r"found '\.\./setup'"):
    config_lib.load('../setup')


def test_a_package_without_its_source_tree(tmp_path):
  with pytest.raises(UserError, match=r'none: the package alone .* a clone of the repository'):
    config_lib.load('digits_lt', tmp_path / 'configs')
