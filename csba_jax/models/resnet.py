"""CIFAR ResNets of 6n + 2 layers (He et al. 2016): plain, and with branches in the last stage.

Names of layers look like `stage2/block1/conv1/kernel`, `stage3/branch1/block1/conv1/kernel`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from csba_jax.models import attention as attn
from csba_jax.models import capacity, classifiers, layers

BLOCKS, STAGES = 5, (16, 32, 64)  # blocks of each stage, channels at width 1: ResNet-32
BRANCHES = ('branch1', 'branch2', 'branch3')


def shortcut(x: Array, features: int, stride: int) -> Array:
  """Shortcut without parameters (He et al.'s option A): every s-th pixel, new channels of zeros.

  [N, H, W, C] -> [N, ceil(H/s), ceil(W/s), features]. Half of the new channels come before the old
  ones and half after, as in the code of LDAM-DRW; where features < C, channels are cut off.
  """
  new = features - x.shape[-1]
  x = x[:, ::stride, ::stride]
  return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0),) * 3 + ((new // 2, new - new // 2, 0),))


class Block(nn.Module):
  """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))).   [N, H, W, C] -> [N, H/s, W/s, features]

  Initial kernels are scaled by the fan-out, as in all our nets; the code of LDAM-DRW takes the
  fan-in.
  """

  features: int
  stride: int = 1
  dtype: Any = jnp.float32
  norm: str = 'batch'

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    norm = functools.partial(layers.make_norm, self.norm, train, self.dtype)
    u = layers.Conv(self.features, (3, 3), self.stride, self.dtype, name='conv1')(x)
    u = nn.relu(norm(name='norm1')(u))
    u = layers.Conv(self.features, (3, 3), dtype=self.dtype, name='conv2')(u)
    return layers.stored(nn.relu(norm(name='norm2')(u) + shortcut(x, self.features, self.stride)))


class Stage(nn.Module):
  """`blocks` blocks of one width, the first with the stride.   [N, H, W, C] -> [N, H/s, W/s, D]"""

  features: int
  blocks: int
  stride: int
  dtype: Any = jnp.float32
  norm: str = 'batch'

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    for j in range(1, self.blocks + 1):
      stride = self.stride if j == 1 else 1
      x = Block(self.features, stride, self.dtype, self.norm, name=f'block{j}')(x, train)
    return x


class BranchStage(nn.Module):
  """aggregate(attention(stage_b(x) for each b)).   [N, H, W, C] -> [N, H/2, W/2, B * features]"""

  features: int
  blocks: int
  attention: str
  dtype: Any = jnp.float32
  norm: str = 'batch'

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    stage = functools.partial(Stage, self.features, self.blocks, 2, self.dtype, self.norm)
    branches = [stage(name=name)(x, train) for name in BRANCHES]
    return attn.aggregate(
      self, branches, BRANCHES, self.attention, train, self.dtype, norm=self.norm
    )


class ResNet(nn.Module):
  """CIFAR ResNet.   [N, H, W, ch] float in [-1, 1] -> logits [N, num_classes] float32

  3x3 stem -> three stages of strides 1, 2, 2 -> global mean -> classifier (He et al. 2016). Strided
  convolutions first halve images above 32 pixels; the net of He et al. has none of these.
  Parameters are float32; `dtype` is the type of the computation.
  """

  num_classes: int
  stages: tuple[int, ...] = STAGES
  blocks: int = BLOCKS
  dtype: Any = jnp.float32
  classifier: classifiers.Classifier = classifiers.LINEAR
  norm: str = 'batch'  # a row of layers.NORMS

  head = classifiers.HEAD  # names of the parameters of the classifier

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    x = _shared_stages(x, self.stages, self.blocks, self.dtype, self.norm, train)
    z = x.mean((1, 2))[:, None]
    return classifiers.classify(z, self.num_classes, self.classifier, 'none', self.dtype)


class BranchedResNet(nn.Module):
  """ResNet whose last stage is B = 3 stages in parallel.   [N, H, W, ch] -> [N, num_classes]

  The branches share the stem and all stages but the last. The branches of the last stage meet in
  one attention, and z_b is the mean of each over space. This is the topology of RIDE (Wang et al.
  2021) and SADE (Zhang et al. 2022). Their code for CIFAR also gives each branch its own second of
  the three stages, can make branches narrower, and averages the logits of B classifiers; this net
  sums them.
  """

  num_classes: int
  attention: str = 'csba'
  stages: tuple[int, ...] = STAGES
  blocks: int = BLOCKS
  dtype: Any = jnp.float32
  classifier: classifiers.Classifier = classifiers.LINEAR
  norm: str = 'batch'  # a row of layers.NORMS

  head = classifiers.HEAD  # names of the parameters of the classifier

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    *shared, features = self.stages
    x = _shared_stages(x, shared, self.blocks, self.dtype, self.norm, train)
    name = f'stage{len(self.stages)}'
    stage = BranchStage(features, self.blocks, self.attention, self.dtype, self.norm, name=name)
    x = stage(x, train)
    z = x.mean((1, 2)).reshape(x.shape[0], len(BRANCHES), features)
    return classifiers.classify(z, self.num_classes, self.classifier, self.attention, self.dtype)


def build(
  num_classes: int,
  image_shape: tuple[int, int, int],
  attention: str,
  width: float,
  dtype: Any,
  classifier: classifiers.Classifier = classifiers.LINEAR,
  depth: int = 1,
  norm: str = 'batch',
) -> ResNet:
  """ResNet of 30 depth + 2 layers at a width; ResNet-32 has 464,154 parameters for 10 classes.

  Args:
    num_classes: C >= 2.
    image_shape: (height, width, channels) of the images; the depth of the stem follows from it.
    attention: 'none', since the net has no branches.
    width: multiplies every number of channels.
    dtype: type of the computation.
    classifier: settings of the classifier.
    depth: multiplies the number of blocks of every stage.
    norm: a row of layers.NORMS.
  """

  def make_model(stages: Sequence[int], _: str) -> ResNet:
    return ResNet(num_classes, tuple(stages), depth * BLOCKS, dtype, classifier, norm)

  return capacity.at_width(make_model, STAGES, attention, width, image_shape, tuned=())


@functools.lru_cache  # `none_wide` counts parameters
def build_branches(
  num_classes: int,
  image_shape: tuple[int, int, int],
  attention: str,
  width: float,
  dtype: Any,
  classifier: classifiers.Classifier = classifiers.LINEAR,
  depth: int = 1,
  norm: str = 'batch',
) -> BranchedResNet:
  """ResNet-32 with branches in the last stage, at a width; arguments as in `build`.

  `attention` is a row of ATTENTIONS; `none_wide` is widened until it has as many parameters as
  `csba`.
  """

  def make_model(stages: Sequence[int], attention: str) -> BranchedResNet:
    blocks = depth * BLOCKS
    return BranchedResNet(num_classes, attention, tuple(stages), blocks, dtype, classifier, norm)

  return capacity.at_width(make_model, STAGES, attention, width, image_shape, tuned=(1, 0))


def _shared_stages(x: Array, stages: Any, blocks: int, dtype: Any, norm: str, train: bool) -> Array:
  """Stem and stages of a net; its `@nn.compact` method calls this and gets the submodules."""
  x = layers.Stem(stages[0], layers.SMALL, dtype, norm, name='stem')(x.astype(dtype), train)
  for i, features in enumerate(stages, 1):
    x = Stage(features, blocks, 1 if i == 1 else 2, dtype, norm, name=f'stage{i}')(x, train)
  return x
