"""Classifiers against their formulas in plain NumPy, in loops, float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from csba_jax.methods import optimizers
from csba_jax.models import classifiers

N, B, D, K = 3, 2, 5, 4
SCALE = 7.0  # of the cosines
CASES = [(kind, gated) for kind in classifiers.KINDS for gated in (False, True)]
PARAMETERS = {'linear': {'kernel', 'bias'}, 'cosine': {'kernel'}}
PARAMETERS['scaled'] = PARAMETERS['linear'] | {'scale'}


def draw(*shape, seed=1):
  return np.random.default_rng(seed).normal(size=shape)


def make(kind, gated, dtype=np.float32):
  """(module, params, (z,) or (z, the image's share of the gate)), nothing zero."""
  module = classifiers.ClassifierLayer(K, classifiers.Classifier(kind, SCALE))
  inputs = (draw(N, B, D), draw(N, B, D, seed=2))[: 1 + gated]
  shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)['params']
  params = {name: draw(*leaf.shape, seed=len(name)) for name, leaf in shapes.items()}
  return module, *jax.tree.map(lambda x: x.astype(dtype), (params, inputs))


def apply(module, params, *inputs):
  return np.asarray(module.apply({'params': params}, *inputs), np.float64)


def reference(kind, params, z, gate=None):
  logits = np.zeros((N, K))
  for n in range(N):
    for k in range(K):
      seen, w = z[n], params['kernel'][..., k]
      if gate is not None:
        seen = seen * 2 / (1 + np.exp(-gate[n] - params['class_embedding'][k]))
      logits[n, k] = (w * seen).sum()
      if kind == 'cosine':
        lengths = np.linalg.norm(w) * np.linalg.norm(seen)  # over branches and channels
        logits[n, k] *= SCALE / lengths
      else:
        logits[n, k] += params['bias'][k]
      if kind == 'scaled':
        logits[n, k] *= params['scale'][k]
  return logits


def close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('kind', 'gated'), CASES)
def test_logits(kind, gated):
  module, params, inputs = make(kind, gated)
  assert params.keys() == PARAMETERS[kind] | ({'class_embedding'} if gated else set())
  assert params['kernel'].shape == (B, D, K)
  wide = jax.tree.map(lambda x: x.astype(np.float64), (params, inputs))
  close(apply(module, params, *inputs), reference(kind, wide[0], *wide[1]))


@pytest.mark.seconds
@pytest.mark.parametrize(('kind', 'gated'), CASES)
def test_gradients_against_finite_differences(kind, gated):
  with jax.enable_x64(True):
    module, params, inputs = make(kind, gated, np.float64)
    check_grads(
      lambda params, inputs: module.apply({'params': params}, *inputs).sum(0),
      (params, inputs),
      order=1,
      modes=['rev'],
    )


@pytest.mark.parametrize('gated', [False, True])
def test_cosine_sees_directions_only(gated):
  module, params, inputs = make('cosine', gated)
  logits = apply(module, params, *inputs)
  assert np.abs(logits).max() <= SCALE
  z, *gate = inputs
  close(
    apply(module, params, z * np.array([1e-8, 1, 1e8], np.float32)[:, None, None], *gate), logits
  )
  lengths = np.array([1e-6, 0.5, 1, 1e6], np.float32)
  close(apply(module, params | {'kernel': params['kernel'] * lengths}, *inputs), logits)
  own = np.broadcast_to(params['kernel'][..., 2], z.shape)
  if not gated:
    close(apply(module, params, own)[:, 2], SCALE)
    close(apply(module, params, -own)[:, 2], -SCALE)


@pytest.mark.seconds
@pytest.mark.parametrize('gated', [False, True])
def test_a_vector_without_direction_has_cosine_and_gradient_zero(gated):
  module, params, (z, *gate) = make('cosine', gated)
  z[1] = 0
  params['kernel'][..., 3] = 0
  logits, pullback = jax.vjp(lambda p, z: module.apply({'params': p}, z, *gate), params, z)
  grads, dz = pullback(jnp.ones_like(logits))
  assert all(np.isfinite(leaf).all() for leaf in (logits, dz, *grads.values()))
  assert not np.asarray(logits)[1].any()
  assert not np.asarray(logits)[:, 3].any()
  assert not np.asarray(dz)[1].any()
  assert not np.asarray(grads['kernel'])[..., 3].any()
  assert np.asarray(logits)[0, :3].all()
  assert np.asarray(dz)[0].all()


def test_scaled_starts_as_linear_and_its_scale_is_not_decayed():
  _, params, inputs = make('linear', True)
  initial = classifiers.ClassifierLayer(K, classifiers.Classifier('scaled')).init(
    jax.random.key(0), *inputs
  )['params']
  np.testing.assert_array_equal(initial['scale'], np.ones(K))
  scaled = classifiers.ClassifierLayer(K, classifiers.Classifier('scaled'))
  found = apply(scaled, params | {'scale': initial['scale']}, *inputs)
  np.testing.assert_array_equal(found, apply(classifiers.ClassifierLayer(K), params, *inputs))
  assert not optimizers.decay_mask(initial)['scale']


@pytest.mark.parametrize(('embedding', 'gate'), [(-50.0, 0.0), (0.0, 1.0), (50.0, 2.0)])
def test_class_gates_lie_between_zero_and_two(embedding, gate):
  module, params, (z, share) = make('linear', True)
  params['class_embedding'] = np.full((K, B, D), embedding, np.float32)
  params['bias'] = np.zeros(K, np.float32)
  plain = {name: params[name] for name in ('kernel', 'bias')}
  found = apply(module, params, z, np.zeros_like(share))
  close(found, gate * apply(module, plain, z))


def test_initial_values():
  # truncated normal of variance 1 / fan-in, the fan-in being all branches together
  z = np.zeros((1, 3, 64), np.float32)
  params = classifiers.ClassifierLayer(50).init(jax.random.key(0), z, z)['params']
  assert np.asarray(params['kernel']).std() == pytest.approx((3 * 64) ** -0.5, rel=0.05)
  assert not np.asarray(params['class_embedding']).any()
  assert not np.asarray(params['bias']).any()


@pytest.mark.parametrize(('kind', 'gated'), CASES)
def test_permuting_the_classes_permutes_the_logits(kind, gated):
  module, params, inputs = make(kind, gated)
  order = np.array([2, 0, 3, 1])
  permuted = {
    name: leaf[order] if name == 'class_embedding' else leaf[..., order]
    for name, leaf in params.items()
  }
  close(apply(module, permuted, *inputs), apply(module, params, *inputs)[:, order])


@pytest.mark.seconds
@pytest.mark.parametrize(('kind', 'gated'), CASES)
def test_the_logit_of_a_class_reaches_only_its_own_parameters(kind, gated):
  module, params, inputs = make(kind, gated)
  jacobian = jax.jacobian(lambda p: module.apply({'params': p}, *inputs).sum(0))(params)
  for name, leaf in jacobian.items():  # [k, ..., K], and the embedding [k, K, ...]
    by_class = np.abs(np.moveaxis(leaf, 1 if name == 'class_embedding' else -1, 1))
    reached = by_class.reshape(K, K, -1).max(2) > 0
    np.testing.assert_array_equal(reached, np.eye(K, dtype=bool), err_msg=name)


@pytest.mark.parametrize(('kind', 'gated'), CASES)
def test_images_do_not_see_each_other(kind, gated):
  module, params, inputs = make(kind, gated)
  alone = apply(module, params, *(x[1:2] for x in inputs))
  close(apply(module, params, *inputs)[1:2], alone)


@pytest.mark.parametrize(('kind', 'gated'), CASES)
def test_logits_of_half_precision_are_float32(kind, gated):
  module, params, inputs = make(kind, gated)
  half = module.apply({'params': params}, *(jnp.asarray(x, jnp.bfloat16) for x in inputs))
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, apply(module, params, *inputs), rtol=0.05, atol=0.05)
