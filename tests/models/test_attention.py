"""Attention layers against their formulas in plain NumPy, float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csba_jax.models import attention as attn
from csba_jax.models import multibranch

NAMES = ('branch1x1', 'branch3x3', 'branch5x5')


def random_variables(module, *args, seed=0):
  """Variables of a module, all drawn anew, so that no bias, V or E is zero."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda key: module.init(key, *args), jax.random.key(0))

  def draw(path, leaf):
    value = rng.normal(size=leaf.shape)
    return (abs(value) + 0.5 if path[-1].key == 'var' else value).astype(np.float32)

  return jax.tree.map_with_path(draw, shapes)


def draw(*shape, seed=1):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def relu(x):
  return np.maximum(x, 0)


def channel_gate(params, z):
  hidden = relu(z @ params['squeeze']['kernel'] + params['squeeze']['bias'])
  return sigmoid(hidden @ params['excite']['kernel'] + params['excite']['bias'])


def float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('reduction', 'hidden'), [(1, 6), (3, 2), (16, 1)])
def test_channel_gate(reduction, hidden):
  module, z = attn.ChannelGate(reduction), draw(4, 6)
  variables = random_variables(module, z)
  assert variables['params']['squeeze']['kernel'].shape == (6, hidden)
  found = module.apply(variables, z)
  close(found, channel_gate(float64(variables['params']), z))
  assert ((np.asarray(found) > 0) & (np.asarray(found) < 1)).all()


def test_branch_attention_gates_each_branch_by_its_own_channels():
  module = attn.BranchAttention(NAMES)
  branches = [draw(2, 4, 5, 6, seed=seed) for seed in range(3)]
  variables = random_variables(module, branches)
  found = module.apply(variables, branches)
  for name, u, gated in zip(NAMES, branches, found, strict=True):
    z = u.astype(np.float64).mean((1, 2))
    s = channel_gate(float64(variables['params'][name]), z)
    close(gated, u * s[:, None, None, :])


def test_branch_attention_shares_nothing_between_branches():
  module = attn.BranchAttention(NAMES)
  branches = [draw(2, 4, 5, 6, seed=seed) for seed in range(3)]
  variables = random_variables(module, branches)
  before = module.apply(variables, branches)
  changed = [branches[0], 2 * branches[1], branches[2]]
  after = module.apply(variables, changed)
  np.testing.assert_array_equal(before[0], after[0])
  np.testing.assert_array_equal(before[2], after[2])
  assert (np.asarray(before[1]) != np.asarray(after[1])).any()


@pytest.mark.parametrize(('channels', 'hidden'), [(8, 1), (48, 3)])
def test_squeeze_excite(channels, hidden):
  module, x = attn.SqueezeExcite(), draw(2, 4, 5, channels)
  variables = random_variables(module, x)
  gate = float64(variables['params']['gate'])
  assert gate['squeeze']['kernel'].shape == (channels, hidden)
  s = channel_gate(gate, x.astype(np.float64).mean((1, 2)))
  close(module.apply(variables, x), x * s[:, None, None, :])


def cbam_maps(params, x):
  """The image after channel attention, and the two maps of spatial attention convolved."""
  squeeze, excite = params['squeeze'], params['excite']

  def mlp(z):
    hidden = relu(z @ squeeze['kernel'] + squeeze['bias'])
    return hidden @ excite['kernel'] + excite['bias']

  x = x * sigmoid(mlp(x.mean((1, 2))) + mlp(x.max((1, 2))))[:, None, None, :]
  maps = np.stack([x.mean(-1), x.max(-1)], -1)
  n, height, width, _ = maps.shape
  convolved = np.zeros((n, height, width))
  for y in range(height):
    for x_ in range(width):
      for dy in range(-3, 4):
        for dx in range(-3, 4):
          if 0 <= y + dy < height and 0 <= x_ + dx < width:
            weights = params['spatial']['kernel'][dy + 3, dx + 3, :, 0]
            convolved[:, y, x_] += maps[:, y + dy, x_ + dx] @ weights
  return x, convolved


@pytest.mark.parametrize('train', [False, True])
def test_cbam(train):
  module, x = attn.CBAM(), draw(2, 5, 4, 32)
  variables = random_variables(module, x, train)
  params, stats = float64(variables['params']), float64(variables['batch_stats']['spatial_norm'])
  assert params['squeeze']['kernel'].shape == (32, 2)
  gated, convolved = cbam_maps(params, x.astype(np.float64))
  mean, var = (convolved.mean(), convolved.var()) if train else (stats['mean'][0], stats['var'][0])
  norm = params['spatial_norm']
  normed = (convolved - mean) / np.sqrt(var + 1e-5) * norm['scale'][0] + norm['bias'][0]
  found = module.apply(variables, x, train, mutable=['batch_stats'] if train else False)
  close(found[0] if train else found, gated * sigmoid(normed)[..., None])


def test_linear_head():
  module, z = attn.LinearHead(4), draw(3, 2, 5)
  variables = random_variables(module, z)
  params = float64(variables['params'])
  assert params.keys() == {'kernel', 'bias'}
  expected = np.zeros((3, 4))
  for n in range(3):
    for k in range(4):
      expected[n, k] = params['bias'][k]
      for b in range(2):
        expected[n, k] += params['kernel'][b, :, k] @ z[n, b]
  close(module.apply(variables, z), expected)


def class_logits(params, gate, z):
  """logit_k = bias_k + sum_b <w_kb, 2 sigmoid(gate_b + E_kb) * z_b>, in loops."""
  branches, _, classes = params['kernel'].shape
  logits = np.zeros((len(z), classes))
  for n in range(len(z)):
    for k in range(classes):
      logits[n, k] = params['bias'][k]
      for b in range(branches):
        gates = 2 * sigmoid(gate[n, b] + params['class_embedding'][k, b])
        logits[n, k] += params['kernel'][b, :, k] @ (gates * z[n, b])
  return logits


@pytest.fixture
def class_head():
  """(module, variables, z [N, B, D], image's share of the gate [N, B, D])"""
  module, z, gate = attn.LinearHead(4), draw(3, 2, 5), draw(3, 2, 5, seed=2)
  return module, random_variables(module, z, gate), z, gate


def test_class_conditioned_head(class_head):
  module, variables, z, gate = class_head
  params = float64(variables['params'])
  assert params['class_embedding'].shape == (4, 2, 5)
  close(module.apply(variables, z, gate), class_logits(params, gate, z))


@pytest.mark.parametrize(('reduction', 'hidden'), [(1, 5), (2, 2), (16, 1)])
def test_class_gate(reduction, hidden):
  module, z = attn.ClassGate(reduction), draw(3, 2, 5)
  variables = random_variables(module, z)
  params = float64(variables['params'])
  assert params['squeeze'].shape == (2, 5, hidden)
  expected = np.zeros((3, 2, 5))
  for n in range(3):
    for b in range(2):
      expected[n, b] = relu(z[n, b] @ params['squeeze'][b]) @ params['excite'][b]
  close(module.apply(variables, z), expected)


@pytest.mark.parametrize(('embedding', 'gate'), [(-50.0, 0.0), (0.0, 1.0), (50.0, 2.0)])
def test_class_gates_lie_between_zero_and_two(class_head, embedding, gate):
  module, variables, z, _ = class_head
  params = variables['params'] | {'class_embedding': np.full((4, 2, 5), embedding, np.float32)}
  plain = {'kernel': params['kernel'], 'bias': np.zeros(4, np.float32)}
  found = module.apply({'params': params}, z, np.zeros_like(z)) - params['bias'][None]
  close(found, gate * module.apply({'params': plain}, z))


def test_v_and_e_start_at_zero_and_the_rest_does_not():
  z = draw(3, 2, 5)
  gate = attn.ClassGate().init(jax.random.key(0), z)
  assert not np.asarray(gate['params']['excite']).any()
  assert np.asarray(gate['params']['squeeze']).all()
  assert not np.asarray(attn.ClassGate().apply(gate, z)).any()
  params = attn.LinearHead(4).init(jax.random.key(0), z, z)['params']
  assert not np.asarray(params['class_embedding']).any()
  assert not np.asarray(params['bias']).any()
  assert np.asarray(params['kernel']).all()


def test_initial_scales_are_those_of_the_fan_in():
  # truncated normal of variance 1 / fan-in, the fan-in of the head being all branches together
  z = np.zeros((1, 3, 64), np.float32)
  kernel = attn.LinearHead(50).init(jax.random.key(0), z)['params']['kernel']
  assert np.asarray(kernel).std() == pytest.approx((3 * 64) ** -0.5, rel=0.05)
  squeeze = attn.ClassGate().init(jax.random.key(0), z)['params']['squeeze']
  assert np.asarray(squeeze).std() == pytest.approx(64**-0.5, rel=0.05)


def test_permuting_the_classes_permutes_the_logits(class_head):
  module, variables, z, gate = class_head
  order = np.array([2, 0, 3, 1])
  params = variables['params']
  permuted = {
    'kernel': params['kernel'][..., order],
    'bias': params['bias'][order],
    'class_embedding': params['class_embedding'][order],
  }
  before = np.asarray(module.apply({'params': params}, z, gate))
  close(module.apply({'params': permuted}, z, gate), before[:, order])


def test_the_logit_of_a_class_reaches_only_its_own_row_of_e(class_head):
  module, variables, z, gate = class_head

  def logit_sums(params):
    return module.apply({'params': params}, z, gate).sum(0)

  jacobian = jax.jacobian(logit_sums)(variables['params'])['class_embedding']  # [k, row, B, D]
  reached = np.abs(np.asarray(jacobian)).max((2, 3)) > 0
  np.testing.assert_array_equal(reached, np.eye(4, dtype=bool))


@pytest.mark.parametrize(
  'module', [attn.BranchAttention(NAMES[:1]), attn.SqueezeExcite(), attn.CBAM()]
)
def test_images_do_not_see_each_other(module):
  x = draw(3, 4, 4, 48)
  wrap = (lambda x: [x]) if isinstance(module, attn.BranchAttention) else (lambda x: x)
  extra = (False,) if isinstance(module, attn.CBAM) else ()
  variables = random_variables(module, wrap(x), *extra)

  def apply(x):
    return np.asarray(jax.tree.leaves(module.apply(variables, wrap(x), *extra))[0])

  np.testing.assert_allclose(apply(x)[1:2], apply(x[1:2]), rtol=1e-5, atol=1e-6)


def test_heads_do_not_mix_images(class_head):
  module, variables, z, gate = class_head
  alone = module.apply(variables, z[1:2], gate[1:2])
  np.testing.assert_allclose(module.apply(variables, z, gate)[1:2], alone, rtol=1e-5, atol=1e-6)


def test_half_precision_computes_gates_in_half_and_logits_in_float32(class_head):
  module, variables, z, gate = class_head
  half = module.apply(variables, jnp.asarray(z, jnp.bfloat16), jnp.asarray(gate, jnp.bfloat16))
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, module.apply(variables, z, gate), rtol=0.05, atol=0.05)
  x = draw(2, 4, 4, 8)
  for layer, extra in (
    (attn.SqueezeExcite(dtype=jnp.bfloat16), ()),
    (attn.CBAM(dtype=jnp.bfloat16), (False,)),
  ):
    variables = layer.init(jax.random.key(0), x, *extra)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
    found = layer.apply(variables, jnp.asarray(x, jnp.bfloat16), *extra)
    assert found.dtype == jnp.bfloat16


def test_csba_class_with_zero_v_and_e_is_csba():
  models = {
    name: multibranch.build(5, (8, 8, 1), name, 0.1, jnp.float32) for name in ('csba', 'csba_class')
  }
  x = draw(2, 8, 8, 1)
  variables = random_variables(models['csba'], x)
  gate = {'squeeze': draw(3, 16, 16, seed=5), 'excite': np.zeros((3, 16, 16), np.float32)}
  head = variables['params']['head'] | {'class_embedding': np.zeros((5, 3, 16), np.float32)}
  conditioned = variables | {'params': variables['params'] | {'class_gate': gate, 'head': head}}
  quick = {'xla_backend_optimization_level': 1}
  plain, found = (
    jax.jit(models[name].apply, compiler_options=quick)(values, x)
    for name, values in (('csba', variables), ('csba_class', conditioned))
  )
  assert np.abs(plain).max() > 0.1
  np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-5 * np.abs(plain).max())
