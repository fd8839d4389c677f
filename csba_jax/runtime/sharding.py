"""The devices of a run as a mesh, and the shardings of its arrays.

The mesh has two axes. Over `data` only the batch is split. Over `fsdp` parameters and the state of
the optimiser are split too (fully sharded data parallelism: a step gathers parameters where it
needs them, and reduces and scatters gradients). The program is the same for every number of devices
and processes: XLA's partitioner adds the communication.
"""

import collections
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from csba_jax.errors import UserError
from csba_jax.runtime import distributed, jax_setup

PyTree = Any
AXES = ('data', 'fsdp')
# Arrays of fewer numbers are not split: that would cost more messages than it saves memory.
SMALLEST_SPLIT = 2**12


@dataclasses.dataclass(frozen=True)
class Layout:
  """Shardings of a run: batches are split over all devices, states as `of_state` says."""

  mesh: Mesh

  @classmethod
  def of(cls, tree: PyTree) -> 'Layout':
    """The layout of arrays that are on devices already, so that computations follow their data."""
    leaf = jax.tree.leaves(tree)[0]
    sharding = leaf.sharding if isinstance(leaf, Array) else None
    if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == AXES:
      return cls(sharding.mesh)
    device = jax.local_devices()[0] if sharding is None else min(sharding.device_set, key=_id)
    return cls(_mesh([device], 1))

  @property
  def devices(self) -> int:
    """Number of devices of the mesh, of all processes."""
    return self.mesh.size

  @property
  def grams_mesh(self) -> Mesh | None:
    """The `mesh` for `gradients.class_grams`; None for one device, which needs none."""
    return self.mesh if self.devices > 1 else None

  @property
  def whole(self) -> NamedSharding:
    """The sharding that puts the whole array on every device."""
    return NamedSharding(self.mesh, PartitionSpec())

  def split(self, axis: int = 0) -> NamedSharding:
    """The sharding that splits one axis of an array over all devices."""
    return NamedSharding(self.mesh, PartitionSpec(*(None,) * axis, self.mesh.axis_names))

  def rows(self, number: int) -> np.ndarray:
    """The rows, of `number` split over all devices, that this process holds; ascending."""
    parts = self.split().addressable_devices_indices_map((number,)).values()
    return np.unique(np.concatenate([np.arange(number)[part] for part in parts]))

  def of_state(self, state: PyTree) -> PyTree:
    """A sharding for each leaf: `fsdp` splits the longest axis that it divides."""
    return jax.tree.map(self._of_leaf, state)

  def _of_leaf(self, leaf: Any) -> NamedSharding:
    shape, ways = np.shape(leaf), self.mesh.shape['fsdp']
    axes = [axis for axis, length in enumerate(shape) if length % ways == 0]
    if ways == 1 or not axes or np.prod(shape) < SMALLEST_SPLIT:
      return self.whole
    axis = max(axes, key=lambda axis: shape[axis])
    return NamedSharding(self.mesh, PartitionSpec(*(None,) * axis, 'fsdp'))

  def like(self, tree: PyTree) -> PyTree:
    """Shapes, dtypes and shardings of a state: what a checkpoint is read into."""
    return jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      tree,
      self.of_state(tree),
    )

  def gather(self, tree: PyTree) -> PyTree:
    """Inside a compiled function: the whole of each array on every device."""
    return self._constrain(tree, jax.tree.map(lambda _: self.whole, tree))

  def scatter(self, tree: PyTree) -> PyTree:
    """Inside a compiled function: parameters, or a tree like them, split as in `of_state`."""
    return self._constrain(tree, self.of_state(tree))

  def spread(self, tree: PyTree) -> PyTree:
    """Inside a compiled function: a batch split over all devices."""
    return self._constrain(tree, jax.tree.map(lambda _: self.split(), tree))

  def _constrain(self, tree: PyTree, shardings: PyTree) -> PyTree:
    if self.devices == 1:
      return tree
    return jax.lax.with_sharding_constraint(tree, shardings)

  def place(self, tree: PyTree) -> PyTree:
    """Puts the same values on every device; every process has them as host arrays."""
    return jax.tree.map(lambda x: self._put(x, self.whole), tree)

  def place_state(self, state: PyTree) -> PyTree:
    """Puts a state on its devices, from host arrays or arrays of this process's devices."""
    return jax.tree.map(self._put, state, self.of_state(state))

  def place_batch(self, tree: PyTree, axis: int = 0) -> PyTree:
    """Splits batches along an axis; every process has all the values and takes its share."""
    return jax.tree.map(lambda x: self._put(x, self.split(axis)), tree)

  def place_rows(self, tree: PyTree, number: int, axis: int = 0) -> PyTree:
    """Builds batches of `number` rows along an axis; this process passes only its own `rows`."""
    sharding = self.split(axis)

    def one(x: np.ndarray) -> Array:
      shape = (*x.shape[:axis], number, *x.shape[axis + 1 :])
      return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(one, tree)

  def batch_of(self, read: Callable[[np.ndarray], PyTree], number: int) -> PyTree:
    """Builds a batch of `number` rows; each process reads its own with `read(rows)`."""
    return self.place_rows(read(self.rows(number)), number)

  @staticmethod
  def _put(x: Any, sharding: NamedSharding) -> Array:
    if distributed.count() == 1:
      return jax.device_put(x, sharding)
    if isinstance(x, Array) and not x.is_fully_addressable:
      return jax.jit(lambda x: x, out_shardings=sharding)(x)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      data = Layout._put(jax.random.key_data(x), sharding)
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])


def one_at_a_time(result: PyTree) -> None:
  """Waits for the result of a program with collectives before the next one is dispatched.

  The devices of the CPU backend are threads. With dozens of such programs in flight they wait for
  each other forever (seen with two processes of four devices each, jaxlib 0.10.2).
  """
  jax.block_until_ready(result)


def _id(device: jax.Device) -> int:
  return device.id


def layout(config: ml_collections.ConfigDict, *, fake: bool = False) -> Layout:
  """The layout that config.parallel describes, over the first of all processes' devices.

  Args:
    config: of a run.
    fake: whether config.parallel.fake_devices is allowed, because nothing will run.

  Raises:
    UserError: more devices than there are, sizes of which one does not divide another, or
      config.deterministic on GPUs without the flags for it.
  """
  if config.parallel.fake_devices and not fake:
    raise UserError(
      'parallel.fake_devices only with --dry_run',
      f'{config.parallel.fake_devices} in a run',
      'add --dry_run, or set --config.parallel.fake_devices=0',
    )
  there = jax.devices()
  wanted = config.parallel.devices or len(there)
  if wanted > len(there):
    raise UserError(
      f'parallel.devices of at most {len(there)}, the number of devices',
      str(wanted),
      'set --config.parallel.devices=0 to use all',
    )
  if wanted < len(there) and distributed.count() > 1:
    raise UserError(
      'parallel.devices=0 (all) with several processes', str(wanted), 'start fewer processes'
    )
  check(config, wanted)
  _check_slices(there[:wanted], config.parallel.fsdp)
  if config.deterministic and there[0].platform == 'gpu' and jax_setup.missing_flags():
    raise UserError(
      f'XLA_FLAGS with {" ".join(jax_setup.missing_flags())} for deterministic=True',
      repr(os.environ.get('XLA_FLAGS', '')),
      'call csba_jax.runtime.jax_setup.prepare(deterministic=True) before JAX starts, or set '
      '--config.deterministic=False',
    )
  return Layout(_mesh(there[:wanted], config.parallel.fsdp))


def for_evaluation(config: ml_collections.ConfigDict) -> Layout:
  """The layout for evaluation: without fsdp, whatever devices the state was trained on."""
  there = jax.devices()
  wanted = config.parallel.devices if distributed.count() == 1 else 0
  return Layout(_mesh(there[: min(wanted, len(there)) or None], 1))


def _mesh(devices: Sequence[jax.Device], fsdp: int) -> Mesh:
  return Mesh(_arranged(devices, fsdp), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)


def _arranged(devices: Sequence[jax.Device], fsdp: int) -> np.ndarray:
  """Devices [data, fsdp]; those that share a copy of the state are close to each other.

  Devices with one `slice_index` share a fast network: the GPUs of a node, or the chips of a TPU
  slice, where the place in the torus counts too. (`jax.make_mesh` takes devices of one slice only.)
  """
  shape, slices = (len(devices) // fsdp, fsdp), len({_slice(device) for device in devices})
  if devices[0].platform == 'tpu' and slices > 1:
    inside = (shape[0] // slices, fsdp)
    return mesh_utils.create_hybrid_device_mesh(
      inside, (slices, 1), devices, allow_split_physical_axes=True
    )
  if devices[0].platform == 'tpu':
    try:
      return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except AssertionError:  # these devices are no box of the torus: any order is as good
      pass
  # by slice first: a launcher may number processes across nodes
  ordered = sorted(devices, key=lambda device: (_slice(device), device.process_index, device.id))
  return np.array(ordered).reshape(shape)


def _slice(device: jax.Device) -> int:
  return getattr(device, 'slice_index', 0)  # CPU devices have none


def _check_slices(devices: Sequence[jax.Device], fsdp: int) -> None:
  """Raises UserError if a copy of the state would take parts of several nodes."""
  sizes = set(collections.Counter(map(_slice, devices)).values())
  if sizes == {len(devices)} or all(size % fsdp == 0 for size in sizes):
    return
  tpu = devices[0].platform == 'tpu'
  if not tpu and len(sizes) == 1 and fsdp % min(sizes) == 0:
    return  # whole nodes: slower, for a state too large for one node
  node, beyond = ('TPU slice', '') if tpu else ('node', ', or is a multiple of them')
  raise UserError(
    f'parallel.fsdp that divides the {min(sizes)} devices of a {node}{beyond}',
    str(fsdp),
    'set --config.parallel.fsdp to 1 or another divisor',
  )


def check(config: ml_collections.ConfigDict, devices: int) -> None:
  """Raises UserError unless fsdp divides the devices, and the devices divide the batch."""
  fsdp, batch = config.parallel.fsdp, config.train.batch_size
  if devices % fsdp:
    raise UserError(
      f'parallel.fsdp that divides the {devices} devices',
      str(fsdp),
      'set --config.parallel.fsdp to 1 or another divisor',
    )
  if batch % devices:
    raise UserError(
      f'train.batch_size that {devices} devices divide',
      f'{batch}',
      f'set --config.train.batch_size={max(1, batch // devices) * devices}, or '
      'use fewer --config.parallel.devices',
    )
