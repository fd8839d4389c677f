"""One class after the other in one compiled program, at full speed on every backend."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from csba_jax.runtime import backend, jax_internals

PyTree = Any


def map_classes(
  fun: Callable[[PyTree], PyTree], xs: PyTree, images: int, zero: Array | int = 0
) -> PyTree:
  """fun(xs[0]), fun(xs[1]), ... stacked, as few at once as `backend.classes_at_once` says.

  Memory is that of the stacked results and of the classes in flight, and the program is one class
  long, whatever their number. On CPU, where XLA hands to its fast library only convolutions that
  stand outside every loop or are written in one order of dimensions, they are rewritten in it;
  convolutions with groups have no such form, and their classes are unrolled.

  Args:
    fun: of one class; not differentiated afterwards.
    xs: leaves [C, ...], C >= 1.
    images: images that `fun` works on.
    zero: the number 0, which may depend on what has to be done before: results are allocated then.

  Returns:
    Leaves [C, ...].
  """
  classes = len(jax.tree.leaves(xs)[0])
  at_once = backend.classes_at_once(classes, images)
  if (backend.is_cpu() or _is_sharded()) and _has_groups(fun, xs):
    unrolled = -(-classes // backend.LONGEST_UNROLLING)  # at once, in a program not too long
    if _is_sharded():  # JAX has no rule for vmap of convolutions with groups there
      at_once, unrolled = 1, 1 if classes <= backend.LONGEST_UNROLLING else classes
    if backend.is_cpu() and at_once < classes and unrolled < classes:
      return _unroll(fun, xs, unrolled)
  if at_once == classes > 1:
    return jax.vmap(fun)(xs)
  if at_once == 1:
    return _loop(_rewritten(fun), xs, zero)
  chunks = -(-classes // at_once)
  at_once = -(-classes // chunks)  # chunks of one size; the last is filled up with the first class
  index = jnp.arange(chunks * at_once)
  index = jnp.where(index < classes, index, 0).reshape(chunks, at_once)
  found = _loop(_rewritten(jax.vmap(fun)), jax.tree.map(lambda x: x[index], xs), zero)
  return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:classes], found)


def _loop(fun: Callable[[PyTree], PyTree], xs: PyTree, zero: Array | int) -> PyTree:
  """lax.map, whose results are allocated when `zero` is known and not at the program's start."""
  turns = len(jax.tree.leaves(xs)[0])

  def take(i):
    return jax.tree.map(lambda x: x[i], xs)

  def turn(i, results):
    return jax.tree.map(lambda rows, row: rows.at[i].set(row), results, fun(take(i)))

  shapes = jax.eval_shape(fun, take(0))
  empty = jax.tree.map(lambda s: jnp.full((turns, *s.shape), zero, s.dtype), shapes)
  return lax.fori_loop(0, turns, turn, empty)


def _unroll(fun: Callable[[PyTree], PyTree], xs: PyTree, at_once: int) -> PyTree:
  classes = len(jax.tree.leaves(xs)[0])
  if at_once == 1:
    rows = [fun(jax.tree.map(lambda x, i=i: x[i], xs)) for i in range(classes)]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *rows)
  chunks = [
    jax.vmap(fun)(jax.tree.map(lambda x, i=i: x[i : i + at_once], xs))
    for i in range(0, classes, at_once)
  ]
  return jax.tree.map(lambda *parts: jnp.concatenate(parts), *chunks)


def _is_sharded() -> bool:
  """Whether this is traced for one device of a mesh, inside shard_map."""
  return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _rewritten(fun: Callable[[PyTree], PyTree]) -> Callable[[PyTree], PyTree]:
  """`fun` with its convolutions in the order that loops need on CPU; elsewhere `fun`."""
  return jax_internals.with_convolutions(fun, _convolve) if backend.is_cpu() else fun


def _convolve(lhs: Array, rhs: Array, **params: Any) -> Array:
  """conv_general_dilated in the order batch, space, channels; groups of the batch stay."""
  if params['batch_group_count'] > 1:
    return lax.conv_general_dilated_p.bind(lhs, rhs, **params)
  lhs_spec, rhs_spec, out_spec = params['dimension_numbers']
  rank = lhs.ndim
  images = (0, rank - 1, *range(1, rank - 1))
  kernel = (rank - 1, rank - 2, *range(rank - 2))
  params['dimension_numbers'] = lax.ConvDimensionNumbers(images, kernel, images)
  out = lax.conv_general_dilated_p.bind(
    lhs.transpose(lhs_spec[0], *lhs_spec[2:], lhs_spec[1]),
    rhs.transpose(*rhs_spec[2:], rhs_spec[1], rhs_spec[0]),
    **params,
  )
  order = (out_spec[0], *out_spec[2:], out_spec[1])  # of the dimensions as they stand
  return out.transpose(sorted(range(rank), key=order.__getitem__))


def _has_groups(fun: Callable[[PyTree], PyTree], xs: PyTree) -> bool:
  """Whether `fun` of one class has a convolution with groups."""
  one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
  return jax_internals.has_grouped_convolutions(fun, one)
