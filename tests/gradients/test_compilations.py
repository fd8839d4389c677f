"""The warning about functions that are made anew: once, and not for ordinary use."""

import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from csba_jax.gradients import class_grams, compilations
from csba_jax.gradients.compilations import RecompilationWarning, watch

PARAMS = {'w': jnp.ones(2)}


@pytest.fixture(autouse=True)
def nothing_seen(monkeypatch):
  monkeypatch.setattr(compilations, '_SEEN', type(compilations._SEEN)())
  monkeypatch.setattr(compilations, '_SAID', set())


def warned(functions, params=PARAMS):
  """How many warnings these losses give."""
  with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter('always')
    for function in functions:
      watch(function if isinstance(function, Partial) else Partial(function), params)
  assert all(w.category is RecompilationWarning for w in found)
  return len(found)


def losses(params, batch):
  return batch['x'] @ params['w']


def of_model(model):
  return lambda params, batch: model(params, batch)


def scaled(scale, params, batch):
  return scale * losses(params, batch)


class Loss:
  def __call__(self, params, batch):
    return losses(params, batch)

  def of(self, params, batch):
    return losses(params, batch)


def test_a_fresh_lambda_each_call_is_named_once():
  batch = {'x': np.ones((2, 2), np.float32), 'label': np.array([0, 1])}
  given = {'num_classes': 2, 'strategy': 'masked', 'per_example': True}
  with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter('always')
    for _ in range(5):
      class_grams(lambda params, batch: losses(params, batch), PARAMS, batch, **given)
  (warning,) = found
  assert warning.category is RecompilationWarning
  assert 'losses_fn of test_compilations.py, line ' in str(warning.message)
  assert 'define the function once' in str(warning.message)
  assert 'jax.tree_util.Partial(function, arrays)' in str(warning.message)


MISTAKES = {
  'a lambda': lambda i: lambda params, batch: losses(params, batch),
  'a closure over an array': lambda i: of_array(jnp.float32(i)),
  'functools.partial with a number': lambda i: functools.partial(scaled, float(i)),
  'jit of a lambda': lambda i: jax.jit(lambda params, batch: losses(params, batch)),
  'a Partial of a lambda': lambda i: Partial(lambda a, params, batch: a, jnp.float32(i)),
}


def of_array(scale):
  return lambda params, batch: scale * losses(params, batch)


@pytest.mark.parametrize('name', MISTAKES)
def test_each_way_to_make_it_anew_is_found(name):
  assert warned(MISTAKES[name](i) for i in range(9)) == 1


ORDINARY = {
  'one function': itertools.repeat(losses),
  'one callable object': itertools.repeat(Loss()),
  'methods of one object': (loss.of for loss in itertools.repeat(Loss())),
  'a Partial with new arrays': (Partial(scaled, jnp.float32(i)) for i in itertools.count()),
  'losses of several models': (of_model(Loss()) for _ in itertools.count()),
}


@pytest.mark.parametrize('name', ORDINARY)
def test_ordinary_use_is_not_named(name):
  assert warned(itertools.islice(ORDINARY[name], 9)) == 0


def test_other_shapes_of_parameters_are_other_programs():
  for size in range(1, 9):
    assert warned([MISTAKES['a lambda'](0)], {'w': jnp.ones(size)}) == 0


def test_inside_jit_nothing_is_compiled_by_itself():
  @jax.jit
  def step(params):
    assert warned(MISTAKES['a lambda'](i) for i in range(9)) == 0
    return params

  step(PARAMS)
