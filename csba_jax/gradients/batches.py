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
      images of class c in row c. The optional 'mask' is 0 or False for padding.
    num_classes: C.
  """
  if not isinstance(num_classes, int | np.integer) or num_classes < 1:
    raise UserError(
      'num_classes, a whole number of at least 1', repr(num_classes), 'pass the number of classes'
    )
  if not isinstance(batch, Mapping) or 'label' not in batch:
    found = f'keys {sorted(batch)}' if isinstance(batch, Mapping) else type(batch).__name__
    raise UserError(
      "batch, a dict with an array 'label'", found, "use 'label' as the key of the labels"
    )
  label = batch['label']
  dtype = jnp.result_type(label)
  if not jnp.issubdtype(dtype, jnp.integer):
    raise UserError("batch['label'] of an integer type", str(dtype), 'pass class indices')
  shape = jnp.shape(label)
  if len(shape) not in (1, 2):
    raise UserError("batch['label'] of shape [N] or [C, n]", f'{list(shape)}', 'reshape it')
  if 0 in shape:
    raise UserError(
      'a batch with images', f"batch['label'] of shape {list(shape)}", 'pass at least one image'
    )
  for path, leaf in jax.tree.leaves_with_path(dict(batch)):
    if jnp.shape(leaf)[: len(shape)] != shape:
      raise UserError(
        f"every array of the batch with the dimensions {list(shape)} of 'label' in front",
        f'{jax.tree_util.keystr(path, simple=True, separator="/")} of shape '
        f'{list(jnp.shape(leaf))}',
        'let losses_fn close over arrays that do not belong to single examples',
      )
  if 'mask' in batch and jnp.shape(batch['mask']) != shape:
    raise UserError(
      f"batch['mask'] of shape {list(shape)}", f'{list(jnp.shape(batch["mask"]))}', 'reshape it'
    )
  if len(shape) == 2 and shape[0] != num_classes:
    raise UserError(
      f'a class-stacked batch of num_classes = {num_classes} rows',
      f'{shape[0]} rows',
      'stack C rows',
    )
  if not is_traced([label, batch.get('mask', 0)]):
    _check_values(np.asarray(label), _mask(batch), num_classes)


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
