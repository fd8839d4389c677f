"""ResNet-32 and its branches: sizes, names, shortcuts, topology."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csba_jax.models import capacity, layers, resnet

CIFAR = (32, 32, 3)
QUICK = {'xla_backend_optimization_level': 1}
# At 10 classes, 32 pixels and width 1. Another number is another net: results are not comparable.
PARAMETERS = {
  'none': 1168410,
  'none_wide': 1193689,
  'se': 1173222,
  'cbam': 1173322,
  'csba': 1193370,
  'csba_class': 1219866,
}


def draw(*shape, seed=1):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def names_of(model, image_shape=CIFAR):
  image = jnp.zeros((1, *image_shape))
  params = jax.eval_shape(model.init, jax.random.key(0), image)['params']
  return {'/'.join(k.key for k in path): x.shape for path, x in jax.tree.leaves_with_path(params)}


def test_resnet32_has_the_parameters_of_the_paper():
  model = resnet.build(10, CIFAR, 'none', 1.0, jnp.float32)
  assert capacity.parameter_count(model, CIFAR) == 464154  # 0.46 M in Table 6 of He et al.
  shapes = names_of(model)
  assert len([name for name in shapes if name.endswith('conv/kernel')]) == 1  # the stem
  assert len([name for name in shapes if '/conv' in name and 'stem' not in name]) == 30
  assert shapes['head/kernel'] == (1, 64, 10)


@pytest.mark.seconds
@pytest.mark.parametrize('attention', PARAMETERS)
def test_number_of_parameters_of_branches(attention):
  model = resnet.build_branches(10, CIFAR, attention, 1.0, jnp.float32)
  assert capacity.parameter_count(model, CIFAR) == PARAMETERS[attention]


def parameters_by_hand(branches):
  conv = lambda c, d: 9 * c * d + 2 * d  # noqa: E731
  stage = lambda c, d: conv(c, d) + 9 * conv(d, d)  # noqa: E731
  body = conv(3, 16) + stage(16, 16) + stage(16, 32) + branches * stage(32, 64)
  return body + branches * 64 * 10 + 10


def test_number_of_parameters_by_hand():
  assert parameters_by_hand(1) == 464154
  assert parameters_by_hand(3) == PARAMETERS['none']
  assert PARAMETERS['csba'] - PARAMETERS['none'] == 3 * 2 * (64**2 + 64)
  assert PARAMETERS['csba_class'] - PARAMETERS['csba'] == 3 * 2 * 64**2 + 10 * 3 * 64


@pytest.mark.parametrize(('width', 'stages'), [(0.5, (8, 16, 32)), (1e-3, (1, 1, 1))])
def test_width_scales_every_stage(width, stages):
  assert resnet.build(10, CIFAR, 'none', width, jnp.float32).stages == stages
  assert resnet.build_branches(10, CIFAR, 'csba', width, jnp.float32).stages == stages


def test_layer_names_read_well():
  model = resnet.BranchedResNet(10, 'csba_class', blocks=2)
  names = names_of(model, (64, 64, 3))
  for name in (
    'stem/down1/conv/kernel',
    'stem/full/conv/kernel',
    'stage2/block1/conv1/kernel',
    'stage2/block2/norm2/scale',
    'stage3/branch1/block1/conv1/kernel',
    'stage3/attention/branch3/squeeze/kernel',
    'class_gate/excite',
    'head/class_embedding',
  ):
    assert name in names
  assert not [name for name in names if name.startswith(('stage1/branch', 'stage3/block'))]


@pytest.mark.parametrize('attention', ['none', 'se', 'cbam', 'csba_class'])
def test_controls_have_the_branches_of_csba_to_the_layer(attention):
  control, csba = (
    names_of(resnet.BranchedResNet(10, name, (3, 4, 5), 1)) for name in (attention, 'csba')
  )
  branches = [
    {
      name: shape
      for name, shape in net.items()
      if name.startswith(('stem', 'stage')) and '/attention/' not in name
    }
    for net in (control, csba)
  ]
  assert branches[0] == branches[1]


@pytest.mark.parametrize(('size', 'map_size'), [(8, 2), (9, 3), (32, 8), (33, 5), (256, 8)])
def test_map_of_the_last_stage(size, map_size):
  model, image = resnet.BranchedResNet(10, 'none', (2, 2, 2), 1), jnp.zeros((1, size, size, 3))
  _, state = jax.eval_shape(
    lambda key: model.init_with_output(key, image, capture_intermediates=True), jax.random.key(0)
  )
  found = state['intermediates']['stage3']['__call__'][0].shape
  assert found == (1, map_size, map_size, 3 * 2)


@pytest.mark.parametrize(
  ('channels', 'features', 'stride', 'before'),
  [(16, 32, 2, 8), (4, 4, 1, 0), (4, 4, 2, 0), (3, 6, 2, 1), (2, 5, 1, 1)],
)
def test_shortcut_of_option_a(channels, features, stride, before):
  x = draw(2, 5, 6, channels)
  found = np.asarray(resnet.shortcut(jnp.asarray(x), features, stride))
  expected = np.zeros((2, -(-5 // stride), -(-6 // stride), features), np.float32)
  for i in range(expected.shape[1]):
    for j in range(expected.shape[2]):
      for c in range(channels):
        expected[:, i, j, before + c] = x[:, stride * i, stride * j, c]
  np.testing.assert_array_equal(found, expected)


def test_shortcut_to_fewer_channels_keeps_those_in_the_middle():
  x = draw(2, 4, 4, 6)
  np.testing.assert_array_equal(resnet.shortcut(jnp.asarray(x), 4, 1), x[..., 1:5])


@pytest.mark.parametrize(('features', 'stride'), [(3, 1), (5, 2)])
def test_block_against_its_formula(features, stride):
  block, x = resnet.Block(features, stride), draw(2, 6, 6, 3)
  shapes = jax.eval_shape(lambda key: block.init(key, x, False), jax.random.key(0))
  variables = jax.tree.map(lambda leaf: abs(draw(*leaf.shape)) + 0.1, shapes)
  variables['params'] = jax.tree.map(lambda leaf: draw(*leaf.shape), variables['params'])

  def norm(u, name):
    (scale, bias), (mean, var) = (
      [variables[kind][name][key] for key in keys]
      for kind, keys in (('params', ('scale', 'bias')), ('batch_stats', ('mean', 'var')))
    )
    return (u - mean) / np.sqrt(var + 1e-5) * scale + bias

  kernels = [jnp.asarray(variables['params'][name]['kernel']) for name in ('conv1', 'conv2')]
  u = np.maximum(norm(np.asarray(layers.convolve(jnp.asarray(x), kernels[0], stride)), 'norm1'), 0)
  u = norm(np.asarray(layers.convolve(jnp.asarray(u), kernels[1])), 'norm2')
  expected = np.maximum(u + np.asarray(resnet.shortcut(jnp.asarray(x), features, stride)), 0)
  assert (expected > 0).any()
  found = block.apply(variables, x, False)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.seconds
def test_each_branch_has_its_own_blocks_and_meets_its_own_weights():
  model, x = resnet.BranchedResNet(4, 'none', (3, 4, 5), 1), draw(3, 8, 8, 3)
  init = jax.jit(model.init, compiler_options=QUICK)
  variables = jax.tree.map(np.array, init(jax.random.key(0), x))
  head, branch = variables['params']['head'], variables['params']['stage3']['branch2']
  compiled = jax.jit(model.apply, compiler_options=QUICK)

  def apply():  # to the end: JAX reads the arrays where they lie, and they are changed in place
    return np.asarray(compiled(variables, x))

  before = [apply()]
  of_branch2, head['kernel'][1] = head['kernel'][1].copy(), 0
  before.append(apply())
  branch['block1']['norm2']['bias'][:] += 1
  np.testing.assert_array_equal(apply(), before[1])  # 0 * z_2
  head['kernel'][1] = of_branch2
  assert (apply() != before[0]).any()


@pytest.mark.seconds
@pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason='its XLA removes the barrier before it fuses'
)
def test_a_block_is_not_computed_again_in_what_reads_it():
  """XLA fuses sums into their readers; each would read the convolutions of all blocks before it."""
  model = resnet.ResNet(10, stages=(8, 8), blocks=4)
  images = jnp.zeros((2, 8, 8, 3))
  variables = jax.eval_shape(functools.partial(model.init, train=True), jax.random.key(0), images)

  def loss(params, stats, images):
    logits, _ = model.apply(
      {'params': params, 'batch_stats': stats}, images, train=True, mutable=['batch_stats']
    )
    return (logits**2).sum()

  gradient = jax.jit(jax.grad(loss))
  text = gradient.lower(variables['params'], variables['batch_stats'], images).compile().as_text()
  fusions = re.findall(r' fusion\((.*?)\), kind', text)
  read = [len(re.findall(r'%conv[\w.]*', operands)) for operands in fusions]
  assert sum(read) >= 16  # each convolution has a norm
  assert max(read) <= 2
