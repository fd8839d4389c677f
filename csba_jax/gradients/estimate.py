"""Conflict of a whole data set: exact, or estimated from samples without bias, with intervals.

The cosine of two plain mini-batch gradients is biased toward 0, most of all for rare classes: noise
adds to the norms but not to the inner product. Here every class has K folds of images. The rows of
a layer's Gram are the gradient sums over (class, fold), and squared norms come from products of
*different* folds, whose noise is independent. Standard errors come from a jackknife, which leaves
out one fold of one class at a time.

There are two targets. `train` is the gradient over the training set itself; images are drawn from
it with replacement. `population` is the expected gradient over new images of the same kind; the
folds are disjoint parts of the data.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from csba_jax.data.random_draws import draws, permutation
from csba_jax.errors import UserError
from csba_jax.gradients import arguments, batches, fold_statistics
from csba_jax.gradients import per_example as per_example_lib
from csba_jax.gradients.conflict import (
  SCOPES,
  Conflict,
  conflict_matrix,
  name_classes,
  weigh_classes,
)
from csba_jax.gradients.dataset import Examples, Tick, group_grams_of
from csba_jax.gradients.gram import LayerFn, Layers
from csba_jax.gradients.per_class import LossesFn
from csba_jax.runtime import backend

PyTree = Any
TARGETS = ('train', 'population')


def no_tick(done: int, total: int) -> None:
  """Does nothing."""


def exact_conflict(
  losses_fn: LossesFn,
  params: PyTree,
  data: Examples,
  *,
  num_classes: int,
  layer_fn: LayerFn | None = None,
  head: str | None = None,
  max_bytes: int = backend.CLASS_GRADIENT_BYTES,
  per_example: bool | None = None,
  tick: Tick = no_tick,
  mesh: Mesh | None = None,
  class_names: Sequence[str] | None = None,
  class_counts: np.ndarray | None = None,
  prior: np.ndarray | None = None,
  about: Mapping[str, Any] | None = None,
) -> Conflict:
  """The conflict of a data set from every image: target `train` without sampling error.

  Args:
    losses_fn: (params, batch) -> [N] losses that are per-example: frozen statistics, no dropout.
    params: tree of float arrays.
    data: arrays [N, ...] on the host, with 'label' [N] int.
    num_classes: C.
    layer_fn: as in `class_grams`.
    head: as in `class_grams`.
    max_bytes: for class gradients, which take C times the memory of the parameters. Where they need
      more, there are several passes over the data, each for some of the layers.
    per_example: whether the loss of an example is independent of the rest of the batch. None: a
      test decides once for each losses_fn, at the price of two small compilations.
    tick: called with (images done, images in all) after every dispatch.
    mesh: devices that share the images of every dispatch; None: one device.
    class_names: 'class 0', ... by default.
    class_counts: training images of each class; by default those of `data`.
    prior: weight of each class in the training loss; by default its share of class_counts.
    about: other facts to keep in the result, as JSON.

  Returns:
    The conflict, with intervals of length 0.

  Raises:
    UserError: data have no integer labels from 0 to C - 1, or losses are coupled or not finite.
  """
  losses_fn, params, data = _checked(losses_fn, params, data, num_classes, per_example)
  arguments.check_mesh(mesh, params)
  arguments.check_max_bytes(max_bytes)
  of_class = _classes(data, num_classes)
  layers = Layers.of(params, layer_fn, head)
  sums, loss_sums = group_grams_of(losses_fn, params, data, of_class, layers, max_bytes, tick, mesh)
  sizes = np.array([[len(images)] for images in of_class])
  grams = add_scopes(layers, sums) / fold_statistics.outer(sizes)
  cosines = conflict_matrix(grams)
  known = np.zeros_like(grams), cosines, cosines
  names = describe_result(
    class_names, class_counts, prior, sizes.sum(1), {'target': 'train, exact'}, about
  )
  return make_conflict(layers, grams, known, loss_sums, sizes, names)


def estimated_conflict(
  losses_fn: LossesFn,
  params: PyTree,
  data: Examples,
  *,
  num_classes: int,
  target: str = 'train',
  images: int = 64,
  folds: int = 8,
  seed: int = 0,
  layer_fn: LayerFn | None = None,
  head: str | None = None,
  max_bytes: int = backend.CLASS_GRADIENT_BYTES,
  per_example: bool | None = None,
  tick: Tick = no_tick,
  mesh: Mesh | None = None,
  class_names: Sequence[str] | None = None,
  class_counts: np.ndarray | None = None,
  prior: np.ndarray | None = None,
  about: Mapping[str, Any] | None = None,
) -> Conflict:
  """The conflict of a data set from a sample of it: unbiased Grams with standard errors.

  Their cosines are ratios of estimates, and not unbiased: the noise of the norms makes them too
  large in size, by 1 to 9 % where it was measured.

  Args:
    losses_fn: as in `exact_conflict`.
    params: as in `exact_conflict`.
    data: as in `exact_conflict`.
    num_classes: as in `exact_conflict`.
    target: 'train': the gradient over `data` itself, with images drawn with replacement.
      'population': the expected gradient over new images, with disjoint folds and at most as many
      images as there are. For a net that was fitted to `data`, these are not new: pass others.
    images: of each class.
    folds: K >= 2, of each class; intervals use Student's t with K - 1 degrees of freedom.
    seed: of the draw.
    layer_fn: as in `class_grams`.
    head: as in `class_grams`.
    max_bytes: for gradients of folds, which take C K times the memory of the parameters.
    per_example: as in `exact_conflict`.
    tick: as in `exact_conflict`.
    mesh: as in `exact_conflict`.
    class_names: as in `exact_conflict`.
    class_counts: as in `exact_conflict`.
    prior: as in `exact_conflict`.
    about: as in `exact_conflict`.

  Returns:
    The conflict, with errors and 95 % intervals; a class of fewer than two images has none.

  Raises:
    UserError: as in `exact_conflict`; or the target is unknown, or there are fewer than 2 folds or
      fewer images than folds.
  """
  losses_fn, params, data = _checked(losses_fn, params, data, num_classes, per_example)
  arguments.check_mesh(mesh, params)
  arguments.check_max_bytes(max_bytes)
  index, sizes = draw_folds(data, num_classes, target, images, folds, seed)
  groups = [index[c, k, : sizes[c, k]] for c in range(num_classes) for k in range(folds)]
  layers = Layers.of(params, layer_fn, head)
  sums, loss_sums = group_grams_of(losses_fn, params, data, groups, layers, max_bytes, tick, mesh)
  counts = np.bincount(data['label'], minlength=num_classes)
  drawn = {'target': target, 'folds': folds, 'images': images, 'seed': seed}
  names = describe_result(class_names, class_counts, prior, counts, drawn, about)
  return from_folds(layers, sums, loss_sums, sizes, counts, names)


def draw_folds(
  data: Examples,
  num_classes: int,
  target: str,
  images: int,
  folds: int,
  seed: int | tuple[int, ...],
) -> tuple[np.ndarray, np.ndarray]:
  """Indices of the images of every fold, and the sizes of the folds.

  Returns:
    [C, K, ceil(images / K)] indices into `data`, of which the first sizes[c, k] are valid; and
    sizes [C, K], 0 for folds without images.
  """
  if target not in TARGETS:
    raise UserError(f'target among {", ".join(TARGETS)}', repr(target), 'correct it')
  if not 2 <= folds <= images:
    raise UserError(
      'at least 2 folds, and at least one image of each class for each fold',
      f'{folds} folds, {images} images',
      'change folds or images',
    )
  depth = -(-images // folds)
  index = np.zeros((num_classes, folds, depth), np.int64)
  sizes = np.zeros((num_classes, folds), np.int64)
  for c, of_class in enumerate(_classes(data, num_classes)):
    if not len(of_class):
      continue
    if target == 'train':
      taken = of_class[draws((seed, 'folds', c), len(of_class), images)]
    else:
      taken = of_class[permutation((seed, 'folds', c), len(of_class))[:images]]
    for k in range(folds):
      fold = taken[k::folds]
      index[c, k, : len(fold)], sizes[c, k] = fold, len(fold)
  return index, sizes


def from_folds(
  layers: Layers,
  sums: Sequence[np.ndarray],
  loss_sums: np.ndarray,
  sizes: np.ndarray,
  counts: np.ndarray,
  names: Mapping[str, Any],
) -> Conflict:
  """The estimate from Grams of gradient sums over (class, fold).

  Args:
    layers: L of them.
    sums: L Grams [C K, C K], rows in the order (class, fold).
    loss_sums: [C K].
    sizes: [C, K] images of each fold, 0 for none.
    counts: [C] images of each class in the data.
    names: class_names, class_counts, prior and about of the result.
  """
  all_sums = add_scopes(layers, sums)
  grams, *known = fold_statistics.unbiased(all_sums, sizes, counts)
  of_classes = fold_statistics.class_intervals_over_folds(
    all_sums[0], sizes, counts, names['prior']
  )
  return make_conflict(layers, grams, known, loss_sums, sizes, names, of_classes)


def add_scopes(layers: Layers, sums: Sequence[np.ndarray]) -> np.ndarray:
  """Grams of sums of shared, total and every layer, [L + 2, R, R] float64."""
  of_layer = np.stack(sums).astype(np.float64)
  body = ~np.array(layers.in_head)
  return np.concatenate([of_layer[body].sum(0)[None], of_layer.sum(0)[None], of_layer])


def make_conflict(
  layers: Layers,
  grams: np.ndarray,
  known: Sequence[np.ndarray],
  loss_sums: np.ndarray,
  sizes: np.ndarray,
  names: Mapping[str, Any],
  of_classes: np.ndarray | None = None,
) -> Conflict:
  """The result of an estimate: Grams, (errors, low, high), loss sums and sizes by (class, fold).

  And intervals of the measures of classes, [3, 2, C], where there are any.
  """
  counts = sizes.sum(1)
  errors, low, high = known
  return Conflict(
    scopes=(*SCOPES, *layers.names),
    grams=grams,
    errors=errors,
    low=low,
    high=high,
    losses=np.asarray(loss_sums, np.float64).reshape(sizes.shape).sum(1) / np.maximum(counts, 1),
    counts=counts,
    class_intervals=of_classes,
    **names,
  )


def describe_result(
  class_names: Sequence[str] | None,
  class_counts: np.ndarray | None,
  prior: np.ndarray | None,
  counts: np.ndarray,
  drawn: Mapping[str, Any],
  about: Mapping[str, Any] | None,
) -> dict[str, Any]:
  """The descriptive fields of a result, with the defaults of `exact_conflict`."""
  class_counts, prior = weigh_classes(class_counts, prior, counts)
  return {
    'class_names': name_classes(class_names, len(counts)),
    'class_counts': class_counts,
    'prior': prior,
    'about': {**drawn, **(about or {})},
  }


def _checked(
  losses_fn: LossesFn,
  params: PyTree,
  data: Examples,
  num_classes: int,
  per_example: bool | None,
) -> tuple[Partial, PyTree, Examples]:
  """losses_fn as a Partial, params and data; UserError where the losses are coupled."""
  losses_fn, params = arguments.prepare(losses_fn, params)
  batches.check_num_classes(num_classes)
  _check_data(data)
  _classes(data, num_classes)
  arguments.check_per_example(per_example)
  data = arguments.without_explicit_axes(dict(data))
  few = {name: np.asarray(values[: backend.images_per_dispatch()]) for name, values in data.items()}
  arguments.check_losses(losses_fn, params, few)
  if per_example is None:
    per_example = per_example_lib.is_per_example(losses_fn, params, few)
  if not per_example:
    raise UserError(
      'per-example losses for a conflict over a data set',
      'losses that change with the rest of the batch (BatchNorm in training? dropout?)',
      'use the running statistics (train=False)',
    )
  return losses_fn, params, data


def _check_data(data: Examples) -> None:
  """Raises UserError unless data is a dict of arrays with a 'label', and has no mask."""
  expected = "data, a dict of arrays [N, ...] on the host with an array 'label'"
  if not isinstance(data, Mapping) or 'label' not in data:
    found = f'keys {sorted(map(str, data))}' if isinstance(data, Mapping) else type(data).__name__
    raise UserError(expected, found, "use 'label' as the key of the labels")
  if 'mask' in data:
    raise UserError("data without 'mask'", "an entry 'mask'", 'leave the masked examples out')
  for name, values in data.items():
    kind = getattr(values, 'dtype', None)
    if kind is None or not hasattr(values, 'shape') or not isinstance(name, str):
      found = f'{name!r} of type {type(values).__name__}'
      raise UserError(expected, found, 'pass arrays under names: np.asarray')
    if name != 'label' and (not isinstance(kind, np.dtype) or kind.kind not in 'biufcV'):
      raise UserError(
        'data of numbers', f'{name!r} of type {kind}', 'leave it out, or turn it into numbers'
      )
    if not len(values.shape) or values.shape[0] != np.shape(data['label'])[0]:
      raise UserError(
        f"every array of data with the length {len(data['label'])} of 'label'",
        f'{name!r} of shape {list(values.shape)}',
        'let losses_fn close over arrays that do not belong to single examples',
      )


def _classes(data: Examples, num_classes: int) -> list[np.ndarray]:
  """Indices of the images of each class."""
  label = np.asarray(data['label'])
  wanted = f"data['label'] [N] of integers from 0 to {num_classes - 1}, N >= 1"
  if label.ndim != 1 or not len(label) or not np.issubdtype(label.dtype, np.integer):
    raise UserError(
      wanted, f'{label.dtype} of shape {list(label.shape)}', batches.remedy(label, num_classes)
    )
  if label.min() < 0 or label.max() >= num_classes:
    raise UserError(wanted, f'{label.min()} to {label.max()}', 'correct the labels or num_classes')
  return [np.flatnonzero(label == c) for c in range(num_classes)]
