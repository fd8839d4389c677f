"""A warning where one function is compiled again and again, because each call makes it anew."""

import collections
import inspect
import os
import warnings
from types import CodeType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

PyTree = Any
SEVERAL = 3  # objects of one code
_KEPT = 256  # entries
_SEEN: collections.OrderedDict[Any, list[Any]] = collections.OrderedDict()
_SAID: set[CodeType] = set()


class RecompilationWarning(RuntimeWarning):
  """losses_fn is a new object at every call, so every call compiles."""


def watch(losses_fn: Partial, params: PyTree) -> None:
  """Warns, once for each piece of code, if it has come as several objects for such parameters.

  JAX keeps compiled programs by the function object. A lambda in a loop is a new object in each
  turn. Functions count as one piece of code if all that they bind, but for arrays and numbers, is
  the same: losses of two models are two functions.
  """
  if any(isinstance(leaf, jax.core.Tracer) for leaf in [*jax.tree.leaves(params), jnp.zeros(())]):
    return  # the program around it is compiled, and this function with it
  code, bound = _code_and_bound(losses_fn.func)
  if code is None or code in _SAID:
    return
  shapes = tuple((np.shape(leaf), leaf.dtype) for leaf in jax.tree.leaves(params))
  key = code, jax.tree.structure(params), shapes
  seen = _SEEN.setdefault(key, [])
  if any(function == losses_fn.func for function, _ in seen):
    return
  seen.append((losses_fn.func, bound))
  if len(_SEEN) > _KEPT:
    _SEEN.popitem(last=False)
  if sum(_same(bound, others) for _, others in seen) < SEVERAL:
    del seen[: -2 * SEVERAL]
    return
  _SAID.add(code)
  del _SEEN[key]
  warnings.warn(
    f'losses_fn of {os.path.basename(code.co_filename)}, line {code.co_firstlineno}, has come as '
    f'{SEVERAL} different objects, and each was compiled anew: define the function once, outside '
    'of the loop, and bind arrays that change with jax.tree_util.Partial(function, arrays)',
    RecompilationWarning,
    stacklevel=4,
  )


def _code_and_bound(function: Any) -> tuple[CodeType | None, list[Any]]:
  """The code under partials, methods and wrappers, and what is bound but for arrays and numbers."""
  bound: list[Any] = []
  while True:
    if hasattr(function, 'keywords') and hasattr(function, 'func'):  # functools.partial
      bound += [function.args, function.keywords]
      function = function.func
    elif hasattr(function, 'fun'):
      function = function.fun  # what Partial makes of functools.partial
    elif hasattr(function, '__wrapped__'):
      function = function.__wrapped__
    elif inspect.ismethod(function):
      bound.append(function.__self__)
      function = function.__func__
    elif inspect.isfunction(function):
      break
    elif inspect.isfunction(call := inspect.getattr_static(type(function), '__call__', None)):
      bound.append(function)
      function = call
    else:
      return None, []
  bound += [cell.cell_contents for cell in function.__closure__ or () if _is_full(cell)]
  bound += [function.__defaults__, function.__kwdefaults__]
  return function.__code__, [leaf for leaf in jax.tree.leaves(bound) if not _is_number(leaf)]


def _is_full(cell: Any) -> bool:
  try:
    cell.cell_contents  # noqa: B018
  except ValueError:  # a name that has no value yet
    return False
  return True


def _is_number(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex)


def _same(a: list[Any], b: list[Any]) -> bool:
  return len(a) == len(b) and all(x is y or _equal(x, y) for x, y in zip(a, b, strict=True))


def _equal(x: Any, y: Any) -> bool:
  try:
    return bool(x == y)
  except Exception:  # nobody knows what the objects of others raise
    return False
