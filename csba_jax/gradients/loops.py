"""One class after the other in one compiled program, at full speed on every backend."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core

from csba_jax import backend

PyTree = Any

# Primitives that only call what they hold, and the parameter that holds it: once derivatives have
# been taken they may as well be opened.
_CALLS = {
  'jit': 'jaxpr',
  'pjit': 'jaxpr',
  'closed_call': 'call_jaxpr',
  'checkpoint': 'jaxpr',
  'remat2': 'jaxpr',
  'custom_jvp_call': 'call_jaxpr',
  'custom_vjp_call': 'call_jaxpr',
}
_ORIGIN = core.DebugInfo('one equation', __name__, None, None)


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
  if not backend.is_cpu():
    return fun

  def rewritten(x: PyTree) -> PyTree:
    jaxpr, out = jax.make_jaxpr(fun, return_shape=True)(x)
    leaves = _evaluate(jaxpr.jaxpr, jaxpr.consts, jax.tree.leaves(x))
    return jax.tree.unflatten(jax.tree.structure(out), leaves)

  return rewritten


def _evaluate(jaxpr: core.Jaxpr, consts: Sequence[Array], args: Sequence[Array]) -> list[Array]:
  """The values of a jaxpr, its convolutions rewritten."""
  env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

  def read(atom):
    return atom.val if isinstance(atom, core.Literal) else env[atom]

  for eqn in jaxpr.eqns:
    values = [read(atom) for atom in eqn.invars]
    env.update(zip(eqn.outvars, _evaluate_equation(eqn, values), strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _evaluate_equation(eqn: core.JaxprEqn, values: list[Array]) -> Sequence[Array]:
  if eqn.primitive is lax.conv_general_dilated_p:
    return [_convolve(*values, **eqn.params)]
  if next(_convolutions([eqn]), None) is not None:
    if eqn.primitive.name in _CALLS:
      inner = eqn.params[_CALLS[eqn.primitive.name]]
      return _evaluate(getattr(inner, 'jaxpr', inner), getattr(inner, 'consts', ()), values)
    if eqn.primitive is lax.scan_p:
      return _scan(eqn.params, values)
  inputs = {
    v: x for v, x in zip(eqn.invars, values, strict=True) if not isinstance(v, core.Literal)
  }
  alone = core.Jaxpr((), list(inputs), eqn.outvars, [eqn], eqn.effects, _ORIGIN)
  return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*inputs.values())


def _scan(params: dict[str, Any], values: list[Array]) -> Sequence[Array]:
  """A scan inside the function of one class, with its body rewritten."""
  fixed, carried = params['num_consts'], params['num_carry']
  consts, init, xs = values[:fixed], values[fixed : fixed + carried], values[fixed + carried :]

  def body(carry, x):
    found = _evaluate(params['jaxpr'].jaxpr, params['jaxpr'].consts, [*consts, *carry, *x])
    return found[:carried], found[carried:]

  carry, ys = lax.scan(
    body, init, xs, params['length'], reverse=params['reverse'], unroll=params['unroll']
  )
  return [*carry, *ys]


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


def _convolutions(eqns: Iterable[core.JaxprEqn]) -> Iterator[core.JaxprEqn]:
  """All convolutions in equations, those inside calls and loops too."""
  for eqn in eqns:
    if eqn.primitive is lax.conv_general_dilated_p:
      yield eqn
    for inner in core.jaxprs_in_params(eqn.params):
      yield from _convolutions(inner.eqns)


def _has_groups(fun: Callable[[PyTree], PyTree], xs: PyTree) -> bool:
  """Whether `fun` of one class has a convolution with groups."""
  one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
  found = _convolutions(jax.make_jaxpr(fun)(one).eqns)
  return any(e.params['feature_group_count'] * e.params['batch_group_count'] > 1 for e in found)
