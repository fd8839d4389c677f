"""Gradient surgery over classes: from the Gram of class gradients to a weight for each class.

G[c, d] = <g_c, g_d> and the prior pi give rows a_c = pi_c g_c, whose sum is the gradient of the
plain step. An aggregator chooses weights w from the inner products A[c, d] = pi_c pi_d G[c, d] of
the rows, and the direction is sum_c w_c a_c. With all weights 1 it is the plain step. Each of
`AGGREGATORS` is a pure function, for `jax.jit` and `jax.vmap`, in float32:
  fun(gram [C, C], prior [C], state, key, *, losses=None, settings) -> (weights [C], state)
`initial` makes the first state, and `build` binds checked settings.

A class is absent where its diagonal is not positive or not finite, its prior is not positive, or
its inner product with a class that is there is not finite. It keeps weight 1 and stays out of the
problem. Where at most one class is there, all weights are exactly 1. An unbiased Gram need not be
semidefinite: all but `gradnorm` and `interference`, which have no need of it, then take the nearest
semidefinite matrix in place of the cosines. Should weights overflow all the same, all are 1.
"""

import difflib
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from csba_jax.errors import UserError, shown
from csba_jax.gradients import aggregators
from csba_jax.gradients import gram as gram_lib

PyTree = Any
Aggregator = Callable[..., tuple[Array, PyTree]]
LONGEST = 10.0  # factor of `keep_length` at most

AGGREGATORS: dict[str, Aggregator] = {
  'pcgrad': aggregators.pcgrad,
  'upgrad': aggregators.upgrad,
  'dual_projection': aggregators.dual_projection,
  'cagrad': aggregators.cagrad,
  'gradvac': aggregators.gradvac,
  'mgda': aggregators.mgda,
  'gradnorm': aggregators.gradnorm,
  'interference': aggregators.interference,
}
_RANGES = {'c': (0, np.inf), 'beta': (0, 1), 'alpha': (0, np.inf), 'rate': (0, 1), 'share': (0, 1)}


def initial(name: str, num_classes: int) -> PyTree:
  """The state that an aggregator starts with, {} where it has none; UserError for another name."""
  _check_name(name)
  whole = isinstance(num_classes, int | np.integer) and not isinstance(num_classes, bool)
  if not whole or num_classes < 1:
    raise UserError('num_classes >= 1', shown(num_classes), 'pass the number of classes')
  if name == 'gradvac':
    return {'targets': jnp.zeros((num_classes, num_classes))}
  if name == 'gradnorm':
    return {'weights': jnp.ones(num_classes), 'losses': jnp.zeros(num_classes)}
  return {}


def build(name: str, **settings: Any) -> Aggregator:
  """An aggregator with its settings, (gram, prior, state, key, *, losses=None) -> (weights, state).

  Raises:
    UserError: no such aggregator, a setting that it does not take, or one out of range.

  Example:
    >>> gram = jnp.array([[18.0, -22.0], [-22.0, 38.0]])
    >>> pcgrad = build('pcgrad')
    >>> pcgrad(gram, jnp.ones(2), initial('pcgrad', 2), jax.random.key(0))[0].round(4)
    Array([2.2222, 1.5789], dtype=float32)
  """
  _check_name(name)
  known = [
    parameter.name
    for parameter in inspect.signature(AGGREGATORS[name]).parameters.values()
    if parameter.kind is parameter.KEYWORD_ONLY and parameter.name != 'losses'
  ]
  for setting, value in settings.items():
    if setting not in known:
      raise UserError(
        f'settings of {name}: {", ".join(known) or "none"}', setting, 'leave it out, or correct it'
      )
    _check_setting(setting, value)
  return functools.partial(AGGREGATORS[name], **settings)


def without_uncertain(gram: Array, low: Array, high: Array) -> Array:
  """The Gram with 0 for negative entries between classes that cannot be told from 0.

  Args:
    gram: [..., C, C].
    low: [..., C, C], lower ends of intervals of the entries, or of their cosines.
    high: [..., C, C], upper ends. An interval leaves the sign open where it includes 0, or where an
      end is NaN.

  Returns:
    [..., C, C]; what is positive, certain or on the diagonal stays.
  """
  gram, low, high = map(jnp.asarray, (gram, low, high))
  open_sign = ~((low > 0) | (high < 0)) | jnp.isnan(low) | jnp.isnan(high)
  between = jnp.broadcast_to(~jnp.eye(gram.shape[-1], dtype=bool), gram.shape)
  return jnp.where(between & open_sign & (gram < 0), 0, gram)


def keep_length(weights: Array, gram: Array, prior: Array) -> Array:
  """Weights times |sum_c a_c| / |sum_c w_c a_c|: the direction at the length of the plain step.

  [C], [C, C], [C] -> [C]. The factor is 10 at most, and 1 where all weights are 1. Where one of the
  two squared lengths is not positive, as of an unbiased Gram, it brings the mean weight
  sum_c w_c pi_c / sum_c pi_c to 1. Absent classes have no part in these sums, but their weights are
  multiplied too.
  """
  rows = aggregators.rows_of(gram, prior)
  weights = jnp.asarray(weights, jnp.float32)
  aggregators.check_shape('weights', weights, rows.lengths.shape)

  def squared(scaled: Array) -> Array:
    return scaled @ jnp.matmul(rows.cosines, scaled, precision=lax.Precision.HIGHEST)

  plain, found = squared(rows.lengths), squared(weights * rows.lengths)
  changed, known = (weights != 1).any(), (plain > 0) & (found > 0)
  factor = jnp.sqrt(jnp.where(known, plain, 1) / jnp.where(known, found, 1))
  pi = jnp.where(rows.present, jnp.asarray(prior, jnp.float32), 0)
  total, mean = pi.sum(), (weights * pi).sum()
  usable = (total > 0) & (mean > 0)
  of_mean = jnp.where(usable, total, 1) / jnp.where(usable, mean, 1)
  factor = jnp.where(changed, jnp.where(known, factor, of_mean), 1)
  return weights * jnp.minimum(factor, LONGEST)


class SurgeryState(NamedTuple):
  """What `gradient_surgery` keeps between steps."""

  count: Array  # steps, int32
  aggregator: PyTree  # state of the aggregator


def gradient_surgery(
  name: str,
  prior: Array,
  *,
  seed: int = 0,
  head: str | None = None,
  same_length: bool = False,
  **settings: Any,
) -> optax.GradientTransformationExtraArgs:
  """Surgery as an Optax transformation: class gradients in, sum_c w_c pi_c g_c out.

  The leaves of the updates have a leading class axis, [C, ...], as `class_gradients` returns them;
  the axis is gone on the way out. It stands first in a chain, before momentum and weight decay. The
  Gram is formed leaf by leaf, in float32 at least. `update(..., losses=)` reaches the aggregator.

  Args:
    name: of `AGGREGATORS`.
    prior: pi [C], the weight of each class in the training loss.
    seed: of the keys, by `jax.random.fold_in` of the number of the step.
    head: regular expression that finds the names of the classifier's parameters. They take the
      plain sum, and stay out of the Gram.
    same_length: whether the step outside of the head keeps its length, by `keep_length`.
    settings: of the aggregator, as in `build`.

  Raises:
    UserError: as `build`; a prior that is not C numbers of at least 0; a head as in `class_grams`;
      updates without a class axis.

  Example:
    >>> tx = optax.chain(gradient_surgery('upgrad', np.array([0.9, 0.1])), optax.sgd(0.1))
    >>> params = {'kernel': jnp.zeros(3)}
    >>> rows = {'kernel': jnp.array([[1.0, 0.0, 0.0], [-1.0, 2.0, 0.0]])}  # class gradients
    >>> updates, state = tx.update(rows, tx.init(params), params)
    >>> updates['kernel'].round(3)
    Array([-0.072, -0.056, -0.   ], dtype=float32)
  """
  aggregate = build(name, **settings)
  pi = _checked_prior(prior)
  if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
    raise UserError('seed, an integer', shown(seed), 'pass an integer')

  def init(params: PyTree) -> SurgeryState:
    gram_lib.Layers.of(params, None, head)
    return SurgeryState(jnp.zeros((), jnp.int32), initial(name, len(pi)))

  def update(
    updates: PyTree,
    state: SurgeryState,
    params: PyTree | None = None,
    *,
    losses: Array | None = None,
    **others: Any,
  ) -> tuple[PyTree, SurgeryState]:
    del params, others
    leaves, tree = jax.tree.flatten(updates)
    _check_class_axis(updates, len(pi))
    layers = gram_lib.Layers.of(updates, None, head)
    groups = zip(layers.members, layers.in_head, strict=True)
    plain = {i for members, in_head in groups if in_head for i in members}
    rows = [leaf for i, leaf in enumerate(leaves) if i not in plain]
    found = gram_lib.gram(rows) if rows else jnp.zeros((len(pi), len(pi)))
    key = jax.random.fold_in(jax.random.key(seed), state.count)
    weights, kept = aggregate(found, pi, state.aggregator, key, losses=losses)
    if same_length:
      weights = keep_length(weights, found, pi)
    combined = [combine(pi if i in plain else weights * pi, leaf) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, combined), SurgeryState(state.count + 1, kept)

  return optax.GradientTransformationExtraArgs(init, update)


def combine(weights: Array, leaf: Array) -> Array:
  """sum_c w_c g_c, in float32 at least.   [C], [C, ...] -> [...]"""
  dtype = gram_lib.accumulator(leaf.dtype)
  total = jnp.tensordot(
    weights.astype(dtype), leaf.astype(dtype), axes=1, precision=lax.Precision.HIGHEST
  )
  return total.astype(leaf.dtype)


def _checked_prior(prior: Array) -> Array:
  pi = np.asarray(prior)
  numbers = pi.ndim == 1 and pi.size > 0 and pi.dtype.kind in 'iuf'
  if not numbers or not (pi >= 0).all() or not 0 < pi.sum() < np.inf:
    raise UserError(
      'prior, one number of at least 0 for each class, not all 0',
      shown(pi.tolist()),
      'pass the weight of each class in the training loss, such as its share of the images',
    )
  return jnp.asarray(pi, jnp.float32)


def _check_class_axis(updates: PyTree, classes: int) -> None:
  names = gram_lib.parameter_names(updates)
  for name, leaf in zip(names, jax.tree.leaves(updates), strict=True):
    if jnp.shape(leaf)[:1] != (classes,):
      raise UserError(
        f'updates with a leading axis of {classes} classes, as class_gradients returns them',
        f'{name or "an array"} of shape {list(jnp.shape(leaf))}',
        'put this transformation first in the chain, and give it class gradients',
      )


def _check_name(name: str) -> None:
  if name in AGGREGATORS:
    return
  near = difflib.get_close_matches(str(name), AGGREGATORS, n=1, cutoff=0.5)
  raise UserError(
    f'an aggregator among {", ".join(AGGREGATORS)}',
    shown(name),
    f'use {near[0]}' if near else 'use one of these',
  )


def _check_setting(name: str, value: Any) -> None:
  if name == 'protect':
    if value is not None and (np.ndim(value) != 1 or np.asarray(value).dtype != bool):
      raise UserError('protect, bool [C], or None for all', shown(value), 'pass True or False each')
    return
  low, high = _RANGES[name]
  number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
  if not number or not low <= value <= high or math.isinf(value):
    limits = f'from {low} to {high}' if high < math.inf else f'of at least {low}'
    raise UserError(f'{name}, a number {limits}', shown(value), 'correct it')
