"""Conflict of the gradient that training takes, where the images of a batch are coupled.

BatchNorm in training makes the loss of an image depend on its batch, and training differentiates
through the statistics of the batch. So a class gradient belongs to a batch: batch b gives
s_cb, the gradient of the sum of the losses of its n_cb images of class c. What is estimated is the
Gram of the class gradients of training,

  g_c = E[s_cb] / E[n_cb],

the expectation over the batches that training draws. The gradient of a step is on average
sum_c E[n_cb] / N g_c, for batches of N images. Noise of one batch adds to norms and, since the
images of a batch are coupled, to inner products too; so only products of *different* batches count.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import scipy.special
from jax import Array
from jax.tree_util import Partial

from csba_jax.errors import UserError
from csba_jax.gradients import arguments
from csba_jax.gradients import batches as batches_lib
from csba_jax.gradients.batches import Batch
from csba_jax.gradients.conflict import Conflict, conflict_matrix
from csba_jax.gradients.dataset import Tick
from csba_jax.gradients.estimate import (
  LEVEL,
  add_scopes,
  describe_result,
  make_conflict,
  no_tick,
)
from csba_jax.gradients.gram import LayerFn, Layers, gram
from csba_jax.gradients.per_class import LossesFn, check_finite, class_sums
from csba_jax.runtime import backend

PyTree = Any


def batch_conflict(
  losses_fn: LossesFn,
  params: PyTree,
  batches: Sequence[Batch],
  *,
  num_classes: int,
  layer_fn: LayerFn | None = None,
  head: str | None = None,
  max_bytes: int = backend.CLASS_GRADIENT_BYTES,
  tick: Tick = no_tick,
  class_names: Sequence[str] | None = None,
  class_counts: np.ndarray | None = None,
  prior: np.ndarray | None = None,
  about: Mapping[str, Any] | None = None,
) -> Conflict:
  """The conflict of training, from a few of its batches: Grams with standard errors.

  It costs one forward pass and C backward passes for each batch. A class that a batch does not
  have adds nothing there. Errors come from a jackknife over batches.

  Args:
    losses_fn: (params, batch) -> [N] losses, coupled or not, such as those of a net in training
      mode.
    params: tree of float arrays.
    batches: B >= 2 of one shape, drawn as training draws them; each a dict of arrays [N, ...] with
      'label' [N] int and an optional 'mask' [N].
    num_classes: C.
    layer_fn: as in `class_grams`.
    head: as in `class_grams`.
    max_bytes: for the class gradients of all batches, which take B C times the memory of the
      parameters. Where they need more, there are several passes, each for some of the layers.
    tick: called with (images done, images in all) after every batch.
    class_names: 'class 0', ... by default.
    class_counts: training images of each class; by default the images of the batches.
    prior: weight of each class in the training loss; by default its share of class_counts.
    about: other facts to keep in the result, as JSON.

  Returns:
    The conflict, with errors and 95 % intervals. A class that fewer than two batches have has a
    Gram of 0 and no interval; one that only two have has no interval.

  Raises:
    UserError: fewer than two batches, or of different shapes; or as in `class_grams`.
  """
  losses_fn, params = arguments.prepare(losses_fn, params)
  batches = arguments.without_explicit_axes(_checked(batches, num_classes))
  arguments.check_max_bytes(max_bytes)
  arguments.check_losses(losses_fn, params, batches[0])
  layers = Layers.of(params, layer_fn, head)
  leaves, rows = jax.tree.leaves(params), len(batches) * num_classes
  layers.check_room(leaves, rows, backend.device_bytes())
  grams: list[np.ndarray] = []
  loss_sums = np.zeros((len(batches), num_classes))
  groups = layers.passes(leaves, rows, max_bytes)
  each = len(batches[0]['label'])
  for number, group in enumerate(groups):
    wanted = tuple(i for layer in group for i in layers.members[layer])
    found = []
    for b, batch in enumerate(batches):
      sums, of_losses = _masked_sums()(
        losses_fn, params, batch, num_classes=num_classes, wanted=wanted
      )
      check_finite(of_losses, sums)
      found.append(dict(zip(wanted, sums, strict=True)))
      loss_sums[b] = np.asarray(of_losses)
      done = number * len(batches) + b + 1
      tick(done * each // len(groups), len(batches) * each)
    for layer in group:
      members = layers.members[layer]
      grams.append(np.asarray(_gram_of_batches()([[of[i] for i in members] for of in found])))
  sizes = np.stack([_counts(batch, num_classes) for batch in batches])
  estimates = unbiased_over_batches(add_scopes(layers, grams), sizes)
  drawn = {'target': 'training batches', 'batches': len(batches), 'batch_size': each}
  counts = sizes.sum(0)
  names = describe_result(class_names, class_counts, prior, counts, drawn, about)
  return make_conflict(layers, estimates[0], estimates[1:], loss_sums.T, sizes.T, names)


def unbiased_over_batches(sums: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, ...]:
  """Gram of class gradients from products of different batches, errors, intervals of cosines.

    G[c, d] = sum_{a != b} <s_ca, s_db> / sum_{a != b} n_ca n_db.

  The variance of an entry is (B - 1) / B sum_b (t_b - mean_b t_b)^2, t_b the entry without batch b;
  t quantiles have B - 1 degrees of freedom. The ratio has a bias of order 1 / B where n_cb varies.

  Args:
    sums: [..., B C, B C] float, Gram of the s_cb in the order (batch, class).
    sizes: [B, C] int, images of each class in each batch.

  Returns:
    (gram, errors, low, high), each [..., C, C] float64.
  """
  number, classes = sizes.shape
  products = np.asarray(sums, np.float64).reshape(*sums.shape[:-2], *2 * (number, classes))
  same = np.einsum('...bcbd->...bcd', products)
  others = products.sum(-2) - same  # [..., B, C, C]: class c of batch b with d of the others
  n = sizes.astype(np.float64)
  pairs_others = n[:, :, None] * (n.sum(0) - n)[:, None]  # [B, C, C], numbers of such pairs
  total, pairs = others.sum(-3), pairs_others.sum(0)
  gram = _divide((total + total.swapaxes(-1, -2)) / 2, pairs)

  # the same without batch b: [..., B, C, C]
  left = total[..., None, :, :] - others - others.swapaxes(-1, -2)
  rest = _divide(left, pairs[None] - pairs_others - pairs_others.swapaxes(-1, -2))
  errors = np.sqrt(_jackknife(rest))
  norms = np.sqrt(np.where((own := np.einsum('...cc->...c', rest)) > 0, own, np.nan))
  cosines = rest / (norms[..., :, None] * norms[..., None, :])
  width = scipy.special.stdtrit(number - 1, 0.5 + LEVEL / 2) * np.sqrt(_jackknife(cosines))
  width = np.where(np.eye(classes, dtype=bool) & ~np.isnan(width), 0, width)
  cosine = conflict_matrix(gram)
  return gram, errors, np.clip(cosine - width, -1, 1), np.clip(cosine + width, -1, 1)


def _of_classes(
  losses_fn: Partial, params: PyTree, batch: Batch, num_classes: int, wanted: tuple[int, ...]
) -> tuple[list[Array], Array]:
  """Sums over the images of each class, of gradients [C, ...] and losses [C]."""
  return class_sums(losses_fn, params, batch, num_classes, False, wanted)


_masked_sums = backend.jit(_of_classes, static_argnames=('num_classes', 'wanted'))


def _checked(batches: Sequence[Batch], num_classes: int) -> list[Batch]:
  """The batches with a mask; UserError where they cannot be compared."""
  if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
    raise UserError('a list of batches', type(batches).__name__, 'pass [batch, batch, ...]')
  given = list(batches)
  if len(given) < 2:
    raise UserError('at least 2 batches', f'{len(given)}', 'draw more')
  for batch in given:
    batches_lib.check(batch, num_classes)
  found = [dict(batch) for batch in given]
  for batch in found:
    if batches_lib.is_stacked(batch):
      raise UserError(
        'flat batches, arrays [N, ...]', 'class-stacked ones', 'pass batches as training has them'
      )
  shapes = [{name: np.shape(values) for name, values in batch.items()} for batch in found]
  for b, shape in enumerate(shapes):
    if shape != shapes[0]:
      raise UserError(
        'batches of one shape',
        f'{shapes[0]} first, {shape} in batch {b}',
        "fill the smaller ones up, with 'mask' 0",
      )
  return [batch | {'mask': batches_lib.valid(batch)} for batch in found]


def _counts(batch: Batch, num_classes: int) -> np.ndarray:
  """Images of each class that are not padding, [C]."""
  label, mask = np.asarray(batch['label']), np.asarray(batch['mask'], bool)
  return np.bincount(label[mask], minlength=num_classes)


def _gram(rows: list[list[Array]]) -> Array:
  return gram([jax.numpy.concatenate(leaf) for leaf in zip(*rows, strict=True)])


_gram_of_batches = backend.jit(_gram)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """a / b, and 0 where b is 0."""
  return np.where(b > 0, a / np.maximum(b, 1), 0)


def _jackknife(x: np.ndarray) -> np.ndarray:
  """(B - 1) / B sum_b (x_b - mean_b x_b)^2.   [..., B, C, C] -> [..., C, C]"""
  number = x.shape[-3]
  return (number - 1) / number * ((x - x.mean(-3, keepdims=True)) ** 2).sum(-3)
