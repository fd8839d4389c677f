"""One class after the other against a Python loop."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from csba_jax.gradients import loops
from csba_jax.runtime import backend

C = 5


def convolve(x, kernel, dims, **options):
  options = {'window_strides': (1,) * len(dims[1][2:]), 'padding': 'SAME', **options}
  return lax.conv_general_dilated(x, kernel, dimension_numbers=dims, **options)


TWO = ('NHWC', 'HWIO', 'NHWC')
KINDS = {
  'strided': ((6, 5, 2), (3, 3, 2, 4), {'dims': TWO, 'window_strides': (2, 1)}),
  'dilated': ((7, 6, 2), (3, 2, 2, 3), {'dims': TWO, 'rhs_dilation': (2, 3), 'padding': 'VALID'}),
  'transposed': (
    (3, 4, 2),
    (3, 3, 2, 3),
    {'dims': TWO, 'lhs_dilation': (2, 2), 'padding': ((1, 2), (2, 1))},
  ),
  'channels first': ((2, 6, 5), (3, 2, 3, 2), {'dims': ('NCHW', 'OIHW', 'NCHW')}),
  'mixed order': ((6, 5, 2), (3, 2, 3, 2), {'dims': ('NWHC', 'OIHW', 'NCHW')}),
  '1-D': ((9, 2), (3, 2, 4), {'dims': ('NHC', 'HIO', 'NHC'), 'window_strides': (2,)}),
  '3-D': ((4, 3, 4, 2), (2, 3, 2, 2, 3), {'dims': ('NDHWC', 'DHWIO', 'NDHWC')}),
  'grouped': ((5, 5, 4), (3, 3, 2, 6), {'dims': TWO, 'feature_group_count': 2}),
  'batch groups': ((5, 5, 2), (3, 3, 2, 4), {'dims': TWO, 'batch_group_count': 2}),
}


@jax.custom_jvp
def softened(x, kernel):
  return jnp.tanh(nn.Conv(2, (3, 3)).apply({'params': {'kernel': kernel, 'bias': jnp.zeros(2)}}, x))


@softened.defjvp
def _(primals, tangents):
  return jax.jvp(lambda x, k: 2 * softened.fun(x, k), primals, tangents)


def scanned(x, kernel):
  def body(x, shift):
    y = convolve(x, kernel, TWO) + shift
    return jnp.tanh(y), y.sum()

  carried, sums = lax.scan(body, x, jnp.arange(3.0), reverse=True)
  return carried * sums.mean()


def looped(x, kernel):
  return lax.fori_loop(0, 2, lambda _, x: jnp.tanh(convolve(x, kernel, TWO)), x)


def conditional(x, kernel):
  return lax.cond(kernel.sum() > -1e9, lambda x: convolve(x, kernel, TWO), lambda x: x, x)


WRAPPERS = {
  'jit': jax.jit(lambda x, kernel: convolve(x, kernel, TWO)),
  'scan': scanned,
  'remat': jax.checkpoint(lambda x, kernel: jnp.tanh(convolve(jnp.sin(x), kernel, TWO))),
  'remat of jit of scan': jax.checkpoint(jax.jit(scanned)),
  'custom_jvp': softened,
  'cond': conditional,
}


def task(name):
  """(fun of one class: a value and its gradients, xs)"""
  rng = np.random.default_rng(0)
  if name in KINDS:
    image, kernel, options = KINDS[name]
    function = functools.partial(convolve, **options)
  else:
    image, kernel, function = (5, 4, 2), (3, 3, 2, 2), WRAPPERS[name]
  kernel = jnp.asarray(rng.normal(size=kernel), jnp.float32)

  def value(kernel, x, weight):
    y = function(x, kernel)
    return (weight * y * y).sum()

  def of_class(images):
    return jax.value_and_grad(value, (0, 1))(kernel, images['x'], images['weight'])

  xs = {
    'x': jnp.asarray(rng.normal(size=(C, 4, *image)), jnp.float32),
    'weight': jnp.arange(1.0, C + 1),
  }
  return of_class, xs


@pytest.mark.parametrize(
  'at_once', [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, C))]
)
@pytest.mark.parametrize('name', [*KINDS, *WRAPPERS])
def test_equals_a_python_loop(monkeypatch, name, at_once):
  monkeypatch.setattr(backend, 'classes_at_once', lambda classes, images: at_once)
  compare(*task(name))


@pytest.mark.seconds
@pytest.mark.parametrize('at_once', [1, 2])
@pytest.mark.parametrize('name', ['strided', 'grouped', 'scan'])
def test_equals_a_python_loop_on_the_path_of_accelerators(monkeypatch, name, at_once):
  monkeypatch.setattr(backend, 'is_cpu', lambda: False)
  monkeypatch.setattr(backend, 'classes_at_once', lambda classes, images: at_once)
  compare(*task(name))


def compare(fun, xs):
  found = jax.jit(lambda xs: loops.map_classes(fun, xs, 4))(xs)
  one = jax.jit(fun)
  rows = [one(jax.tree.map(lambda x, c=c: x[c], xs)) for c in range(C)]
  expected = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert abs(a - b).max() <= 1e-5 * abs(b).max()


def test_classes_that_are_absent_are_left_out_of_the_loop():
  def fun(x):  # not zero for them: so they are seen
    return {'a': x + 1, 'b': jnp.full((2,), x)}

  xs = jnp.arange(1.0, C + 1)
  mapped = jax.jit(lambda xs, present: loops.map_classes(fun, xs, 4, present=present))
  for there in ([True, False, True, True, False], [False] * C, [True] * C):
    found = mapped(xs, jnp.array(there))
    expected = np.where(there, xs + 1, 0)
    np.testing.assert_array_equal(found['a'], expected)
    np.testing.assert_array_equal(found['b'], np.where(there, xs, 0)[:, None].repeat(2, 1))


def convolutions(jaxpr):
  for eqn in jaxpr.eqns:
    if eqn.primitive is lax.conv_general_dilated_p:
      yield eqn.params['dimension_numbers']
    for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, 'eqns')):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from convolutions(inner)


@pytest.mark.parametrize(
  'name', [n for n in (*KINDS, *WRAPPERS) if 'group' not in n and n != 'cond']
)
def test_on_cpu_every_convolution_is_written_in_one_order(name):
  fun, xs = task(name)
  found = list(convolutions(jax.make_jaxpr(lambda xs: loops.map_classes(fun, xs, 4))(xs).jaxpr))
  assert len(found) >= 3  # forward, and two gradients
  for lhs, rhs, out in found:
    space = tuple(range(1, len(lhs) - 1))
    assert (lhs, out) == ((0, len(lhs) - 1, *space),) * 2
    assert rhs == (len(lhs) - 1, len(lhs) - 2, *range(len(lhs) - 2))


def test_equals_a_python_loop_where_nothing_is_differentiated():
  kernel = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 2, 2)), jnp.float32)
  xs = jnp.asarray(np.random.default_rng(2).normal(size=(C, 4, 5, 4, 2)), jnp.float32)
  compare(lambda x: (softened(x, kernel), looped(x, kernel)), xs)


def test_a_function_that_takes_nothing_from_its_class(monkeypatch):
  monkeypatch.setattr(backend, 'classes_at_once', lambda classes, images: 2)
  compare(lambda x: (jnp.ones(3), x), jnp.arange(float(C)))


def test_many_classes_with_groups_are_unrolled_in_few_parts(monkeypatch):
  monkeypatch.setattr(backend, 'LONGEST_UNROLLING', 2)
  compare(*task('grouped'))


def test_zero_may_be_known_only_later():
  fun, xs = task('strided')
  zero = (jnp.arange(3) * 0).max()
  found = jax.jit(lambda xs, zero: loops.map_classes(fun, xs, 4, zero))(xs, zero)
  expected = jax.jit(lambda xs: loops.map_classes(fun, xs, 4))(xs)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_as_many_classes_at_once_as_make_a_large_batch(monkeypatch):
  assert backend.classes_at_once(10, 16) == 1
  monkeypatch.setattr(backend, 'is_cpu', lambda: False)
  assert backend.classes_at_once(10, 16) == 10
  assert backend.classes_at_once(1000, 16) == 64
  assert backend.classes_at_once(10, 5000) == 1
