"""Layers of any parameter tree, and Grams of class gradients layer by layer."""

import collections
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from csba_jax.errors import UserError
from csba_jax.gradients import nnx_variables

PyTree = Any
LayerFn = Callable[[str], str | None]
RESERVED = ('shared', 'total')  # sums of layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassGrams:
  """Inner products of class gradients, <g_c, g_d>, by layer and over scopes.

  Layers stand in the order of the parameter tree: each where its first parameter stands. A dict
  sorts its keys; a list, a module of Equinox or a NamedTuple keeps the order of its parts.
  A class without images has a count of 0, and 0 as its row, its column and its loss.
  """

  grams: dict[str, Array]  # layer name: [C, C], float32 or float64; ordered, also out of jit
  total: Array  # [C, C], all layers
  shared: Array  # [C, C], all layers except the classifier head; without a `head`, all layers
  counts: Array  # [C], images of each class that took part
  losses: Array  # [C], mean loss of each class


@dataclasses.dataclass(frozen=True)
class Layers:
  """Which leaves of a parameter tree form which layer, in the order of the tree; hashable."""

  names: tuple[str, ...]
  members: tuple[tuple[int, ...], ...]  # indices of each layer's leaves in the flattened tree
  in_head: tuple[bool, ...]

  @classmethod
  def of(cls, params: PyTree, layer_fn: LayerFn | None, head: str | None) -> 'Layers':
    """The layers of a tree.

    Args:
      params: leaves are float arrays.
      layer_fn: maps the name of a parameter, such as 'stage1/conv/kernel', to the name of its
        layer, or to None for a parameter that is held fixed. By default the layer is the name
        without its last part.
      head: regular expression that finds, by `re.search`, the names of the parameters of the
        classifier head.

    Raises:
      UserError: no parameters, some that are not float, a `layer_fn` or `head` that finds nothing,
        a head that takes a part of a layer.
    """
    names = parameter_names(params)
    check_params(params)
    _check_head(head)
    found = [_layer_of(layer_fn or layer_name, name) for name in names]
    members: dict[str, list[int]] = {}
    for i, layer in enumerate(found):
      if layer is not None:
        members.setdefault(layer, []).append(i)
    if not members:
      raise UserError(
        'a layer_fn that names the layer of at least one parameter',
        f'None for all of {_some(names)}',
        'return a name for the parameters whose gradients are wanted',
      )
    heads = {layer: {_is_head(names[i], head) for i in of} for layer, of in members.items()}
    split = [layer for layer, kinds in heads.items() if len(kinds) > 1]
    if split:
      raise UserError(
        'a head that takes layers as a whole',
        f'{head!r}, which takes a part of {split[0]}',
        'widen the regular expression',
      )
    if head is not None and not any(_is_head(name, head) for name in names):
      raise UserError(
        'a head that matches parameters of the classifier',
        f'{head!r}, which matches none of {_some(names)}',
        'correct the regular expression',
      )
    return cls(
      tuple(members),
      tuple(map(tuple, members.values())),
      tuple(True in kinds for kinds in heads.values()),
    )

  def passes(self, leaves: Sequence[Array], classes: int, max_bytes: int) -> list[list[int]]:
    """Groups of layers whose class gradients together stay within `max_bytes`.

    A single layer that needs more forms a group of its own.

    Args:
      leaves: arrays or shapes of the parameter tree.
      classes: rows of the Gram.
      max_bytes: for the class gradients of one pass.

    Returns:
      Indices into `names`; each layer once.
    """
    groups: list[list[int]] = []
    free = 0
    for i, size in enumerate(self.class_gradient_bytes(leaves, classes)):
      if not groups or size > free:
        groups.append([])
        free = max_bytes
      groups[-1].append(i)
      free -= size
    return groups

  def check_room(
    self, leaves: Sequence[Array], rows: int, room: int, devices: int = 1, every_gram: bool = False
  ) -> None:
    """Raises UserError where class gradients of one layer, or Grams, exceed a device's memory.

    At least one layer is formed at a time. Where devices share the images, each device holds the
    sums over its own images, and a contiguous copy of them that is reduced and scattered.

    Args:
      leaves: as in `passes`.
      rows: of the Gram.
      room: bytes of one device.
      devices: that share the images.
      every_gram: whether all Grams are held at once, not only those of one pass.
    """
    sizes, of_gram = self.class_gradient_bytes(leaves, rows), 4 * rows**2
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    needed = sizes[largest] * (2 if devices > 1 else 1)
    grams = of_gram * (len(self.names) if every_gram else 1)
    what, do = f'the {rows} class gradients of {self.names[largest]}', 'leave this layer out'
    if grams > needed:
      what, do = f'Grams of {rows} rows for {grams // of_gram} layers', 'leave layers out'
    if needed + grams > room:
      raise UserError(
        f'class gradients and Grams within the {room / 1e9:.1f} GB of a device',
        f'{(needed + grams) / 1e9:.1f} GB, {max(needed, grams) / 1e9:.1f} GB of them for {what}',
        f'{do} (csba-diagnose --layers=REGEX, layer_fn), or take fewer classes or folds',
      )

  def class_gradient_bytes(self, leaves: Sequence[Array], classes: int) -> list[int]:
    """Bytes of the class gradients of each layer."""
    return [
      sum(classes * leaves[i].size * accumulator(leaves[i].dtype).itemsize for i in members)
      for members in self.members
    ]


def parameter_names(params: PyTree) -> list[str]:
  """A name such as 'stage1/conv/kernel' for each leaf, without the '/value' that NNX adds."""
  variables = nnx_variables.variables(params)
  return [
    jax.tree_util.keystr(path[:-1] if path[:-1] in variables else path, simple=True, separator='/')
    for path, _ in jax.tree.leaves_with_path(params)
  ]


def layer_name(parameter: str) -> str:
  """The module that owns a parameter: its name without the last part, if it has two."""
  return parameter.rpartition('/')[0] or parameter or 'parameters'


def _is_head(name: str, head: str | None) -> bool:
  return head is not None and re.search(head, name) is not None


def check_params(params: PyTree) -> None:
  """Raises UserError unless the leaves are float arrays or their shapes, and NNX's are Params."""
  nnx_variables.check_variables(params)
  names = parameter_names(params)
  for name, leaf in zip(names, jax.tree.leaves(params), strict=True):
    if not jnp.issubdtype(getattr(leaf, 'dtype', type(leaf)), jnp.floating):
      raise UserError(
        'params whose leaves are float arrays',
        f'{name or "params"} of type {getattr(leaf, "dtype", type(leaf).__name__)}',
        'give integers and functions to losses_fn by another way (eqx.partition, nnx.split)',
      )
  if not names:
    raise UserError('params with at least one array', 'an empty tree', "pass the model's params")


def _check_head(head: str | None) -> None:
  expected = "head, a regular expression for the classifier's parameters, or None"
  if head is not None and (not isinstance(head, str) or not head):
    raise UserError(expected, repr(head), "pass a string such as '^head/', or None")
  try:
    re.compile(head or '')
  except re.error as error:
    raise UserError(expected, f'{head!r}: {error}', 'correct it') from error


def _layer_of(layer_fn: LayerFn, name: str) -> str | None:
  """layer_fn(name), checked."""
  expected = 'layer_fn that maps the name of a parameter to the name of its layer, or to None'
  if not callable(layer_fn):
    raise UserError(expected, repr(layer_fn), 'pass a function, such as lambda name: name')
  try:
    layer = layer_fn(name)
  except Exception as error:
    found = f'{type(error).__name__} for {name!r}: {error}'
    raise UserError(expected, found, 'correct the function') from error
  if layer is not None and (not isinstance(layer, str) or not layer):
    raise UserError(expected, f'{layer!r} for {name!r}', 'return a string or None')
  if layer in RESERVED:
    raise UserError(
      f'layers with other names than {" and ".join(RESERVED)}, which are sums of layers',
      f'{layer!r} for the parameter {name!r}',
      "give another name: layer_fn=lambda name: 'layer ' + name.rpartition('/')[0]",
    )
  return layer


def _some(names: Sequence[str]) -> str:
  return ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')


def accumulator(dtype: Any) -> jnp.dtype:
  """The type of sums of gradients: float32 at least."""
  return jnp.dtype(jax.dtypes.canonicalize_dtype(jnp.promote_types(dtype, jnp.float32)))


def gram(rows: Sequence[Array]) -> Array:
  """sum over leaves of <row_c, row_d>.   leaves [C, ...] -> [C, C], float32 at least, symmetric"""
  flat = (leaf.reshape(leaf.shape[0], -1).astype(accumulator(leaf.dtype)) for leaf in rows)
  total = sum(jnp.matmul(x, x.T, precision=lax.Precision.HIGHEST) for x in flat)
  return (total + total.T) / 2


def assemble(layers: Layers, sums: Sequence[Array], counts: Array, loss_sums: Array) -> ClassGrams:
  """ClassGrams from Grams of gradient *sums*, which are divided by n_c n_d.

  Args:
    layers: L of them.
    sums: L Grams [C, C] of sum_{i: y_i = c} grad loss_i.
    counts: [C] images of each class.
    loss_sums: [C] sums of losses.
  """
  per_image = 1 / jnp.maximum(counts, 1).astype(sums[0].dtype)
  means = [g * (per_image[:, None] * per_image[None]) for g in sums]
  body = [g for g, head in zip(means, layers.in_head, strict=True) if not head]
  return ClassGrams(
    # jax.tree sorts the keys of a dict, and would bring layers into another order
    grams=collections.OrderedDict(zip(layers.names, means, strict=True)),
    total=sum(means),
    shared=sum(body) if body else jnp.zeros_like(means[0]),
    counts=counts,
    losses=loss_sums * per_image.astype(loss_sums.dtype),
  )
