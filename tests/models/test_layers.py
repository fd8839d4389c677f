"""Layers against plain NumPy in float64, written tap by tap."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from csba_jax.models import layers

# kernel, stride, [H, W], C, D: every kernel of the nets, and maps smaller than their kernel
CONVOLUTIONS = [
  ((1, 1), 1, (4, 5), 3, 6),
  ((1, 1), 2, (5, 4), 3, 2),
  ((3, 3), 1, (7, 5), 3, 4),
  ((3, 3), 1, (1, 2), 2, 3),
  ((3, 3), 2, (7, 6), 3, 4),
  ((1, 5), 1, (3, 2), 4, 3),
  ((5, 1), 1, (6, 3), 4, 3),
  ((5, 1), 2, (5, 6), 2, 3),
  ((7, 7), 1, (5, 6), 2, 1),
]


def draw(*shape, seed=1):
  return np.random.default_rng(seed).normal(size=shape)


def close(found, expected, tolerance):
  """Equal up to `tolerance` times the largest expected value."""
  expected = np.asarray(expected, np.float64)
  assert found.shape == expected.shape
  error = abs(np.asarray(found, np.float64) - expected).max() / abs(expected).max()
  assert error < tolerance, error


def taps(x, kernel_size, stride):
  """((i, j), the pixels that tap (i, j) of the kernel meets) of a zero-padded x."""
  (kh, kw), (h, w) = kernel_size, x.shape[1:3]
  padded = np.pad(x, ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)))
  for i in range(kh):
    for j in range(kw):
      yield (i, j), padded[:, i : i + h : stride, j : j + w : stride]


def reference(x, kernel, stride):
  return sum(met @ kernel[tap] for tap, met in taps(x, kernel.shape[:2], stride))


def reference_gradients(x, kernel, stride, dy):
  """(dx, dkernel): every pixel is given back to the place from where its tap took it."""
  places = np.arange(x[..., 0].size).reshape(*x.shape[:3], 1) + 1  # 0 is the padding
  dx = np.zeros((places.size + 1, x.shape[-1]))
  dkernel = np.zeros(kernel.shape)
  size = kernel.shape[:2]
  for (tap, met), (_, place) in zip(taps(x, size, stride), taps(places, size, stride), strict=True):
    dkernel[tap] = np.einsum('nhwc,nhwd->cd', met, dy)
    np.add.at(dx, place[..., 0], dy @ kernel[tap].T)
  return dx[1:].reshape(x.shape), dkernel


@pytest.mark.parametrize('dtype', ['float32', 'float64', 'bfloat16'])
@pytest.mark.parametrize(('kernel_size', 'stride', 'size', 'c', 'd'), CONVOLUTIONS)
def test_convolution(kernel_size, stride, size, c, d, dtype):
  tolerance = {'float32': 1e-5, 'float64': 1e-12, 'bfloat16': 2e-2}[dtype]
  with jax.enable_x64(dtype == 'float64'):
    x, kernel = jnp.asarray(draw(3, *size, c), dtype), jnp.asarray(draw(*kernel_size, c, d), dtype)

    @jax.jit
    def both(x, kernel):
      y, pullback = jax.vjp(lambda x, kernel: layers.convolve(x, kernel, stride), x, kernel)
      dy = jnp.asarray(draw(*y.shape, seed=2), dtype)
      return y, dy, pullback(dy)

    y, dy, gradients = both(x, kernel)
    exact = [np.asarray(a, np.float64) for a in (x, kernel, dy)]
  assert y.dtype == dtype
  assert y.shape == (3, -(-size[0] // stride), -(-size[1] // stride), d)
  close(y, reference(exact[0], exact[1], stride), tolerance)
  expected = reference_gradients(exact[0], exact[1], stride, exact[2])
  for found, gradient in zip(gradients, expected, strict=True):
    close(found, gradient, tolerance)


@pytest.mark.parametrize(('kernel_size', 'stride', 'size', 'c', 'd'), CONVOLUTIONS[::3])
def test_convolution_against_finite_differences(kernel_size, stride, size, c, d):
  with jax.enable_x64(True):
    args = jnp.asarray(draw(2, *size, c)), jnp.asarray(draw(*kernel_size, c, d))
    check_grads(lambda x, k: jnp.sin(layers.convolve(x, k, stride)), args, order=1, modes=['rev'])


@pytest.mark.seconds
@pytest.mark.parametrize('kernel_size', [(1, 1), (3, 3), (1, 5)])
def test_convolution_under_vmap(kernel_size):
  """One kernel for each class, one batch for each class, or both."""
  xs, kernels = draw(2, 3, 4, 5, 3), draw(2, *kernel_size, 3, 4)
  one_by_one = [reference(x, k, 1) for x, k in zip(xs, kernels, strict=True)]
  xs, kernels = jnp.asarray(xs, jnp.float32), jnp.asarray(kernels, jnp.float32)
  close(jax.vmap(layers.convolve)(xs, kernels), np.stack(one_by_one), 1e-5)
  shared = jax.vmap(layers.convolve, (0, None))(xs, kernels[0])
  close(shared[0], one_by_one[0], 1e-5)
  close(shared[1], layers.convolve(xs[1], kernels[0]), 1e-5)
  shared = jax.vmap(layers.convolve, (None, 0))(xs[0], kernels)
  close(shared[0], one_by_one[0], 1e-5)
  close(shared[1], layers.convolve(xs[0], kernels[1]), 1e-5)

  def loss(kernel, x):
    return (layers.convolve(x, kernel) ** 2).sum()

  gradients = jax.vmap(jax.grad(loss))(kernels, xs)
  for gradient, x, kernel in zip(gradients, xs, kernels, strict=True):
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    _, expected = reference_gradients(x, kernel, 1, 2 * reference(x, kernel, 1))
    close(gradient, expected, 1e-5)


@pytest.mark.parametrize('kernel_size', [(1, 1), (3, 3), (5, 1)])
def test_no_image_depends_on_the_others(kernel_size):
  x, kernel = jnp.asarray(draw(5, 6, 6, 3)), jnp.asarray(draw(*kernel_size, 3, 4))
  whole = np.asarray(layers.convolve(x, kernel))
  other = np.asarray(layers.convolve(x.at[1:].set(jnp.nan), kernel))
  np.testing.assert_array_equal(other[0], whole[0])
  assert np.isnan(other[1:]).all()
  close(layers.convolve(x[:1], kernel), whole[:1], 1e-6)


def by_groups(x, scale, bias):
  """GroupNorm in float64, image by image and group by group."""
  x, y = np.asarray(x, np.float64), np.zeros(x.shape)
  channels = x.shape[-1]
  groups = min(32, max(1, round(channels / 8)))
  of = [c * groups // channels for c in range(channels)]
  for i, g in np.ndindex(len(x), groups):
    mine = [c for c in range(channels) if of[c] == g]
    part = x[i][..., mine]
    y[i][..., mine] = (part - part.mean()) / np.sqrt(part.var() + 1e-5) * scale[mine] + bias[mine]
  return y


@pytest.mark.parametrize(
  'dtype',
  ['float64', *(pytest.param(d, marks=pytest.mark.seconds) for d in ('float32', 'bfloat16'))],
)
@pytest.mark.parametrize('shape', [(3, 4, 5, 3), (2, 1, 1, 20), (2, 3, 3, 37), (2, 2, 2, 300)])
def test_group_norm(shape, dtype):
  tolerance = {'float32': 1e-5, 'float64': 1e-12, 'bfloat16': 2e-2}[dtype]
  scale, bias = draw(shape[-1], seed=2), draw(shape[-1], seed=3)
  with jax.enable_x64(dtype == 'float64'):
    x = jnp.asarray(3 + 2 * draw(*shape), dtype)
    params = {'scale': jnp.asarray(scale), 'bias': jnp.asarray(bias)}
    y = layers.GroupNorm(jnp.dtype(dtype)).apply({'params': params}, x)
  assert y.dtype == dtype
  close(y, by_groups(x, scale, bias), tolerance)


def test_group_norm_against_pytorch():
  torch = pytest.importorskip('torch')
  x = np.float32(draw(4, 5, 6, 32))
  scale, bias = np.float32(draw(32, seed=2)), np.float32(draw(32, seed=3))
  expected = torch.nn.functional.group_norm(
    torch.tensor(x.transpose(0, 3, 1, 2)), 4, torch.tensor(scale), torch.tensor(bias)
  )
  y = layers.GroupNorm().apply({'params': {'scale': scale, 'bias': bias}}, x)
  close(y, expected.numpy().transpose(0, 2, 3, 1), 1e-5)


@pytest.mark.parametrize('channels', [1, 3, 8, 12, 73, 160, 1000])
def test_groups_have_about_eight_channels(channels):
  member = layers.group_members(channels)
  assert (member.sum(1) == 1).all()
  sizes = member.sum(0)
  assert sizes.max() - sizes.min() <= 1
  if 6 <= channels <= 256:
    assert 5 <= sizes.min() <= sizes.max() <= 12
  assert len(sizes) <= 32


def test_conv_norm_relu_is_made_of_its_parts():
  module = layers.ConvNormRelu(4, (3, 3), stride=2)
  x = jnp.asarray(draw(3, 5, 5, 2), jnp.float32)
  variables = module.init(jax.random.key(0), x, train=False)
  shapes = jax.tree.map(jnp.shape, variables)
  assert shapes['params'] == {
    'conv': {'kernel': (3, 3, 2, 4)},
    'norm': {'scale': (4,), 'bias': (4,)},
  }
  assert shapes['batch_stats'] == {'norm': {'mean': (4,), 'var': (4,)}}
  y, _ = module.apply(variables, x, train=True, mutable=['batch_stats'])
  u = reference(np.asarray(x, np.float64), np.asarray(variables['params']['conv']['kernel']), 2)
  u = (u - u.mean((0, 1, 2))) / np.sqrt(u.var((0, 1, 2)) + 1e-5)
  close(y, np.maximum(u, 0), 1e-5)


@pytest.mark.seconds
@pytest.mark.parametrize('size', [(4, 6), (5, 7), (2, 3), (3, 2)])
def test_max_pool(size):
  x = draw(2, *size, 3)
  h, w = size[0] // 2, size[1] // 2
  y, pullback = jax.vjp(layers.max_pool2, jnp.asarray(x, jnp.float32))
  dy = draw(*y.shape)
  (dx,) = pullback(jnp.asarray(dy, jnp.float32))
  expected_y, expected_dx = np.zeros((2, h, w, 3)), np.zeros(x.shape)
  for n, i, j, c in np.ndindex(2, h, w, 3):
    window = x[n, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, c]
    k, m = divmod(int(window.argmax()), 2)
    expected_y[n, i, j, c] = window[k, m]
    expected_dx[n, 2 * i + k, 2 * j + m, c] = dy[n, i, j, c]
  close(y, expected_y, 1e-6)
  close(dx, expected_dx, 1e-6)


def test_of_equal_values_the_first_gets_the_gradient():
  windows = jnp.array([[[5.0, 5], [5, 5]], [[1, 5], [5, 5]], [[1, 2], [5, 5]]])[..., None]
  dx = jax.grad(lambda x: layers.max_pool2(x).sum())(windows)[..., 0]
  np.testing.assert_array_equal(dx, [[[1, 0], [0, 0]], [[0, 1], [0, 0]], [[0, 0], [1, 0]]])


def norm_and_variables(shape, dtype='float32', train=True):
  """A norm with drawn variables, those variables as float64, and a drawn input."""
  c = shape[-1]
  variables = {
    'params': {'scale': draw(c, seed=2), 'bias': draw(c, seed=3)},
    'batch_stats': {'mean': draw(c, seed=4), 'var': draw(c, seed=5) ** 2 + 0.1},
  }
  x = 2 * draw(*shape, seed=6) + 3
  return layers.BatchNorm(use_running_average=not train, dtype=jnp.dtype(dtype)), variables, x


TOLERANCE = {'float32': 1e-5, 'float64': 1e-12}


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('shape', [(3, 4, 5, 6), (7, 2)])
def test_batch_norm_in_training(shape, dtype):
  module, variables, x = norm_and_variables(shape, dtype)
  axes = tuple(range(x.ndim - 1))
  dy = draw(*shape, seed=7)
  with jax.enable_x64(dtype == 'float64'):
    given = jax.tree.map(lambda a: jnp.asarray(a, dtype), variables)

    @jax.jit
    def step(params, x):
      def forward(params, x):
        return module.apply(given | {'params': params}, x, mutable=['batch_stats'])

      y, pullback, updated = jax.vjp(forward, params, x, has_aux=True)
      return y, updated['batch_stats'], pullback(jnp.asarray(dy, dtype))

    y, stats, (dparams, dx) = step(given['params'], jnp.asarray(x, dtype))
    y, stats, dparams, dx = jax.tree.map(np.asarray, (y, stats, dparams, dx))
  mean, var = x.mean(axes), x.var(axes)
  normal = (x - mean) / np.sqrt(var + 1e-5)
  scale = variables['params']['scale']
  close(y, normal * scale + variables['params']['bias'], TOLERANCE[dtype])
  close(stats['mean'], 0.9 * variables['batch_stats']['mean'] + 0.1 * mean, TOLERANCE[dtype])
  close(stats['var'], 0.9 * variables['batch_stats']['var'] + 0.1 * var, TOLERANCE[dtype])
  close(dparams['bias'], dy.sum(axes), TOLERANCE[dtype])
  close(dparams['scale'], (dy * normal).sum(axes), TOLERANCE[dtype])
  centred = dy - dy.mean(axes) - normal * (dy * normal).mean(axes)
  close(dx, scale / np.sqrt(var + 1e-5) * centred, TOLERANCE[dtype])


def test_batch_norm_with_running_statistics():
  module, variables, x = norm_and_variables((3, 4, 5, 6), train=False)
  y, updated = module.apply(variables, jnp.asarray(x, jnp.float32), mutable=['batch_stats'])
  stats, params = variables['batch_stats'], variables['params']
  normal = (x - stats['mean']) / np.sqrt(stats['var'] + 1e-5)
  close(y, normal * params['scale'] + params['bias'], 1e-5)
  for name, value in updated['batch_stats'].items():
    np.testing.assert_array_equal(value, stats[name])


def test_batch_norm_is_that_of_flax():
  x = jnp.asarray(draw(4, 3, 3, 5), jnp.float32)
  ours = layers.BatchNorm(use_running_average=False)
  flax = nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5)
  variables = ours.init(jax.random.key(0), x)
  jax.tree.map(np.testing.assert_array_equal, variables, flax.init(jax.random.key(0), x))
  found, expected = (module.apply(variables, x, mutable=['batch_stats']) for module in (ours, flax))
  jax.tree.map(lambda a, b: close(a, b, 1e-5), found, expected)


def test_batch_norm_sums_bfloat16_in_float32():
  module, variables, x = norm_and_variables((64, 16, 16, 2), 'bfloat16')
  x = jnp.asarray(x, jnp.bfloat16)
  given = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), variables)
  y, updated = module.apply(given, x, mutable=['batch_stats'])
  exact = np.asarray(x, np.float64)
  assert y.dtype == jnp.bfloat16
  assert all(value.dtype == jnp.float32 for value in updated['batch_stats'].values())
  mean = 0.9 * variables['batch_stats']['mean'] + 0.1 * exact.mean((0, 1, 2))
  close(updated['batch_stats']['mean'], mean, 1e-5)
  normal = (exact - exact.mean((0, 1, 2))) / np.sqrt(exact.var((0, 1, 2)) + 1e-5)
  close(y, normal * variables['params']['scale'] + variables['params']['bias'], 2e-2)


@pytest.mark.seconds
def test_batch_norm_of_constant_and_of_shifted_channels():
  """No spread is no NaN; a mean of thirty standard deviations costs three digits of seven."""
  module = layers.BatchNorm(use_running_average=False)
  x = jnp.asarray(np.stack([np.full(4096, 7.3), draw(4096) + 30], -1), jnp.float32)
  variables = module.init(jax.random.key(0), x)

  def loss(x):
    return (module.apply(variables, x, mutable=['batch_stats'])[0] ** 3).sum()

  y, _ = module.apply(variables, x, mutable=['batch_stats'])
  assert np.isfinite(y).all()
  assert np.isfinite(jax.grad(loss)(x)).all()
  shifted = np.asarray(x[:, 1:], np.float64)
  close(y[:, 1:], (shifted - shifted.mean()) / np.sqrt(shifted.var() + 1e-5), 1e-3)
