"""ResNets for large photos (He et al. 2016): 18 and 50 layers, plain, and with branches in the end.

They are the nets of torchvision and timm, so that their weights can be loaded: see `pretrained`.
Names of layers look like `stage2/block1/conv1/kernel`, `stage4/branch1/block1/conv1/kernel`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from csba_jax.models import attention as attn
from csba_jax.models import capacity, classifiers, layers
from csba_jax.models.resnet import BRANCHES

CHANNELS = (64, 64, 128, 256, 512)  # of the stem and of each stage, at width 1
RESNET18, RESNET50 = (2, 2, 2, 2), (3, 4, 6, 3)  # blocks of each stage
EXPANSION = 4  # channels that leave a bottleneck, for each that its 3x3 convolution has


class ConvNorm(nn.Module):
  """norm(conv(x)).   [N, H, W, C] -> [N, ceil(H/s), ceil(W/s), features]"""

  features: int
  kernel_size: tuple[int, int]
  stride: int = 1
  dtype: Any = jnp.float32
  norm: str = 'batch'

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    x = layers.Conv(self.features, self.kernel_size, self.stride, self.dtype, name='conv')(x)
    return layers.make_norm(self.norm, train, self.dtype, 'norm')(x)


class Block(nn.Module):
  """relu(shortcut(x) + f(x)).   [N, H, W, C] -> [N, H/s, W/s, features, or four times as many]

  f is two 3x3 convolutions; or, as a bottleneck, 1x1, 3x3 and 1x1 with EXPANSION times the
  channels. All have norms, and all but the last a relu. The stride is that of the first 3x3
  convolution, as in torchvision (in the paper, of the first 1x1). The shortcut is a strided 1x1
  convolution with a norm where shapes change (option B).
  """

  features: int
  bottleneck: bool
  stride: int = 1
  dtype: Any = jnp.float32
  norm: str = 'batch'

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    widths, sizes, at = [self.features] * 2, [3, 3], 0
    if self.bottleneck:
      widths, sizes, at = [*widths, EXPANSION * self.features], [1, 3, 1], 1
    u = x
    for i, (width, size) in enumerate(zip(widths, sizes, strict=True)):
      stride = self.stride if i == at else 1
      conv = layers.Conv(width, (size, size), stride, self.dtype, name=f'conv{i + 1}')
      u = layers.make_norm(self.norm, train, self.dtype, f'norm{i + 1}')(
        conv(nn.relu(u) if i else u)
      )
    if u.shape != x.shape:
      make = functools.partial(ConvNorm, widths[-1], (1, 1), self.stride)
      x = make(self.dtype, self.norm, name='shortcut')(x, train)
    return nn.relu(u + x)


class Stage(nn.Module):
  """`blocks` blocks of one width, the first with the stride."""

  features: int
  blocks: int
  bottleneck: bool
  stride: int
  dtype: Any = jnp.float32
  norm: str = 'batch'

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    block = functools.partial(Block, self.features, self.bottleneck, dtype=self.dtype)
    for j in range(1, self.blocks + 1):
      x = block(stride=self.stride if j == 1 else 1, norm=self.norm, name=f'block{j}')(x, train)
    return x


class BranchStage(nn.Module):
  """aggregate(attention(stage_b(x) for each b)).   [N, H, W, C] -> [N, H/2, W/2, B * D]"""

  features: int
  blocks: int
  bottleneck: bool
  attention: str
  dtype: Any = jnp.float32
  norm: str = 'batch'

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    stage = functools.partial(Stage, self.features, self.blocks, self.bottleneck, 2, self.dtype)
    branches = [stage(self.norm, name=name)(x, train) for name in BRANCHES]
    return attn.aggregate(
      self, branches, BRANCHES, self.attention, train, self.dtype, norm=self.norm
    )


class PhotoResNet(nn.Module):
  """ResNet for photos.   [N, H, W, 3] -> logits [N, num_classes] float32

  7x7 convolution of stride 2 -> norm, relu, 3x3 maximum of stride 2 -> four stages of strides 1, 2,
  2, 2 -> global mean -> classifier. With `attention`, the last stage is three stages in parallel
  that meet in it, as in `resnet.BranchedResNet`. Parameters are float32; `dtype` is the type of the
  computation.
  """

  num_classes: int
  blocks: tuple[int, ...]
  bottleneck: bool
  attention: str = ''  # '': no branches
  channels: tuple[int, ...] = CHANNELS
  dtype: Any = jnp.float32
  classifier: classifiers.Classifier = classifiers.LINEAR
  norm: str = 'batch'  # a row of layers.NORMS

  head = classifiers.HEAD  # names of the parameters of the classifier

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    stem, *widths = self.channels
    common = {'dtype': self.dtype, 'norm': self.norm}
    x = ConvNorm(stem, (7, 7), 2, name='stem', **common)(x.astype(self.dtype), train)
    x = max_pool3(nn.relu(x))
    branches = 1
    for i, (width, blocks) in enumerate(zip(widths, self.blocks, strict=True), 1):
      shape, name = (width, blocks, self.bottleneck), f'stage{i}'
      if self.attention and i == len(widths):
        x = BranchStage(*shape, self.attention, name=name, **common)(x, train)
        branches = len(BRANCHES)
      else:
        x = Stage(*shape, 1 if i == 1 else 2, name=name, **common)(x, train)
    z = x.mean((1, 2)).reshape(x.shape[0], branches, -1)
    kind = self.attention or 'none'
    return classifiers.classify(z, self.num_classes, self.classifier, kind, self.dtype)


def max_pool3(x: Array) -> Array:
  """3x3 maximum with stride 2 and a border of one pixel.   [N, H, W, C] -> [N, ceil(H/2), ...]

  The maximum of nine strided slices: its gradient takes 19 ms (19 to 23) where that of XLA's window
  takes 210 (195 to 217), for 8 images of 112 x 112 x 64 (median of 7, JAX 0.11.2, two cores of an
  AMD EPYC). Equal values share the gradient; torch gives it to the first.
  """
  h, w = x.shape[1], x.shape[2]
  low = jnp.finfo(x.dtype).min
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=low)
  slices = [padded[:, i : i + h : 2, j : j + w : 2] for i in range(3) for j in range(3)]
  return functools.reduce(jnp.maximum, slices)


@functools.lru_cache  # `none_wide` counts parameters
def build(
  num_classes: int,
  image_shape: tuple[int, int, int],
  attention: str,
  width: float,
  dtype: Any,
  classifier: classifiers.Classifier = classifiers.LINEAR,
  depth: int = 1,
  norm: str = 'batch',
  *,
  blocks: tuple[int, ...],
  bottleneck: bool,
  branches: bool,
) -> PhotoResNet:
  """A ResNet for photos at a width; ResNet-18 has 11,689,512 parameters for 1,000 classes.

  Args:
    num_classes: C >= 2.
    image_shape: (height, width, channels) of the images.
    attention: a row of ATTENTIONS; 'none' without branches.
    width: multiplies every number of channels.
    dtype: type of the computation.
    classifier: settings of the classifier.
    depth: multiplies the number of blocks of every stage.
    norm: a row of layers.NORMS.
    blocks: of each stage.
    bottleneck: whether blocks are bottlenecks.
    branches: whether the last stage has branches.
  """

  def make_model(channels: Sequence[int], attention: str) -> PhotoResNet:
    return PhotoResNet(
      num_classes,
      tuple(depth * number for number in blocks),
      bottleneck,
      attention if branches else '',
      tuple(channels),
      dtype,
      classifier,
      norm,
    )

  tuned = (3, 2, 1) if branches else ()
  return capacity.at_width(make_model, CHANNELS, attention, width, image_shape, tuned)


build18 = functools.partial(build, blocks=RESNET18, bottleneck=False, branches=False)
build50 = functools.partial(build, blocks=RESNET50, bottleneck=True, branches=False)
build18_branches = functools.partial(build, blocks=RESNET18, bottleneck=False, branches=True)
build50_branches = functools.partial(build, blocks=RESNET50, bottleneck=True, branches=True)


def torch_names(name: str) -> tuple[str, ...]:
  """The name in files of torchvision and timm of 'params/stage1/block1/conv1/kernel' and the like.

  The branches of the last stage all have that of layer4. None at all for a variable that no file
  has.
  """
  _, *path, leaf = name.split('/')
  path = [part for part in path if part not in BRANCHES]
  match path:
    case ['stem', part]:
      layer = {'conv': 'conv1', 'norm': 'bn1'}[part]
    case [stage, block, *rest] if stage.startswith('stage') and block.startswith('block'):
      inside = '.'.join(rest)
      inside = {'shortcut.conv': 'downsample.0', 'shortcut.norm': 'downsample.1'}.get(
        inside, inside
      )
      place = f'layer{stage.removeprefix("stage")}.{int(block.removeprefix("block")) - 1}'
      layer = f'{place}.{inside.replace("norm", "bn")}'
    case _:
      return ()
  return (f'{layer}.{layers.IN_TORCH[leaf]}',) if leaf in layers.IN_TORCH else ()
