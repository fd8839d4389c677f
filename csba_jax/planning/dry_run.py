"""What a run would cost, read off compiled programs; it allocates nothing and needs no data.

The training step and the diagnostic step are compiled ahead of time. They are compiled for the
devices of this machine, or for a mesh that does not exist (config.parallel.fake_devices). For such
a mesh XLA compiles them as for CPUs.
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.typing import DTypeLike

from csba_jax.data import mixing, pipeline, streaming
from csba_jax.errors import UserError
from csba_jax.gradients.gram import LayerFn, Layers
from csba_jax.measure import diagnose, probe, training_conflict
from csba_jax.methods import optimizers, surgery
from csba_jax.models import registry
from csba_jax.planning import collectives, hardware
from csba_jax.planning.collectives import Collective
from csba_jax.run import state as state_lib
from csba_jax.run.net import Metadata, Net
from csba_jax.run.state import TrainState
from csba_jax.runtime import backend, sharding, text_table
from csba_jax.training import step
from csba_jax.training import surgery as surgery_in_training

STEPS = 1000  # of a run: they change the schedules and not the cost of a step
# It changes the work of LLVM alone. The program, its memory and its collectives stay the same.
_FAST_TO_COMPILE = {'xla_backend_optimization_level': 1}
UNITS = {'GFLOP': 1e9, 'MiB': 2**20, 'GiB': 2**30, 'ms': 1e-3}
# name in the table: attribute of jaxlib's CompiledMemoryStats
MEMORY = {
  'arguments': 'argument_size_in_bytes',
  'temporaries': 'temp_size_in_bytes',
  'outputs': 'output_size_in_bytes',
  'of them shared by arguments and outputs': 'alias_size_in_bytes',
}


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
  """What is compiled: a run's net, its state as shapes with shardings, and a mesh."""

  config: ml_collections.ConfigDict
  num_classes: int
  image_shape: tuple[int, int, int]
  model: nn.Module
  tx: optax.GradientTransformation
  state: TrainState
  layout: sharding.Layout

  @classmethod
  def of(cls, config: ml_collections.ConfigDict) -> 'Setting':
    """The setting of a config; UserError for an invalid config or an unknown number of classes."""
    num_classes = config.data.num_classes or _count_classes(config)
    image_shape = (config.data.image_size, config.data.image_size, config.data.channels)
    model = registry.build(config.model, num_classes, image_shape)
    tx, _ = optimizers.build(config, STEPS)
    layout = sharding.layout(config, fake=True)
    state = state_lib.shapes(model, tx, image_shape, config.train.ema_decay > 0)
    state = state.replace(surgery=surgery.initial(config, num_classes))
    return cls(config, num_classes, image_shape, model, tx, layout.like(state), layout)

  @property
  def net(self) -> Net:
    """The net as shapes, for classes of one image each."""
    names, counts = tuple(map(str, range(self.num_classes))), np.ones(self.num_classes, int)
    return Net(self.model, self.state.variables(), Metadata(names, counts, self.image_shape))

  @property
  def statistics(self) -> str:
    """'batch' or 'frozen': what its measurements of conflict take."""
    return training_conflict.choose(self.config.diagnostics.statistics, self.net, self.config)

  @property
  def measures_for_surgery(self) -> bool:
    """Whether gradient surgery measures conflict every so many steps."""
    wanted = self.config.surgery
    return wanted.every > 1 and wanted.name not in ('none', *surgery.CONTROLS)

  def of_surgery(self) -> tuple['Setting', LayerFn | None]:
    """The setting whose diagnostic step is a measurement for surgery, and its layers."""
    own = dataclasses.replace(self, config=surgery_in_training.measured(self.config))
    layers = self.config.surgery.layers
    return own, diagnose.choose_layers(layers, self.state.params) if layers else None

  @property
  def parameters(self) -> int:
    """Number of parameters of the net."""
    return sum(x.size for x in jax.tree.leaves(self.state.params))


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one call of a compiled program costs each device."""

  flops: float
  highest_flops: float  # of products at the highest precision, not part of `flops`
  bytes_accessed: float
  memory: Any  # jaxlib's CompiledMemoryStats
  collectives: tuple[Collective, ...]

  @classmethod
  def of(cls, compiled: jax.stages.Compiled, devices: int) -> 'Cost':
    """The costs of a program without loops, as XLA analyses it."""
    found = compiled.cost_analysis()
    return cls(
      flops=found.get('flops', math.nan),
      highest_flops=0.0,
      bytes_accessed=found.get('bytes accessed', math.nan),
      memory=compiled.memory_analysis(),
      collectives=tuple(collectives.read(compiled.as_text(), devices)),
    )

  @property
  def held(self) -> int:
    """Peak memory in bytes, arguments and results included."""
    m = self.memory
    held = m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes
    return held - m.alias_size_in_bytes


@dataclasses.dataclass(frozen=True)
class Images:
  """Images that each device holds besides the arguments of the programs: see `feed.Inputs`."""

  held: int  # bytes, 0 where they cannot be counted
  note: str

  @classmethod
  def of(cls, setting: Setting) -> 'Images':
    """The batches of one dispatch if images are streamed, else all training images.

    All training images are an upper bound: all that the source has, before a long tail is cut.
    """
    config, image = setting.config, math.prod(setting.image_shape)
    try:
      number = len(pipeline.open_sources(config.data)[0])
    except UserError:
      number = 0
    limit = backend.IN_MEMORY_BYTES
    if config.data.input == 'stream' or (config.data.input == 'auto' and number * image > limit):
      streams = 2 if mixing.find(config.mixing.name).partner else 1
      batch = config.train.batch_size * streams
      one = pipeline.Part(np.broadcast_to(np.uint8(0), (1, *setting.image_shape)), np.zeros(1))
      steps = min(config.train.log_every, streaming.batches_ahead(one, batch))
      held = (steps - 1) * batch * image // setting.layout.devices  # the arguments hold one more
      return cls(held, f'images: {steps} streamed batches')
    if number:
      return cls(number * image, 'images: at most these, all training images')
    most = f', up to {limit / 2**30:.0f} GiB,' if config.data.input == 'auto' else ''
    return cls(
      0,
      f'images: not counted, because the data is not here; data.input={config.data.input} puts all '
      f'training images{most} on every device',
    )


def use_fake_devices(number: int) -> None:
  """Makes JAX start with `number` CPU devices, whatever XLA_FLAGS and JAX_PLATFORMS say.

  Call it before anything asks for devices.

  Raises:
    UserError: JAX has started already, with fewer devices.
  """
  try:
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', number)
  except RuntimeError as error:
    if jax.default_backend() != 'cpu' or len(jax.devices()) < number:
      raise UserError(
        f'{number} fake devices before JAX starts', str(error), 'start a new process for it'
      ) from error


def describe(config: ml_collections.ConfigDict) -> str:
  """Parameter table, `parameters: N`, costs of both steps on a mesh, and the resolved config.

  Raises:
    UserError: an invalid config, or hardware that is not in the table.
  """
  accelerator = hardware.find(config.parallel.hardware)
  if config.parallel.fake_devices:
    use_fake_devices(config.parallel.fake_devices)
    config = config.copy_and_resolve_references()
    config.parallel.devices = config.parallel.fake_devices
  backend.start()
  setting = Setting.of(config)
  devices, images = setting.layout.devices, Images.of(setting)
  costs, refused = {'training step': Cost.of(compile_training(setting), devices)}, []
  measurements: dict[str, tuple[Setting, LayerFn | None]] = {'diagnostic step': (setting, None)}
  if setting.measures_for_surgery:
    measurements['surgery measurement'] = setting.of_surgery()
  for name, (own, layer_fn) in measurements.items():
    try:
      costs[name] = measure_diagnostics(own, accelerator.memory, layer_fn)
    except UserError as error:
      refused.append(f'{name}: does not fit: {error}')
  return '\n'.join(
    [
      _parameter_table(setting.state),
      f'parameters: {setting.parameters}',
      _mesh(setting),
      _cost_table(setting, costs, images, accelerator),
      *refused,
      *_notes(setting, images),
      _ASSUMPTIONS,
      f'config: {json.dumps(config.to_dict(), indent=2)}',
    ]
  )


def compile_training(setting: Setting) -> jax.stages.Compiled:
  """One training step with its images as arguments, as in a run that streams them."""
  config, layout = setting.config, setting.layout
  ones = np.ones(setting.num_classes)
  frozen = config.model.init != '' and config.train.frozen == 1
  step_fn = step.make_step(config, setting.model, setting.tx, ones, STEPS, layout, frozen=frozen)

  def of(dtype: DTypeLike, *shape: int) -> jax.ShapeDtypeStruct:
    shape = (1, config.train.batch_size, *shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.split(1))

  batch = {'image': of(jnp.uint8, *setting.image_shape), 'label': of(jnp.int32)}
  if mixing.find(config.mixing.name).partner:
    batch |= {f'partner_{name}': values for name, values in batch.items()}
  key = jax.eval_shape(jax.random.key, 0)
  key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=layout.whole)
  lowered = step.compiled_steps().lower(
    setting.state, {}, batch, key, step_fn=step_fn, layout=layout
  )
  return lowered.compile(_FAST_TO_COMPILE)


def measure_diagnostics(setting: Setting, room: float, layer_fn: LayerFn | None = None) -> Cost:
  """The cost of the diagnostic step; of one of its batches, where it takes training batches.

  Raises:
    UserError: a device with `room` bytes cannot hold it.
  """
  if setting.statistics == 'batch':
    return measure_batch(setting, room, layer_fn)
  return measure_probe(setting, room, layer_fn=layer_fn)


def measure_batch(setting: Setting, room: float, layer_fn: LayerFn | None = None) -> Cost:
  """The cost of the class gradients of one training batch, see `probe.BatchProbe`.

  The program loops over classes, and XLA counts the body of a loop once. So the FLOPs are those of
  one class, and C - 1 times what the pullback of one class adds to the forward pass.
  """
  net, layout, config = setting.net, setting.layout, setting.config

  def lower(classes: int | None = None) -> jax.stages.Lowered:
    return probe.lower_batch(net, config, layout, int(room), classes, layer_fn)

  cost = Cost.of(lower().compile(_FAST_TO_COMPILE), layout.devices)
  one = lower(1)
  image = jax.ShapeDtypeStruct((config.train.batch_size, *setting.image_shape), jnp.float32)
  batch = {'image': image, 'label': jax.ShapeDtypeStruct(image.shape[:1], jnp.int32)}
  losses_fn = training_conflict.losses_of(net, config)
  forward = jax.jit(losses_fn).lower(net.batch_stats, net.params, batch)
  flops, of_forward = (lowered.cost_analysis()['flops'] for lowered in (one, forward))
  pullback = flops - of_forward
  return dataclasses.replace(
    cost, flops=(of_forward + setting.num_classes * pullback) / layout.devices
  )


def measure_probe(
  setting: Setting,
  room: float,
  folds: int = probe.FOLDS,
  layer_fn: LayerFn | None = None,
) -> Cost:
  """The cost of a probe of images; UserError where a device with `room` bytes cannot hold it.

  The program loops over rows (class, fold), and XLA counts the body of a loop once. So the FLOPs
  are those of one row, times the number of rows. The bytes accessed are those of the class
  gradients alone, four passes over them: write, concatenate, reduce, read.
  """
  net, layout = setting.net, setting.layout

  def lower(one_row: bool = False) -> jax.stages.Lowered:
    return probe.lower_images(
      net, setting.config, layout, int(room), folds=folds, layer_fn=layer_fn, one_row=one_row
    )

  cost = Cost.of(lower().compile(_FAST_TO_COMPILE), layout.devices)
  rows, leaves = setting.num_classes * folds, jax.tree.leaves(net.params)
  layers = Layers.of(net.params, layer_fn, net.model.head)
  columns = sum(leaves[i].size for members in layers.members for i in members)
  return dataclasses.replace(
    cost,
    flops=lower(one_row=True).cost_analysis()['flops'] * rows,
    highest_flops=2 * rows**2 * columns / layout.devices,  # of the Grams
    bytes_accessed=4 * sum(layers.class_gradient_bytes(leaves, rows)),
  )


def _count_classes(config: ml_collections.ConfigDict) -> int:
  try:
    return len(pipeline.open_sources(config.data)[0].class_names)
  except UserError as error:
    raise UserError(
      'data.num_classes, or data to count the classes of',
      f'data.num_classes 0, and {error}',
      'set --config.data.num_classes=N',
    ) from error


def _parameter_table(state: TrainState) -> str:
  rows = [['parameter', 'shape', 'number']]
  for path, leaf in jax.tree.leaves_with_path(state.params):
    name = '/'.join(key.key for key in path)
    rows.append([name, 'x'.join(map(str, leaf.shape)), str(leaf.size)])
  return text_table.align(rows)


_ASSUMPTIONS = (
  'these are estimates and not measurements: XLA compiled the programs for CPUs, and the compiler '
  'of an accelerator fuses, lays out and sends differently\n'
  f'times assume {hardware.UTILISATION:.0%} of the peak FLOP/s, the full memory bandwidth, ring '
  'collectives over the slowest link that each one uses, no overlap of communication and '
  'computation, no latency of messages and no wait for input'
)


def _mesh(setting: Setting) -> str:
  parallel, devices = setting.config.parallel, setting.layout.devices
  noun = 'device' if devices == 1 else 'devices'
  here = f'{noun} of this machine ({jax.devices()[0].device_kind})'
  kind = f'fake {noun}' if parallel.fake_devices else here
  fsdp = f', {parallel.fsdp} to a copy of the state' if parallel.fsdp > 1 else ''
  return f'mesh: {devices} {kind}{fsdp}; times for {parallel.hardware}'


def _cost_table(
  setting: Setting, costs: dict[str, Cost], images: Images, accelerator: hardware.Accelerator
) -> str:
  """What one call of each program costs each device: a column a program, a row a quantity."""
  taken = [seconds(setting, cost, accelerator) for cost in costs.values()]
  rows = [['one call, on each device', *costs]]

  def add(name: str, unit: str, values: Iterable[float], digits: int = 1) -> None:
    rows.append([f'{name}, {unit}', *(f'{value / UNITS[unit]:.{digits}f}' for value in values)])

  add('work', 'GFLOP', [cost.flops for cost in costs.values()], 2)
  add('  and at the highest precision', 'GFLOP', [c.highest_flops for c in costs.values()], 2)
  add('memory traffic', 'GiB', [cost.bytes_accessed for cost in costs.values()], 3)
  held = [cost.held + images.held for cost in costs.values()]
  add('memory held', 'GiB', held, 3)
  for name, size in MEMORY.items():
    add(f'  {name}', 'MiB', [getattr(cost.memory, size) for cost in costs.values()])
  add('  images besides', 'MiB', [images.held for _ in costs])
  fits = ['yes' if size <= accelerator.memory else 'no' for size in held]
  rows.append([f'  fits into {accelerator.memory / 2**30:.1f} GiB', *fits])
  sent = [collectives.by_kind(cost.collectives) for cost in costs.values()]
  none = collectives.Traffic(0, 0, 0.0)
  for kind in [kind for kind in collectives.KINDS if any(kind in found for found in sent)]:
    found = [traffic.get(kind, none) for traffic in sent]
    rows.append([f'{kind}, calls', *(str(traffic.number) for traffic in found)])
    add('  results', 'MiB', [traffic.bytes for traffic in found], 3)
    add('  sent', 'MiB', [traffic.sent for traffic in found], 3)
  add('time: max(compute, memory) + communication', 'ms', [t.total for t in taken], 3)
  for part in ('compute', 'memory', 'communication'):
    add(f'  {part}', 'ms', [getattr(t, part) for t in taken], 3)
  rows.append(['  share of communication', *(f'{t.share:.0%}' for t in taken)])
  images_per_second = setting.config.train.batch_size / taken[0].total  # the first is training
  rows.append(['images/s, on all devices', f'{images_per_second:.0f}'])
  return text_table.align(rows)


def _notes(setting: Setting, images: Images) -> list[str]:
  """What the columns of the table are of."""
  batch, devices = setting.config.train.batch_size, setting.layout.devices
  parameters, state = (_bytes_of(x) / 2**20 for x in (setting.state.params, setting.state))
  return [
    f'training step: {batch // devices} of {batch} images on each device, {parameters:.1f} MiB of '
    f'parameters in {state:.1f} MiB of state',
    f'diagnostic step (diagnostics.every): {_measured(setting)}, shared by all devices',
    images.note,
    *_surgery(setting),
  ]


def _surgery(setting: Setting) -> list[str]:
  """What the numbers of gradient surgery are of."""
  wanted = setting.config.surgery
  if setting.measures_for_surgery:
    taken = _measured(setting.of_surgery()[0])
    return [f'surgery measurement: {taken}, every {wanted.every} steps']
  if wanted.name in ('none', *surgery.CONTROLS):
    return []
  return ['surgery.every 1: a loop over classes or rows of images, which FLOPs count once']


def _measured(setting: Setting) -> str:
  """What a measurement of conflict takes."""
  config, classes = setting.config, setting.num_classes
  if setting.statistics == 'batch':
    return (
      f'one of {config.diagnostics.batches} training batches of {config.train.batch_size} images, '
      f'a forward and {classes} backward passes'
    )
  return f'{config.diagnostics.images} images of each of {classes} classes in {probe.FOLDS} folds'


def seconds(setting: Setting, cost: Cost, accelerator: hardware.Accelerator) -> hardware.Seconds:
  """How long one call of a program would take, under the assumptions that `describe` prints."""
  return hardware.seconds(
    accelerator,
    cost.flops,
    cost.bytes_accessed,
    cost.collectives,
    setting.config.model.dtype,
    cost.highest_flops,
  )


def _bytes_of(tree: Any) -> int:
  """Bytes of the arrays of a tree that one device holds."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
