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

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from csba_jax.errors import UserError
from csba_jax.gradients import arguments
from csba_jax.gradients import batches as batches_lib
from csba_jax.gradients.batches import Batch
from csba_jax.gradients.conflict import (
  Conflict,
  class_intervals,
  class_measures,
  conflict_matrix,
)
from csba_jax.gradients.dataset import Tick
from csba_jax.gradients.estimate import (
  add_scopes,
  describe_result,
  make_conflict,
  no_tick,
)
from csba_jax.gradients.fold_statistics import quantile
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
  mesh: Mesh | None = None,
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
      'label' [N] int and an optional 'mask' [N]. Each is asked for once in a pass over the layers,
      so that a sequence may draw it then.
    num_classes: C.
    layer_fn: as in `class_grams`.
    head: as in `class_grams`.
    max_bytes: for the class gradients of all batches, which take B C times the memory of the
      parameters. Where they need more, there are several passes, each for some of the layers.
    tick: called with (images done, images in all) after every batch.
    mesh: devices that share the images of every batch, where their number divides N; else each does
      all of them. Several processes pass the same batches. None: one device.
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
  if isinstance(batches, Mapping) or not isinstance(batches, Sequence):
    raise UserError('a list of batches', type(batches).__name__, 'pass [batch, batch, ...]')
  if len(batches) < 2:
    raise UserError('at least 2 batches', f'{len(batches)}', 'draw more')
  first = _checked(batches[0], num_classes)
  arguments.check_max_bytes(max_bytes)
  arguments.check_mesh(mesh, params)
  arguments.check_losses(losses_fn, params, first)
  layers = Layers.of(params, layer_fn, head)
  leaves, rows = jax.tree.leaves(params), len(batches) * num_classes
  layers.check_room(leaves, rows, backend.device_bytes())
  grams: list[np.ndarray] = []
  loss_sums = np.zeros((len(batches), num_classes))
  sizes = np.zeros((len(batches), num_classes), np.int64)
  groups = layers.passes(leaves, rows, max_bytes)
  each = len(first['label'])
  for number, group in enumerate(groups):
    wanted = tuple(i for layer in group for i in layers.members[layer])
    found = []
    for b in range(len(batches)):
      batch = first if b == 0 == number else _checked(batches[b], num_classes)
      _check_shapes(batch, first, b)
      sizes[b] = _counts(batch, num_classes)
      sums, of_losses = compiled_sums()(
        losses_fn, params, _placed(batch, mesh), num_classes=num_classes, wanted=wanted, mesh=mesh
      )
      check_finite(of_losses, sums)
      found.append(dict(zip(wanted, sums, strict=True)))
      loss_sums[b] = np.asarray(of_losses)
      done = number * len(batches) + b + 1
      tick(done * each // len(groups), len(batches) * each)
    for layer in group:
      members = layers.members[layer]
      grams.append(np.asarray(_gram_of_batches()([[of[i] for i in members] for of in found])))
  sums = add_scopes(layers, grams)
  estimates = unbiased_over_batches(sums, sizes)
  drawn = {'target': 'training batches', 'batches': len(batches), 'batch_size': each}
  counts = sizes.sum(0)
  names = describe_result(class_names, class_counts, prior, counts, drawn, about)
  known = class_intervals_over_batches(sums[0], sizes, names['prior'])
  return make_conflict(layers, estimates[0], estimates[1:], loss_sums.T, sizes.T, names, known)


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
  gram, rest = _with_and_without(sums, sizes)
  errors = np.sqrt(_jackknife(rest))
  norms = np.sqrt(np.where((own := np.einsum('...cc->...c', rest)) > 0, own, np.nan))
  cosines = rest / (norms[..., :, None] * norms[..., None, :])
  width = float(quantile(number)) * np.sqrt(_jackknife(cosines))
  width = np.where(np.eye(classes, dtype=bool) & ~np.isnan(width), 0, width)
  cosine = conflict_matrix(gram)
  return gram, errors, np.clip(cosine - width, -1, 1), np.clip(cosine + width, -1, 1)


def class_intervals_over_batches(
  sums: np.ndarray, sizes: np.ndarray, prior: np.ndarray
) -> np.ndarray:
  """95 % intervals of `class_measures`, from the same jackknife over batches.

  Args:
    sums: [B C, B C], as in `unbiased_over_batches`.
    sizes: [B, C].
    prior: [C].

  Returns:
    [3, 2, C], lower and upper ends; NaN where a measure is undefined without one of the batches.
  """
  gram, rest = _with_and_without(sums, sizes)
  values, without = (
    class_measures(g @ prior, np.einsum('...cc->...c', g), prior) for g in (gram, rest)
  )
  number = len(sizes)
  spread = (number - 1) / number * ((without - without.mean(0, keepdims=True)) ** 2).sum(0)
  return class_intervals(spread, values, float(quantile(number)))


def _with_and_without(sums: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Grams [..., C, C] from products of different batches, and the same without each batch.

  The second is [..., B, C, C].
  """
  number, classes = sizes.shape
  products = np.asarray(sums, np.float64).reshape(*sums.shape[:-2], *2 * (number, classes))
  same = np.einsum('...bcbd->...bcd', products)
  others = products.sum(-2) - same  # [..., B, C, C]: class c of batch b with d of the others
  n = sizes.astype(np.float64)
  pairs_others = n[:, :, None] * (n.sum(0) - n)[:, None]  # [B, C, C], numbers of such pairs
  total, pairs = others.sum(-3), pairs_others.sum(0)
  gram = _divide((total + total.swapaxes(-1, -2)) / 2, pairs)

  left = total[..., None, :, :] - others - others.swapaxes(-1, -2)
  return gram, _divide(left, pairs[None] - pairs_others - pairs_others.swapaxes(-1, -2))


def _masked_sums(
  losses_fn: Partial,
  params: PyTree,
  batch: Batch,
  num_classes: int,
  wanted: tuple[int, ...],
  mesh: Mesh | None = None,
) -> tuple[list[Array], Array]:
  """Sums over the images of each class, of gradients [C, ...] and losses [C], on every device."""
  found = class_sums(losses_fn, params, batch, num_classes, False, wanted)
  if mesh is None:
    return found
  whole = NamedSharding(mesh, PartitionSpec())
  return jax.lax.with_sharding_constraint(found, jax.tree.map(lambda _: whole, found))


compiled_sums = backend.jit(_masked_sums, static_argnames=('num_classes', 'wanted', 'mesh'))


def shardings(batch: Batch, mesh: Mesh) -> dict[str, Any]:
  """A sharding for each array of a batch: images are split where that is possible, labels not."""
  whole = NamedSharding(mesh, PartitionSpec())
  split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  images = whole if np.shape(batch['label'])[0] % mesh.size else split
  return {
    name: jax.tree.map(lambda _, to=whole if name in ('label', 'mask') else images: to, values)
    for name, values in batch.items()
  }


def _placed(batch: Batch, mesh: Mesh | None) -> Batch:
  """The batch on the devices of the mesh; every process has all of it."""
  if mesh is None:
    return batch

  def place(values: Any, sharding: NamedSharding) -> Array:
    host = np.asarray(values)
    return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])

  return jax.tree.map(place, dict(batch), shardings(batch, mesh))


def _checked(batch: Batch, num_classes: int) -> dict[str, Any]:
  """The batch with a mask; UserError where it is none."""
  batches_lib.check(batch, num_classes)
  if batches_lib.is_stacked(batch):
    raise UserError(
      'flat batches, arrays [N, ...]', 'class-stacked ones', 'pass batches as training has them'
    )
  return arguments.without_explicit_axes(dict(batch) | {'mask': batches_lib.valid(batch)})


def _check_shapes(batch: Batch, first: Batch, number: int) -> None:
  """UserError unless the batch has the arrays and the shapes of the first one."""
  here, there = (jax.tree.map(np.shape, dict(each)) for each in (batch, first))
  if here != there:
    raise UserError(
      'batches of one shape',
      f'{there} first, {here} in batch {number}',
      "fill the smaller ones up, with 'mask' 0",
    )


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
