"""The classifier at the end of every model: means of the branches z [N, B, D] -> logits [N, K].

The config calls its kind model.head, and checkpoints call its parameters head/...
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from csba_jax.models import attention as attn

KINDS = ('linear', 'cosine', 'scaled')
# names of the classifier's parameters; each of their rows belongs to one class by construction
HEAD = r'^head/'
SHORTEST = 1e-12  # a vector shorter than this counts as one without a direction


class Classifier(NamedTuple):
  """Settings of a model's classifier; see `ClassifierLayer`."""

  kind: str = 'linear'  # one of KINDS
  scale: float = 30.0  # of the cosines, where the kind is `cosine`


LINEAR = Classifier()


class ClassifierLayer(nn.Module):
  """Logits of the kind that `like` names.   [N, B, D] -> [N, num_classes], at least float32

  - linear: logit_k = bias_k + sum_b <w_kb, z_b>.
  - cosine: logit_k = scale <w_k, z> / (|w_k| |z|) over all B * D numbers, without bias
    (NormedLinear of Cao et al. 2019). Where a vector is shorter than SHORTEST, the logit and its
    gradient are 0; the official code divides by that length instead. The official code has the
    scale, 30, in the loss; here it is part of the logits, so that they are log-odds wherever they
    are used.
  - scaled: scale_k times the logit of `linear`, with its bias, as in the official code; scale
    starts at 1 (learnable weight scaling, Kang et al. 2020, who train it alone in a second stage).
  """

  num_classes: int
  like: Classifier = LINEAR

  @nn.compact
  def __call__(self, z: Array, class_gate: Array | None = None) -> Array:
    """With `class_gate` g [N, B, D], class k has its own gates of z, 2 sigmoid(g_b + E_kb)."""
    wide = jnp.promote_types(z.dtype, jnp.float32)
    z = z.astype(wide)
    shape = (*z.shape[1:], self.num_classes)
    init = nn.initializers.variance_scaling(1.0, 'fan_in', 'truncated_normal', in_axis=(0, 1))
    kernel = self.param('kernel', init, shape)
    if class_gate is None:
      logits = jnp.einsum('nbd,bdk->nk', z, kernel)
    else:
      embedding = self.param(
        'class_embedding', nn.initializers.zeros, (self.num_classes, *z.shape[1:])
      )
      gates = 2 * nn.sigmoid(class_gate.astype(wide)[:, None] + embedding[None])
      self.sow('intermediates', 'class_gates', gates.mean(-1))  # [N, K, B]
      logits = jnp.einsum('nbd,nkbd,bdk->nk', z, gates, kernel)
    if self.like.kind == 'cosine':
      if class_gate is None:
        square = jnp.einsum('nbd,nbd->n', z, z)[:, None]
      else:  # of z through the gates of each class
        square = jnp.einsum('nbd,nkbd->nk', z * z, gates * gates)
      lengths = _inverse_norm((kernel * kernel).sum((0, 1)))[None]
      return self.like.scale * logits * _inverse_norm(square) * lengths
    logits = logits + self.param('bias', nn.initializers.zeros, (self.num_classes,))[None]
    if self.like.kind == 'scaled':
      logits = logits * self.param('scale', nn.initializers.ones, (self.num_classes,))[None]
    return logits


def classify(z: Array, num_classes: int, like: Classifier, attention: str, dtype: Any) -> Array:
  """Logits of a model's branches, with class gates where the attention has them.

  A model calls it at the end of its `@nn.compact` method, which gets the submodules `head` and
  `class_gate`.   z [N, B, D] -> [N, num_classes]
  """
  gate, make_gate = None, attn.find(attention)[0].at_classifier
  if make_gate is not None:
    gate = make_gate(dtype=dtype, name='class_gate')(z)
  return ClassifierLayer(num_classes, like, name='head')(z, gate)


def _inverse_norm(square: Array) -> Array:
  """1 / |x| from |x|^2; where x counts as having no direction, 0 with gradient 0."""
  present = square > SHORTEST**2
  return jnp.where(present, lax.rsqrt(jnp.where(present, square, 1)), 0)
