"""Small models of every kind, each a losses_fn(params, batch) -> [N] in a type of computation."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from csba_jax.models import classifiers, layers, multibranch
from csba_jax.models.attention import ATTENTIONS

CLASSES = 4
IMAGES = 12
MODELS = {}


class Model(NamedTuple):
  losses_fn: Any  # (params, batch) -> [N]
  params: Any  # float32, nothing zero
  inputs: dict  # what the batch holds besides labels, [N, ...]; NumPy
  per_example: bool = True
  precision: float = 0.0  # that the model itself rounds to, whatever the type of its parameters


def model(function):
  """Registers `function(dtype) -> Model` under its name."""
  MODELS[function.__name__] = functools.cache(function)
  return function


def xent(logits, batch):
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])


def images(*shape, seed=3):
  shape = shape or (8, 8, 3)
  return {'x': np.random.default_rng(seed).normal(size=(IMAGES, *shape)).astype(np.float32)}


def fill(shapes, seed=0):
  """Arrays of these shapes, of the size that initialisation gives; nothing is zero."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = jax.tree_util.keystr(path[-1:], simple=True)
    if name in ('scale', 'var'):
      return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
    fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 10
    value = rng.normal(size=leaf.shape) / np.sqrt(fan_in)
    # a gate of few hidden units stays alive
    alive = name == 'bias' and any(getattr(key, 'key', '') == 'squeeze' for key in path)
    return jnp.asarray(abs(value) + 1 if alive else value, jnp.float32)

  return jax.tree.map_with_path(draw, shapes)


def linen(module, inputs, dtype, **options):
  """Model of a Linen module, its variables filled; statistics are closed over, in `dtype`."""
  kind = jax.dtypes.canonicalize_dtype(inputs['x'].dtype)  # int32 for words, unless in 64 bits
  example = jax.ShapeDtypeStruct((2, *inputs['x'].shape[1:]), kind)
  variables = dict(jax.eval_shape(module.init, jax.random.key(0), example))
  variables = fill(variables)
  params = variables.pop('params')
  # part of a program in float32 would be rounded by what the compiler makes of it
  variables = jax.tree.map(lambda x: x.astype(dtype), variables)

  def losses_fn(params, batch):
    return xent(module.apply({'params': params, **variables}, batch['x']), batch)

  return Model(losses_fn, params, inputs, **options)


class TwoBlocks(nn.Module):
  """The first and the last block of a multi-branch net, and its classifier."""

  attention: str
  dtype: Any

  @nn.compact
  def __call__(self, x):
    x = multibranch.Block(2, self.attention, dtype=self.dtype, name='first')(x, False)
    x = layers.max_pool2(x)
    x = multibranch.Block(3, self.attention, False, self.dtype, name='last')(x, False)
    z = x.mean((1, 2)).reshape(x.shape[0], 3, -1)
    return classifiers.classify(z, CLASSES, classifiers.Classifier(), self.attention, self.dtype)


def two_blocks(kind, dtype):
  return linen(TwoBlocks(kind, dtype), images(), dtype)


def whole_net(kind, dtype):
  if kind == 'none_wide':
    return linen(multibranch.build(CLASSES, (8, 8, 3), kind, 0.05, dtype), images(), dtype)
  return linen(multibranch.MultiBranch(CLASSES, kind, 2, (3, 2, 3), dtype), images(), dtype)


for _kind in ATTENTIONS:
  MODELS[f'blocks_{_kind}'] = functools.cache(functools.partial(two_blocks, _kind))
  MODELS[f'multibranch_{_kind}'] = functools.cache(functools.partial(whole_net, _kind))
del MODELS['blocks_none_wide']  # the same blocks as those of `none`


class Net(nn.Module):
  """body(x), a function that makes modules, and a classifier of its mean over space."""

  body: Any

  @nn.compact
  def __call__(self, x):
    x = self.body(x)
    return nn.Dense(CLASSES, name='head')(x.reshape(x.shape[0], -1, x.shape[-1]).mean(1))


class Basic(nn.Module):
  """Basic block of a residual net with frozen statistics."""

  features: int
  stride: int

  @nn.compact
  def __call__(self, x):
    norm = functools.partial(nn.BatchNorm, use_running_average=True)
    y = nn.Conv(self.features, (3, 3), self.stride, use_bias=False)(x)
    y = nn.Conv(self.features, (3, 3), use_bias=False)(nn.relu(norm()(y)))
    y = norm()(y)
    if y.shape != x.shape:
      x = norm()(nn.Conv(self.features, (1, 1), self.stride, use_bias=False)(x))
    return nn.relu(x + y)


@model
def resnet_blocks(dtype):
  return linen(Net(lambda x: Basic(6, 2)(Basic(4, 1)(x))), images(), dtype)


@model
def depthwise_separable(dtype):
  def body(x):
    x = nn.Conv(6, (3, 3), feature_group_count=3)(x)
    return nn.relu(nn.Conv(4, (1, 1))(nn.relu(x)))

  return linen(Net(body), images(), dtype)


@model
def dilated(dtype):
  return linen(
    Net(lambda x: nn.relu(nn.Conv(5, (3, 3), kernel_dilation=(2, 3))(x))), images(), dtype
  )


@model
def transposed(dtype):
  def body(x):
    x = nn.relu(nn.Conv(4, (3, 3), 2)(x))
    return nn.relu(nn.ConvTranspose(3, (3, 2), (2, 1))(x))

  return linen(Net(body), images(), dtype)


@model
def strided_valid(dtype):
  return linen(Net(lambda x: nn.relu(nn.Conv(5, (3, 4), (2, 3), 'VALID')(x))), images(), dtype)


@model
def conv_1d(dtype):
  def body(x):
    return nn.gelu(nn.Conv(4, 3, 2)(nn.gelu(nn.Conv(5, 3)(x))))

  return linen(Net(body), images(10, 3), dtype)


@model
def mlp_layer_norm(dtype):
  return linen(
    Net(lambda x: nn.gelu(nn.Dense(6)(nn.LayerNorm()(nn.Dense(8)(x))))), images(7), dtype
  )


@model
def cnn_group_norm(dtype):
  return linen(Net(lambda x: nn.silu(nn.GroupNorm(2)(nn.Conv(6, (3, 3))(x)))), images(), dtype)


@model
def self_attention(dtype):
  def body(x):
    x = nn.Dense(8)(x)
    return x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))

  return linen(Net(body), images(5, 3), dtype)


class ScanBody(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return x + nn.tanh(nn.Conv(3, (3, 3))(x)), None


@model
def scan_over_layers(dtype):
  def body(x):
    scanned = nn.scan(ScanBody, variable_axes={'params': 0}, split_rngs={'params': True}, length=3)
    return scanned()(x, None)[0]

  return linen(Net(body), images(), dtype)


@model
def rnn(dtype):
  params = fill(
    {
      name: jax.ShapeDtypeStruct(shape, dtype)
      for name, shape in {
        'in/w': (3, 5),
        'hidden/w': (5, 5),
        'hidden/b': (5,),
        'out/w': (5, CLASSES),
      }.items()
    }
  )

  def losses_fn(params, batch):
    def step(h, x):
      return jnp.tanh(x @ params['in/w'] + h @ params['hidden/w'] + params['hidden/b'][None]), None

    x = batch['x']
    start = jnp.zeros((len(x), 5), jnp.result_type(x, params['in/w']))
    return xent(lax.scan(step, start, x.swapaxes(0, 1))[0] @ params['out/w'], batch)

  return Model(losses_fn, params, images(6, 3))


class Shared(nn.Module):
  @nn.compact
  def __call__(self, x):
    twice = nn.Dense(6)
    return twice(nn.tanh(twice(x)))


@model
def shared_dense(dtype):
  return linen(Net(Shared()), images(6), dtype)


class ConvBlock(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.relu(nn.Conv(4, (3, 3))(nn.relu(nn.Conv(4, (3, 3))(x))))


@model
def remat(dtype):
  return linen(Net(lambda x: nn.remat(ConvBlock)()(x)), images(), dtype)


@model
def embeddings(dtype):
  tokens = np.random.default_rng(4).integers(0, 9, (IMAGES, 6))
  return linen(Net(lambda x: nn.tanh(nn.Dense(5)(nn.Embed(9, 4)(x)))), {'x': tokens}, dtype)


@model
def nnx_cnn(dtype):
  class Cnn(nnx.Module):
    def __init__(self, rngs):
      self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
      self.norm = nnx.LayerNorm(4, rngs=rngs)
      self.head = nnx.Linear(4, CLASSES, rngs=rngs)

    def __call__(self, x):
      return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))

  graph, state = nnx.split(nnx.eval_shape(lambda: Cnn(nnx.Rngs(0))))

  def losses_fn(params, batch):
    return xent(nnx.merge(graph, params)(batch['x']), batch)

  return Model(losses_fn, fill(state), images())


@model
def equinox_cnn(dtype):
  class Cnn(eqx.Module):
    conv: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __call__(self, x):
      return self.head(jax.nn.relu(self.conv(x.transpose(2, 0, 1))).mean((1, 2)))

  key = jax.random.key(0)
  shapes = eqx.filter_eval_shape(
    lambda: Cnn(eqx.nn.Conv2d(3, 4, 3, key=key), eqx.nn.Linear(4, CLASSES, key=key))
  )
  params, static = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

  def losses_fn(params, batch):
    return xent(jax.vmap(eqx.combine(params, static))(batch['x']), batch)

  return Model(losses_fn, fill(params), images())


class Trained(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = layers.Conv(4, (3, 3), dtype=x.dtype)(x)
    return nn.relu(layers.BatchNorm(use_running_average=False, dtype=x.dtype)(x))


@model
def batch_norm_in_training(dtype):
  net = Net(Trained())
  whole = linen(net, images(), dtype)

  def losses_fn(params, batch):
    statistics = {'body': {'BatchNorm_0': {'mean': jnp.zeros(4), 'var': jnp.ones(4)}}}
    variables = {'params': params, 'batch_stats': statistics}
    return xent(net.apply(variables, batch['x'], mutable=['batch_stats'])[0], batch)

  return Model(losses_fn, whole.params, images(), per_example=False)


@jax.custom_vjp
def steep_sign(x):
  return jnp.sign(x)


steep_sign.defvjp(lambda x: (jnp.sign(x), x), lambda x, dy: (dy / (1 + jnp.abs(x)),))


@model
def custom_vjp(dtype):
  return linen(
    Net(lambda x: nn.Conv(3, (3, 3))(steep_sign(nn.Conv(4, (3, 3))(x)))), images(), dtype
  )


@model
def cond(dtype):
  class Switched(nn.Module):
    @nn.compact
    def __call__(self, x):
      kernel = self.param('kernel', nn.initializers.normal(), (3, 3, 3, 4))
      switch = self.param('switch', nn.initializers.normal(), (2,))

      def convolved(x):
        return layers.convolve(x, kernel.astype(x.dtype)) * switch[0].astype(x.dtype)

      def averaged(x):
        return layers.convolve(x, kernel.mean((0, 1), keepdims=True).astype(x.dtype))

      return jnp.tanh(lax.cond((switch**2).sum() > 0, convolved, averaged, x))

  return linen(Net(Switched()), images(), dtype)


@model
def bfloat16_inside(dtype):
  def body(x):
    x = nn.relu(nn.Conv(4, (3, 3), dtype=jnp.bfloat16)(x))
    return nn.Dense(5, dtype=jnp.bfloat16)(x).astype(jnp.float32)

  return linen(Net(body), images(), dtype, precision=2e-2)
