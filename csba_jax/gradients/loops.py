"""One class after the other in one compiled program, at full speed on every backend."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from csba_jax.runtime import backend, jax_internals

PyTree = Any


def map_classes(
  fun: Callable[[PyTree], PyTree],
  xs: PyTree,
  images: int,
  zero: Array | int = 0,
  present: Array | None = None,
) -> PyTree:
  """fun(xs[0]), fun(xs[1]), ... stacked; `backend.classes_at_once` says how many run at once.

  It takes the memory of the stacked results and of the classes that run at once. The program has
  the size of one class, whatever C is. Inside a loop, XLA for CPUs hands a convolution to its fast
  library only if its dimensions have one certain order. So on CPU the convolutions are rewritten in
  that order. Convolutions with groups have no such form, and their classes are unrolled.

  Args:
    fun: a function of one class; its result cannot be differentiated.
    xs: leaves [C, ...], C >= 1.
    images: images of one class.
    zero: the number 0. It may depend on an array: the results are allocated once that is known.
    present: [C] bool, False where fun is known to give zeros; None: nothing is known. A loop over
      single classes, as on CPU, leaves these classes out, and gives zeros for them even where fun
      would give NaN.

  Returns:
    Leaves [C, ...].
  """
  classes = len(jax.tree.leaves(xs)[0])
  at_once = backend.classes_at_once(classes, images)
  if (backend.is_cpu() or _is_sharded()) and _has_groups(fun, xs):
    # classes at once, so that the program is not too long
    unrolled = -(-classes // backend.LONGEST_UNROLLING)
    if _is_sharded():  # JAX has no rule for vmap of convolutions with groups there
      at_once, unrolled = 1, 1 if classes <= backend.LONGEST_UNROLLING else classes
    if backend.is_cpu() and at_once < classes and unrolled < classes:
      return _unroll(fun, xs, unrolled)
  if at_once == classes > 1:
    return jax.vmap(fun)(xs)
  if at_once == 1:
    # in shard_map every device has other labels, and would do another number of turns
    return _loop(_rewritten(fun), xs, zero, None if _is_sharded() else present)
  chunks = -(-classes // at_once)
  at_once = -(-classes // chunks)  # chunks of one size: class 0 fills up the last one
  index = jnp.arange(chunks * at_once)
  index = jnp.where(index < classes, index, 0).reshape(chunks, at_once)
  found = _loop(_rewritten(jax.vmap(fun)), jax.tree.map(lambda x: x[index], xs), zero)
  return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:classes], found)


def sum_rows(
  fun: Callable[[Array], tuple[Array, PyTree]], used: Array, most: int, images: int, classes: int
) -> PyTree:
  """Sums over rows r of a tree, by the class of the row: fun(r) = (class, tree), r < used.

  As many rows as `backend.classes_at_once` says run at once, and only the sums are held. On CPU
  convolutions are rewritten as in `map_classes`; those with groups are slow here.

  Args:
    fun: of a row's number; gives zeros for a row from `used` on.
    used: number of rows, known when the program runs.
    most: that `used` can be.
    images: of a row.
    classes: C.

  Returns:
    Leaves [C, ...].
  """
  at_once = backend.classes_at_once(most, images)
  # not vmap over one row, which would make convolutions with groups of weight gradients
  some = _rewritten(fun if at_once == 1 else jax.vmap(fun))

  def turn(i: Array, sums: PyTree) -> PyTree:
    own, found = some(i if at_once == 1 else i * at_once + jnp.arange(at_once))
    return jax.tree.map(lambda total, rows: total.at[own].add(rows), sums, found)

  shapes = jax.eval_shape(fun, jnp.zeros((), jnp.int32))[1]
  zeros = jax.tree.map(lambda s: jnp.zeros((classes, *s.shape), s.dtype), shapes)
  return lax.fori_loop(0, -(-used // at_once), turn, zeros)


def _loop(
  fun: Callable[[PyTree], PyTree],
  xs: PyTree,
  zero: Array | int,
  present: Array | None = None,
) -> PyTree:
  """lax.map that allocates its results once `zero` is known, not at the start of the program.

  It does the turns where `present` is True, and leaves zeros at the others.
  """
  turns = len(jax.tree.leaves(xs)[0])

  def take(i: Array | int) -> PyTree:
    return jax.tree.map(lambda x: x[i], xs)

  def turn(i: Array, results: PyTree) -> PyTree:
    return jax.tree.map(lambda rows, row: rows.at[i].set(row), results, fun(take(i)))

  shapes = jax.eval_shape(fun, take(0))
  empty = jax.tree.map(lambda s: jnp.full((turns, *s.shape), zero, s.dtype), shapes)
  if present is None:
    return lax.fori_loop(0, turns, turn, empty)
  order = jnp.argsort(~present, stable=True)
  return lax.fori_loop(0, present.sum(), lambda k, results: turn(order[k], results), empty)


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
  """Whether this is traced inside shard_map, for one device of a mesh."""
  return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _rewritten(fun: Callable[[PyTree], PyTree]) -> Callable[[PyTree], PyTree]:
  """On CPU `fun` with its convolutions in the order that loops need; elsewhere `fun`."""
  return jax_internals.with_convolutions(fun, _convolve) if backend.is_cpu() else fun


def _convolve(lhs: Array, rhs: Array, **params: Any) -> Array:
  """conv_general_dilated in the order batch, space, channels; with batch groups, unchanged."""
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
