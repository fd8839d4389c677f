"""Findings without runs, for the pages that show them."""

import importlib.util
import pathlib

import pytest


@pytest.fixture(scope='session')
def made_up():
  """The module tests/report/made_up.py."""
  path = pathlib.Path(__file__).with_name('made_up.py')
  spec = importlib.util.spec_from_file_location('made_up', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
