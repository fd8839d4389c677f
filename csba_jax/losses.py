"""Losses per example: (logits [N, C], labels [N] int, progress) -> [N] nats, in one visible table.

Reduction and masks belong to the caller: that is what makes class gradients possible. `progress`
is the share of the run that is done, 0 <= progress < 1; deferred re-weighting looks at it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax import Array

from csba_jax import longtail
from csba_jax.errors import UserError

LossFn = Callable[[Array, Array, Array | float], Array]


def cross_entropy(logits: Array, labels: Array, *, class_counts: np.ndarray) -> Array:
  """-log p_y,  p = softmax(logits).   [N, C], [N] -> [N] nats"""
  del class_counts  # the plain loss knows no prior
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def label_smoothing(
  logits: Array, labels: Array, *, class_counts: np.ndarray, smoothing: float
) -> Array:
  """-(1 - eps) log p_y - eps mean_c log p_c  (Szegedy et al. 2016).   [N, C], [N] -> [N] nats"""
  del class_counts
  log_p = jax.nn.log_softmax(logits)
  return -(1 - smoothing) * _of_label(log_p, labels) - smoothing * log_p.mean(-1)


def label_aware_smoothing(
  logits: Array,
  labels: Array,
  *,
  class_counts: np.ndarray,
  smoothing: float,
  smoothing_tail: float,
) -> Array:
  """-(1 - eps_y) log p_y - eps_y / (C - 1) sum_{c != y} log p_c.   [N, C], [N] -> [N] nats

  eps_y = eps_tail + (eps_head - eps_tail) sin(pi/2 (n_y - n_min) / (n_max - n_min)), the concave
  form of MiSLAS (Zhong et al. 2021): large classes, which are over-confident, are smoothed most.
  The formula is the paper's; its code spreads eps_y over all C classes, the label's own included.
  """
  n = np.asarray(class_counts, np.float64)
  rank = (n - n.min()) / max(n.max() - n.min(), 1)
  by_class = smoothing_tail + (smoothing - smoothing_tail) * np.sin(np.pi / 2 * rank)
  eps = jnp.asarray(by_class, logits.dtype)[labels]
  log_p = jax.nn.log_softmax(logits)
  of_label = _of_label(log_p, labels)
  return -(1 - eps) * of_label - eps / (len(n) - 1) * (log_p.sum(-1) - of_label)


def focal(logits: Array, labels: Array, *, class_counts: np.ndarray, gamma: float) -> Array:
  """-(1 - p_y)^gamma log p_y  (Lin et al. 2017).   [N, C], [N] -> [N] nats

  p is the plain softmax. LDAM-DRW's code takes p from the class-weighted cross-entropy, so that
  there a weight also changes what counts as hard; here weights multiply the loss from outside.
  """
  del class_counts
  log_p = _of_label(jax.nn.log_softmax(logits), labels)
  return -_power(-jnp.expm1(log_p), gamma) * log_p


def dual_focal(logits: Array, labels: Array, *, class_counts: np.ndarray, gamma: float) -> Array:
  """-(1 - p_y + p_j)^gamma log p_y,  p_j = max{p_c : p_c < p_y}, 0 if there is none.

  Tao et al. 2023. [N, C], [N] -> [N] nats. As in their code the gradient also goes through p_j.
  """
  del class_counts
  log_p = jax.nn.log_softmax(logits)
  of_label = _of_label(log_p, labels)
  p = jnp.exp(log_p)
  lower = jnp.where(log_p < of_label[:, None], p, 0)
  return -_power(-jnp.expm1(of_label) + lower.max(-1), gamma) * of_label


def ldam(
  logits: Array, labels: Array, *, class_counts: np.ndarray, max_margin: float, scale: float
) -> Array:
  """Cross-entropy of s (z - m_y e_y),  m_c = max_margin (n_min / n_c)^(1/4).

  Cao et al. 2019. [N, C], [N] -> [N] nats. z are cosines (model.head cosine), s is `scale`.
  """
  margins = max_margin * (np.min(class_counts) / np.asarray(class_counts, np.float64)) ** 0.25
  margin = jnp.asarray(margins, logits.dtype)[labels]
  hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
  return optax.softmax_cross_entropy_with_integer_labels(
    scale * (logits - margin[:, None] * hot), labels
  )


def logit_adjustment(
  logits: Array, labels: Array, *, class_counts: np.ndarray, tau: float
) -> Array:
  """Cross-entropy of logits + tau log pi_c  (Menon et al. 2021).   [N, C], [N] -> [N] nats

  Predictions use the plain logits.
  """
  shift = jnp.asarray(tau * np.log(longtail.prior(class_counts)), logits.dtype)
  return optax.softmax_cross_entropy_with_integer_labels(logits + shift[None], labels)


def balanced_softmax(logits: Array, labels: Array, *, class_counts: np.ndarray) -> Array:
  """-log(n_y e^{z_y} / sum_c n_c e^{z_c})  (Ren et al. 2020).   [N, C], [N] -> [N] nats

  Logit adjustment with tau = 1: a constant added to all logits changes nothing, so counts serve as
  well as the prior. Predictions use the plain logits.
  """
  counts = jnp.asarray(class_counts, logits.dtype)
  return optax.softmax_cross_entropy_with_integer_labels(logits + jnp.log(counts)[None], labels)


class Kind(NamedTuple):
  """A row of LOSSES."""

  function: Callable[..., Array]  # (logits, labels, *, class_counts, **options) -> [N]
  options: tuple[str, ...] = ()  # fields of config.loss that it takes
  linear: bool = True  # in the label's distribution: then mixed labels mix losses
  heads: tuple[str, ...] = ('linear', 'scaled')  # model.head that its logits come from


LOSSES: Mapping[str, Kind] = {
  'cross_entropy': Kind(cross_entropy),
  'balanced_softmax': Kind(balanced_softmax),
  'logit_adjustment': Kind(logit_adjustment, ('tau',)),
  'label_smoothing': Kind(label_smoothing, ('smoothing',)),
  'label_aware_smoothing': Kind(label_aware_smoothing, ('smoothing', 'smoothing_tail')),
  'focal': Kind(focal, ('gamma',), linear=False),
  'dual_focal': Kind(dual_focal, ('gamma',), linear=False),
  'ldam': Kind(ldam, ('max_margin', 'scale'), linear=False, heads=('cosine',)),
}


def build(loss: ml_collections.ConfigDict, class_counts: np.ndarray) -> LossFn:
  """The loss that config.loss describes, bound to the training counts [C].

  With class weights w (sum C) an example's loss is multiplied by w_y / sum_c pi_c w_c from
  progress `weights_start` on: PyTorch's weighted mean, with the mean weight of the training set
  in place of the batch's, so that a batch's loss stays a plain mean over examples.

  Raises:
    UserError: unknown names, a class without images, an option out of range.
  """
  kind = kind_of(loss.name)
  options = {name: loss[name] for name in kind.options}
  counts = np.asarray(class_counts, np.float64)
  prior = longtail.prior(counts)
  weights = longtail.class_weights(loss.weights, counts, loss.beta)
  per_example = functools.partial(kind.function, class_counts=counts, **options)
  if loss.weights == 'none':
    return functools.partial(_plain, per_example)
  return functools.partial(
    _reweighted, per_example, weights / (prior @ weights), loss.weights_start
  )


def kind_of(name: str) -> Kind:
  """The row of LOSSES, or a UserError that lists them."""
  if name not in LOSSES:
    raise UserError(f'loss.name among {", ".join(LOSSES)}', repr(name), 'set --config.loss.name')
  return LOSSES[name]


def check_fits(loss_name: str, head: str, mixing_name: str) -> None:
  """Raises UserError for a loss that does not take this classifier's logits or mixed labels."""
  kind = kind_of(loss_name)
  if head not in kind.heads:
    raise UserError(
      f'model.head {" or ".join(kind.heads)} for loss.name {loss_name}',
      repr(head),
      f'set --config.model.head={kind.heads[0]}',
    )
  if mixing_name != 'none' and not kind.linear:
    linear = ', '.join(name for name, kind in LOSSES.items() if kind.linear)
    raise UserError(
      f'a loss that takes mixed labels with mixing.name {mixing_name}: {linear}',
      loss_name,
      'set --config.loss.name to one of these, or --config.mixing.name=none',
    )


def _plain(per_example: Callable, logits: Array, labels: Array, progress: Array | float) -> Array:
  del progress  # nothing is deferred
  return per_example(logits, labels)


def _reweighted(
  per_example: Callable,
  weights: np.ndarray,
  start: float,
  logits: Array,
  labels: Array,
  progress: Array | float,
) -> Array:
  """Deferred re-weighting (Cao et al. 2019): weights from `start` on, none before."""
  weight = jnp.where(progress >= start, jnp.asarray(weights, logits.dtype)[labels], 1)
  return weight * per_example(logits, labels)


def mixed(
  loss_fn: LossFn, logits: Array, batch: Mapping[str, Array], progress: Array | float
) -> Array:
  """Losses [N] of a batch whose images may be mixed: share loss(label) + (1 - share) loss(partner).

  Equal to the loss under the mixed label for the losses that are linear in it.
  """
  losses = loss_fn(logits, batch['label'], progress)
  if 'share' not in batch:
    return losses
  share = batch['share'].astype(losses.dtype)
  return share * losses + (1 - share) * loss_fn(logits, batch['partner_label'], progress)


def post_hoc_shift(tau: float, class_counts: np.ndarray) -> np.ndarray:
  """-tau log pi_c, added to the logits of a trained net before it predicts.   [C] float32

  Post-hoc logit adjustment (Menon et al. 2021); tau = 0 changes nothing.
  """
  return (-tau * np.log(longtail.prior(class_counts))).astype(np.float32)


def _of_label(values: Array, labels: Array) -> Array:
  """values[i, labels[i]].   [N, C], [N] -> [N]"""
  return jnp.take_along_axis(values, labels[:, None], axis=-1)[:, 0]


def _power(base: Array, exponent: float) -> Array:
  """base^exponent for base >= 0; its gradient is finite at 0 for every exponent.

  A gradient through 0^gamma with gamma < 1 is infinite, and times log p_y = 0 it is NaN.
  """
  safe = jnp.where(base > 0, base, 1)
  return jnp.where(base > 0, safe**exponent, 1.0 if exponent == 0 else 0.0)
