"""Losses per example: (logits [N, C], labels [N] int, class_counts [C]) -> [N] nats.

Reduction, weights and masks belong to the caller: that is what makes class gradients possible.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import optax
from jax import Array

from csba_jax.errors import UserError

LossFn = Callable[[Array, Array], Array]


def cross_entropy(logits: Array, labels: Array, *, class_counts: Array) -> Array:
  """-log softmax(logits)[label].   [N, C], [N] -> [N] nats"""
  del class_counts  # the plain loss knows no prior
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def balanced_softmax(logits: Array, labels: Array, *, class_counts: Array) -> Array:
  """Cross-entropy on logits + log n_c (Ren et al. 2020).   [N, C], [N] -> [N] nats

  Equal to logit adjustment with tau = 1 (Menon et al. 2021): a constant added to all logits
  changes nothing, so counts serve as well as the prior. Predictions use the plain logits.
  """
  counts = class_counts.astype(logits.dtype)
  return optax.softmax_cross_entropy_with_integer_labels(logits + jnp.log(counts)[None], labels)


LOSSES = {'cross_entropy': cross_entropy, 'balanced_softmax': balanced_softmax}


def build(name: str, class_counts: Array) -> LossFn:
  """The loss of that name, bound to the training counts [C] (all at least 1)."""
  if name not in LOSSES:
    raise UserError(f'loss.name among {", ".join(LOSSES)}', repr(name), 'set --config.loss.name')
  return functools.partial(LOSSES[name], class_counts=jnp.asarray(class_counts))
