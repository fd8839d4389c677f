"""Convolution, norm and pooling layers shared by the models. Images are [N, H, W, C] everywhere."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

kernel_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'truncated_normal')
SMALL = 32  # pixels a side: the nets are made for this size, and larger images are halved first
IN_TORCH = {  # names of variables here and in files of PyTorch
  'kernel': 'weight',
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}
NORMS = ('batch', 'group')  # values of config.model.norm


class BatchNorm(nn.Module):
  """(x - mean) / sqrt(var + eps) * scale + bias by channel.   [..., C] -> [..., C]

  In training, mean and var are those of the batch, and the running ones move towards them by a
  tenth of the difference; otherwise the running ones are used. The running var is that of the
  batch, its sum of squares over n; torch's is over n - 1, and larger by 1 / (n - 1): by 14 % where
  a batch of 8 images meets a map of one pixel, by 0.01 % where 32 images meet one of 16 x 16. All
  are float32 whatever the type of the computation. The variables are those of Flax's BatchNorm.
  """

  use_running_average: bool
  dtype: Any = jnp.float32
  momentum: float = 0.9
  epsilon: float = 1e-5
  scale: float = 1.0  # at first

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = x.shape[-1:]
    running_mean = self.variable('batch_stats', 'mean', jnp.zeros, shape)
    running_var = self.variable('batch_stats', 'var', jnp.ones, shape)
    scale = self.param('scale', nn.initializers.constant(self.scale), shape)
    bias = self.param('bias', nn.initializers.zeros, shape)
    if self.use_running_average:
      mean, var = running_mean.value, running_var.value
    else:
      axes = tuple(range(x.ndim - 1))
      wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
      mean = wide.mean(axes)
      var = jnp.maximum((wide * wide).mean(axes) - mean * mean, 0)
      if not self.is_initializing():
        keep = self.momentum
        running_mean.value = keep * running_mean.value + (1 - keep) * mean
        running_var.value = keep * running_var.value + (1 - keep) * var
    factor = scale * jax.lax.rsqrt(var + self.epsilon)
    shift = bias - mean * factor
    broadcast = (1,) * (x.ndim - 1) + shape
    return (x * factor.reshape(broadcast) + shift.reshape(broadcast)).astype(self.dtype)


class GroupNorm(nn.Module):
  """(x - mean) / sqrt(var + eps) * scale + bias by image and group of channels.   [N, ..., C]

  mean and var are those of one image, over all its pixels and the channels of a group (Wu & He
  2018). So no image depends on another, and training and evaluation are the same function. Of C
  channels, c is in group floor(c G / C), with G = max(1, round(C / 8)) and at most 32: groups of
  about eight channels, of unequal sizes where G does not divide C. Wu & He have G = 32, or 16
  channels each.
  mean and var are float32 whatever the type of the computation.
  """

  dtype: Any = jnp.float32
  epsilon: float = 1e-5
  scale: float = 1.0  # at first

  @nn.compact
  def __call__(self, x: Array) -> Array:
    channels = x.shape[-1]
    scale = self.param('scale', nn.initializers.constant(self.scale), (channels,))
    bias = self.param('bias', nn.initializers.zeros, (channels,))
    member = group_members(channels)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    axes = tuple(range(1, x.ndim - 1))
    share = (member / member.sum(0)).astype(wide.dtype)  # [C, G]: each group's sums to 1
    mean = wide.mean(axes) @ share  # [N, G]
    var = jnp.maximum((wide * wide).mean(axes) @ share - mean * mean, 0)
    back = member.T.astype(wide.dtype)
    factor = scale[None] * (jax.lax.rsqrt(var + self.epsilon) @ back)  # [N, C]
    shift = bias[None] - (mean @ back) * factor
    each = (x.shape[0], *(1,) * len(axes), channels)
    return (x * factor.reshape(each) + shift.reshape(each)).astype(self.dtype)


def group_members(channels: int) -> np.ndarray:
  """Which channel is in which group of `GroupNorm`, 0 or 1.   [C, G] float64"""
  groups = min(32, max(1, round(channels / 8)))
  return np.eye(groups)[np.arange(channels) * groups // channels]


def make_norm(kind: str, train: bool, dtype: Any, name: str, scale: float = 1.0) -> nn.Module:
  """The normalisation of a kind of NORMS, for a compact method; parameters `scale` and `bias`."""
  if kind == 'group':
    return GroupNorm(dtype, scale=scale, name=name)
  return BatchNorm(use_running_average=not train, dtype=dtype, scale=scale, name=name)


def convolve(x: Array, kernel: Array, stride: int = 1) -> Array:
  """Convolution with stride s and zero padding k // 2, for odd k.

  [N, H, W, C], [kh, kw, C, D] -> [N, ceil(H/s), ceil(W/s), D]
  """
  kh, kw = kernel.shape[:2]
  if (kh, kw, stride) == (1, 1, 1):
    # As a product of two matrices it is 3 to 10 times faster on CPU. Flattened first: the gradient
    # of a product with an [N, H, W, C] array takes twice as long.
    return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], -1)
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(stride, stride),
    padding=((kh // 2, kh // 2), (kw // 2, kw // 2)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


class Conv(nn.Module):
  """Convolution without bias, odd kernel.   [N, H, W, C] -> [N, ceil(H/s), ceil(W/s), features]"""

  features: int
  kernel_size: tuple[int, int]
  stride: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = (*self.kernel_size, x.shape[-1], self.features)
    kernel = self.param('kernel', kernel_init, shape)
    return convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)


def stored(x: Array) -> Array:
  """x, computed once and kept in memory for all that read it. Use it for sums over residual blocks.

  XLA for CPUs computes elementwise operations anew in each of their readers. With residual
  connections, a reader of the fifth block computed the sums of all five from the outputs of their
  convolutions, in the order of its own reads. benchmarks/README.md has the times. With JAX 0.10 it
  has no effect: there XLA removes the barrier before it fuses.
  """
  return jax.lax.optimization_barrier(x)


class ConvNormRelu(nn.Module):
  """relu(norm(conv(x))).   [N, H, W, C] -> [N, ceil(H/s), ceil(W/s), features]"""

  features: int
  kernel_size: tuple[int, int]
  stride: int = 1
  dtype: Any = jnp.float32
  norm: str = 'batch'

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    x = Conv(self.features, self.kernel_size, self.stride, self.dtype, name='conv')(x)
    return nn.relu(make_norm(self.norm, train, self.dtype, 'norm')(x))


class Stem(nn.Module):
  """3x3 convolutions that reduce images to a map of at most `largest` <= SMALL pixels a side.

  Strided convolutions halve the image until its shorter side is at most SMALL pixels; then, where
  that is more than `largest`, a pooling halves it once more.
  [N, H, W, ch] -> [N, h, w, features]
  """

  features: int
  largest: int
  dtype: Any = jnp.float32
  norm: str = 'batch'

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    conv = functools.partial(ConvNormRelu, self.features, (3, 3), dtype=self.dtype, norm=self.norm)
    halvings = 0
    while min(x.shape[1:3]) > SMALL:
      halvings += 1
      x = conv(stride=2, name=f'down{halvings}')(x, train)
    x = conv(name='full')(x, train)
    return max_pool2(x) if min(x.shape[1:3]) > self.largest else x


def max_pool2(x: Array) -> Array:
  """2x2 maximum with stride 2.   [N, H, W, C] -> [N, H // 2, W // 2, C]

  An odd last row or column is dropped. The gradient goes to the first of equal values.
  """
  h, w = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2

  def larger(a: Array, b: Array) -> Array:
    return jnp.where(a >= b, a, b)

  top = larger(x[:, 0:h:2, 0:w:2], x[:, 0:h:2, 1:w:2])
  bottom = larger(x[:, 1:h:2, 0:w:2], x[:, 1:h:2, 1:w:2])
  return larger(top, bottom)
