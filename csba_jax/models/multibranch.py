"""The paper's multi-branch net: blocks of parallel convolutions that meet through an attention.

Layer names read `stage2/block1/branch3x3/conv/kernel`. Every variant has the same branches to the
layer; they differ in the attention between the branches and their aggregation alone.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from csba_jax.models import attention as attn
from csba_jax.models import layers

ATTENTIONS = ('none', 'none_wide', 'se', 'cbam', 'csba', 'csba_class')
HEAD = r'^head/'  # parameters whose rows belong to single classes by construction
MIN_SIZE = 8  # pixels; two poolings leave a 2x2 map
BRANCHES = ('branch1x1', 'branch3x3', 'branch5x5')
BLOCKS = (1, 1, 2)  # blocks in each stage
STEM, STAGES = 32, (64, 128, 160)  # channels at width 1: 1.35 M parameters without attention


class FactorisedConv(nn.Module):
  """A 5x5 field from 1x5 and 5x1, each with norm and relu.   [N, H, W, C] -> [N, H, W, features]"""

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    x = layers.ConvNormRelu(self.features, (1, 5), dtype=self.dtype, name='row')(x, train)
    return layers.ConvNormRelu(self.features, (5, 1), dtype=self.dtype, name='column')(x, train)


class Block(nn.Module):
  """aggregate(attention(branch_b(x) for each b)).   [N, H, W, C] -> [N, H, W, features]

  With `project` the branches are concatenated and projected by a 1x1 convolution, norm and relu;
  without it (the last block, whose branches meet the classifier) they are concatenated only:
  [N, H, W, B * features].
  """

  features: int
  attention: str
  project: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    conv = functools.partial(layers.ConvNormRelu, self.features, dtype=self.dtype)
    branches = [
      conv((1, 1), name='branch1x1')(x, train),
      conv((3, 3), name='branch3x3')(x, train),
      FactorisedConv(self.features, self.dtype, name='branch5x5')(x, train),
    ]
    if self.attention in ('csba', 'csba_class'):
      branches = attn.BranchAttention(BRANCHES, self.dtype, name='attention')(branches)
    x = jnp.concatenate(branches, axis=-1)
    if self.project:
      x = conv((1, 1), name='project')(x, train)
    if self.attention == 'se':
      x = attn.SqueezeExcite(dtype=self.dtype, name='attention')(x)
    if self.attention == 'cbam':
      x = attn.CBAM(dtype=self.dtype, name='attention')(x, train)
    return x


class Stage(nn.Module):
  """`blocks` blocks of one width; the net's last one leaves its branches unprojected."""

  features: int
  blocks: int
  attention: str
  last: bool
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    for i in range(1, self.blocks + 1):
      project = not (self.last and i == self.blocks)
      x = Block(self.features, self.attention, project, self.dtype, name=f'block{i}')(x, train)
    return x


class Stem(nn.Module):
  """3x3 convolutions down to a map of at most 16x16.   [N, H, W, ch] -> [N, h, w, features]

  Above 32 pixels each halving is a strided convolution; the last halving is a pooling.
  """

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    conv = functools.partial(layers.ConvNormRelu, self.features, (3, 3), dtype=self.dtype)
    halvings = 0
    while min(x.shape[1:3]) > 32:
      halvings += 1
      x = conv(stride=2, name=f'down{halvings}')(x, train)
    x = conv(name='full')(x, train)
    return layers.max_pool2(x) if min(x.shape[1:3]) > 16 else x


class MultiBranch(nn.Module):
  """Multi-branch CNN.   [N, H, W, ch] float in [-1, 1] -> logits [N, num_classes] float32

  stem -> stages of blocks, 2x2 pooling between stages -> z_b, the mean of each branch of the last
  block -> classifier. `csba_class` is `csba` whose classifier gates z_b for every class.
  Parameters are float32; `dtype` is the type of the computation.
  """

  num_classes: int
  attention: str = 'csba'
  stem: int = STEM
  stages: tuple[int, ...] = STAGES
  dtype: Any = jnp.float32

  head = HEAD

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    x = Stem(self.stem, self.dtype, name='stem')(x.astype(self.dtype), train)
    for i, (features, blocks) in enumerate(zip(self.stages, BLOCKS, strict=True), 1):
      if i > 1:
        x = layers.max_pool2(x)
      last = i == len(self.stages)
      x = Stage(features, blocks, self.attention, last, self.dtype, name=f'stage{i}')(x, train)
    z = x.mean((1, 2)).reshape(x.shape[0], len(BRANCHES), self.stages[-1])
    gate = None
    if self.attention == 'csba_class':
      gate = attn.ClassGate(dtype=self.dtype, name='class_gate')(z)
    return attn.LinearHead(self.num_classes, name='head')(z, gate)


def build(
  num_classes: int, image_shape: tuple[int, int, int], attention: str, width: float, dtype: Any
) -> MultiBranch:
  """The net at a width; for `none_wide`, as wide as gives it the parameters of `csba`.

  Args:
    num_classes: C >= 2.
    image_shape: (height, width, channels); it decides the depth of the stem.
    attention: one of ATTENTIONS.
    width: multiplies every number of channels.
    dtype: type of the computation.
  """
  stem, stages = scaled(width)
  if attention == 'none_wide':
    stem, stages = widen(num_classes, image_shape, width)
    attention = 'none'
  return MultiBranch(num_classes, attention, stem, stages, dtype)


def scaled(width: float) -> tuple[int, tuple[int, ...]]:
  """Channels of stem and stages at a width, whole numbers of at least 1."""
  stem, *stages = (max(1, round(width * channels)) for channels in (STEM, *STAGES))
  return stem, tuple(stages)


@functools.lru_cache
def widen(
  num_classes: int, image_shape: tuple[int, int, int], width: float
) -> tuple[int, tuple[int, ...]]:
  """Channels without attention that give the parameter count of `csba` at `width`, within 1 %.

  Parameters grow about as width squared: one uniform step, then the first stage and the stem,
  whose channels weigh least, take up what is left.
  """

  def count(channels, attention='none'):
    model = MultiBranch(num_classes, attention, channels[0], tuple(channels[1:]))
    return parameter_count(model, image_shape)

  def flat(factor):
    stem, stages = scaled(factor)
    return [stem, *stages]

  target = count(flat(width), 'csba')
  channels = flat(width * (target / count(flat(width))) ** 0.5)
  for position in (1, 0):  # first stage, then stem: steps of falling size
    wider = channels.copy()
    wider[position] += 1
    now = count(channels)
    more = round((target - now) / (count(wider) - now))
    channels[position] = max(1, channels[position] + more)
  return channels[0], tuple(channels[1:])


def parameter_count(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
  """Number of parameters, from shapes alone: nothing is allocated."""
  image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)['params']
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
