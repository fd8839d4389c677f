"""Layers of parameter trees, passes over them, Grams by flattening everything."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csba_jax.gradients import gram
from csba_jax.gradients.gram import Layers
from csba_jax.runtime import backend


def resnet50():
  """Shapes of the 53 convolutions, their norms and the classifier (He et al. 2016, table 1)."""
  shapes = {'stem/conv/kernel': (7, 7, 3, 64), 'stem/norm/scale': (64,), 'stem/norm/bias': (64,)}
  into = 64
  for stage, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True)):
    for block in range(blocks):
      out = 4 * width
      kernels = {'a': (1, 1, into, width), 'b': (3, 3, width, width), 'c': (1, 1, width, out)}
      if block == 0:
        kernels['shortcut'] = (1, 1, into, out)
      for name, kernel in kernels.items():
        at = f'stage{stage}/block{block}/{name}'
        shapes[f'{at}/conv/kernel'] = kernel
        shapes[f'{at}/norm/scale'] = shapes[f'{at}/norm/bias'] = kernel[-1:]
      into = out
  shapes['head/kernel'], shapes['head/bias'] = (into, 1000), (1000,)
  return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def test_a_resnet50_at_a_thousand_classes_fits_in_passes():
  params = resnet50()
  leaves = jax.tree.leaves(params)
  assert sum('conv' in name for name in params) == 53
  assert sum(leaf.size for leaf in leaves) == 25_557_032  # as published
  layers = Layers.of(params, None, '^head/')
  rows = layers.class_gradient_bytes(leaves, 1000)
  assert sum(rows) > 100e9
  passes = layers.passes(leaves, 1000, backend.CLASS_GRADIENT_BYTES)
  bound = max(backend.CLASS_GRADIENT_BYTES, max(rows))
  assert bound < 10e9
  assert all(sum(rows[i] for i in group) <= bound for group in passes)
  assert len(passes) <= 2 * sum(rows) / backend.CLASS_GRADIENT_BYTES + 1


@pytest.mark.parametrize('max_bytes', [0, 1, 4 * 70, 4 * 71, 400, 1000, 10**9])
def test_passes_partition_the_layers_in_order_within_the_bound(max_bytes):
  sizes = [10, 20, 71, 3, 3, 3, 50, 20, 1]
  params = {f'{i}/w': jax.ShapeDtypeStruct((n,), jnp.float32) for i, n in enumerate(sizes)}
  layers = Layers.of(params, None, None)
  leaves = jax.tree.leaves(params)
  rows = layers.class_gradient_bytes(leaves, 2)
  assert rows == [8 * n for n in sizes]
  passes = layers.passes(leaves, 2, max_bytes)
  assert list(itertools.chain(*passes)) == list(range(len(sizes)))
  assert all(passes)
  for group in passes:
    assert sum(rows[i] for i in group) <= max_bytes or len(group) == 1
  for one, other in itertools.pairwise(passes):  # none is shorter than it has to be
    assert sum(rows[i] for i in one) + rows[other[0]] > max_bytes


def test_sums_of_small_types_take_four_bytes_a_number():
  params = {
    'a/w': jax.ShapeDtypeStruct((5,), jnp.bfloat16),
    'b/w': jax.ShapeDtypeStruct((5,), jnp.float16),
    'c/w': jax.ShapeDtypeStruct((5,), jnp.float32),
    'd/w': jax.ShapeDtypeStruct((5,), np.float64),
  }
  with jax.enable_x64(True):
    layers = Layers.of(params, None, None)
    assert layers.class_gradient_bytes(jax.tree.leaves(params), 3) == [60, 60, 60, 120]


def test_layers_are_the_modules_that_own_parameters():
  ones = jnp.ones(2)
  params = {
    'head': {'kernel': ones, 'bias': ones},
    'body': [{'w': ones}, {'w': ones}],
    'scale': ones,
  }
  layers = Layers.of(params, None, '^head/')
  assert dict(zip(layers.names, layers.members, strict=True)) == {
    'body/0': (0,),
    'body/1': (1,),
    'head': (2, 3),
    'scale': (4,),
  }
  assert layers.in_head == (False, False, True, False)
  assert hash(layers) == hash(Layers.of(params, None, '^head/'))
  assert Layers.of(ones, None, None).names == ('parameters',)


def test_a_parameter_that_is_called_value_stays_in_its_module():
  ones = jnp.ones(2)
  layers = Layers.of({'net': {'bias': ones, 'gate': {'value': ones, 'query': ones}}}, None, None)
  assert layers.names == ('net', 'net/gate')


def test_nnx_and_equinox_name_their_layers(zoo):
  for name, expected in [('nnx_cnn', ('conv', 'head', 'norm')), ('equinox_cnn', ('conv', 'head'))]:
    layers = Layers.of(zoo.MODELS[name](jnp.float32).params, None, '^head')
    assert sorted(layers.names) == sorted(expected)
    assert sum(layers.in_head) == 1


@pytest.mark.parametrize('dtype', ['float64', 'float32', 'bfloat16'])
def test_gram_is_that_of_everything_flattened(dtype):
  rng = np.random.default_rng(0)
  with jax.enable_x64(dtype == 'float64'):
    rows = [jnp.asarray(rng.normal(size=(5, *shape)), dtype) for shape in ((3, 4, 2), (7,), ())]
    found = gram.gram(rows)
    flat = np.concatenate([np.asarray(x, np.float64).reshape(5, -1) for x in rows], axis=1)
  assert found.dtype == ('float64' if dtype == 'float64' else 'float32')
  np.testing.assert_array_equal(found, found.T)
  norms = np.linalg.norm(flat, axis=1)
  tolerance = 1e-12 if dtype == 'float64' else 1e-6
  assert (abs(np.asarray(found) - flat @ flat.T) <= tolerance * np.outer(norms, norms)).all()
