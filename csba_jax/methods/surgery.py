"""Gradient surgery of a run: what config.surgery names, and what a run keeps of it between steps.

The weights w [C] change the direction of a step in the shared layers from sum_c a_c to
sum_c w_c a_c, where a_c is what class c adds to the gradient. The classifier head takes the plain
gradient. The aggregators, from a Gram to weights: `csba_jax.gradients.surgery`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import Array, lax

from csba_jax.errors import UserError
from csba_jax.gradients import surgery as library
from csba_jax.gradients.conflict import majority_minority

PyTree = Any
# controls, whose weights are those of another run: its mean weights, and these with the classes
# permuted
CONTROLS = ('fixed', 'random')
NAMES = ('none', *library.AGGREGATORS, *CONTROLS)
# fields of config.surgery that an aggregator takes as its settings
SETTINGS: Mapping[str, tuple[str, ...]] = {
  'cagrad': ('c',),
  'gradvac': ('beta',),
  'gradnorm': ('alpha', 'rate'),
  'interference': ('share', 'protect'),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Surgery:
  """How the weights of a run are chosen."""

  every: int  # steps between measurements; 1: every step, from its own batch; 0: never
  aggregate: Callable[..., tuple[Array, PyTree]] | None  # None: the weights stay as they are
  keeps_length: bool  # whether the step keeps its length in the shared layers
  uses_intervals: bool  # whether negative entries of a measured Gram that may be 0 count as 0
  layers: str  # regular expression of the shared layers whose Gram is taken; '': all

  def choose(
    self, kept: Mapping[str, PyTree], gram: Array, prior: Array, losses: Array, key: Array
  ) -> dict[str, PyTree]:
    """What a run keeps after a new Gram; with the weights that it had where these are not finite.

    Args:
      kept: what it keeps, see `initial`.
      gram: [C, C] of class gradients g_c.
      prior: [C], such that a_c = prior_c g_c.
      losses: [C] mean loss of each class.
      key: decides the order of classes where the aggregator takes them in a random one.
    """
    assert self.aggregate is not None  # the weights of a control do not change
    weights, state = self.aggregate(gram, prior, kept['aggregator'], key, losses=losses)
    if self.keeps_length:
      weights = library.keep_length(weights, gram, prior)
    weights = jnp.where(jnp.diagonal(gram) > 0, weights, 1)  # classes that are not there
    finite = jnp.isfinite(weights).all() & jnp.isfinite(gram).all()

    def new(new: Array, old: Array) -> Array:
      return jnp.where(finite, new, old)

    return {
      **kept,
      'weights': new(weights, kept['weights']),
      'aggregator': jax.tree.map(new, state, kept['aggregator']),
      'skipped': kept['skipped'] + jnp.where(finite, 0, 1),
    }


def check(config: ml_collections.ConfigDict) -> None:
  """Raises UserError for a config whose surgery does not exist, or does not go with the rest."""
  surgery = config.surgery
  if surgery.name not in NAMES:
    raise UserError(
      f'surgery.name among {", ".join(NAMES)}', repr(surgery.name), 'set --config.surgery.name'
    )
  if (surgery.name in CONTROLS) != (surgery.source != ''):
    raise UserError(
      'surgery.source with surgery.name fixed or random alone: the workdir of a run with surgery',
      f'name {surgery.name!r}, source {surgery.source!r}',
      'set --config.surgery.source=WORKDIR, or remove it',
    )
  try:
    re.compile(surgery.layers)
  except re.error as error:
    raise UserError(
      'surgery.layers, a regular expression of names of layers',
      f'{surgery.layers!r}: {error}',
      'correct it, or set --config.surgery.layers= for all shared layers',
    ) from error
  if surgery.name == 'none':
    return
  if config.model.init and config.train.frozen == 1:
    raise UserError(
      'weights that move, for gradient surgery',
      f'surgery.name {surgery.name} with train.frozen 1',
      'set --config.train.frozen below 1, or --config.surgery.name=none',
    )
  if surgery.name == 'gradnorm' and surgery.every == 1 and config.loss.weights_start > 0:
    raise UserError(
      'losses of one kind in the whole run, for surgery.name gradnorm with surgery.every 1',
      f'class weights from loss.weights_start {config.loss.weights_start} on',
      'set --config.surgery.every above 1, or --config.loss.weights_start=0',
    )
  if config.mixing.name != 'none':
    raise UserError(
      'images of one class each, for gradients of classes',
      f'surgery.name {surgery.name} with mixing.name {config.mixing.name}',
      'set --config.mixing.name=none, or --config.surgery.name=none',
    )
  if config.stage.method != 'none':
    raise UserError(
      'a run that trains shared layers, for gradient surgery',
      f'surgery.name {surgery.name} with stage.method {config.stage.method}, which trains the '
      'classifier alone',
      'set --config.surgery.name=none; the first stage may have surgery',
    )


def build(config: ml_collections.ConfigDict, class_counts: np.ndarray) -> Surgery | None:
  """The surgery of a config, None for 'none'; UserError as in `check`."""
  check(config)
  surgery = config.surgery
  if surgery.name == 'none':
    return None
  if surgery.name in CONTROLS:
    return Surgery(0, None, False, False, '')
  settings = {name: surgery[name] for name in SETTINGS.get(surgery.name, ())}
  if 'protect' in settings:
    _, minority = majority_minority(class_counts)
    settings['protect'] = minority if surgery.protect == 'minority' else None
  return Surgery(
    surgery.every,
    library.build(surgery.name, **settings),
    surgery.keep_length,
    surgery.certain,
    surgery.layers,
  )


def reads_counts(config: ml_collections.ConfigDict) -> bool:
  """Whether the compiled step depends on the class counts."""
  return config.surgery.name == 'interference' and config.surgery.protect == 'minority'


def initial(config: ml_collections.ConfigDict, num_classes: int) -> dict[str, PyTree]:
  """What a run keeps of its surgery, before the first step; {} without surgery.

  'weights' [C]: of the next step. 'images' [C]: images of each class in the steps with weights, and
  'total' [C]: the sum of their weights. 'skipped': measurements that were not finite. 'aggregator':
  what the aggregator keeps.
  """
  name = config.surgery.name
  if name == 'none':
    return {}
  return {
    'weights': jnp.ones(num_classes, jnp.float32),
    'images': jnp.zeros(num_classes, jnp.float32),
    'total': jnp.zeros(num_classes, jnp.float32),
    'skipped': jnp.zeros((), jnp.int32),
    'aggregator': {} if name in CONTROLS else library.initial(name, num_classes),
  }


def effect(weights: Array, gram: Array, prior: Array) -> dict[str, Array]:
  """What weights change of a step in the shared layers, to first order.

  With d_c = <g_c, sum_d w_d a_d>, in which the loss of class c falls by d_c times the rate.

  Args:
    weights: [C].
    gram: [C, C] of g_c.
    prior: [C], a_c = prior_c g_c.

  Returns:
    'surgery_length': |sum_c w_c a_c| / |sum_c a_c|, and 'surgery_cosine' between the two; NaN where
    a squared norm is not positive, as that of an unbiased Gram may be. 'surgery_losing' and
    'surgery_losing_plain': number of classes whose loss rises, d_c < 0, with the weights and
    without.
  """

  def product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)

  plain, cut = product(gram, prior), product(gram, weights * prior)
  before, after = product(prior, plain), product(weights * prior, cut)
  usable = (before > 0) & (after > 0)
  before, after = (jnp.where(usable, x, jnp.nan) for x in (before, after))
  return {
    'surgery_length': jnp.sqrt(after / before),
    'surgery_cosine': product(prior, cut) / jnp.sqrt(before * after),
    'surgery_losing': (cut < 0).sum(),
    'surgery_losing_plain': (plain < 0).sum(),
  }
