"""Batches for class gradients, flat [N, ...] or class-stacked [C, n, ...]: checks, conversions."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from csba_jax.errors import UserError

Batch = Mapping[
  str, Any
]  # 'label' [N] or [C, n] int, optional 'mask' alike, whatever losses_fn reads


def is_traced(tree: Any) -> bool:
  """Whether a value of the tree is known only while a compiled program runs."""
  return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def is_tracing(tree: Any) -> bool:
  """Whether a value of the tree is traced, or JAX now traces a function as a whole."""
  return is_traced([tree, jnp.zeros(())])


def is_stacked(batch: Batch) -> bool:
  """Whether the batch is class-stacked."""
  return jnp.ndim(batch['label']) == 2


def check(batch: Batch, num_classes: int) -> None:
  """Raises UserError unless the batch is as described below; does not check traced values.

  Args:
    batch: dict of arrays whose first dimensions are those of 'label': [N], or [C, n] with the
      images of class c in row c. The optional 'mask' is 0 or False for padding, and 1
      or True elsewhere.
    num_classes: C.
  """
  check_num_classes(num_classes)
  if not isinstance(batch, Mapping) or 'label' not in batch:
    found = (
      f'keys {sorted(map(str, batch))}' if isinstance(batch, Mapping) else type(batch).__name__
    )
    raise UserError(
      "batch, a dict with an array 'label'", found, "use 'label' as the key of the labels"
    )
  shape = _check_label(batch['label'], num_classes)
  _check_leaves(batch, shape)
  if 'mask' in batch:
    _check_mask(batch['mask'], shape)
  if not is_traced([batch['label'], batch.get('mask', 0)]):
    _check_values(np.asarray(batch['label']), _mask(batch), num_classes)


def check_num_classes(num_classes: Any) -> None:
  """Raises UserError unless it is a whole number of at least 1."""
  whole = isinstance(num_classes, int | np.integer) and not isinstance(num_classes, bool)
  if not whole or num_classes < 1:
    raise UserError(
      'num_classes, a whole number of at least 1', repr(num_classes), 'pass the number of classes'
    )


def remedy(label: Any, num_classes: int) -> str:
  """What to do about labels of a wrong type or shape."""
  if np.asarray(label).dtype.kind in 'USO':
    return 'number the classes: labels = np.unique(names, return_inverse=True)[1]'
  shape = np.shape(label)
  if len(shape) == 2 and shape[1] == num_classes:
    return 'pass class indices: labels.argmax(-1)'
  return 'pass class indices: labels[:, 0]' if shape[1:] == (1,) else 'pass class indices'


def _check_label(label: Any, num_classes: int) -> tuple[int, ...]:
  """The shape of the labels; UserError unless they are integers [N] or [C, n]."""
  if not hasattr(label, 'dtype') and not isinstance(label, int):
    raise UserError("batch['label'], an array", type(label).__name__, 'pass np.asarray(labels)')
  shape = np.shape(label)
  dtype = getattr(label, 'dtype', np.dtype(int))
  if not jnp.issubdtype(dtype, jnp.integer):
    do = 'pass class indices' if is_traced(label) else remedy(label, num_classes)
    raise UserError("batch['label'] of an integer type", str(dtype), do)
  if len(shape) not in (1, 2):
    raise UserError("batch['label'] of shape [N] or [C, n]", f'{list(shape)}', 'reshape it')
  if 0 in shape:
    raise UserError(
      'a batch with images', f"batch['label'] of shape {list(shape)}", 'pass at least one image'
    )
  if len(shape) == 2 and not is_traced(label) and _is_one_hot(np.asarray(label), num_classes):
    raise UserError("batch['label'] of class indices", 'one-hot rows', remedy(label, num_classes))
  if len(shape) == 2 and shape[0] != num_classes:
    raise UserError(
      f'a class-stacked batch of num_classes = {num_classes} rows',
      f"{shape[0]} rows, as batch['label'] has the shape {list(shape)}",
      'stack C rows, or pass a flat batch with labels [N]',
    )
  return shape


def _is_one_hot(label: np.ndarray, num_classes: int) -> bool:
  """Whether each row has a single 1 among 0; class 1 of 2 may be stacked so too."""
  if label.shape[1] != num_classes or not np.isin(label, (0, 1)).all():
    return False
  return bool((label.sum(1) == 1).all())


def _check_leaves(batch: Batch, shape: tuple[int, ...]) -> None:
  """Raises UserError unless all values are arrays of numbers for single examples."""
  if not all(isinstance(name, str) for name in batch):
    raise UserError('a batch whose keys are strings', f'keys {[*batch]}', 'name the arrays')
  for name, value in batch.items():
    for path, leaf in jax.tree.leaves_with_path({name: value}):
      place = jax.tree_util.keystr(path, simple=True, separator='/')
      if isinstance(value, list | tuple) and not hasattr(leaf, 'dtype'):
        raise UserError('arrays in the batch', f'{name}, a {type(value).__name__}', 'np.asarray')
      if not is_numeric(leaf):
        dtype = getattr(leaf, 'dtype', type(leaf).__name__)
        raise UserError(
          'a batch of arrays of numbers', f'{place} of type {dtype}', 'leave it out of the batch'
        )
      if jnp.shape(leaf)[: len(shape)] != shape:
        raise UserError(
          f"every array of the batch with the dimensions {list(shape)} of 'label' in front",
          f'{place} of shape {list(jnp.shape(leaf))}',
          'let losses_fn close over arrays that do not belong to single examples',
        )


def _check_mask(mask: Any, shape: tuple[int, ...]) -> None:
  if mask is None or np.shape(mask) != shape:
    found = 'None' if mask is None else f'{list(np.shape(mask))}'
    raise UserError(f"batch['mask'] of shape {list(shape)}", found, 'reshape it, or leave it out')
  if not is_traced(mask) and not np.isin(np.asarray(mask), (0, 1)).all():
    values = np.asarray(mask)
    raise UserError(
      "batch['mask'] of 0 for padding and 1 elsewhere",
      f'{values[~np.isin(values, (0, 1))][0]}',
      'multiply the losses by weights in losses_fn, if weights are meant',
    )


def is_numeric(leaf: Any) -> bool:
  """Whether JAX takes it as an array: numbers, booleans, random keys."""
  if isinstance(leaf, bool | int | float | complex):
    return True
  if isinstance(leaf, np.ndarray | np.generic):
    return bool(jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == np.bool_)
  return isinstance(leaf, jax.Array)


def _check_values(label: np.ndarray, mask: np.ndarray, num_classes: int) -> None:
  if not mask.any():
    raise UserError('a batch with images', 'a mask that leaves none', 'correct the mask')
  wrong = mask & ((label < 0) | (label >= num_classes))
  if wrong.any():
    raise UserError(
      f"batch['label'] from 0 to num_classes - 1 = {num_classes - 1}",
      f'{label[wrong][0]}',
      'correct the labels, or pass the number of classes that they have',
    )
  if label.ndim == 2 and (mask & (label != np.arange(num_classes)[:, None])).any():
    row = np.nonzero((mask & (label != np.arange(num_classes)[:, None])).any(1))[0][0]
    raise UserError(
      'a class-stacked batch with class c in row c',
      f'labels {sorted(set(label[row][mask[row]].tolist()))} in row {row}',
      'sort the rows, or pass a flat batch',
    )


def _mask(batch: Batch) -> np.ndarray:
  """The mask as booleans on the host; all True without one."""
  mask = batch.get('mask')
  return np.ones(np.shape(batch['label']), bool) if mask is None else np.asarray(mask) != 0


def valid(batch: Batch) -> Array:
  """The mask as booleans on the device, of the shape of 'label'."""
  if 'mask' not in batch:
    return jnp.ones(jnp.shape(batch['label']), bool)
  return jnp.asarray(batch['mask']) != 0


def flatten(batch: Batch) -> dict[str, Any]:
  """Class-stacked to flat.   [C, n, ...] -> [C n, ...]"""
  return jax.tree.map(lambda x: jnp.reshape(x, (-1, *jnp.shape(x)[2:])), dict(batch))


def stack(batch: Batch, num_classes: int) -> dict[str, Any]:
  """Flat to class-stacked.   [N, ...], concrete labels -> [C, n, ...] with a mask

  n is the count of the largest class, rounded up by less than a half, so that many batches need few
  compilations. Rows are padded with the first image of the batch, mask False.
  """
  label, mask = np.asarray(batch['label']), _mask(batch)
  index = [np.nonzero(mask & (label == c))[0] for c in range(num_classes)]
  n = _round_up(max(map(len, index)))
  position = np.zeros((num_classes, n), np.int32)
  filled = np.zeros((num_classes, n), bool)
  for c, of_class in enumerate(index):
    position[c, : len(of_class)] = of_class
    filled[c, : len(of_class)] = True
  stacked = {name: jax.tree.map(lambda x: jnp.asarray(x)[position], v) for name, v in batch.items()}
  return stacked | {'mask': filled}


def _round_up(n: int) -> int:
  """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, ... that is not below n."""
  power = 1
  while power < n:
    if power >= 2 and power * 3 // 2 >= n:
      return power * 3 // 2
    power *= 2
  return power


def pad(batch: Batch, multiple: int) -> dict[str, Any]:
  """Pads the last dimension of 'label' to a multiple with the first example, mask False."""
  axis = jnp.ndim(batch['label']) - 1
  length = jnp.shape(batch['label'])[axis]
  missing = -length % multiple
  if not missing:
    return dict(batch)
  index = np.concatenate([np.arange(length), np.zeros(missing, np.int64)])
  padded = jax.tree.map(lambda x: jnp.take(x, index, axis=axis), dict(batch))
  kept = (np.arange(length + missing) < length).reshape((1,) * axis + (-1,))
  return padded | {'mask': jnp.take(valid(batch), index, axis=axis) & kept}
