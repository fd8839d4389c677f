"""Classifiers of a net's branches, z [N, B, D] -> logits [N, K], for every model."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from csba_jax.models import attention as attn

KINDS = ('linear', 'cosine', 'scaled')
HEAD = r'^head/'  # parameters whose rows belong to single classes by construction
SHORTEST = 1e-12  # vectors shorter than this have no direction


class Classifier(NamedTuple):
  """What a model's classifier is like; see `LinearHead`."""

  kind: str = 'linear'  # one of KINDS
  scale: float = 30.0  # of the cosines of `cosine`


LINEAR = Classifier()


class LinearHead(nn.Module):
  """The classifier of a kind.   [N, B, D] -> [N, num_classes], float32 at least

  linear: logit_k = bias_k + sum_b <w_kb, z_b>.
  cosine: logit_k = scale <w_k, z> / (|w_k| |z|) over all of B * D, without bias; 0, and of
    gradient 0, where a vector is shorter than SHORTEST, which the official code divides by instead
    (NormedLinear of Cao et al. 2019, whose scale, 30, is part of the loss: here it is of the
    logits, so that they are log-odds wherever they are used).
  scaled: scale_k times the logit of `linear`, bias included as in the official code; scale is 1 at
    first (learnable weight scaling, Kang et al. 2020, who train it alone in a second stage).
  """

  num_classes: int
  like: Classifier = LINEAR

  @nn.compact
  def __call__(self, z: Array, class_gate: Array | None = None) -> Array:
    """With `class_gate` g [N, B, D], every class k gates z for itself by 2 sigmoid(g_b + E_kb)."""
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
      else:  # what each class sees of z
        square = jnp.einsum('nbd,nkbd->nk', z * z, gates * gates)
      lengths = _inverse_norm((kernel * kernel).sum((0, 1)))[None]
      return self.like.scale * logits * _inverse_norm(square) * lengths
    logits = logits + self.param('bias', nn.initializers.zeros, (self.num_classes,))[None]
    if self.like.kind == 'scaled':
      logits = logits * self.param('scale', nn.initializers.ones, (self.num_classes,))[None]
    return logits


def classify(z: Array, num_classes: int, like: Classifier, attention: str, dtype: Any) -> Array:
  """Logits of a model's branches; its class gate too where attention is `csba_class`.

  Called at the end of a model's `@nn.compact` method, which gets the submodules `head` and
  `class_gate`.   z [N, B, D] -> [N, num_classes]
  """
  gate = None
  if attention == 'csba_class':
    gate = attn.ClassGate(dtype=dtype, name='class_gate')(z)
  return LinearHead(num_classes, like, name='head')(z, gate)


def _inverse_norm(square: Array) -> Array:
  """1 / |x| from |x|^2; 0, and of gradient 0, where x has no direction."""
  present = square > SHORTEST**2
  return jnp.where(present, lax.rsqrt(jnp.where(present, square, 1)), 0)
