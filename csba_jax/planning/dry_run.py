"""What training would be, from compiled programs: nothing is allocated, and no data is needed.

The training step and the step of the diagnostic are compiled ahead of time, for the devices that
are there or for a mesh that is not (config.parallel.fake_devices), as XLA compiles them for CPUs.
"""

import dataclasses
import json
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from csba_jax.data import mixing, pipeline, streaming
from csba_jax.errors import UserError
from csba_jax.gradients.gram import LayerFn, Layers
from csba_jax.measure import diagnose
from csba_jax.methods import optimizers
from csba_jax.models import registry
from csba_jax.planning import collectives, hardware
from csba_jax.planning.collectives import Collective
from csba_jax.run import state as state_lib
from csba_jax.run.state import TrainState
from csba_jax.runtime import backend, sharding, text_table
from csba_jax.training import step

STEPS = 1000  # of a run; they set schedules, not the cost of a step
# LLVM's part alone: the program, its memory and what it sends are the same
_FAST_TO_COMPILE = {'xla_backend_optimization_level': 1}


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
    """UserError where the config does not go together, or its classes are not known."""
    num_classes = config.data.num_classes or _count_classes(config)
    image_shape = (config.data.image_size, config.data.image_size, config.data.channels)
    model = registry.build(config.model, num_classes, image_shape)
    tx, _ = optimizers.build(config, STEPS)
    layout = sharding.layout(config, fake=True)
    state = state_lib.shapes(model, tx, image_shape, config.train.ema_decay > 0)
    return cls(config, num_classes, image_shape, model, tx, layout.like(state), layout)

  @property
  def parameters(self) -> int:
    """How many the net has."""
    return sum(x.size for x in jax.tree.leaves(self.state.params))


@dataclasses.dataclass(frozen=True)
class Cost:
  """A compiled program, on each device."""

  flops: float
  highest_flops: float  # of products at the highest precision, beside `flops`
  bytes_accessed: float
  memory: Any  # jaxlib's CompiledMemoryStats
  collectives: tuple[Collective, ...]

  @classmethod
  def of(cls, compiled: jax.stages.Compiled, devices: int) -> 'Cost':
    """What XLA says of a program without loops."""
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
    """Bytes of memory at its fullest, arguments and results included."""
    m = self.memory
    held = m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes
    return held - m.alias_size_in_bytes


@dataclasses.dataclass(frozen=True)
class Images:
  """What lies on each device beside the compiled programs: see `inputs.Inputs`."""

  held: int  # bytes, as far as they are known
  words: str

  @classmethod
  def of(cls, setting: Setting) -> 'Images':
    """Streamed, the batches of one dispatch; else all training images, if they can be counted.

    The long tail is cut from the images of the source: these are the most that it can be.
    """
    config, image = setting.config, math.prod(setting.image_shape)
    try:
      number = len(pipeline.open_sources(config.data)[0])
    except UserError:
      number = 0
    limit = backend.IN_MEMORY_BYTES
    if config.data.input == 'stream' or (config.data.input == 'auto' and number * image > limit):
      streams = 2 if mixing.kind_of(config.mixing.name).partner else 1
      batch = config.train.batch_size * streams
      one = pipeline.Part(np.broadcast_to(np.uint8(0), (1, *setting.image_shape)), np.zeros(1))
      steps = min(config.train.log_every, streaming.batches_ahead(one, batch))
      held = (steps - 1) * batch * image // setting.layout.devices  # one is in `memory` already
      return cls(held, f'and {held / 2**30:.3f} GiB of {steps} streamed batches')
    if number:
      held = number * image
      return cls(held, f'and up to {held / 2**30:.3f} GiB of training images')
    most = f', up to {limit / 2**30:.0f} GiB of them,' if config.data.input == 'auto' else ''
    return cls(
      0,
      f'without the training images{most} which data.input={config.data.input} puts on every '
      'device and which cannot be counted: there is no data',
    )


def use_fake_devices(number: int) -> None:
  """That many CPU devices, whatever XLA_FLAGS and JAX_PLATFORMS say; before any use of devices.

  Raises:
    UserError: JAX has started with fewer.
  """
  try:
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', number)
  except RuntimeError as error:
    if jax.default_backend() != 'cpu' or len(jax.devices()) < number:
      raise UserError(
        f'{number} fake devices before JAX starts', str(error), 'start a process of its own'
      ) from error


def describe(config: ml_collections.ConfigDict) -> str:
  """Parameter table, `parameters: N`, costs of the steps on a mesh, and the resolved config.

  Raises:
    UserError: a config that does not go together, or hardware that is not in the table.
  """
  accelerator = hardware.find(config.parallel.hardware)
  if config.parallel.fake_devices:
    use_fake_devices(config.parallel.fake_devices)
    config = config.copy_and_resolve_references()
    config.parallel.devices = config.parallel.fake_devices
  setting = Setting.of(config)
  compiled, images = compile_training(setting), Images.of(setting)
  return '\n'.join(
    [
      _parameter_table(setting.state),
      f'parameters: {setting.parameters}',
      _cost(compiled, setting),
      _mesh(setting),
      *_describe_training(setting, Cost.of(compiled, setting.layout.devices), images, accelerator),
      *_describe_probe(setting, images, accelerator),
      _ASSUMPTIONS,
      f'config: {json.dumps(config.to_dict(), indent=2)}',
    ]
  )


def compile_training(setting: Setting) -> jax.stages.Compiled:
  """One training step whose images are its arguments, as where they are streamed."""
  config, layout = setting.config, setting.layout
  ones = np.ones(setting.num_classes)
  step_fn = step.make_step(config, setting.model, setting.tx, ones, STEPS, layout)

  def of(dtype, *shape):
    shape = (1, config.train.batch_size, *shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.split(1))

  batch = {'image': of(jnp.uint8, *setting.image_shape), 'label': of(jnp.int32)}
  if mixing.kind_of(config.mixing.name).partner:
    batch |= {f'partner_{name}': values for name, values in batch.items()}
  key = jax.eval_shape(jax.random.key, 0)
  key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=layout.whole)
  lowered = step.compiled_steps().lower(
    setting.state, {}, batch, key, step_fn=step_fn, layout=layout
  )
  return lowered.compile(_FAST_TO_COMPILE)


def measure_probe(
  setting: Setting,
  room: float,
  folds: int = diagnose.FOLDS,
  layer_fn: LayerFn | None = None,
) -> Cost:
  """The step of the diagnostic; UserError where a device with `room` bytes cannot hold it.

  XLA counts the body of the loop over rows (class, fold) once; the work is that of one row, as
  often. Bytes accessed are those of the class gradients alone: written, put in one piece, reduced
  and read.
  """
  state, layout = setting.state, setting.layout
  counts = np.ones(setting.num_classes, int)

  def lower(**options):
    return diagnose.lower_probe(
      setting.config,
      setting.model,
      state,
      counts,
      setting.image_shape,
      layout,
      int(room),
      folds=folds,
      layer_fn=layer_fn,
      **options,
    )

  cost = Cost.of(lower().compile(_FAST_TO_COMPILE), layout.devices)
  rows, leaves = setting.num_classes * folds, jax.tree.leaves(state.params)
  layers = Layers.of(state.params, layer_fn, setting.model.head)
  columns = sum(leaves[i].size for at in layers.members for i in at)
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


def _cost(compiled: jax.stages.Compiled, setting: Setting) -> str:
  flops = compiled.cost_analysis().get('flops', float('nan'))
  memory = compiled.memory_analysis()
  mebibytes = {
    'arguments': memory.argument_size_in_bytes,
    'temporary': memory.temp_size_in_bytes,
    'output': memory.output_size_in_bytes,
    'shared by argument and output': memory.alias_size_in_bytes,
  }
  sizes = ', '.join(f'{name} {size / 2**20:.1f}' for name, size in mebibytes.items())
  devices, kind = setting.layout.devices, jax.devices()[0].device_kind
  where, of = (f'{devices} devices ({kind})', ' of each device') if devices > 1 else (kind, '')
  return (
    f'one step of {setting.config.train.batch_size} images on {where}: {flops / 1e9:.2f} GFLOP{of} '
    'as XLA counts them\n'
    f'memory{of} of the compiled step in MiB: {sizes}'
  )


_ASSUMPTIONS = (
  'estimates, not measurements: XLA compiled these programs for CPUs; the compiler of the '
  'accelerator fuses, lays out and sends otherwise\n'
  f'assumed: {hardware.UTILISATION:.0%} of the peak FLOP/s, the whole rate of memory, rings over '
  'the slowest link that a collective uses, nothing sent while computing, messages that start in '
  'no time, and no wait for input'
)


def _mesh(setting: Setting) -> str:
  parallel_ = setting.config.parallel
  there = 'that are not there' if parallel_.fake_devices else 'that are here'
  fsdp = f', {parallel_.fsdp} of them to a copy of the state' if parallel_.fsdp > 1 else ''
  return f'mesh: {setting.layout.devices} devices {there}{fsdp}; constants of {parallel_.hardware}'


def _describe_training(
  setting: Setting, cost: Cost, images: Images, accelerator: hardware.Accelerator
) -> list[str]:
  batch, devices = setting.config.train.batch_size, setting.layout.devices
  own = _bytes_of(setting.state)
  taken = seconds(setting, cost, accelerator)
  return [
    f'training step, on each device: {batch // devices} of {batch} images, '
    f'{_bytes_of(setting.state.params) / 2**20:.1f} MiB of parameters, {own / 2**20:.1f} MiB of '
    'state',
    *_costs(cost, images, accelerator),
    f'  time: {_milliseconds(taken)}, {batch / taken.total:.0f} images/s in all',
  ]


def _describe_probe(
  setting: Setting, images: Images, accelerator: hardware.Accelerator
) -> list[str]:
  probed = setting.config.diagnostics.images
  try:
    cost = measure_probe(setting, accelerator.memory)
  except UserError as error:
    return [f'step of the diagnostic: does not fit: {error}']
  return [
    f'step of the diagnostic (diagnostics.every), on each device: its share of {probed} images of '
    f'each of {setting.num_classes} classes in {diagnose.FOLDS} folds',
    *_costs(cost, images, accelerator),
    f'  time: {_milliseconds(seconds(setting, cost, accelerator))}',
  ]


def seconds(setting: Setting, cost: Cost, accelerator: hardware.Accelerator) -> hardware.Seconds:
  """What a call of a program would take, under the assumptions that `describe` prints."""
  return hardware.seconds(
    accelerator,
    cost.flops,
    cost.bytes_accessed,
    cost.collectives,
    setting.config.model.dtype,
    cost.highest_flops,
  )


def _costs(cost: Cost, images: Images, accelerator: hardware.Accelerator) -> list[str]:
  """Memory, FLOPs and what is sent, a line each."""
  memory = cost.memory
  fits = 'fits' if cost.held + images.held <= accelerator.memory else 'does not fit'
  highest = f' and {cost.highest_flops / 1e9:.2f} at the highest precision'
  sent = [
    f'{kind} {t.number} of {t.bytes / 2**20:.3f} MiB in all, {t.sent / 2**20:.3f} MiB sent'
    for kind, t in collectives.by_kind(cost.collectives).items()
  ]
  return [
    f'  memory: {cost.held / 2**30:.3f} GiB (arguments {memory.argument_size_in_bytes / 2**20:.1f},'
    f' temporary {memory.temp_size_in_bytes / 2**20:.1f}, output '
    f'{memory.output_size_in_bytes / 2**20:.1f}, shared {memory.alias_size_in_bytes / 2**20:.1f} '
    f'MiB), {images.words}: {fits} into {accelerator.memory / 2**30:.1f} GiB',
    f'  work: {cost.flops / 1e9:.2f} GFLOP{highest if cost.highest_flops else ""}, '
    f'{cost.bytes_accessed / 2**30:.3f} GiB of memory read and written',
    f'  collectives: {"; ".join(sent) or "none"}',
  ]


def _milliseconds(taken: hardware.Seconds) -> str:
  return (
    f'{1e3 * taken.total:.3f} ms = max({1e3 * taken.compute:.3f} compute, '
    f'{1e3 * taken.memory:.3f} memory) + {1e3 * taken.communication:.3f} communication '
    f'({taken.share:.0%})'
  )


def _bytes_of(tree: Any) -> int:
  """Of the part of each array that one device holds."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
