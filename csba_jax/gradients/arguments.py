"""Checks of what users pass: each mistake ends in one line, before anything is compiled."""

import math
import os
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.tree_util import Partial

from csba_jax.errors import UserError
from csba_jax.gradients import batches, compilations
from csba_jax.gradients.gram import check_params

PyTree = Any
_LONGEST = 200  # characters of a message of others
_NOT_TRACEABLE = (  # what JAX raises where Python asks for a value that is known only later
  jax.errors.ConcretizationTypeError,
  jax.errors.TracerArrayConversionError,
  jax.errors.TracerIntegerConversionError,
)


def prepare(losses_fn: Any, params: PyTree) -> tuple[Partial, PyTree]:
  """The function as a Partial, and params, both on automatic axes; UserError for other things."""
  losses_fn = _as_partial(losses_fn)
  check_params(params)
  for leaf in jax.tree.leaves(params):
    if type(leaf) in (float, jax.ShapeDtypeStruct):
      found = type(leaf).__name__
      do = 'use jnp.asarray' if isinstance(leaf, float) else 'initialise the model'
      raise UserError('params whose leaves are float arrays', f'a leaf of type {found}', do)
  return without_explicit_axes((losses_fn, params))


def _as_partial(losses_fn: Any) -> Partial:
  """The function as a Partial; UserError for what is no function, or binds what is no array."""
  if not callable(losses_fn):
    raise UserError(
      'losses_fn, a function (params, batch) -> [N] losses',
      f'{type(losses_fn).__name__}',
      'pass the function itself',
    )
  if not isinstance(losses_fn, Partial):
    return Partial(losses_fn)
  for leaf in jax.tree.leaves((losses_fn.args, losses_fn.keywords)):
    if not batches.is_numeric(leaf):
      raise UserError(
        'a Partial of arrays',
        f'{type(leaf).__name__} among them',
        'bind models, functions and names with functools.partial, and arrays with Partial',
      )
  return losses_fn


def check_losses(losses_fn: Partial, params: PyTree, batch: PyTree) -> None:
  """Raises UserError unless losses_fn gives one float for each example; evaluates shapes only."""
  examples = len(batch['label'])
  losses = _shapes(losses_fn, params, batch)
  if not hasattr(losses, 'shape') or losses.shape != (examples,):
    many = isinstance(losses, tuple) and len(losses) > 1
    raise UserError(
      f'one loss for each of the {examples} examples from losses_fn',
      f'shape {list(losses.shape)}' if hasattr(losses, 'shape') else _describe(losses),
      'return the losses [N] alone, without auxiliary output and without a mean'
      if many
      else 'leave out the mean: losses_fn(params, batch) -> [N]',
    )
  if not jnp.issubdtype(losses.dtype, jnp.floating):
    raise UserError('float losses from losses_fn', str(losses.dtype), 'return losses')
  compilations.watch(losses_fn, params)


def check_mesh(mesh: Any, params: PyTree = ()) -> None:
  """Raises UserError unless it is a mesh of devices, or None and params lie on one device."""
  if mesh is not None and not isinstance(mesh, Mesh):
    raise UserError(
      'mesh, a jax.sharding.Mesh, or None for one device',
      type(mesh).__name__,
      "make one: jax.make_mesh((jax.device_count(),), ('data',))",
    )
  devices = {d for leaf in jax.tree.leaves(params) for d in _devices(leaf)}
  if mesh is None and len(devices) > 1:
    raise UserError(
      'a mesh of the devices that hold params',
      f'no mesh, and params on {len(devices)} devices',
      "pass it, such as mesh=jax.make_mesh((jax.device_count(),), ('data',))",
    )


def _devices(leaf: Any) -> set[jax.Device]:
  return leaf.devices() if isinstance(leaf, Array) else set()


def check_max_bytes(max_bytes: Any) -> None:
  """Raises UserError unless it is a number of bytes."""
  known = isinstance(max_bytes, int | float | np.number) and not isinstance(max_bytes, bool)
  if not known or not 0 <= max_bytes < math.inf:
    raise UserError('max_bytes, a number of bytes', repr(max_bytes), 'pass a number, such as 2**30')


def check_per_example(per_example: Any) -> None:
  """Raises UserError unless it is True, False or None."""
  if not isinstance(per_example, bool | np.bool_ | None):
    raise UserError('per_example, True, False or None', repr(per_example), 'pass one of these')


def without_explicit_axes(tree: PyTree) -> PyTree:
  """The tree with each array that lies on explicit axes of a mesh put on automatic ones.

  JAX cannot work out for itself what this package does over explicit axes, the default of
  jax.make_mesh. No values are moved between devices. Traced arrays stay as they are.
  """
  found = jax.tree.map(_on_automatic_axes, tree)
  moved = any(
    a is not b for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True)
  )
  if moved and AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
    raise UserError(
      'a call outside of jax.set_mesh, or a mesh of automatic axes',
      'jax.set_mesh with explicit axes around the call',
      'leave the with block, or use jax.make_mesh(..., axis_types=(AxisType.Auto,))',
    )
  return found


def _on_automatic_axes(leaf: Any) -> Any:
  if not isinstance(leaf, Array) or isinstance(leaf, jax.core.Tracer):
    return leaf
  at = leaf.sharding
  if not isinstance(at, NamedSharding) or AxisType.Explicit not in at.mesh.axis_types:
    return leaf
  mesh = Mesh(at.mesh.devices, at.mesh.axis_names)
  return jax.device_put(leaf, NamedSharding(mesh, at.spec, memory_kind=at.memory_kind))


@jax.jit
def _losses(losses_fn: Partial, params: PyTree, batch: PyTree) -> Array:
  return losses_fn(params, batch)


def _shapes(losses_fn: Partial, params: PyTree, batch: PyTree) -> Any:
  """Shapes of the losses, traced once; UserError where losses_fn fails."""
  try:
    return _losses.eval_shape(losses_fn, params, batch)
  except UserError:
    raise
  except Exception as error:
    first = (str(error).splitlines() or [''])[0][:_LONGEST]
    if isinstance(error, _NOT_TRACEABLE):
      do = 'use jax.numpy and jax.lax in place of NumPy, float() and if, and jax.debug.print'
    elif isinstance(error, KeyError):
      do = f'look for it: the batch has the keys {sorted(batch)}'
    else:
      do = 'call losses_fn(params, batch) by itself, and correct it'
    raise UserError(
      'losses_fn(params, batch) that JAX can trace',
      f'{type(error).__name__}: {first}{_place(error)}',
      do,
    ) from error


def _place(error: Exception) -> str:
  """File and line of the user's code that raised; '' where none of it did."""
  package = os.path.dirname(os.path.abspath(__file__))
  for frame in reversed(traceback.extract_tb(error.__traceback__)):
    if 'site-packages' not in frame.filename and not frame.filename.startswith(package):
      return f', in {os.path.basename(frame.filename)}, line {frame.lineno}'
  return ''


def _describe(losses: Any) -> str:
  """What a losses_fn returned in place of an array."""
  if losses is None:
    return 'None'
  if isinstance(losses, dict):
    return f'a dict with the keys {sorted(map(str, losses))}'
  if isinstance(losses, tuple | list):
    return f'a {type(losses).__name__} of {len(losses)}'
  return type(losses).__name__
