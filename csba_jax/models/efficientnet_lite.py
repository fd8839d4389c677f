"""EfficientNet-Lite0 (Tan & Le 2019), without squeeze-excite and with relu6: 4.65 M parameters.

The net for which weights are published; `torch_names` says how files call its variables. Names of
layers look like `stem/conv/kernel`, `stage2/block1/depthwise/norm/scale`, `top/conv/kernel`.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from csba_jax.models import attention as attn
from csba_jax.models import capacity, classifiers, layers
from csba_jax.models.resnet import BRANCHES

EPSILON = 1e-3  # of the batch norms of the published weights
RELU6 = 6.0
SLABS = 16  # of rows, at most, over which the gradient of a depthwise kernel is summed


class StageShape(NamedTuple):
  """A row of STAGES: what its blocks have in common, and how many there are."""

  expand: int  # channels within a block, for each that enters it
  kernel_size: int
  stride: int  # of the first block; that of the others is 1
  channels: int
  blocks: int


STAGES = (
  StageShape(1, 3, 1, 16, 1),
  StageShape(6, 3, 2, 24, 2),
  StageShape(6, 5, 2, 40, 2),
  StageShape(6, 3, 2, 80, 3),
  StageShape(6, 5, 1, 112, 3),
  StageShape(6, 5, 2, 192, 4),
  StageShape(6, 3, 1, 320, 1),
)
STEM, TOP = 32, 1280  # channels before and after the stages
CHANNELS = (STEM, *(stage.channels for stage in STAGES), TOP)  # at width 1

# Names in a file, of the package efficientnet_lite_pytorch and of timm's tf_efficientnet_lite0.
# In a block of either, the layers of BLOCK; where a block does not expand, those of FIRST.
OUTSIDE: Mapping[str, tuple[str, str]] = {
  'stem/conv': ('_conv_stem', 'conv_stem'),
  'stem/norm': ('_bn0', 'bn1'),
  'top/conv': ('_conv_head', 'conv_head'),
  'top/norm': ('_bn1', 'bn2'),
  'head': ('_fc', 'classifier'),
}
BLOCK: Mapping[str, tuple[str, str]] = {
  'expand/conv': ('_expand_conv', 'conv_pw'),
  'expand/norm': ('_bn0', 'bn1'),
  'depthwise/conv': ('_depthwise_conv', 'conv_dw'),
  'depthwise/norm': ('_bn1', 'bn2'),
  'project/conv': ('_project_conv', 'conv_pwl'),
  'project/norm': ('_bn2', 'bn3'),
}
FIRST: Mapping[str, tuple[str, str]] = {
  'depthwise/conv': ('_depthwise_conv', 'conv_dw'),
  'depthwise/norm': ('_bn1', 'bn1'),
  'project/conv': ('_project_conv', 'conv_pw'),
  'project/norm': ('_bn2', 'bn2'),
}


class Conv(nn.Module):
  """Convolution as TensorFlow pads it.   [N, H, W, C] -> [N, ceil(H/s), ceil(W/s), features]

  Of the zeros that a stride and a size need, the odd one comes after the image ('SAME'): with
  stride 2 and an even size none comes before it. The published weights were trained so.
  """

  features: int
  kernel_size: int = 1
  stride: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    k, s = self.kernel_size, self.stride
    shape = (k, k, x.shape[-1], self.features)
    kernel = self.param('kernel', layers.kernel_init, shape).astype(self.dtype)
    x = x.astype(self.dtype)
    if s == 1:  # the same zeros on both sides
      return layers.convolve(x, kernel)
    return lax.conv_general_dilated(
      x, kernel, (s, s), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


class DepthwiseConv(nn.Module):
  """Each channel with a kernel [k, k, 1, C] of its own.   [N, H, W, C] -> [N, H/s, W/s, C]"""

  kernel_size: int
  stride: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    # the paper's code scales by k * k here, too: the fan-out of one channel
    init = nn.initializers.variance_scaling(2.0, 'fan_in', 'truncated_normal')
    shape = (self.kernel_size, self.kernel_size, 1, x.shape[-1])
    kernel = self.param('kernel', init, shape)
    return depthwise(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)


class Layer(nn.Module):
  """norm(conv(x)), and min(relu(.), 6) of it unless `linear`; depthwise where features = 0."""

  features: int
  kernel_size: int = 1
  stride: int = 1
  dtype: Any = jnp.float32
  norm: str = 'batch'
  linear: bool = False

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    shape = (self.kernel_size, self.stride, self.dtype)
    if self.features:
      x = Conv(self.features, *shape, name='conv')(x)
    else:
      x = DepthwiseConv(*shape, name='conv')(x)
    if self.norm == 'batch':  # its epsilon is not that of our other nets
      x = layers.BatchNorm(not train, self.dtype, epsilon=EPSILON, name='norm')(x)
    else:
      x = layers.make_norm(self.norm, train, self.dtype, 'norm')(x)
    return x if self.linear else jnp.minimum(nn.relu(x), RELU6)


class Block(nn.Module):
  """project(depthwise(expand(x))), plus x where shapes agree.   [N, H, W, C] -> [N, H/s, W/s, D]

  Inverted residual (Sandler et al. 2018). Where `expand` is 1, there is no layer of that name.
  """

  shape: StageShape
  features: int
  stride: int = 1
  dtype: Any = jnp.float32
  norm: str = 'batch'

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    layer = functools.partial(Layer, dtype=self.dtype, norm=self.norm)
    u, expand = x, self.shape.expand
    if expand != 1:
      u = layer(expand * x.shape[-1], name='expand')(u, train)
    u = layer(0, self.shape.kernel_size, self.stride, name='depthwise')(u, train)
    u = layer(self.features, linear=True, name='project')(u, train)
    return u + x if self.stride == 1 and u.shape == x.shape else u


class Stage(nn.Module):
  """Blocks of one shape, the first with the stride.   [N, H, W, C] -> [N, H/s, W/s, features]"""

  shape: StageShape
  features: int
  blocks: int
  dtype: Any = jnp.float32
  norm: str = 'batch'

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    for j in range(1, self.blocks + 1):
      stride = self.shape.stride if j == 1 else 1
      block = Block(self.shape, self.features, stride, self.dtype, self.norm, name=f'block{j}')
      x = block(x, train)
    return x


class Branches(nn.Module):
  """aggregate(attention(top_b(stage_b(x)) for each b)).   [N, H, W, C] -> [N, H, W, B * top]"""

  shape: StageShape  # of the last stage
  blocks: int
  channels: tuple[int, int]  # of the last stage and of the layer after it
  attention: str
  dtype: Any = jnp.float32
  norm: str = 'batch'

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    branches = []
    for name in BRANCHES:
      branch = Branch(self.shape, self.blocks, self.channels, self.dtype, self.norm, name=name)
      branches.append(branch(x, train))
    return attn.aggregate(
      self, branches, BRANCHES, self.attention, train, self.dtype, norm=self.norm
    )


class Branch(nn.Module):
  """top(stage(x)), the end of the net.   [N, H, W, C] -> [N, H, W, top]"""

  shape: StageShape
  blocks: int
  channels: tuple[int, int]
  dtype: Any = jnp.float32
  norm: str = 'batch'

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    features, top = self.channels
    common = {'dtype': self.dtype, 'norm': self.norm}
    x = Stage(self.shape, features, self.blocks, name='stage', **common)(x, train)
    return Layer(top, name='top', **common)(x, train)


class EfficientNetLite(nn.Module):
  """EfficientNet-Lite0.   [N, H, W, 3] float -> logits [N, num_classes] float32

  3x3 stem of stride 2 -> STAGES -> 1x1 convolution to 1,280 channels -> global mean -> classifier.
  With `attention`, the last stage and the layer after it are there three times in parallel, and
  meet in it
  (Tan & Le 2019; the row of the Lite nets without squeeze-excite). Every layer pads as TensorFlow
  does, and the batch norms have epsilon 0.001. The published weights were trained on RGB photos of
  224 pixels a side, as (pixel - 127) / 128 with pixels of 0..255. timm takes (pixel - 127.5) /
  127.5. Of its training we leave out dropout, stochastic depth, and the slower running statistics
  (momentum 0.99; here 0.9). Parameters are float32; `dtype` is the type of the computation.
  """

  num_classes: int
  channels: tuple[int, ...] = CHANNELS
  depth: int = 1  # multiplies the blocks of every stage
  dtype: Any = jnp.float32
  classifier: classifiers.Classifier = classifiers.LINEAR
  norm: str = 'batch'  # a row of layers.NORMS
  stages: tuple[StageShape, ...] = STAGES
  attention: str = ''  # '': no branches

  head = classifiers.HEAD  # names of the parameters of the classifier

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    stem, *widths, top = self.channels
    common = {'dtype': self.dtype, 'norm': self.norm}
    x = Layer(stem, 3, 2, name='stem', **common)(x.astype(self.dtype), train)
    branches = 1
    for i, (shape, features) in enumerate(zip(self.stages, widths, strict=True), 1):
      blocks = self.depth * shape.blocks
      if self.attention and i == len(widths):
        make = functools.partial(Branches, shape, blocks, (features, top), self.attention)
        x = make(name='end', **common)(x, train)
        branches = len(BRANCHES)
      else:
        x = Stage(shape, features, blocks, name=f'stage{i}', **common)(x, train)
    if not self.attention:
      x = Layer(top, name='top', **common)(x, train)
    z = x.mean((1, 2)).reshape(x.shape[0], branches, -1)
    kind = self.attention or 'none'
    return classifiers.classify(z, self.num_classes, self.classifier, kind, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise(x: Array, kernel: Array, stride: int = 1) -> Array:
  """y[p, c] = sum_q kernel[q, 0, c] x[s p + q, c], padded as `Conv`; summed in at least float32.

  [N, H, W, C], [k, k, 1, C] -> [N, ceil(H/s), ceil(W/s), C]. It has a gradient of its own, and none
  in forward mode.
  """
  # As k * k shifted products: XLA's convolution by groups of one channel is far slower on CPU. With
  # jax 0.11, two shared cores of an AMD EPYC, 4 images, forward and gradient, ms (groups; shifts):
  #   112 x 112 x 32, k = 3: 120, 336; 3, 112       56 x 56 x 144, k = 3: 140, 1352; 4, 102
  #   112 x 112 x 96, stride 2: 94, 1386; 7, 120    14 x 14 x 480, k = 5: 36, 441; 2, 21
  total = jnp.zeros((), jnp.promote_types(x.dtype, jnp.float32))
  for shifted, (i, j) in _shifted(x, kernel.shape[0], stride):
    total = total + shifted * kernel[i, j][None, None].astype(total.dtype)
  return total.astype(x.dtype)


def _depthwise(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
  return depthwise(x, kernel, stride), (x, kernel)


def _depthwise_gradient(stride: int, inputs: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
  """Of x, a depthwise convolution of dy; of the kernel, sum over p of x[s p + q, c] dy[p, c]."""
  x, kernel = inputs
  size, wide = kernel.shape[0], jnp.promote_types(x.dtype, jnp.float32)
  dy = dy.astype(wide)
  # x has pixels n, and zeros before and after; dy is as far apart as the stride says
  edges = []
  for n, m in zip(x.shape[1:3], dy.shape[1:3], strict=True):
    before = size - 1 - _zeros(n, size, stride) // 2
    edges.append((before, n + size - 1 - before - (stride * (m - 1) + 1), stride - 1))
  spread = lax.pad(dy, jnp.zeros((), wide), ((0, 0, 0), *edges, (0, 0, 0)))
  height, width = x.shape[1:3]
  dx = jnp.zeros((), wide)
  for i in range(size):
    for j in range(size):
      opposite = kernel[size - 1 - i, size - 1 - j][None, None].astype(wide)
      dx = dx + spread[:, i : i + height, j : j + width] * opposite
  # XLA's sums over all axes but the last are slow on CPU if what they sum is computed on the way;
  # those of a few slabs are not. Two cores of an AMD EPYC, jax 0.11, 16 images, ms, fastest of nine
  # (one sum; slabs): 56 x 56 x 144, k = 3: 163, 60; 28 x 28 x 240, k = 5: 185, 56; 14 x 14 x 480,
  # k = 5: 95, 11; 64 x 64 x 96, k = 3, stride 2: 42, 11.
  # Slabs of rows: images may lie on several devices.
  rows = dy.shape[1]
  parts = max(n for n in range(1, SLABS + 1) if rows % n == 0)
  slabs = [slice(i * rows // parts, (i + 1) * rows // parts) for i in range(parts)]
  over_slabs = [
    functools.reduce(jnp.add, (shifted[:, slab] * dy[:, slab] for slab in slabs))
    for shifted, _ in _shifted(x, size, stride)
  ]
  # without the barrier XLA makes one sum of the two
  dkernel = lax.optimization_barrier(jnp.stack(over_slabs)).sum((1, 2, 3))
  return dx.astype(x.dtype), dkernel.reshape(kernel.shape).astype(kernel.dtype)


def _zeros(pixels: int, size: int, stride: int) -> int:
  """How many zeros 'SAME' puts around so many pixels, half of them before, the odd one after."""
  return max((-(-pixels // stride) - 1) * stride + size - pixels, 0)


def _shifted(x: Array, size: int, stride: int) -> Iterator[tuple[Array, tuple[int, int]]]:
  """x[s p + q] for every offset q = (i, j) of a kernel, in at least float32; and the offset."""
  height, width = x.shape[1:3]
  out = [-(-n // stride) for n in (height, width)]
  zeros = [_zeros(n, size, stride) for n in (height, width)]
  padded = jnp.pad(x, ((0, 0), *((n // 2, n - n // 2 + stride) for n in zeros), (0, 0)))
  padded = padded.astype(jnp.promote_types(x.dtype, jnp.float32))
  # pixels a multiple of the stride apart, side by side: strided slices within sums are slow
  phases = {(a, b): padded[:, a::stride, b::stride] for a in range(stride) for b in range(stride)}
  if stride > 1:
    phases = lax.optimization_barrier(phases)
  for i in range(size):
    for j in range(size):
      (top, a), (left, b) = divmod(i, stride), divmod(j, stride)
      yield phases[a, b][:, top : top + out[0], left : left + out[1]], (i, j)


depthwise.defvjp(_depthwise, _depthwise_gradient)


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
  branches: bool = False,
) -> EfficientNetLite:
  """EfficientNet-Lite0 at a width; 4,652,008 parameters for 1,000 classes.

  Args:
    num_classes: C >= 2.
    image_shape: (height, width, channels) of the images.
    attention: a row of ATTENTIONS; 'none' without branches.
    width: multiplies every number of channels. Lite1 to Lite4 keep those of the stem and the top,
      and round the others to multiples of 8.
    dtype: type of the computation.
    classifier: settings of the classifier.
    depth: multiplies the number of blocks of every stage.
    norm: a row of layers.NORMS.
    branches: whether the end of the net has branches.
  """

  def make_model(channels: Sequence[int], attention: str) -> EfficientNetLite:
    return EfficientNetLite(
      num_classes,
      tuple(channels),
      depth,
      dtype,
      classifier,
      norm,
      attention=attention if branches else '',
    )

  tuned = (8, 7, 6) if branches else ()
  return capacity.at_width(make_model, CHANNELS, attention, width, image_shape, tuned)


build_branches = functools.partial(build, branches=True)


def torch_names(name: str) -> tuple[str, ...]:
  """Names of a variable in a state dict: of efficientnet_lite_pytorch, and of timm.

  A kernel of 4 axes is [out, in, h, w] there and [h, w, in, out] here, also of a depthwise layer
  ([C, 1, h, w] and [h, w, 1, C]); that of the classifier is [K, D] there and [1, D, K] here.
  Branches all have the names of the last stage and of the layer after it.

  Example:
    >>> torch_names('batch_stats/stage2/block1/depthwise/norm/mean')
    ('_blocks.1._bn1.running_mean', 'blocks.1.0.bn2.running_mean')

  Args:
    name: such as 'params/stem/conv/kernel'. Of a net of depth 1, since files have that.

  Returns:
    None at all for a variable that no file has.
  """
  _, _, place = name.partition('/')
  place = re.sub(f'^end/({"|".join(BRANCHES)})/', '', place)
  place = re.sub('^stage/', f'stage{len(STAGES)}/', place)
  layer, _, value = place.rpartition('/')
  found = re.fullmatch(r'stage(\d+)/block(\d+)/(\w+/\w+)', layer)
  before = ('', '')
  if found:
    stage, block, layer = int(found[1]) - 1, int(found[2]) - 1, found[3]
    number = sum(shape.blocks for shape in STAGES[:stage]) + block
    before = (f'_blocks.{number}.', f'blocks.{stage}.{block}.')
    table = BLOCK if STAGES[stage].expand != 1 else FIRST
  else:
    table = OUTSIDE
  if layer not in table or value not in layers.IN_TORCH:
    return ()
  end = layers.IN_TORCH[value]
  pairs = zip(before, table[layer], strict=True)
  return tuple(f'{prefix}{theirs}.{end}' for prefix, theirs in pairs)
