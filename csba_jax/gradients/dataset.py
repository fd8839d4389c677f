"""Grams of gradient sums over a data set on the host, batch by batch, on one device or several."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from csba_jax.data.rows import Rows
from csba_jax.gradients.gram import Layers, accumulator
from csba_jax.gradients.per_class import check_finite, gram_across, row_gradient
from csba_jax.runtime import backend, sharding

PyTree = Any
Tick = Callable[[int, int], None]
Examples = Mapping[str, np.ndarray | Rows]  # arrays [N, ...] on the host, or in a file


def group_grams_of(
  losses_fn: Partial,
  params: PyTree,
  data: Examples,
  groups: Sequence[np.ndarray],
  layers: Layers,
  max_bytes: int,
  tick: Tick,
  mesh: Mesh | None,
) -> tuple[list[np.ndarray], np.ndarray]:
  """Grams by layer of the gradient sums of any groups of examples, and the sums of losses.

  The work is split into dispatches, so that a group may have any size and the caller can stop
  between two of them. On a mesh each device sums over its own images; the sums are combined once,
  when the Grams are formed.

  Raises:
    UserError: the sums of a layer exceed the memory of a device, or losses are not finite.
  """
  leaves = jax.tree.leaves(params)
  mesh = mesh or Mesh(np.array([_device_of(leaves[0])]), ('images',))
  layers.check_room(leaves, len(groups), backend.device_bytes(), mesh.size)
  size = min(backend.images_per_dispatch(), -(-max(map(len, groups)) // mesh.size)) * mesh.size
  layout = sharding.Layout(mesh)
  mine = layout.rows(size)
  grams: list[np.ndarray] = []
  loss_sums = np.zeros(len(groups))
  passes = layers.passes(leaves, len(groups), max_bytes)
  done, total = 0, len(passes) * sum(map(len, groups))
  for passing in passes:
    wanted = tuple(i for layer in passing for i in layers.members[layer])
    rows = _empty_rows(mesh, leaves, len(groups), wanted)
    for row, group in enumerate(groups):
      for start in range(0, len(group), size):
        index = group[start : start + size]
        batch = layout.place_rows(_take(data, index, size, mine), size)
        rows, loss = _compiled_add()(losses_fn, params, rows, row, batch, wanted=wanted, mesh=mesh)
        sharding.one_at_a_time(loss)
        if not grams:
          loss_sums[row] += loss
        done += len(index)
        tick(done, total)
    of_leaf = dict(zip(wanted, rows, strict=True))
    of_layer = [[of_leaf[i] for i in layers.members[layer]] for layer in passing]
    grams += jax.device_get(_grams(of_layer, mesh))
    del rows, of_leaf, of_layer
  check_finite(loss_sums, dict(zip(layers.names, grams, strict=True)))
  return grams, loss_sums


@functools.partial(jax.jit, static_argnames='mesh')
def _grams(layers: list[list[Array]], mesh: Mesh) -> list[Array]:
  """The Gram of each layer's rows, from each device's sums [1, R, ...] of them."""

  def local(layers: list[list[Array]]) -> list[Array]:
    return [gram_across(mesh, [x[0] for x in rows]) for rows in layers]

  by_device = PartitionSpec(mesh.axis_names)
  return jax.shard_map(
    local, mesh=mesh, in_specs=(by_device,), out_specs=PartitionSpec(), check_vma=False
  )(layers)


def _device_of(leaf: Any) -> jax.Device:
  return min(leaf.devices(), key=lambda d: d.id) if isinstance(leaf, Array) else jax.devices()[0]


def _empty_rows(
  mesh: Mesh, leaves: Sequence[Array], groups: int, wanted: Sequence[int]
) -> list[Array]:
  """Zeros [devices, R, *leaf.shape] for each wanted leaf, a part on each device."""
  shapes = [((mesh.size, groups, *leaves[i].shape), accumulator(leaves[i].dtype)) for i in wanted]
  make = jax.jit(
    lambda: [jnp.zeros(*shape) for shape in shapes],
    out_shardings=NamedSharding(mesh, PartitionSpec(mesh.axis_names)),
  )
  return make()


def _take(data: Examples, index: np.ndarray, size: int, mine: np.ndarray) -> dict[str, np.ndarray]:
  """The rows `mine` of these examples, padded to `size` with the first of them, mask False."""
  filled = np.concatenate([index, np.full(size - len(index), index[0])])[mine]
  batch = {name: np.asarray(values[filled]) for name, values in data.items()}
  return batch | {'mask': mine < len(index)}


def _add(
  losses_fn: Partial,
  params: PyTree,
  rows: list[Array],
  row: int,
  batch: Mapping[str, Array],
  *,
  wanted: tuple[int, ...],
  mesh: Mesh,
) -> tuple[list[Array], Array]:
  """`rows` with the gradient of the batch's losses added to one, and their sum.

  Each device adds the gradient of its images to its own sums; only the loss is sent.
  """

  def local(
    losses_fn: Partial, params: PyTree, rows: list[Array], row: Array, batch: Mapping[str, Array]
  ) -> tuple[list[Array], Array]:
    grads, loss = row_gradient(losses_fn, params, batch, wanted)
    rows = [r.at[0, row].add(g.astype(r.dtype)) for r, g in zip(rows, grads, strict=True)]
    return rows, lax.psum(loss, mesh.axis_names)

  whole, by_device = PartitionSpec(), PartitionSpec(mesh.axis_names)
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(whole, whole, by_device, whole, by_device),
    out_specs=(by_device, whole),
    check_vma=False,
  )(losses_fn, params, rows, row, batch)


_compiled_add = backend.jit(_add, static_argnames=('wanted', 'mesh'), donate_argnames='rows')
