"""Losses per example: (logits [N, C], labels [N] int, step) -> [N] nats, in one visible table.

Reduction and masks belong to the caller: that is what makes class gradients possible. The step of
the run is there for deferred re-weighting.
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
from csba_jax.errors import UserError

LossFn = Callable[[Array, Array, Array | int], Array]


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
  """Cross-entropy of s (cos - m_y e_y),  m_c = max_margin (n_min / n_c)^(1/4).

  Cao et al. 2019. [N, C], [N] -> [N] nats. The logits are s cos already, of the cosine classifier;
  `scale` is its s. Margins are cosines, and the training loss is the only place that has them.
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

  Predictions use the plain logits.
  """
  shift = jnp.asarray(tau * np.log(class_counts_lib.prior(class_counts)), logits.dtype)
  return optax.softmax_cross_entropy_with_integer_labels(logits + shift[None], labels)


def balanced_softmax(logits: Array, labels: Array, *, class_counts: np.ndarray) -> Array:
  """-log(n_y e^{z_y} / sum_c n_c e^{z_c})  (Ren et al. 2020).   [N, C], [N] -> [N] nats

  Logit adjustment with tau = 1: a constant added to all logits changes nothing, so counts serve as
  well as the prior. Predictions use the plain logits.
  """
  counts = jnp.asarray(class_counts, logits.dtype)
  return optax.softmax_cross_entropy_with_integer_labels(logits + jnp.log(counts)[None], labels)


def vector_scaling(
  logits: Array, labels: Array, *, class_counts: np.ndarray, gamma: float, tau: float
) -> Array:
  """Cross-entropy of (n_c / n_max)^gamma z_c + tau log pi_c  (VS loss, Kini et al. 2021).

  [N, C], [N] -> [N] nats. gamma = 0 is logit adjustment. Predictions use the plain logits.
  """
  counts = np.asarray(class_counts, np.float64)
  factors = jnp.asarray((counts / counts.max()) ** gamma, logits.dtype)
  return logit_adjustment(logits * factors[None], labels, class_counts=class_counts, tau=tau)


class Kind(NamedTuple):
  """A row of LOSSES."""

  function: Callable[..., Array]  # (logits, labels, *, class_counts, **options) -> [N]
  options: tuple[str, ...] = ()  # fields of config.loss, or of config.model, that it takes
  linear: bool = True  # in the label's distribution: only then are mixed labels mixed losses
  heads: tuple[str, ...] = ('linear', 'scaled')  # model.head that its logits come from
  counts: bool = True  # whether it depends on class_counts


LOSSES: Mapping[str, Kind] = {
  'cross_entropy': Kind(cross_entropy, counts=False),
  'balanced_softmax': Kind(balanced_softmax),
  'logit_adjustment': Kind(logit_adjustment, ('tau',)),
  'vector_scaling': Kind(vector_scaling, ('gamma', 'tau')),
  'label_smoothing': Kind(label_smoothing, ('smoothing',), counts=False),
  'label_aware_smoothing': Kind(label_aware_smoothing, ('smoothing', 'smoothing_tail')),
  'focal': Kind(focal, ('gamma',), linear=False, counts=False),
  'dual_focal': Kind(dual_focal, ('gamma',), linear=False, counts=False),
  'ldam': Kind(ldam, ('max_margin', 'scale'), linear=False, heads=('cosine',)),
}


def build(config: ml_collections.ConfigDict, class_counts: np.ndarray, total_steps: int) -> LossFn:
  """The loss that config.loss describes, bound to the training counts [C].

  An example's loss is multiplied by `class_weights` of its class from the step on that
  weights_start names (deferred re-weighting, DRW, Cao et al. 2019).

  Raises:
    UserError: unknown names, a class without images, an option out of range, parts that do not go
      together.
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
  kind = kind_of(config.loss.name)
  options = {
    name: (config.loss if name in config.loss else config.model)[name] for name in kind.options
  }
  class_counts_lib.prior(class_counts)
  counts = np.asarray(class_counts, np.float64)
  return functools.partial(kind.function, class_counts=counts, **options)


def counts_that_matter(
  config: ml_collections.ConfigDict, class_counts: np.ndarray
) -> tuple[int, ...]:
  """The counts [C] as `build` and the mixing of a config know them: ones where they know none.

  So that runs whose classes differ in size by an image or two can share one compiled program.
  """
  blind = not kind_of(config.loss.name).counts and config.loss.weights == 'none'
  if blind and config.mixing.name != 'remix':
    return (1,) * len(class_counts)
  return tuple(np.asarray(class_counts).tolist())


def class_weights(config: ml_collections.ConfigDict, class_counts: np.ndarray) -> np.ndarray:
  """w_c / sum_d pi_d w_d of the weights w that config.loss names.   [C] float64

  PyTorch's weighted mean, with the mean weight of the training set in place of the batch's, so
  that a batch's loss stays a plain mean over examples.
  """
  if config.loss.weights == 'none':
    return np.ones(len(class_counts))
  weights = class_counts_lib.class_weights(config.loss.weights, class_counts, config.loss.beta)
  return weights / (class_counts_lib.prior(class_counts) @ weights)


def kind_of(name: str) -> Kind:
  """The row of LOSSES, or a UserError that lists them."""
  if name not in LOSSES:
    raise UserError(f'loss.name among {", ".join(LOSSES)}', repr(name), 'set --config.loss.name')
  return LOSSES[name]


def check_fits(config: ml_collections.ConfigDict) -> None:
  """Raises UserError for parts of a config that do not go with its loss or its weights."""
  loss, kind = config.loss, kind_of(config.loss.name)
  if config.model.head not in kind.heads:
    raise UserError(
      f'model.head {" or ".join(kind.heads)} for loss.name {loss.name}',
      repr(config.model.head),
      f'set --config.model.head={kind.heads[0]}',
    )
  if config.mixing.name != 'none' and not kind.linear:
    linear = ', '.join(name for name, kind in LOSSES.items() if kind.linear)
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
      'loss.weights or a sampler: together they correct the prior twice',
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

  Equal to the loss under the mixed label for the losses that are linear in it.
  """
  losses = loss_fn(logits, batch['label'], step)
  if 'share' not in batch:
    return losses
  share = batch['share'].astype(losses.dtype)
  return share * losses + (1 - share) * loss_fn(logits, batch['partner_label'], step)


def post_hoc_shift(tau: float, class_counts: np.ndarray) -> np.ndarray:
  """-tau log pi_c, added to the logits of a trained net before it predicts.   [C] float32

  Post-hoc logit adjustment (Menon et al. 2021); tau = 0 changes nothing.
  """
  return (-tau * np.log(class_counts_lib.prior(class_counts))).astype(np.float32)


def _of_label(values: Array, labels: Array) -> Array:
  """values[i, labels[i]].   [N, C], [N] -> [N]"""
  return jnp.take_along_axis(values, labels[:, None], axis=-1)[:, 0]


def _power(base: Array, exponent: float) -> Array:
  """base^exponent for base >= 0; its gradient is finite at 0 for every exponent.

  A gradient through 0^gamma with gamma < 1 is infinite, and times log p_y = 0 it is NaN.
  """
  safe = jnp.where(base > 0, base, 1)
  return jnp.where(base > 0, safe**exponent, 1.0 if exponent == 0 else 0.0)
