"""Gradient surgery in training: the gradient of a step, and the measurements between steps.

There are two ways to pay for the Gram of the class gradients that the weights follow from:

- amortised, surgery.every = K > 1: it is measured every K steps, and the weights multiply the
  losses of their classes until the next measurement. With BatchNorm it is that of training batches;
  without it, that of training images as they are, without augmentation.
- exact, surgery.every = 1: it is that of the step's own batch, inside the compiled step.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import Array

from csba_jax.data import pipeline
from csba_jax.data.random_draws import permutation
from csba_jax.errors import NotFinite, UserError
from csba_jax.files import expanded
from csba_jax.gradients import batch_sums
from csba_jax.gradients import surgery as library
from csba_jax.gradients.batch_sums import Batch, ForwardFn
from csba_jax.gradients.conflict import Conflict
from csba_jax.gradients.gram import gram, parameter_names
from csba_jax.gradients.pullback import losses_and_pullback
from csba_jax.measure import probe
from csba_jax.methods import second_stages
from csba_jax.methods import surgery as methods
from csba_jax.methods.surgery import Surgery
from csba_jax.run.net import Net
from csba_jax.run.state import TrainState
from csba_jax.run.workdir import read_config, read_result
from csba_jax.runtime import backend, sharding
from csba_jax.runtime.progress import say
from csba_jax.training.gradient import Gradient, GradientFn, gradient_of_the_mean

PyTree = Any
SEED = 1_000_003  # added to the run's seed: a measurement has other images than diagnostics.every


def gradient_fn(surgery: Surgery | None, head: str, num_classes: int, devices: int) -> GradientFn:
  """The gradient of the steps of a run.

  Args:
    surgery: of the run; None: the plain gradient.
    head: regular expression of the names of the head's parameters.
    num_classes: C.
    devices: that share a batch.
  """
  if surgery is None:
    return gradient_of_the_mean
  if surgery.every != 1:
    return functools.partial(weighted_gradient, head=head)
  return functools.partial(
    exact_gradient,
    surgery=surgery,
    head=head,
    num_classes=num_classes,
    devices=devices,
  )


def weighted_gradient(
  forward: ForwardFn,
  params: PyTree,
  batch: Batch,
  kept: Mapping[str, PyTree],
  key: Array,
  *,
  head: str,
) -> Gradient:
  """(1/N) sum_i w_{y_i} grad l_i in the shared layers, and the plain gradient in the head.

  One forward pass and one backward pass, and a second one through the head alone. Arguments as in
  `gradient_of_the_mean`; `head` is the regular expression of the head's parameters.
  """
  del key
  losses, pullback, auxiliary = losses_and_pullback(lambda params: forward(params, batch), params)
  share = 1 / len(losses)
  shared = pullback(kept['weights'][batch['label']] * share)
  plain = pullback(jnp.full_like(losses, share))
  direction = jax.tree.map(
    lambda is_head, plain, shared: plain if is_head else shared,
    second_stages.matches(head, params),
    plain,
    shared,
  )
  return Gradient(losses.mean(), direction, auxiliary, *_counted(kept, batch['label']))


def exact_gradient(
  forward: ForwardFn,
  params: PyTree,
  batch: Batch,
  kept: Mapping[str, PyTree],
  key: Array,
  *,
  surgery: Surgery,
  head: str,
  num_classes: int,
  devices: int,
) -> Gradient:
  """sum_c w_c a_c in the shared layers, with weights from the Gram of the batch's own a_c.

  a_c = (1/N) sum_{i: y_i = c} grad l_i; classes that are absent have weight 1. The head takes
  sum_c a_c. Arguments as in `gradient_of_the_mean` and `gradient_fn`.
  """
  statistics = jax.eval_shape(forward, params, batch)[1]  # of BatchNorm, which couples the images
  one_by_one = devices == 1 and not jax.tree.leaves(statistics)
  sums_of = batch_sums.independent if one_by_one else batch_sums.coupled
  sums, losses, auxiliary = sums_of(forward, params, batch, num_classes)
  number = len(batch['label'])
  parts = jax.tree.map(lambda s: s / number, sums)
  in_head = second_stages.matches(head, params)
  chosen = second_stages.matches(surgery.layers or '.', params)
  rows = [
    part
    for part, is_head, take in zip(*map(jax.tree.leaves, (parts, in_head, chosen)), strict=True)
    if take and not is_head
  ]
  found, ones = gram(rows), jnp.ones(num_classes, jnp.float32)
  counts = jnp.bincount(batch['label'], length=num_classes)
  kept = surgery.choose(kept, found, ones, losses / jnp.maximum(counts, 1), key)
  weights = kept['weights']
  direction = jax.tree.map(
    lambda part, is_head: part.sum(0) if is_head else library.combine(weights, part),
    parts,
    in_head,
  )
  kept, shown = _counted(kept, batch['label'])
  shown |= methods.effect(weights, found, ones)
  return Gradient(losses.sum() / number, direction, auxiliary, kept, shown)


def _counted(
  kept: Mapping[str, PyTree], labels: Array
) -> tuple[dict[str, PyTree], dict[str, Array]]:
  """What is kept and shown after a step on these images with the weights in `kept`."""
  weights = kept['weights']
  images = jnp.bincount(labels, length=len(weights)).astype(weights.dtype)
  sums = {'images': kept['images'] + images, 'total': kept['total'] + weights * images}
  return {**kept, **sums}, {'surgery_weights': weights}


def begin(config: ml_collections.ConfigDict, data: pipeline.Data) -> dict[str, PyTree]:
  """What a run keeps before its first step: the weights of its source where it is a control.

  Raises:
    UserError: the source has no weights, those of another run, or other classes.
  """
  kept = methods.initial(config, len(data.class_names))
  wanted = config.surgery
  if wanted.name not in methods.CONTROLS:
    return kept
  folder = expanded(wanted.source)
  result = read_result(folder)
  if not result.get('surgery'):
    raise UserError(
      'surgery.source, the workdir of a run with surgery',
      f'{folder}, a run without',
      'set --config.surgery.source to another one',
    )
  name = read_config(folder)['surgery']['name']
  if name in methods.CONTROLS:
    raise UserError(
      'surgery.source, the workdir of a run that measures its weights',
      f'{folder} with surgery.name={name}, which takes those of another run',
      'set --config.surgery.source to the source of that run',
    )
  if list(result['class_names']) != list(data.class_names):
    raise UserError(
      f'surgery.source with the classes of this run, {", ".join(data.class_names[:5])}, ...',
      f'{", ".join(result["class_names"][:5])}, ... in {folder}',
      'set --config.surgery.source to a run on the same classes',
    )
  weights = np.asarray(result['surgery']['mean_weights'], np.float32)
  if wanted.name == 'random':
    weights = weights[_derangement(config.seed, len(weights))]
  return kept | {'weights': jnp.asarray(weights)}


def _derangement(seed: int, classes: int) -> np.ndarray:
  """The first permutation of the seed that leaves no more than half of the classes in place."""
  found, attempt = np.arange(classes), 0
  while 2 * (found == np.arange(classes)).sum() > classes:
    found, attempt = permutation((seed, 'surgery', attempt), classes), attempt + 1
  return found


def summary(state: TrainState) -> dict[str, Any]:
  """What result.json says: the mean weight of the images of each class, measurements left out."""
  if not state.surgery:
    return {}
  total, images, skipped = jax.device_get(
    [state.surgery[name] for name in ('total', 'images', 'skipped')]
  )
  means = np.where(images > 0, total / np.maximum(images, 1), 1)
  return {'mean_weights': means.tolist(), 'skipped': int(skipped)}


def check_room(config: ml_collections.ConfigDict, net: Net, devices: int) -> None:
  """Raises UserError where layers are named that are not there, or class gradients need more room.

  Args:
    config: of the run.
    net: its variables may be shapes.
    devices: that share the images.
  """
  wanted = config.surgery
  if wanted.name == 'none' or wanted.name in methods.CONTROLS:
    return
  names = parameter_names(net.params)
  shared = [name for name in names if not re.search(net.model.head, name)]
  if not any(re.search(wanted.layers, name) for name in shared):
    raise UserError(
      'surgery.layers that finds parameters outside of the classifier',
      f'{wanted.layers!r}, which finds none of {", ".join(shared[:4])}, ...',
      'set --config.surgery.layers, or leave it empty for all',
    )
  if wanted.every > 1:
    _check_measurement(config, net, devices)
    return
  available, batch = backend.device_bytes(), config.train.batch_size
  rows = backend.classes_at_once(batch, min(backend.ROW_IMAGES, batch))
  each = sum(4 * leaf.size for leaf in jax.tree.leaves(net.params))
  needed = (net.num_classes + rows) * each
  if needed > available:
    raise UserError(
      f'gradients of all classes within the {available / 1e9:.1f} GB of a device, for '
      'surgery.every 1',
      f'{needed / 1e9:.1f} GB for {net.num_classes} classes',
      'set --config.surgery.every above 1, with --config.surgery.layers for some of the layers',
    )


def _check_measurement(config: ml_collections.ConfigDict, net: Net, devices: int) -> None:
  try:
    probe.check_room(net, measured(config), devices, config.surgery.layers or None)
  except UserError as error:
    raise UserError(
      f'{error.expected}, to measure for surgery',
      error.found,
      'set --config.surgery.batches or --config.surgery.images to fewer, or name fewer '
      '--config.surgery.layers',
    ) from error


def measured(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The config of a run whose diagnostics.every is the measurement for its surgery."""
  own = config.copy_and_resolve_references()
  own.seed = (config.seed + SEED) % 2**31
  own.diagnostics.every, own.diagnostics.snapshots, own.diagnostics.loss_levels = 1, '', ''
  own.diagnostics.statistics = 'auto'  # whatever the diagnostics of the run show
  own.diagnostics.batches, own.diagnostics.images = config.surgery.batches, config.surgery.images
  return own


class Measurement:
  """The Gram of a run's class gradients every so many steps, and the weights that follow from it.

  Every measurement draws new images, which are none of those of diagnostics.every.

  Args:
    surgery: of the run, with every > 1.
    net: of the run; its variables may be shapes.
    config: of the run.
    data: of the run.
    layout: devices that share the work.
  """

  def __init__(
    self,
    surgery: Surgery,
    net: Net,
    config: ml_collections.ConfigDict,
    data: pipeline.Data,
    layout: sharding.Layout,
  ):
    self._surgery, self._layout = surgery, layout
    self._key = jax.random.fold_in(jax.random.key(config.seed), SEED)
    own, layers = measured(config), surgery.layers or None
    self._probe = probe.of_config(net, own, data, layout, layers, redraws=True)

  def renew(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The state with weights from a new measurement, and the record of what they change.

    'surgery_losing' counts the classes whose loss a step with the weights so far would raise, on
    the new images, which did not choose these weights; 'surgery_losing_plain' is that of a plain
    step.
    """
    try:
      conflict = self._probe.measure(state)
    except NotFinite as error:
      say(f'surgery keeps its weights: {error}')
      kept = {**state.surgery, 'skipped': state.surgery['skipped'] + 1}
      state = state.replace(surgery=kept)
      return state, _record(state, {})
    found = np.asarray(conflict.grams[conflict.at('shared')], np.float32)
    kept, effect = _renewed(
      dict(state.surgery),
      found,
      self.certain(conflict),
      np.asarray(conflict.prior, np.float32),
      np.asarray(conflict.losses, np.float32),
      jax.random.fold_in(self._key, state.step),
      surgery=self._surgery,
    )
    state = state.replace(surgery=self._layout.place_state(kept))
    unresolved = int((np.diagonal(found) <= 0)[conflict.class_counts > 0].sum())
    shown = {name: float(x) for name, x in effect.items()}
    return state, _record(state, shown | {'surgery_unresolved': unresolved})

  def certain(self, conflict: Conflict) -> np.ndarray:
    """The Gram [C, C] that weights follow from; with 0 for conflict that may be 0, if asked for.

    Over the layers that are measured, but the head.
    """
    at = conflict.at('shared')
    found = conflict.grams[at]
    if self._surgery.uses_intervals:
      found = library.without_uncertain(found, conflict.low[at], conflict.high[at])
    return np.asarray(found, np.float32)


@functools.partial(jax.jit, static_argnames='surgery')
def _renewed(
  kept: dict[str, PyTree],
  found: Array,
  certain: Array,
  prior: Array,
  losses: Array,
  key: Array,
  *,
  surgery: Surgery,
) -> tuple[dict[str, PyTree], dict[str, Array]]:
  """What is kept after a measurement, and the effect of the new weights and of the old ones.

  Weights follow from the Gram `certain`, and effects are those on the whole Gram.
  """
  before = methods.effect(kept['weights'], found, prior)
  kept = surgery.choose(kept, certain, prior, losses, key)
  after = methods.effect(kept['weights'], found, prior)
  losing = {name: before[name] for name in ('surgery_losing', 'surgery_losing_plain')}
  return kept, {name: after[name] for name in ('surgery_length', 'surgery_cosine')} | losing


def _record(state: TrainState, effect: Mapping[str, float]) -> dict[str, Any]:
  weights, skipped = jax.device_get([state.surgery[name] for name in ('weights', 'skipped')])
  return {'surgery_weights': weights.tolist(), **effect, 'surgery_skipped': int(skipped)}
