"""A test of an opaque losses_fn: does the loss of an example depend on the rest of its batch?"""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from csba_jax.gradients.pullback import losses_and_pullback

PyTree = Any
_KNOWN: collections.OrderedDict[Any, bool] = collections.OrderedDict()  # answers by losses_fn
_KEPT = 256  # answers
_EXAMPLES = 8  # of the test
# relative differences that another order of summation may make
_TOLERANCE = {'float64': 1e-9, 'float32': 1e-4, 'bfloat16': 3e-2, 'float16': 3e-3}


def is_per_example(losses_fn: Partial, params: PyTree, batch: PyTree) -> bool:
  """Whether losses and gradients of some examples are the same together and in two halves.

  Gradients are compared too, because a classifier that starts at zero gives the same loss for every
  batch. The answer is cached for the function. A doubtful case counts as coupled: that costs time
  but is never wrong.

  Args:
    losses_fn: of concrete arguments.
    params: its first argument.
    batch: flat, its second argument.
  """
  length = len(batch['label'])
  if length < 2:
    return True  # true for this batch, which has no rest; not cached
  few = min(_EXAMPLES, length) // 2 * 2
  spread = np.linspace(0, length - 1, few).round().astype(int)
  images = jax.tree.map(lambda x: _on_host(x)[spread], dict(batch))
  halves = [jax.tree.map(lambda x, at=at: x[at::2], images) for at in (0, 1)]
  if all(jax.tree.leaves(jax.tree.map(_are_equal, *halves))):
    return False  # equal halves have equal statistics
  key = jax.tree.structure(losses_fn)
  if key not in _KNOWN:
    _KNOWN[key] = _compare(losses_fn, params, images, halves)
    if len(_KNOWN) > _KEPT:
      _KNOWN.popitem(last=False)
  return _KNOWN[key]


def _on_host(x: Any) -> Any:
  """As a NumPy array, unless it is one of random keys, which has no such form."""
  return x if _is_key(x) else np.asarray(x)


def _are_equal(a: Any, b: Any) -> bool:
  if _is_key(a):
    a, b = jax.random.key_data(a), jax.random.key_data(b)
  return np.array_equal(a, b)


def _is_key(x: Any) -> bool:
  return isinstance(x, Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _compare(losses_fn: Partial, params: PyTree, images: PyTree, halves: list[PyTree]) -> bool:
  """Whether losses and gradients of the images are those of their even and odd ones."""
  weights = np.linspace(0.5, 1.5, len(images['label']))
  losses, together = _pull(losses_fn, params, images, weights)
  apart = [
    _pull(losses_fn, params, half, weights[at::2]) for half, at in zip(halves, (0, 1), strict=True)
  ]
  for at, (of_half, _) in enumerate(apart):
    if not _close(of_half, losses[at::2], 0.0):
      return False
  sums = jax.tree.map(jnp.add, apart[0][1], apart[1][1])
  # gradients that are zero but for rounding, such as that of a bias of attention's keys, are
  # compared with others
  floor = 1e-2 * max(float(np.abs(g).max(initial=0)) for g in jax.tree.leaves(together))
  return all(jax.tree.leaves(jax.tree.map(lambda a, b: _close(a, b, floor), sums, together)))


@jax.jit
def _pull(
  losses_fn: Partial, params: PyTree, batch: PyTree, weights: Array
) -> tuple[Array, PyTree]:
  """Losses, and the gradient of their weighted sum."""
  losses, pullback, _ = losses_and_pullback(lambda p: (losses_fn(p, batch), None), params)
  return losses, pullback(weights)


def _close(a: Array, b: Array, floor: float) -> bool:
  tolerance = _TOLERANCE[str(jnp.result_type(b))]
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  with np.errstate(invalid='ignore'):  # losses that are not finite are not close
    return bool(np.abs(a - b).max(initial=0) <= tolerance * max(np.abs(b).max(initial=0), floor))
