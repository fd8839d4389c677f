"""Attention layers against their formulas in plain NumPy, float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csba_jax.models import attention as attn
from csba_jax.models import registry

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


FACTORS = {'identity': 2, 'half': 1}  # of the sigmoid of a gate


def channel_gate(params, z, gate='identity'):
  hidden = relu(z @ params['squeeze']['kernel'] + params['squeeze']['bias'])
  return FACTORS[gate] * sigmoid(hidden @ params['excite']['kernel'] + params['excite']['bias'])


def float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('gate', FACTORS)
@pytest.mark.parametrize(('reduction', 'hidden'), [(1, 10), (3, 8), (16, 8)])
def test_channel_gate(reduction, hidden, gate):
  module, z = attn.ChannelGate(reduction, gate=gate), draw(4, 10)
  variables = random_variables(module, z)
  assert variables['params']['squeeze']['kernel'].shape == (10, hidden)
  found = module.apply(variables, z)
  close(found, channel_gate(float64(variables['params']), z, gate))
  assert ((np.asarray(found) > 0) & (np.asarray(found) < FACTORS[gate])).all()


@pytest.mark.parametrize('module', [attn.ChannelGate, attn.SqueezeExcite, attn.CBAM])
def test_gates_start_as_the_identity_or_near_one_half(module):
  x = draw(4, 10) if module is attn.ChannelGate else draw(4, 6, 6, 48)
  extra = (False,) if module is attn.CBAM else ()
  found, names = {}, {}
  for gate in attn.GATES:
    variables = module(gate=gate).init(jax.random.key(0), x, *extra)
    found[gate] = module(gate=gate).apply(variables, x, *extra)
    names[gate] = jax.tree.map(jnp.shape, variables)
  assert names['identity'] == names['half']  # a checkpoint of one fits the other
  start = np.ones_like(x) if module is attn.ChannelGate else x
  np.testing.assert_array_equal(found['identity'], start)
  smaller = (np.asarray(found['half']) / start).mean()
  assert smaller == pytest.approx(0.25 if module is attn.CBAM else 0.5, abs=0.1)


@pytest.mark.parametrize(
  ('channels', 'reduction', 'hidden'),
  [(3, 16, 3), (16, 16, 8), (127, 16, 8), (144, 16, 9), (256, 16, 16), (5, 1, 5), (40, 1, 40)],
)
def test_a_bottleneck_keeps_8_units_where_it_can(channels, reduction, hidden):
  assert attn.hidden_units(channels, reduction) == hidden


@pytest.mark.parametrize('gate', FACTORS)
def test_branch_attention_gates_each_branch_by_its_own_channels(gate):
  module = attn.BranchAttention(NAMES, gate=gate)
  branches = [draw(2, 4, 5, 6, seed=seed) for seed in range(3)]
  variables = random_variables(module, branches)
  found = module.apply(variables, branches)
  for name, u, gated in zip(NAMES, branches, found, strict=True):
    z = u.astype(np.float64).mean((1, 2))
    s = channel_gate(float64(variables['params'][name]), z, gate)
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


@pytest.mark.parametrize('gate', FACTORS)
@pytest.mark.parametrize(('channels', 'hidden'), [(3, 3), (8, 8), (48, 8), (160, 10)])
def test_squeeze_excite(channels, hidden, gate):
  module, x = attn.SqueezeExcite(gate=gate), draw(2, 4, 5, channels)
  variables = random_variables(module, x)
  params = float64(variables['params']['gate'])
  assert params['squeeze']['kernel'].shape == (channels, hidden)
  s = channel_gate(params, x.astype(np.float64).mean((1, 2)), gate)
  close(module.apply(variables, x), x * s[:, None, None, :])


def cbam_maps(params, x, factor):
  """The image after channel attention, and the two maps of spatial attention convolved."""
  squeeze, excite = params['squeeze'], params['excite']

  def mlp(z):
    hidden = relu(z @ squeeze['kernel'] + squeeze['bias'])
    return hidden @ excite['kernel'] + excite['bias']

  x = x * factor * sigmoid(mlp(x.mean((1, 2))) + mlp(x.max((1, 2))))[:, None, None, :]
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


@pytest.mark.parametrize('gate', FACTORS)
@pytest.mark.parametrize('train', [False, True])
def test_cbam(train, gate):
  module, x = attn.CBAM(gate=gate), draw(2, 5, 4, 32)
  variables = random_variables(module, x, train)
  params, stats = float64(variables['params']), float64(variables['batch_stats']['spatial_norm'])
  assert params['squeeze']['kernel'].shape == (32, 8)
  gated, convolved = cbam_maps(params, x.astype(np.float64), FACTORS[gate])
  mean, var = (convolved.mean(), convolved.var()) if train else (stats['mean'][0], stats['var'][0])
  norm = params['spatial_norm']
  normed = (convolved - mean) / np.sqrt(var + 1e-5) * norm['scale'][0] + norm['bias'][0]
  found = module.apply(variables, x, train, mutable=['batch_stats'] if train else False)
  expected = gated * FACTORS[gate] * sigmoid(normed)[..., None]
  close(found[0] if train else found, expected)


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


def test_v_starts_at_zero_and_u_by_its_fan_in():
  z = draw(3, 2, 64)
  gate = attn.ClassGate().init(jax.random.key(0), z)
  assert not np.asarray(gate['params']['excite']).any()
  assert not np.asarray(attn.ClassGate().apply(gate, z)).any()
  # truncated normal of variance 1 / fan-in
  assert np.asarray(gate['params']['squeeze']).std() == pytest.approx(64**-0.5, rel=0.05)


@pytest.mark.seconds
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


@pytest.mark.seconds
def test_half_precision_computes_in_half():
  x = draw(2, 4, 4, 8)
  for layer, extra in (
    (attn.SqueezeExcite(dtype=jnp.bfloat16), ()),
    (attn.CBAM(dtype=jnp.bfloat16), (False,)),
  ):
    variables = layer.init(jax.random.key(0), x, *extra)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
    found = layer.apply(variables, jnp.asarray(x, jnp.bfloat16), *extra)
    assert found.dtype == jnp.bfloat16


@pytest.mark.parametrize('projected', [False, True])
@pytest.mark.parametrize(
  'attention',
  ['none', 'none_wide', 'half', 'se', 'cbam', 'csba', 'csba_class', 'se/half', 'csba/half'],
)
def test_aggregation_gates_branches_before_and_images_after(attention, projected):
  class Aggregate(nn.Module):
    @nn.compact
    def __call__(self, branches):
      project = nn.Dense(8, name='project') if projected else None
      return attn.aggregate(self, branches, NAMES, attention, False, jnp.float32, project)

  branches = [draw(2, 4, 5, 6, seed=seed) for seed in range(3)]
  variables = random_variables(Aggregate(), branches)
  found = Aggregate().apply(variables, branches)
  inside = {kind: tree.get('attention', {}) for kind, tree in variables.items()}
  attention, _, gate = attention.partition('/')
  start = {'gate': gate or 'identity'}
  if attention in ('csba', 'csba_class'):
    branches = attn.BranchAttention(NAMES, **start).apply(inside, branches)
  if attention == 'half':
    branches = [u / 2 for u in branches]
  expected = np.concatenate(branches, -1)
  if projected:
    expected = nn.Dense(8).apply({'params': variables['params']['project']}, expected)
  if attention == 'se':
    expected = attn.SqueezeExcite(**start).apply(inside, expected)
  if attention == 'cbam':
    expected = attn.CBAM(**start).apply(inside, expected, False)
  close(found, expected)
  assert bool(inside.get('params')) == attn.ATTENTIONS[attention].gated


class Halved(nn.Module):
  """A made-up attention: every branch times one half."""

  names: tuple[str, ...]
  dtype: type
  factor: float = 0.5

  @nn.compact
  def __call__(self, branches):
    return [self.factor * u for u in branches]


class Doubled(nn.Module):
  dtype: type

  @nn.compact
  def __call__(self, x, train):
    return 2 * x


@pytest.mark.parametrize(
  ('row', 'expected'),
  [
    (attn.Attention((attn.BRANCHES,), before=Halved), lambda x: x / 2 + 1),
    (attn.Attention((attn.BRANCHES,), after=Doubled), lambda x: 2 * (x + 1)),
  ],
)
def test_an_attention_is_one_row_of_the_table(row, expected, monkeypatch):
  """A new row is known to every model that has what it needs, and means the same in each."""
  monkeypatch.setitem(attn.ATTENTIONS, 'new', row)
  known = [name for name in registry.MODELS if 'new' in registry.attentions_of(name)]
  assert set(known) >= {'multibranch', 'resnet32_branches', 'vit'}
  assert 'resnet32' not in known
  branches = [draw(2, 4, 5, 6, seed=seed) for seed in range(3)]

  class Aggregate(nn.Module):
    @nn.compact
    def __call__(self, branches):
      return attn.aggregate(self, branches, NAMES, 'new', False, jnp.float32, lambda x: x + 1)

  close(Aggregate().apply({}, branches), expected(np.concatenate(branches, -1)))


def test_each_row_names_what_a_model_may_have():
  for row in attn.ATTENTIONS.values():
    assert set(row.needs) <= {attn.BRANCHES, attn.MAPS}
    if row.before or row.after or row.at_classifier:  # `aggregate` is where branches meet
      assert attn.BRANCHES in row.needs
    assert not (row.before and row.after)  # both would be the submodule `attention`
    assert row.parameters_of is None or row.parameters_of in attn.ATTENTIONS
