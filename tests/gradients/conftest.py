"""What the tests of class gradients share: a zoo of models."""

import importlib.util
import os

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))


@pytest.fixture(scope='session')
def zoo():
  """The module tests/gradients/zoo.py: small models of every kind."""
  spec = importlib.util.spec_from_file_location('zoo', os.path.join(HERE, 'zoo.py'))
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
