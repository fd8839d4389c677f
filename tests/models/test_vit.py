"""The transformer: sizes, names, tokens, and heads that are branches, against plain NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csba_jax.models import capacity, vit

CIFAR = (32, 32, 3)
QUICK = {'xla_backend_optimization_level': 1}
# At 10 classes, 32 pixels and width 1. Another number is another net: results are not comparable.
PARAMETERS = {
  'none': 2767498,
  'none_wide': 2941894,
  'se': 2801182,
  'csba': 2942218,
  'csba_class': 2968714,
}


def draw(*shape, seed=1):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_variables(module, *args):
  shapes = jax.eval_shape(lambda key: module.init(key, *args), jax.random.key(0))
  return jax.tree.map(lambda leaf: draw(*leaf.shape, seed=leaf.size), shapes)


def float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('attention', PARAMETERS)
def test_number_of_parameters(attention):
  model = vit.build(10, CIFAR, attention, 1.0, jnp.float32)
  assert capacity.parameter_count(model, CIFAR) == PARAMETERS[attention]


def test_number_of_parameters_by_hand():
  d, hidden, head_dim = 192, 768, 64
  dense = lambda c, d: c * d + d  # noqa: E731
  tokens = dense(4 * 4 * 3, d) + 64 * d
  block = 2 * 2 * d + dense(d, 3 * d) + dense(d, d) + dense(d, hidden) + dense(hidden, d)
  pool = 2 * d + dense(d, 2 * d) + d
  assert PARAMETERS['none'] == tokens + 6 * block + pool + dense(d, 10)
  gates = 3 * 2 * dense(head_dim, head_dim)  # three heads in each of six blocks and the pooling
  assert PARAMETERS['csba'] - PARAMETERS['none'] == 7 * gates
  assert PARAMETERS['csba_class'] - PARAMETERS['csba'] == 3 * 2 * 64**2 + 10 * d


def test_wide_control_has_the_layers_of_none_and_more_channels():
  none, wide = (
    vit.build(10, CIFAR, attention, 0.5, jnp.float32) for attention in ('none', 'none_wide')
  )
  assert (none.head_dim, none.hidden) == (32, 384)
  assert wide.attention == 'none'
  assert wide.depth == none.depth
  assert wide.head_dim >= none.head_dim
  assert wide.hidden >= none.hidden


def test_layer_names_read_well():
  model = vit.ViT(10, 'csba_class', depth=1)
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *CIFAR)))['params']
  names = {'/'.join(key.key for key in path) for path, _ in jax.tree.leaves_with_path(params)}
  for name in (
    'tokens/patch/kernel',
    'tokens/position',
    'block1/norm1/scale',
    'block1/heads/qkv/kernel',
    'block1/heads/project/kernel',
    'block1/heads/attention/head2/squeeze/kernel',
    'block1/mlp1/kernel',
    'pool/query',
    'pool/attention/head3/excite/bias',
    'class_gate/excite',
    'head/class_embedding',
  ):
    assert name in names


@pytest.mark.parametrize(
  ('shape', 'tokens', 'patch'),
  [
    ((8, 8, 1), 64, 1),
    ((32, 32, 3), 64, 48),
    ((256, 256, 3), 64, 32 * 32 * 3),
    ((12, 12, 3), 36, 12),  # 2 pixels a patch, 6 patches a side
    ((9, 33, 1), 5 * 7, 2 * 5),
  ],
)
def test_at_most_eight_tokens_a_side(shape, tokens, patch):
  module = vit.Tokens(5)
  x, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), jnp.zeros((2, *shape)))
  assert x.shape == (2, tokens, 5)
  assert variables['params']['patch']['kernel'].shape == (patch, 5)


@pytest.mark.parametrize('shape', [(16, 16, 3), (9, 17, 2)])
def test_a_token_is_its_patch_and_its_position(shape):
  module, x = vit.Tokens(5), draw(2, *shape)
  variables = random_variables(module, x)
  params = float64(variables['params'])
  ph, pw = -(-shape[0] // 8), -(-shape[1] // 8)
  padded = np.pad(x, ((0, 0), (0, -shape[0] % ph), (0, -shape[1] % pw), (0, 0)))
  expected = []
  for i in range(0, padded.shape[1], ph):
    for j in range(0, padded.shape[2], pw):
      patch = padded[:, i : i + ph, j : j + pw].reshape(2, -1)
      token = patch @ params['patch']['kernel'] + params['patch']['bias']
      expected.append(token + params['position'][len(expected)])
  close(module.apply(variables, x), np.stack(expected, 1))


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def gated(gates, name, u):
  """u_h * 2 sigmoid(W2 relu(W1 mean over T of u_h)), its own weights for each head."""
  squeeze, excite = gates[name]['squeeze'], gates[name]['excite']
  hidden = np.maximum(u.mean(1) @ squeeze['kernel'] + squeeze['bias'], 0)
  return 2 * u / (1 + np.exp(-(hidden @ excite['kernel'] + excite['bias'])))[:, None]


@pytest.mark.parametrize('attention', ['none', 'csba'])
def test_self_attention(attention):
  module, x = vit.SelfAttention(4, attention), draw(2, 5, 12)
  variables = random_variables(module, x, False)
  params = float64(variables['params'])
  qkv = (x @ params['qkv']['kernel'] + params['qkv']['bias']).reshape(2, 5, 3, 3, 4)
  heads = []
  for h, name in enumerate(vit.BRANCHES):
    q, k, v = (qkv[:, :, i, h] for i in range(3))
    u = softmax(q @ k.transpose(0, 2, 1) / 2) @ v
    heads.append(gated(params['attention'], name, u) if attention == 'csba' else u)
  expected = np.concatenate(heads, -1) @ params['project']['kernel'] + params['project']['bias']
  close(module.apply(variables, x, False), expected)


@pytest.mark.parametrize('attention', ['none', 'csba'])
def test_pooling(attention):
  module, x = vit.Pool(4, attention), draw(2, 5, 12)
  variables = random_variables(module, x, False)
  params = float64(variables['params'])
  kv = (x @ params['kv']['kernel'] + params['kv']['bias']).reshape(2, 5, 2, 3, 4)
  expected = np.zeros((2, 3, 4))
  for h, name in enumerate(vit.BRANCHES):
    k, v = kv[:, :, 0, h], kv[:, :, 1, h]
    u = softmax(params['query'][h] @ k.transpose(0, 2, 1) / 2)[:, None] @ v  # [N, 1, D]
    expected[:, h] = (gated(params['attention'], name, u) if attention == 'csba' else u)[:, 0]
  close(module.apply(variables, x, False), expected)


def test_softmax_is_float32_where_the_rest_is_half():
  q, k, v = (jnp.asarray(draw(2, 5, 3, 4, seed=seed), jnp.bfloat16) for seed in range(3))
  program = str(jax.make_jaxpr(vit.attend)(q, k, v))
  assert set(re.findall(r':(\w+)\[[\d,]*\] = (?:exp|sub|div)\b', program)) == {'f32'}
  assert vit.attend(q, k, v).dtype == jnp.bfloat16


def test_a_head_of_the_pooling_meets_its_own_weights_of_the_classifier():
  model, x = vit.ViT(4, 'none', 4, 6, 1), draw(3, 8, 8, 3)
  variables = random_variables(model, x)
  params = variables['params']
  apply = jax.jit(model.apply, compiler_options=QUICK)
  whole = np.asarray(apply(variables, x))
  of_head2, params['head']['kernel'][1] = params['head']['kernel'][1].copy(), 0
  without = np.asarray(apply(variables, x))
  params['pool']['query'][1] += 1
  np.testing.assert_array_equal(apply(variables, x), without)
  params['head']['kernel'][1] = of_head2
  assert (np.asarray(apply(variables, x)) != whole).any()


def test_places_weigh_as_much_as_patches_at_first():
  # positions of 0.02, the usual size, would drown in the patches
  x = np.random.default_rng(0).uniform(-1, 1, (20, 8, 8, 1)).astype(np.float32)
  variables = vit.Tokens(96).init(jax.random.key(0), x)
  position = np.asarray(variables['params']['position'])
  patches = np.asarray(vit.Tokens(96).apply(variables, x)) - position
  assert position.std() == pytest.approx(1, rel=0.05)
  assert 0.3 < patches.std() < 1
