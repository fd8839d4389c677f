"""CSBA with the class in the trunk: the formula, its start, and its gradient."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csba_jax.models import attention, multibranch

NAMES = ('a', 'b', 'c')


@pytest.mark.parametrize('gate', attention.GATES)
def test_gates_by_numpy(gate):
  us = [jax.random.normal(key, (2, 4, 4, 5)) for key in jax.random.split(jax.random.key(0), 3)]
  p = np.array([[0.2, 0.8], [0.5, 0.5]])
  module = attention.TrunkAttention(NAMES, 2, gate=gate)
  variables = module.init(jax.random.key(1), us)
  params = jax.tree.map(lambda x: np.asarray(x, np.float64) + 0.3, variables['params'])
  params['b_class'][1] -= 1.5
  found = module.apply({'params': params}, us, jnp.asarray(p))
  for name, u, one in zip(NAMES, us, found, strict=True):
    z = np.asarray(u, np.float64).mean((1, 2))
    dense = {
      k: (params[f'{name}_{k}']['kernel'], params[f'{name}_{k}']['bias'])
      for k in ('squeeze', 'excite')
    }
    hidden = np.maximum(z @ dense['squeeze'][0] + dense['squeeze'][1], 0)
    score = hidden @ dense['excite'][0] + dense['excite'][1] + p @ params[f'{name}_class']
    s = (2 if gate == 'identity' else 1) / (1 + np.exp(-score))
    np.testing.assert_allclose(one, np.asarray(u) * s[:, None, None], rtol=2e-5)


def nets():
  x = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
  plain, net = (
    multibranch.build(10, (8, 8, 1), a, 0.125, jnp.float32) for a in ('none', 'csba_trunk')
  )
  one = plain.init(jax.random.key(0), x, train=False)
  other = net.init(jax.random.key(0), x, train=False)
  flat, theirs = (flax.traverse_util.flatten_dict(v['params']) for v in (other, one))
  params = flax.traverse_util.unflatten_dict({k: theirs.get(k, p) for k, p in flat.items()})
  return x, plain, one, net, {**one, 'params': params}


def test_it_starts_as_the_net_without_attention():
  x, plain, one, net, same = nets()
  for train in (False, True):
    found, stats = net.apply(same, x, train=train, mutable=['batch_stats'])
    wanted, theirs = plain.apply(one, x, train=train, mutable=['batch_stats'])
    np.testing.assert_array_equal(found, wanted)
    jax.tree.map(np.testing.assert_array_equal, stats, theirs)


def test_the_class_reaches_the_gates_and_learns_and_the_first_pass_has_no_gradient():
  x, _, _, net, same = nets()

  def loss(params):
    logits, _ = net.apply({**same, 'params': params}, x, train=True, mutable=['batch_stats'])
    return -jax.nn.log_softmax(logits)[jnp.arange(4), jnp.arange(4)].mean()

  gradient = flax.traverse_util.flatten_dict(jax.grad(loss)(same['params']), sep='/')
  of_class = {k: g for k, g in gradient.items() if k.endswith('_class')}
  assert len(of_class) == 12
  assert all(np.abs(g).max() > 0 for g in of_class.values())
