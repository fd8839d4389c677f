"""Losses per example: (logits [N, C], labels [N] int, step) -> [N] nats, in one visible table.

The caller takes the mean and applies masks; that makes class gradients possible. Deferred
re-weighting depends on the step of the run.
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

from csba_jax.config import step_at
from csba_jax.data import class_counts as class_counts_lib
from csba_jax.data import mixing
from csba_jax.errors import UserError

LossFn = Callable[[Array, Array, Array | int], Array]


def cross_entropy(logits: Array, labels: Array) -> Array:
  """-log p_y,  p = softmax(logits).   [N, C], [N] -> [N] nats"""
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def label_smoothing(logits: Array, labels: Array, *, smoothing: float) -> Array:
  """-(1 - eps) log p_y - eps mean_c log p_c  (Szegedy et al. 2016).   [N, C], [N] -> [N] nats"""
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

  eps_y = smoothing_tail + (smoothing - smoothing_tail) sin(pi/2 (n_y - n_min) / (n_max - n_min)),
  the concave form of MiSLAS (Zhong et al. 2021): the predictions for large classes are
  over-confident, so their labels are smoothed most. The formula is that of the paper; the code of
  MiSLAS spreads eps_y over all C classes, the class of the label included.
  """
  n = np.asarray(class_counts, np.float64)
  rank = (n - n.min()) / max(n.max() - n.min(), 1)
  by_class = smoothing_tail + (smoothing - smoothing_tail) * np.sin(np.pi / 2 * rank)
  eps = jnp.asarray(by_class, logits.dtype)[labels]
  log_p = jax.nn.log_softmax(logits)
  of_label = _of_label(log_p, labels)
  return -(1 - eps) * of_label - eps / (len(n) - 1) * (log_p.sum(-1) - of_label)


def focal(logits: Array, labels: Array, *, gamma: float) -> Array:
  """-(1 - p_y)^gamma log p_y  (Lin et al. 2017).   [N, C], [N] -> [N] nats

  p is the plain softmax, and class weights multiply the loss afterwards. In the code of LDAM-DRW p
  comes from the class-weighted cross-entropy, so that a weight also changes the focal factor.
  """
  log_p = _of_label(jax.nn.log_softmax(logits), labels)
  return -_power(-jnp.expm1(log_p), gamma) * log_p


def dual_focal(logits: Array, labels: Array, *, gamma: float) -> Array:
  """-(1 - p_y + p_j)^gamma log p_y,  p_j = max{p_c : p_c < p_y}, 0 if there is none.

  Tao et al. 2023. [N, C], [N] -> [N] nats. As in their code, the gradient also flows through p_j.
  """
  log_p = jax.nn.log_softmax(logits)
  of_label = _of_label(log_p, labels)
  p = jnp.exp(log_p)
  lower = jnp.where(log_p < of_label[:, None], p, 0)
  return -_power(-jnp.expm1(of_label) + lower.max(-1), gamma) * of_label


def ldam(
  logits: Array, labels: Array, *, class_counts: np.ndarray, max_margin: float, scale: float
) -> Array:
  """Cross-entropy of s (cos - m_y e_y),  m_c = max_margin (n_min / n_c)^(1/4).

  Cao et al. 2019. [N, C], [N] -> [N] nats. The logits are those of the cosine classifier, so they
  are s cos already; `scale` is its s. Margins are in units of the cosine. Only the training loss
  has them.
  """
  margins = max_margin * (np.min(class_counts) / np.asarray(class_counts, np.float64)) ** 0.25
  margin = jnp.asarray(margins, logits.dtype)[labels]
  hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
  return optax.softmax_cross_entropy_with_integer_labels(
    logits - scale * margin[:, None] * hot, labels
  )


def logit_adjustment(
  logits: Array, labels: Array, *, class_counts: np.ndarray, tau: float
) -> Array:
  """Cross-entropy of logits + tau log pi_c  (Menon et al. 2021).   [N, C], [N] -> [N] nats

  Predictions take the plain logits.
  """
  shift = jnp.asarray(tau * np.log(class_counts_lib.prior(class_counts)), logits.dtype)
  return optax.softmax_cross_entropy_with_integer_labels(logits + shift[None], labels)


def balanced_softmax(logits: Array, labels: Array, *, class_counts: np.ndarray) -> Array:
  """-log(n_y e^{z_y} / sum_c n_c e^{z_c})  (Ren et al. 2020).   [N, C], [N] -> [N] nats

  The same as logit adjustment with tau = 1: a constant that is added to all logits changes nothing,
  so counts may stand for the prior. Predictions take the plain logits.
  """
  counts = jnp.asarray(class_counts, logits.dtype)
  return optax.softmax_cross_entropy_with_integer_labels(logits + jnp.log(counts)[None], labels)


def vector_scaling(
  logits: Array, labels: Array, *, class_counts: np.ndarray, gamma: float, tau: float
) -> Array:
  """Cross-entropy of (n_c / n_max)^gamma z_c + tau log pi_c  (VS loss, Kini et al. 2021).

  [N, C], [N] -> [N] nats. gamma = 0 is logit adjustment. Predictions take the plain logits.
  """
  counts = np.asarray(class_counts, np.float64)
  factors = jnp.asarray((counts / counts.max()) ** gamma, logits.dtype)
  return logit_adjustment(logits * factors[None], labels, class_counts=class_counts, tau=tau)


class Loss(NamedTuple):
  """A row of LOSSES."""

  function: Callable[..., Array]  # (logits, labels, **options) -> [N]
  reads_counts: bool  # whether it takes class_counts [C] too; without, it cannot depend on them
  options: tuple[str, ...] = ()  # fields of config.loss, or of config.model, that it takes
  linear: bool = True  # in the label's distribution: then the loss of mixed labels is mixed losses
  classifiers: tuple[str, ...] = ('linear', 'scaled')  # values of model.head that it works with


LOSSES: Mapping[str, Loss] = {
  'cross_entropy': Loss(cross_entropy, reads_counts=False),
  'balanced_softmax': Loss(balanced_softmax, reads_counts=True),
  'logit_adjustment': Loss(logit_adjustment, reads_counts=True, options=('tau',)),
  'vector_scaling': Loss(vector_scaling, reads_counts=True, options=('gamma', 'tau')),
  'label_smoothing': Loss(label_smoothing, reads_counts=False, options=('smoothing',)),
  'label_aware_smoothing': Loss(
    label_aware_smoothing, reads_counts=True, options=('smoothing', 'smoothing_tail')
  ),
  'focal': Loss(focal, reads_counts=False, options=('gamma',), linear=False),
  'dual_focal': Loss(dual_focal, reads_counts=False, options=('gamma',), linear=False),
  'ldam': Loss(
    ldam,
    reads_counts=True,
    options=('max_margin', 'scale'),
    linear=False,
    classifiers=('cosine',),
  ),
}


def build(config: ml_collections.ConfigDict, class_counts: np.ndarray, total_steps: int) -> LossFn:
  """The loss that config.loss describes, bound to the training counts [C].

  The loss of an example is multiplied by the `class_weights` of its class, from the step on that
  weights_start gives (deferred re-weighting, DRW, Cao et al. 2019).

  Raises:
    UserError: unknown names, a class without images, an option out of range, or parts that do not
      go together.
  """
  check_fits(config)
  per_example = unweighted(config, class_counts)
  weights = class_weights(config, class_counts)
  first = step_at(config.loss.weights_start, total_steps)
  return functools.partial(_reweighted, per_example, weights, first)


def unweighted(
  config: ml_collections.ConfigDict, class_counts: np.ndarray
) -> Callable[[Array, Array], Array]:
  """The loss without class weights: (logits, labels) -> [N]."""
  row = find(config.loss.name)
  options = {
    name: (config.loss if name in config.loss else config.model)[name] for name in row.options
  }
  class_counts_lib.prior(class_counts)  # raises where a class has no images
  if row.reads_counts:
    options['class_counts'] = np.asarray(class_counts, np.float64)
  return functools.partial(row.function, **options)


def counts_that_matter(
  config: ml_collections.ConfigDict, class_counts: np.ndarray
) -> tuple[int, ...]:
  """The counts [C] where the loss, its weights or the mixing of a config read them; else ones.

  So runs that differ only in an image or two of a class can share one compiled program.
  """
  rows = find(config.loss.name), mixing.find(config.mixing.name)
  if config.loss.weights != 'none' or any(row.reads_counts for row in rows):
    return tuple(np.asarray(class_counts).tolist())
  return (1,) * len(class_counts)


def class_weights(config: ml_collections.ConfigDict, class_counts: np.ndarray) -> np.ndarray:
  """w_c / sum_d pi_d w_d for the weights w that config.loss names.   [C] float64

  This is PyTorch's weighted mean with one difference: the mean weight is that of the training set,
  not of the batch, so that the loss of a batch stays a plain mean over examples.
  """
  if config.loss.weights == 'none':
    return np.ones(len(class_counts))
  weights = class_counts_lib.class_weights(config.loss.weights, class_counts, config.loss.beta)
  return weights / (class_counts_lib.prior(class_counts) @ weights)


def find(name: str) -> Loss:
  """The row of LOSSES, or a UserError that lists them."""
  if name not in LOSSES:
    raise UserError(f'loss.name among {", ".join(LOSSES)}', repr(name), 'set --config.loss.name')
  return LOSSES[name]


def check_fits(config: ml_collections.ConfigDict) -> None:
  """Raises UserError for parts of a config that do not go with its loss or its weights."""
  loss, row = config.loss, find(config.loss.name)
  if config.model.head not in row.classifiers:
    raise UserError(
      f'model.head {" or ".join(row.classifiers)} for loss.name {loss.name}',
      repr(config.model.head),
      f'set --config.model.head={row.classifiers[0]}',
    )
  if config.mixing.name != 'none' and not row.linear:
    linear = ', '.join(name for name, row in LOSSES.items() if row.linear)
    raise UserError(
      f'a loss that takes mixed labels with mixing.name {config.mixing.name}: {linear}',
      loss.name,
      'set --config.loss.name to one of these, or --config.mixing.name=none',
    )
  if loss.weights_start > 0 and loss.weights == 'none':
    raise UserError(
      'class weights to defer with loss.weights_start',
      f'weights_start {loss.weights_start} and no weights',
      'set --config.loss.weights=effective, or remove loss.weights_start',
    )
  if loss.weights != 'none' and config.sampler.name != 'instance':
    raise UserError(
      'loss.weights or a sampler, not both: together they correct the prior twice',
      f'weights {loss.weights}, sampler {config.sampler.name}',
      'set --config.loss.weights=none, or --config.sampler.name=instance',
    )


def _reweighted(
  per_example: Callable,
  weights: np.ndarray,
  first: int,
  logits: Array,
  labels: Array,
  step: Array | int,
) -> Array:
  """The loss of each example, weighted from step `first` on."""
  losses = per_example(logits, labels)
  if (weights == 1).all():
    return losses
  return jnp.where(step >= first, jnp.asarray(weights, losses.dtype)[labels], 1) * losses


def mixed(loss_fn: LossFn, logits: Array, batch: Mapping[str, Array], step: Array | int) -> Array:
  """Losses [N] of a batch whose images may be mixed: share loss(label) + (1 - share) loss(partner).

  For the losses that are linear in the label this is the loss of the mixed label.
  """
  losses = loss_fn(logits, batch['label'], step)
  if 'share' not in batch:
    return losses
  share = batch['share'].astype(losses.dtype)
  return share * losses + (1 - share) * loss_fn(logits, batch['partner_label'], step)


def post_hoc_shift(tau: float, class_counts: np.ndarray) -> np.ndarray:
  """-tau log pi_c, which is added to the logits of a trained net before it predicts.  [C] float32

  Post-hoc logit adjustment (Menon et al. 2021); tau = 0 changes nothing.
  """
  return (-tau * np.log(class_counts_lib.prior(class_counts))).astype(np.float32)


def _of_label(values: Array, labels: Array) -> Array:
  """values[i, labels[i]].   [N, C], [N] -> [N]"""
  return jnp.take_along_axis(values, labels[:, None], axis=-1)[:, 0]


def _power(base: Array, exponent: float) -> Array:
  """base^exponent for base >= 0; its gradient is finite at 0 for every exponent.

  The plain gradient of 0^gamma with gamma < 1 is infinite; multiplied by log p_y = 0 it is NaN.
  """
  safe = jnp.where(base > 0, base, 1)
  return jnp.where(base > 0, safe**exponent, 1.0 if exponent == 0 else 0.0)
