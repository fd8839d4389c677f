"""Findings and facts without runs, for the pages that show them."""

import importlib.util
import pathlib

import pytest


@pytest.fixture(scope='session')
def made_up():
  """The module tests/report/made_up.py."""
  return _module('made_up')


@pytest.fixture(scope='session')
def made_up_run():
  """The module tests/report/made_up_run.py."""
  return _module('made_up_run')


def _module(name):
  path = pathlib.Path(__file__).with_name(f'{name}.py')
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
