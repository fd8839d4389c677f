"""The multi-branch net of the paper: blocks of parallel convolutions, joined with an attention.

Names of layers look like `stage2/block1/branch3x3/conv/kernel`. All variants have the same layers
in their branches; they differ only in the attention where branches are aggregated.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from csba_jax.models import attention as attn
from csba_jax.models import capacity, classifiers, layers

MIN_SIZE = 8  # pixels; two poolings leave a 2x2 map
LARGEST_MAP = 16  # pixels a side in the first stage
BRANCHES = ('branch1x1', 'branch3x3', 'branch5x5')
BLOCKS = (1, 1, 2)  # blocks in each stage
STEM, STAGES = 32, (64, 128, 160)  # channels at width 1: 1.35 M parameters without attention


class FactorisedConv(nn.Module):
  """A 5x5 field by 1x5, then 5x1, each with norm and relu.   [N, H, W, C] -> [N, H, W, features]"""

  features: int
  dtype: Any = jnp.float32
  norm: str = 'batch'

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    conv = functools.partial(layers.ConvNormRelu, self.features, dtype=self.dtype, norm=self.norm)
    return conv((5, 1), name='column')(conv((1, 5), name='row')(x, train), train)


class Block(nn.Module):
  """aggregate(attention(branch_b(x) for each b)).   [N, H, W, C] -> [N, H, W, features]

  With `project` the branches are concatenated and projected by a 1x1 convolution, norm and relu.
  Without it they are concatenated only, [N, H, W, B * features]: so in the last block, whose
  branches go to the classifier.
  """

  features: int
  attention: str
  project: bool = True
  dtype: Any = jnp.float32
  norm: str = 'batch'

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    conv = functools.partial(layers.ConvNormRelu, self.features, dtype=self.dtype, norm=self.norm)
    branches = [
      conv((1, 1), name='branch1x1')(x, train),
      conv((3, 3), name='branch3x3')(x, train),
      FactorisedConv(self.features, self.dtype, self.norm, name='branch5x5')(x, train),
    ]
    project = None
    if self.project:
      projection: nn.Module = conv((1, 1), name='project')
      project = functools.partial(projection, train=train)
    return attn.aggregate(
      self, branches, BRANCHES, self.attention, train, self.dtype, project, self.norm
    )


class Stage(nn.Module):
  """`blocks` blocks of one width; in the last stage of the net, the last one does not project."""

  features: int
  blocks: int
  attention: str
  last: bool
  dtype: Any = jnp.float32
  norm: str = 'batch'

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    block = functools.partial(Block, self.features, self.attention, dtype=self.dtype)
    for i in range(1, self.blocks + 1):
      project = not (self.last and i == self.blocks)
      x = block(project=project, norm=self.norm, name=f'block{i}')(x, train)
    return x


class MultiBranch(nn.Module):
  """Multi-branch CNN.   [N, H, W, ch] float in [-1, 1] -> logits [N, num_classes] float32

  stem -> stages of blocks, 2x2 pooling between stages -> z_b, the mean over space of each branch of
  the last block -> classifier. `csba_class` is `csba` with a classifier that gates z_b for every
  class.
  Parameters are float32; `dtype` is the type of the computation.
  """

  num_classes: int
  attention: str = 'csba'
  stem: int = STEM
  stages: tuple[int, ...] = STAGES
  dtype: Any = jnp.float32
  classifier: classifiers.Classifier = classifiers.LINEAR
  blocks: tuple[int, ...] = BLOCKS  # of each stage
  norm: str = 'batch'  # a row of layers.NORMS

  head = classifiers.HEAD  # names of the parameters of the classifier

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    stem = layers.Stem(self.stem, LARGEST_MAP, self.dtype, self.norm, name='stem')
    x = stem(x.astype(self.dtype), train)
    stage = functools.partial(Stage, attention=self.attention, dtype=self.dtype, norm=self.norm)
    for i, (features, blocks) in enumerate(zip(self.stages, self.blocks, strict=True), 1):
      if i > 1:
        x = layers.max_pool2(x)
      last = i == len(self.stages)
      x = stage(features, blocks, last=last, name=f'stage{i}')(x, train)
    z = x.mean((1, 2)).reshape(x.shape[0], len(BRANCHES), self.stages[-1])
    return classifiers.classify(z, self.num_classes, self.classifier, self.attention, self.dtype)


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
) -> MultiBranch:
  """The net at a width; for `none_wide`, widened until it has as many parameters as `csba`.

  Args:
    num_classes: C >= 2.
    image_shape: (height, width, channels) of the images; the depth of the stem follows from it.
    attention: a row of ATTENTIONS.
    width: multiplies every number of channels.
    dtype: type of the computation.
    classifier: settings of the classifier.
    depth: multiplies the number of blocks of every stage.
    norm: a row of layers.NORMS.
  """

  def make_model(channels: Sequence[int], attention: str) -> MultiBranch:
    stem, *stages = channels
    blocks = tuple(depth * number for number in BLOCKS)
    widths = stem, tuple(stages)
    return MultiBranch(num_classes, attention, *widths, dtype, classifier, blocks, norm)

  # channels of the first stage add fewer parameters than those of the others, and the stem's fewest
  channels = (STEM, *STAGES)
  return capacity.at_width(make_model, channels, attention, width, image_shape, tuned=(1, 0))
