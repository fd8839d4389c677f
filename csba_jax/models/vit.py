"""A small vision transformer, in which CSBA takes the attention heads for branches and gates them.

Names of layers look like `block1/heads/qkv/kernel`, `block1/heads/attention/head2/squeeze/kernel`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from csba_jax.models import attention as attn
from csba_jax.models import capacity, classifiers

BRANCHES = ('head1', 'head2', 'head3')  # the attention heads
DEPTH = 6
HEAD_DIM, HIDDEN = 64, 768  # of an attention head, of the MLP, at width 1: 192 channels, as DeiT-Ti
GRID = 8  # tokens a side, at most


class Tokens(nn.Module):
  """W patch + position, both learned.   [N, H, W, ch] -> [N, T, features]

  A patch has ceil(H / 8) by ceil(W / 8) pixels. Where 8 divides height and width there are 8 x 8
  tokens; elsewhere there are fewer, and zeros fill up the image below and to the right.
  """

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    n, height, width, channels = x.shape
    ph, pw = -(-height // GRID), -(-width // GRID)
    x = jnp.pad(x, ((0, 0), (0, -height % ph), (0, -width % pw), (0, 0)))
    rows, columns = x.shape[1] // ph, x.shape[2] // pw
    x = x.reshape(n, rows, ph, columns, pw, channels).transpose(0, 1, 3, 2, 4, 5)
    x = nn.Dense(self.features, dtype=self.dtype, name='patch')(x.reshape(n, rows * columns, -1))
    # As large as the part of the patch. With the usual standard deviation of 0.02, tokens start
    # almost without a position, and a net that sees few images for few steps does not learn it.
    init = nn.initializers.normal(1.0)
    position = self.param('position', init, (rows * columns, self.features))
    return x + position.astype(self.dtype)[None]


class SelfAttention(nn.Module):
  """project(concat_h u_h), u_h = softmax(q_h k_h^T / sqrt(D_h)) v_h, with gates on the u_h.

  CSBA gates head h by s_h = sigmoid(W2_h relu(W1_h z_h)) with z_h = mean over T of u_h; `se` has
  one gate after the projection.   [N, T, C] -> [N, T, C]
  """

  head_dim: int
  attention: str
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    features = len(BRANCHES) * self.head_dim
    qkv = nn.Dense(3 * features, dtype=self.dtype, name='qkv')(x)
    q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, len(BRANCHES), self.head_dim), 2, 0)
    project = nn.Dense(features, dtype=self.dtype, name='project')
    return _aggregate(self, attend(q, k, v), self.attention, train, self.dtype, project)


class Pool(nn.Module):
  """One learned query for each attention head: z_h = softmax(q_h k_h^T / sqrt(D_h)) v_h.

  CSBA gates the heads as in the blocks; no projection follows.   [N, T, C] -> z [N, heads, D_h]
  """

  head_dim: int
  attention: str
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    shape = len(BRANCHES), self.head_dim
    kv = nn.Dense(2 * len(BRANCHES) * self.head_dim, dtype=self.dtype, name='kv')(x)
    k, v = jnp.moveaxis(kv.reshape(*x.shape[:2], 2, *shape), 2, 0)
    # as large as a query that a Dense layer computes
    q = self.param('query', nn.initializers.normal(1.0), shape).astype(self.dtype)
    u = attend(jnp.broadcast_to(q, (x.shape[0], 1, *shape)), k, v)
    return _aggregate(self, u, self.attention, train, self.dtype).reshape(-1, *shape)


class Block(nn.Module):
  """x <- x + heads(norm(x)); x <- x + W2 gelu(W1 norm(x)).   [N, T, C] -> [N, T, C]"""

  head_dim: int
  hidden: int
  attention: str
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
    dense = functools.partial(nn.Dense, dtype=self.dtype)
    heads_of = SelfAttention(self.head_dim, self.attention, self.dtype, name='heads')
    x = x + heads_of(norm(name='norm1')(x), train)
    u = nn.gelu(dense(self.hidden, name='mlp1')(norm(name='norm2')(x)))
    return x + dense(x.shape[-1], name='mlp2')(u)


class ViT(nn.Module):
  """Vision transformer.   [N, H, W, ch] float in [-1, 1] -> logits [N, num_classes] float32

  tokens -> pre-norm blocks -> norm -> attention pooling, z_h [N, heads, D_h] -> classifier
  (Dosovitskiy et al. 2021). `csba_class` is `csba` with a classifier that gates z_h for every
  class. The original pools by a class token; this net has a query for each attention head, so that
  heads remain branches up to the classifier. It has no dropout and no BatchNorm, so the images of a
  batch never depend on each other. Parameters are float32; `dtype` is the type of the computation,
  except that softmax takes at least float32.
  """

  num_classes: int
  attention: str = 'csba'
  head_dim: int = HEAD_DIM
  hidden: int = HIDDEN
  depth: int = DEPTH
  dtype: Any = jnp.float32
  classifier: classifiers.Classifier = classifiers.LINEAR

  head = classifiers.HEAD  # names of the parameters of the classifier

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    features = len(BRANCHES) * self.head_dim
    x = Tokens(features, self.dtype, name='tokens')(x.astype(self.dtype))
    for i in range(1, self.depth + 1):
      block = Block(self.head_dim, self.hidden, self.attention, self.dtype, name=f'block{i}')
      x = block(x, train)
    x = nn.LayerNorm(dtype=self.dtype, name='norm')(x)
    z = Pool(self.head_dim, self.attention, self.dtype, name='pool')(x, train)
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
) -> ViT:
  """The net at a width; for `none_wide`, widened until it has as many parameters as `csba`.

  Args:
    num_classes: C >= 2.
    image_shape: (height, width, channels) of the images; the size of a patch follows from it.
    attention: a row of ATTENTIONS.
    width: multiplies the channels of an attention head and of the MLP, not the number of heads.
    dtype: type of the computation.
    classifier: settings of the classifier.
    depth: multiplies the number of blocks.
  """

  def make_model(channels: Sequence[int], attention: str) -> ViT:
    return ViT(num_classes, attention, *channels, depth * DEPTH, dtype, classifier)

  channels = HEAD_DIM, HIDDEN
  return capacity.at_width(make_model, channels, attention, width, image_shape, tuned=(1,))


def attend(q: Array, k: Array, v: Array) -> Array:
  """u_h = softmax(q_h k_h^T / sqrt(D)) v_h, with the softmax in float32 at least.

  q [N, S, heads, D]; k, v [N, T, heads, D] -> [N, S, heads, D]
  """
  wide = jnp.promote_types(q.dtype, jnp.float32)
  scores = jnp.einsum('nshd,nthd->nhst', q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
  return jnp.einsum('nhst,nthd->nshd', jax.nn.softmax(scores).astype(v.dtype), v)


def _aggregate(
  module: nn.Module, u: Array, attention: str, train: bool, dtype: Any, *project: Any
) -> Array:
  """`attention.aggregate` for heads, as images one pixel wide.   [N, S, heads, D] -> [N, S, C]"""
  branches = [u[:, :, h : h + 1] for h in range(len(BRANCHES))]
  return attn.aggregate(module, branches, BRANCHES, attention, train, dtype, *project)[:, :, 0]
