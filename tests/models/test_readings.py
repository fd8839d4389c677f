"""Other readings of CSBA's gate: the formulas, and that each starts as the net without attention."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csba_jax.models import attention, multibranch

NAMES = ('a', 'b', 'c')


def branches():
  keys = jax.random.split(jax.random.key(0), 3)
  return [jax.random.normal(key, (2, 4, 4, 5)) for key in keys]


@pytest.mark.parametrize('kind', [attention.MeanOneAttention, attention.Routing])
@pytest.mark.parametrize('gate', attention.GATES)
def test_gates_by_numpy(kind, gate):
  us = branches()
  module = kind(NAMES, gate=gate)
  variables = module.init(jax.random.key(1), us)
  p = jax.tree.map(lambda x: np.asarray(x, np.float64) + 0.3, variables['params'])
  found = module.apply({'params': p}, us)
  z = [np.asarray(u, np.float64).mean((1, 2)) for u in us]

  def dense(x, layer):
    return x @ layer['kernel'] + layer['bias']

  if kind is attention.Routing:
    hidden = np.maximum(dense(np.concatenate(z, -1), p['squeeze']), 0)
    scores = np.exp(dense(hidden, p['excite']).reshape(2, 3, 5))
    gates = list(np.moveaxis(3 * scores / scores.sum(1, keepdims=True), 1, 0))
    np.testing.assert_allclose(sum(gates), 3)  # branches compete
  else:
    gates = []
    for name, of in zip(NAMES, z, strict=True):
      hidden = np.maximum(dense(of, p[name]['squeeze']), 0)
      s = 1 / (1 + np.exp(-dense(hidden, p[name]['excite'])))
      gates.append(s / s.mean(-1, keepdims=True))
  for u, s, one in zip(us, gates, found, strict=True):
    np.testing.assert_allclose(one, np.asarray(u) * s[:, None, None], rtol=2e-5)


@pytest.mark.parametrize('name', ['csba_mean', 'csba_routing'])
def test_they_start_as_the_net_without_attention(name):
  x = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
  plain, net = (multibranch.build(10, (8, 8, 1), a, 0.125, jnp.float32) for a in ('none', name))
  one = plain.init(jax.random.key(0), x, train=False)
  other = net.init(jax.random.key(0), x, train=False)
  flat, theirs = (flax.traverse_util.flatten_dict(v['params']) for v in (other, one))
  params = flax.traverse_util.unflatten_dict({k: theirs.get(k, p) for k, p in flat.items()})
  found = net.apply({**one, 'params': params}, x, train=False)
  np.testing.assert_array_equal(found, plain.apply(one, x, train=False))
