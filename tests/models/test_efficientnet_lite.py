"""EfficientNet-Lite0: numbers of PyTorch, sizes, names in files, gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from csba_jax.models import capacity, efficientnet_lite

PHOTO = (224, 224, 3)
SMALL = (12, 12, 3)
QUICK = {'xla_backend_optimization_level': 1}
WIDTH = 0.25


def names_of(tree):
  return {'/'.join(k.key for k in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


@functools.cache
def shapes(width=1.0, norm='batch', depth=1, classes=1000):
  model = efficientnet_lite.build(
    classes, SMALL, 'none', width, jnp.float32, depth=depth, norm=norm
  )
  image = jax.ShapeDtypeStruct((1, *SMALL), jnp.float32)
  return model, jax.eval_shape(model.init, jax.random.key(0), image)


def draw(path, leaf):
  """Random, also the running statistics; kernels of the size that keeps activations alive."""
  rng = np.random.default_rng(len(str(path)) + leaf.size)
  if path[-1].key in ('scale', 'var'):
    return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
  fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 10
  return (rng.normal(size=leaf.shape) * (2 / fan_in) ** 0.5).astype(np.float32)


@pytest.mark.seconds
def test_number_of_parameters():
  model = efficientnet_lite.build(1000, PHOTO, 'none', 1.0, jnp.float32)
  assert capacity.parameter_count(model, PHOTO) == 4652008
  half = efficientnet_lite.build(10, PHOTO, 'none', 0.5, jnp.float32)
  assert half.channels == (16, 8, 12, 20, 40, 56, 96, 160, 640)


@pytest.mark.seconds
def test_layer_names_and_shapes():
  names = names_of(shapes()[1]['params'])
  assert names['stem/conv/kernel'].shape == (3, 3, 3, 32)
  assert names['stage1/block1/depthwise/conv/kernel'].shape == (3, 3, 1, 32)
  assert names['stage6/block4/expand/norm/scale'].shape == (1152,)
  assert names['stage7/block1/project/conv/kernel'].shape == (1, 1, 1152, 320)
  assert names['top/conv/kernel'].shape == (1, 1, 320, 1280)
  assert names['head/kernel'].shape == (1, 1280, 1000)
  assert not [name for name in names if 'stage1' in name and 'expand' in name]
  deeper = names_of(shapes(depth=2)[1]['params'])
  assert {re.match(r'stage6/block\d+', name)[0] for name in deeper if 'stage6' in name} == {
    f'stage6/block{j}' for j in range(1, 9)
  }
  assert 'batch_stats' not in shapes(norm='group')[1]


def test_names_in_files():
  names = efficientnet_lite.torch_names
  assert names('params/stem/conv/kernel') == ('_conv_stem.weight', 'conv_stem.weight')
  assert names('params/stem/norm/bias') == ('_bn0.bias', 'bn1.bias')
  assert names('batch_stats/top/norm/var') == ('_bn1.running_var', 'bn2.running_var')
  assert names('params/stage1/block1/project/conv/kernel') == (
    '_blocks.0._project_conv.weight',
    'blocks.0.0.conv_pw.weight',
  )
  assert names('params/stage1/block1/depthwise/norm/scale') == (
    '_blocks.0._bn1.weight',
    'blocks.0.0.bn1.weight',
  )
  assert names('batch_stats/stage6/block4/project/norm/mean') == (
    '_blocks.14._bn2.running_mean',
    'blocks.5.3.bn3.running_mean',
  )
  assert names('params/stage7/block1/expand/conv/kernel') == (
    '_blocks.15._expand_conv.weight',
    'blocks.6.0.conv_pw.weight',
  )
  assert names('params/head/kernel') == ('_fc.weight', 'classifier.weight')
  assert names('params/head/scale_of_another') == ()
  assert names('params/stage1/attention/squeeze/kernel') == ()
  everything = [names(name) for name in names_of(shapes()[1])]
  for file in zip(*everything, strict=True):
    assert len(set(file)) == len(everything) == 247  # 49 layers: 5 tensors each, and the head's 2


def same_conv(torch, x, kernel, stride, groups=1):
  """Convolution with TensorFlow's zeros: half of them before, the odd one after."""
  zeros = []
  for n in reversed(x.shape[2:]):
    total = max((-(-n // stride) - 1) * stride + kernel.shape[-1] - n, 0)
    zeros += [total // 2, total - total // 2]
  x = torch.nn.functional.pad(x, zeros)
  return torch.nn.functional.conv2d(x, kernel, stride=stride, groups=groups)


def reference(torch, weights, x):
  """The net, from the table of the paper, with weights by our names in PyTorch's layout."""

  def layer(x, name, stride=1, depthwise=False, relu=True):
    kernel = weights[f'params/{name}/conv/kernel']
    x = same_conv(torch, x, kernel, stride, x.shape[1] if depthwise else 1)
    mean, var = (weights[f'batch_stats/{name}/norm/{key}'] for key in ('mean', 'var'))
    scale, bias = (weights[f'params/{name}/norm/{key}'] for key in ('scale', 'bias'))
    x = torch.nn.functional.batch_norm(x, mean, var, scale, bias, eps=1e-3)
    return torch.nn.functional.relu6(x) if relu else x

  x = layer(x, 'stem', 2)
  table = [(1, 1, 1), (6, 2, 2), (6, 2, 2), (6, 2, 3), (6, 1, 3), (6, 2, 4), (6, 1, 1)]
  for i, (expand, stride, blocks) in enumerate(table, 1):
    for j in range(1, blocks + 1):
      name, step = f'stage{i}/block{j}', stride if j == 1 else 1
      u = layer(x, f'{name}/expand') if expand > 1 else x
      u = layer(u, f'{name}/depthwise', step, depthwise=True)
      u = layer(u, f'{name}/project', relu=False)
      x = x + u if step == 1 and x.shape == u.shape else u
  x = layer(x, 'top').mean((2, 3))
  return x @ weights['params/head/kernel'] + weights['params/head/bias']


@pytest.mark.seconds
def test_logits_are_those_of_pytorch():
  torch = pytest.importorskip('torch')
  model, variables = shapes(WIDTH, classes=7)
  variables = jax.tree.map_with_path(draw, variables)
  theirs = {}
  for name, array in names_of(variables).items():
    array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.reshape(array.shape[-2:])
    theirs[name] = torch.from_numpy(np.ascontiguousarray(array))
  apply = jax.jit(model.apply, compiler_options=QUICK)
  for size in ((64, 64), (37, 53)):
    images = np.random.default_rng(0).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    ours = np.asarray(apply(variables, images))
    with torch.no_grad():
      expected = reference(torch, theirs, torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    assert np.ptp(expected.numpy(), axis=0).max() > 0.05  # the images matter
    np.testing.assert_allclose(ours, expected.numpy(), atol=2e-5 * abs(expected).max().item())


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('size', [3, 5])
@pytest.mark.parametrize('pixels', [(6, 9), (1, 2)])
def test_depthwise_is_the_convolution_by_groups(pixels, size, stride):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, *pixels, 4)).astype(np.float32)
  kernel = rng.normal(size=(size, size, 1, 4)).astype(np.float32)
  expected = jax.lax.conv_general_dilated(
    *(x, kernel, (stride, stride), 'SAME'),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=4,
  )
  found = efficientnet_lite.depthwise(jnp.asarray(x), jnp.asarray(kernel), stride)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  half = efficientnet_lite.depthwise(jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel), stride)
  assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize('images', [1, 6])
@pytest.mark.parametrize(
  ('pixels', 'size', 'stride'),
  [  # 34 and 17 rows have few slabs, the others one for each row
    ((6, 9), 3, 1),
    ((6, 9), 3, 2),
    ((5, 4), 5, 1),
    ((5, 4), 5, 2),
    ((1, 2), 5, 2),
    ((34, 2), 3, 1),
    ((34, 2), 3, 2),
  ],
)
def test_gradient_of_depthwise_is_that_of_the_convolution_by_groups(pixels, size, stride, images):
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(images, *pixels, 3)), rng.normal(size=(size, size, 1, 3))

    def by_groups(x, kernel):
      return jax.lax.conv_general_dilated(
        *(x, kernel, (stride, stride), 'SAME'),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=3,
      )

    def depthwise(x, kernel):
      return efficientnet_lite.depthwise(x, kernel, stride)

    out = by_groups(x, kernel).shape
    dy = rng.normal(size=out)
    expected, found = (
      jax.jit(lambda x, kernel: jax.vjp(f, x, kernel)[1](dy))(x, kernel)  # noqa: B023
      for f in (by_groups, depthwise)
    )
    for ours, theirs in zip(found, expected, strict=True):
      np.testing.assert_allclose(ours, theirs, atol=1e-12 * images)


def test_gradient_of_depthwise_has_the_types_of_its_inputs():
  x, kernel = jnp.ones((2, 4, 4, 3), jnp.bfloat16), jnp.ones((3, 3, 1, 3))
  dx, dkernel = jax.grad(lambda x, k: efficientnet_lite.depthwise(x, k).sum(), (0, 1))(x, kernel)
  assert (dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.seconds
def test_branches_that_are_alike_are_the_plain_net():
  """Each branch with the weights of the last stage, and a third of the classifier."""
  stages = efficientnet_lite.STAGES[:3]
  make = functools.partial(efficientnet_lite.EfficientNetLite, 3, (4, 4, 6, 5, 8), stages=stages)
  plain, branched = make(), make(attention='none')
  image = jax.ShapeDtypeStruct((1, *SMALL), jnp.float32)
  weights, own = (jax.eval_shape(m.init, jax.random.key(0), image) for m in (plain, branched))
  weights = names_of(jax.tree.map_with_path(draw, weights))

  def choose(path, leaf):
    name = '/'.join(key.key for key in path)
    if name == 'params/head/kernel':
      return np.repeat(weights[name] / 3, 3, axis=0)
    plain_name = re.sub(r'end/branch\d/', '', name).replace('/stage/', '/stage3/')
    assert weights[plain_name].shape == leaf.shape
    return weights[plain_name]

  variables = jax.tree.map_with_path(choose, own)
  images = np.random.default_rng(0).uniform(-1, 1, (2, *SMALL)).astype(np.float32)
  tree = unflatten_dict({tuple(name.split('/')): leaf for name, leaf in weights.items()})
  expected = jax.jit(plain.apply, compiler_options=QUICK)(tree, images)
  found = jax.jit(branched.apply, compiler_options=QUICK)(variables, images)
  assert np.ptp(np.asarray(expected)) > 0.1
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_branches_have_the_names_of_the_last_stage_in_files():
  names = efficientnet_lite.torch_names
  for branch in ('branch1', 'branch2', 'branch3'):
    for ours, theirs in (('stage', 'stage7'), ('top', 'top')):
      place = {'stage': 'block1/expand/conv/kernel', 'top': 'norm/scale'}[ours]
      found = names(f'params/end/{branch}/{ours}/{place}')
      assert found == names(f'params/{theirs}/{place}') != ()
  assert names('params/end/attention/branch1/squeeze/kernel') == ()


@pytest.mark.seconds
@pytest.mark.parametrize('norm', ['batch', 'group'])
def test_gradients_are_finite_and_reach_every_parameter(norm):
  stages = (efficientnet_lite.STAGES[0], efficientnet_lite.STAGES[2])  # all of them take minutes
  model = efficientnet_lite.EfficientNetLite(3, (4, 4, 6, 8), norm=norm, stages=stages)
  image = jax.ShapeDtypeStruct((1, *SMALL), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), image)
  variables = jax.tree.map_with_path(draw, variables)
  images = np.random.default_rng(0).uniform(-1, 1, (4, *SMALL)).astype(np.float32)

  def loss(params):
    logits, _ = model.apply(variables | {'params': params}, images, True, mutable='batch_stats')
    return -jax.nn.log_softmax(logits)[:, 0].mean()

  gradients = names_of(jax.jit(jax.grad(loss), compiler_options=QUICK)(variables['params']))
  assert all(np.isfinite(gradient).all() for gradient in gradients.values())
  assert not [name for name, gradient in gradients.items() if not np.any(gradient)]
