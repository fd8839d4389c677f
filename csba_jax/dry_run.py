"""What training would be: parameters, FLOPs and memory of the compiled step. Needs no data."""

import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from csba_jax import optimizers, parallel, step, train_state
from csba_jax.data import mixing, pipeline
from csba_jax.errors import UserError
from csba_jax.models import registry
from csba_jax.report import table
from csba_jax.train_state import TrainState

STEPS = 1000  # of a run; they set schedules, not the cost of a step


def describe(config: ml_collections.ConfigDict) -> str:
  """Parameter table, `parameters: N`, FLOPs and memory of one step, and the resolved config."""
  num_classes = config.data.num_classes or _count_classes(config)
  image_shape = (config.data.image_size, config.data.image_size, config.data.channels)
  model = registry.build(config.model, num_classes, image_shape)
  tx, _ = optimizers.build(config, STEPS)
  state = train_state.shapes(model, tx, image_shape, config.train.ema_decay > 0)
  layout = parallel.layout(config)
  step_fn = step.make_step(config, model, tx, np.ones(num_classes), STEPS, layout)
  batch_size = config.train.batch_size
  data = {
    'image': jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.uint8),
    'label': jax.ShapeDtypeStruct((batch_size,), jnp.int32),
  }
  indices = {'own': jax.ShapeDtypeStruct((1, batch_size), jnp.int32)}
  if mixing.kind_of(config.mixing.name).partner:
    indices['partner'] = indices['own']
  key = jax.eval_shape(jax.random.key, 0)
  lowered = step.compiled_steps().lower(state, data, indices, key, step_fn=step_fn, layout=layout)
  compiled = lowered.compile()
  return '\n'.join(
    [
      _parameter_table(state),
      f'parameters: {sum(x.size for x in jax.tree.leaves(state.params))}',
      _cost(compiled, batch_size),
      f'config: {json.dumps(config.to_dict(), indent=2)}',
    ]
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
  return table.align(rows)


def _cost(compiled: jax.stages.Compiled, batch_size: int) -> str:
  flops = compiled.cost_analysis().get('flops', float('nan'))
  memory = compiled.memory_analysis()
  mebibytes = {
    'arguments': memory.argument_size_in_bytes,
    'temporary': memory.temp_size_in_bytes,
    'output': memory.output_size_in_bytes,
    'shared by argument and output': memory.alias_size_in_bytes,
  }
  sizes = ', '.join(f'{name} {size / 2**20:.1f}' for name, size in mebibytes.items())
  device = jax.devices()[0].device_kind
  return (
    f'one step of {batch_size} images on {device}: {flops / 1e9:.2f} GFLOP as XLA counts them\n'
    f'memory of the compiled step in MiB: {sizes}'
  )
