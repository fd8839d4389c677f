"""Class gradients and their Grams for any losses_fn(params, batch) -> [N], in one compiled step.

Two strategies give the same numbers:

- `masked`: one forward pass of the whole batch, and one pullback for each class. It is right for
  every model, also where the losses of a batch are coupled (BatchNorm in training).
- `stacked`: one class after the other, each with its own images, for the price of one ordinary
  gradient. It is right where the loss of an example does not depend on the rest of the batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jax.tree_util import Partial

from csba_jax.errors import NotFinite, UserError
from csba_jax.gradients import arguments, batches, loops
from csba_jax.gradients import per_example as per_example_lib
from csba_jax.gradients.batches import Batch
from csba_jax.gradients.gram import ClassGrams, LayerFn, Layers, accumulator, assemble, gram
from csba_jax.gradients.pullback import losses_and_pullback
from csba_jax.runtime import backend

PyTree = Any
LossesFn = Callable[[PyTree, Batch], Array]
STRATEGIES = ('auto', 'masked', 'stacked')


def class_gradients(
  losses_fn: LossesFn,
  params: PyTree,
  batch: Batch,
  *,
  num_classes: int,
  strategy: str = 'auto',
  per_example: bool | None = None,
) -> PyTree:
  """g_c = grad of (1/n_c) sum_{i: y_i = c} loss_i, for every class.

  All C gradients are held at once, which takes C times the memory of the parameters. Where only
  their inner products matter, use `class_grams`, which needs less.

  Args:
    losses_fn: (params, batch) -> [N] losses, one for each example. It is a pure function: the
      values that it closes over are those of the first call. Put values that change into a
      `jax.tree_util.Partial`; new values of its arrays need no new compilation.
    params: tree of float arrays.
    batch: unsorted, a dict of arrays [N, ...] with 'label' [N] int and an optional 'mask' [N]; or
      class-stacked, arrays [C, n, ...] with 'label' [C, n], and 'mask' [C, n] where a class has
      fewer than n images.
    num_classes: C.
    strategy: 'masked', 'stacked', or 'auto', which takes `stacked` where it gives the same numbers;
      under jit that needs a class-stacked batch and `per_example=True`.
    per_example: whether the loss of an example is independent of the rest of the batch. None: a
      test at the first eager call decides; under jit, `stacked` needs True.

  Returns:
    A tree like params, leaves [C, ...], float32 or float64; zeros for a class without images.

  Raises:
    UserError: batch, params or losses_fn are not as above; losses are not finite; or `stacked`
      would be wrong.

  Example:
    >>> losses = lambda w, batch: (batch['x'] * w - batch['label']) ** 2 / 2
    >>> batch = {'x': jnp.array([1.0, 2.0, 3.0]), 'label': jnp.array([0, 1, 0])}
    >>> class_gradients(losses, jnp.array(1.0), batch, num_classes=2)
    Array([5., 2.], dtype=float32)
  """
  prepared = _prepare(losses_fn, params, batch, num_classes, strategy, per_example, None)
  traced = batches.is_tracing(prepared)
  found, loss_sums = (_class_gradients if traced else _compiled_gradients())(**prepared)
  if not traced:
    check_finite(loss_sums, found)
  return found


def class_grams(
  losses_fn: LossesFn,
  params: PyTree,
  batch: Batch,
  *,
  num_classes: int,
  strategy: str = 'auto',
  per_example: bool | None = None,
  layer_fn: LayerFn | None = None,
  head: str | None = None,
  mesh: Mesh | None = None,
  max_bytes: int = backend.CLASS_GRADIENT_BYTES,
) -> ClassGrams:
  """G_l[c, d] = <g_c, g_d> for every layer l, with g_c as in `class_gradients`.

  Class gradients are formed for as many layers at a time as fit into `max_bytes`, and each layer's
  are freed after its Gram. The memory is at most max(max_bytes, C times the largest layer) beside
  that of one ordinary gradient. Each further pass repeats the forward pass.

  Args:
    losses_fn: as in `class_gradients`.
    params: as in `class_gradients`.
    batch: as in `class_gradients`.
    num_classes: as in `class_gradients`.
    strategy: as in `class_gradients`.
    per_example: as in `class_gradients`.
    layer_fn: maps the name of a parameter, such as 'stage1/conv/kernel', to the name of its layer,
      or to None to hold the parameter fixed. By default a layer is the module that owns the
      parameters.
    head: regular expression for the names of the parameters of the classifier head, which `shared`
      leaves out; None: `shared` has all layers.
    mesh: devices to split the examples over. Class sums are reduced across devices before the Gram.
      The losses must be per-example.
    max_bytes: for the class gradients that are held at once.

  Returns:
    Grams by layer, in the order of the parameter tree, and over scopes.

  Raises:
    UserError: as in `class_gradients`; layer_fn or head matches nothing; or the class gradients of
      one layer exceed the memory of a device.
  """
  arguments.check_mesh(mesh)
  arguments.check_max_bytes(max_bytes)
  layers = Layers.of(params, layer_fn, head)
  if mesh is not None:  # a mesh whose axes have the default type
    mesh = Mesh(mesh.devices, mesh.axis_names)
  prepared = _prepare(losses_fn, params, batch, num_classes, strategy, per_example, mesh)
  devices, leaves = 1 if mesh is None else mesh.size, jax.tree.leaves(params)
  layers.check_room(leaves, num_classes, backend.device_bytes(), devices, every_gram=True)
  traced = batches.is_tracing(prepared)
  static: dict[str, Any] = {'layers': layers, 'mesh': mesh, 'max_bytes': max_bytes}
  found = (_class_grams if traced else _compiled_grams())(**prepared, **static)
  if not traced:
    check_finite(found.losses, found.grams)
  return found


def group_grams(
  losses_fn: LossesFn,
  params: PyTree,
  batch: Batch,
  *,
  layers: Layers,
  max_bytes: int = backend.CLASS_GRADIENT_BYTES,
  mesh: Mesh | None = None,
) -> tuple[list[Array], Array]:
  """Grams of gradient *sums* of any groups of images, for per-example losses; traceable.

  Args:
    losses_fn: as in `class_gradients`.
    params: as in `class_gradients`.
    batch: arrays [R, n, ...] with 'mask' [R, n]; row r holds the images of group r.
    layers: of params.
    max_bytes: as in `class_grams`.
    mesh: devices that share the images of every group; n is a multiple of their number. Sums are
      reduced and scattered along the parameters, so that each device multiplies its share of them.

  Returns:
    A Gram [R, R] for each layer, and the sums of losses [R].
  """
  rows = len(batch['mask'])

  def local(losses_fn: Partial, params: PyTree, batch: Batch) -> tuple[list[Array], Array]:
    grams, losses = _layer_grams(losses_fn, params, batch, rows, True, layers, max_bytes, mesh)
    return grams, losses if mesh is None else lax.psum(losses, mesh.axis_names)

  if mesh is not None:
    local = _over(mesh, local, stacked=True)
  return local(losses_fn, params, batch)


def _over(mesh: Mesh, local: Callable[..., Any], stacked: bool) -> Callable[..., Any]:
  """`local(losses_fn, params, batch)` on each device's share of a batch's images."""
  whole, images = PartitionSpec(), PartitionSpec(mesh.axis_names)
  by_image = PartitionSpec(None, mesh.axis_names) if stacked else images
  return jax.shard_map(
    local, mesh=mesh, in_specs=(whole, whole, by_image), out_specs=whole, check_vma=False
  )


def _prepare(
  losses_fn: LossesFn,
  params: PyTree,
  batch: Batch,
  num_classes: int,
  strategy: str,
  per_example: bool | None,
  mesh: Mesh | None,
) -> dict[str, Any]:
  """Checks the arguments, chooses the strategy and converts the batch to its form."""
  losses_fn, params = arguments.prepare(losses_fn, params)
  batches.check(batch, num_classes)
  arguments.check_per_example(per_example)
  batch = arguments.without_explicit_axes(dict(batch))
  arguments.check_losses(losses_fn, params, _example_batch(batch))
  stacked = _choose(losses_fn, params, batch, strategy, per_example, mesh)
  if stacked and not batches.is_stacked(batch):
    batch = batches.stack(batch, num_classes)
  if not stacked and batches.is_stacked(batch):
    batch = batches.flatten(batch)
  if mesh is not None:
    batch = batches.pad(batch, mesh.size)
  return {
    'losses_fn': losses_fn,
    'params': params,
    'batch': {**batch, 'mask': batches.valid(batch)},
    'num_classes': num_classes,
    'stacked': stacked,
  }


def _example_batch(batch: Batch) -> Batch:
  return batches.flatten(batch) if batches.is_stacked(batch) else batch


def _choose(
  losses_fn: Partial,
  params: PyTree,
  batch: Batch,
  strategy: str,
  per_example: bool | None,
  mesh: Mesh | None,
) -> bool:
  """Whether to take `stacked`; UserError where the requested strategy would be wrong."""
  if strategy not in STRATEGIES:
    raise UserError(f'strategy among {", ".join(STRATEGIES)}', repr(strategy), 'correct it')
  if strategy == 'masked' and mesh is None:
    return False
  traced = batches.is_tracing([params, batch, losses_fn])
  flat_traced = not batches.is_stacked(batch) and batches.is_traced(
    [batch['label'], batch.get('mask', 0)]
  )
  if strategy == 'stacked' and flat_traced:
    raise UserError(
      "a class-stacked batch [C, n, ...] for strategy='stacked' under jit",
      'a flat batch whose labels are traced',
      "stack it on the host (csba_jax.gradients.batches.stack), or pass strategy='masked'",
    )
  if flat_traced and mesh is None:
    return False
  if per_example is None and not traced:
    per_example = per_example_lib.is_per_example(losses_fn, params, _example_batch(batch))
    known = 'losses that change with the rest of the batch (BatchNorm in training? dropout?)'
  else:
    known = 'per_example=None under jit' if per_example is None else 'per_example=False'
  if per_example:
    return strategy != 'masked' and not flat_traced
  if strategy == 'stacked' or mesh is not None:
    what = "strategy='stacked'" if mesh is None else 'a mesh'
    raise UserError(
      f'per-example losses for {what}',
      known,
      'use the running statistics (train=False) and state per_example=True, '
      + ("or pass strategy='masked'" if mesh is None else 'or pass no mesh'),
    )
  logging.log_first_n(
    logging.INFO, "class gradients take strategy 'masked' because of %s", 1, known
  )
  return False


def _class_gradients(
  losses_fn: Partial, params: PyTree, batch: Batch, num_classes: int, stacked: bool
) -> tuple[PyTree, Array]:
  leaves, tree = jax.tree.flatten(params)
  everything = range(len(leaves))
  sums, loss_sums = class_sums(losses_fn, params, batch, num_classes, stacked, everything)
  counts = _counts(batch, num_classes)
  means = [
    x.astype(accumulator(x.dtype)) / jnp.maximum(counts, 1).reshape(-1, *(1,) * (x.ndim - 1))
    for x in sums
  ]
  means = [m.astype(accumulator(leaf.dtype)) for m, leaf in zip(means, leaves, strict=True)]
  return jax.tree.unflatten(tree, means), loss_sums


def _class_grams(
  losses_fn: Partial,
  params: PyTree,
  batch: Batch,
  num_classes: int,
  stacked: bool,
  layers: Layers,
  mesh: Mesh | None,
  max_bytes: int,
) -> ClassGrams:
  def local(losses_fn: Partial, params: PyTree, batch: Batch) -> tuple[list[Array], Array, Array]:
    sums, loss_sums = _layer_grams(
      losses_fn, params, batch, num_classes, stacked, layers, max_bytes, mesh
    )
    counts = _counts(batch, num_classes)
    if mesh is not None:
      loss_sums, counts = lax.psum((loss_sums, counts), mesh.axis_names)
    return sums, counts, loss_sums

  if mesh is not None:
    local = _over(mesh, local, stacked)
  return assemble(layers, *local(losses_fn, params, batch))


_compiled_gradients = backend.jit(_class_gradients, static_argnames=('num_classes', 'stacked'))
_compiled_grams = backend.jit(
  _class_grams, static_argnames=('num_classes', 'stacked', 'layers', 'mesh', 'max_bytes')
)


def _layer_grams(
  losses_fn: LossesFn,
  params: PyTree,
  batch: Batch,
  rows: int,
  stacked: bool,
  layers: Layers,
  max_bytes: int,
  mesh: Mesh | None = None,
) -> tuple[list[Array], Array]:
  """Gram of each layer's gradient sums, pass by pass, and the sums of losses [rows]."""
  leaves = jax.tree.leaves(params)
  grams: list[Array] = []
  loss_sums = None
  for group in layers.passes(leaves, rows, max_bytes):
    wanted = [i for layer in group for i in layers.members[layer]]
    zero = _zero_once_known(grams[-1]) if grams else 0
    sums, found = class_sums(losses_fn, params, batch, rows, stacked, wanted, zero)
    loss_sums = found if loss_sums is None else loss_sums
    of_leaf = dict(zip(wanted, sums, strict=True))
    for layer in group:
      grams.append(gram_across(mesh, [of_leaf[i] for i in layers.members[layer]]))
  return grams, loss_sums


def _zero_once_known(gram: Array) -> Array:
  """0, but only after `gram` is computed, so that its class gradients are freed before others.

  XLA removes an optimisation barrier before it schedules, but it cannot simplify this.
  """
  return jnp.isnan(gram).astype(jnp.int32).max() // 2


def gram_across(mesh: Mesh | None, rows: Sequence[Array]) -> Array:
  """Gram of the sums over all devices of each device's rows.

  Each device sums up and multiplies its share of the columns. This sends half as much as an
  all-reduce and divides the work.
  """
  if mesh is None:
    return gram(rows)
  flat = jnp.concatenate([x.reshape(len(x), -1).astype(accumulator(x.dtype)) for x in rows], axis=1)
  flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % mesh.size or mesh.size * (not flat.size))))
  share = lax.psum_scatter(flat, mesh.axis_names, scatter_dimension=1, tiled=True)
  return lax.psum(gram([share]), mesh.axis_names)


def class_sums(
  losses_fn: LossesFn,
  params: PyTree,
  batch: Batch,
  rows: int,
  stacked: bool,
  wanted: Sequence[int],
  zero: Array | int = 0,
) -> tuple[list[Array], Array]:
  """Sums over each row's images of the gradients of the wanted leaves, and of the losses.

  Nothing is allocated before `zero` is known.

  Returns:
    A list of [rows, *leaf.shape], and [rows].
  """
  mask = batch['mask'] & (jnp.asarray(zero) == 0)
  if stacked:
    return loops.map_classes(
      lambda images: row_gradient(losses_fn, params, images, wanted),
      {**batch, 'mask': mask},
      mask.shape[1],
      zero,
    )
  chosen, losses_of = _with_others_fixed(losses_fn, params, batch, wanted)
  losses, pullback, _ = losses_and_pullback(lambda chosen: (losses_of(chosen), None), chosen)
  member = (batch['label'][None] == jnp.arange(rows)[:, None]) & mask[None]
  sums = loops.map_classes(pullback, member, losses.shape[0], zero, member.any(1))
  wide = accumulator(losses.dtype)
  return sums, jnp.where(member, losses.astype(wide)[None], 0).sum(1)


def row_gradient(
  losses_fn: LossesFn, params: PyTree, batch: Batch, wanted: Sequence[int]
) -> tuple[list[Array], Array]:
  """Gradient of the sum of a batch's losses where 'mask' is True, and that sum.

  Args:
    losses_fn: as in `class_gradients`.
    params: as in `class_gradients`.
    batch: flat, with 'mask'.
    wanted: indices of the leaves of params to differentiate by; the others are held fixed.
  """
  chosen, losses_of = _with_others_fixed(losses_fn, params, batch, wanted)

  def total(chosen: list[Array]) -> tuple[Array, Array]:
    losses = jnp.where(batch['mask'], losses_of(chosen), 0)
    return losses.sum(), losses.astype(accumulator(losses.dtype)).sum()

  (_, loss_sum), grads = jax.value_and_grad(total, has_aux=True)(chosen)
  return grads, loss_sum


def _with_others_fixed(
  losses_fn: LossesFn, params: PyTree, batch: Batch, wanted: Sequence[int]
) -> tuple[list[Array], Callable[[list[Array]], Array]]:
  """The wanted leaves, and the losses as a function of them alone."""
  leaves, tree = jax.tree.flatten(params)

  def losses_of(chosen: list[Array]) -> Array:
    merged = list(leaves)
    for i, leaf in zip(wanted, chosen, strict=True):
      merged[i] = leaf
    return losses_fn(jax.tree.unflatten(tree, merged), batch)

  return [leaves[i] for i in wanted], losses_of


def _counts(batch: Batch, num_classes: int) -> Array:
  """Images of each class that are not padding, [C] int32."""
  member = batch['label'].reshape(1, -1) == jnp.arange(num_classes)[:, None]
  return (member & batch['mask'].reshape(1, -1)).sum(1, dtype=jnp.int32)


def check_finite(losses: Array, found: PyTree) -> None:
  """Raises NotFinite where a loss or a gradient of the result is NaN or infinite."""
  bad = ~np.isfinite(np.asarray(losses))
  if bad.any():
    raise NotFinite(
      'finite losses',
      f'NaN or infinity from losses_fn in classes {np.nonzero(bad)[0].tolist()}',
      'check the parameters; labels beyond the number of logits give NaN too',
    )
  for path, leaf in jax.tree.leaves_with_path(found):
    if not np.isfinite(np.asarray(leaf)).all():
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      raise NotFinite(
        'finite class gradients',
        f'NaN or infinity in {name or "params"}, from finite losses',
        'look for square roots, norms and logarithms at 0 in the model',
      )
