"""What is fixed about a run before its first step: data, plan, compiled program, devices, keys."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import optax
from jax import Array

from csba_jax.data import mixing, pipeline, sampling
from csba_jax.measure import probe
from csba_jax.methods import losses, optimizers, second_stages
from csba_jax.methods import surgery as surgery_lib
from csba_jax.methods.surgery import Surgery
from csba_jax.models import pretrained, registry
from csba_jax.run import state as state_lib
from csba_jax.run.net import Metadata, Net
from csba_jax.run.schedule import Plan, training_stream
from csba_jax.run.state import TrainState
from csba_jax.runtime import sharding
from csba_jax.training import start_second_stage, surgery
from csba_jax.training.gradient import gradient_of_the_mean
from csba_jax.training.step import StepFn, make_step

# sections and fields of a config on which no compiled step depends
_NOT_COMPILED = ('seed', 'data', 'diagnostics', 'parallel')


class Program(NamedTuple):
  """What is compiled for a run, and for all runs that differ from it in seeds and images only."""

  model: nn.Module
  tx: optax.GradientTransformation
  schedule: optax.Schedule  # learning rate by step
  surgery: Surgery | None
  step_fn: StepFn
  frozen_step_fn: StepFn  # while the weights of model.init do not move


# cached, because jit compiles anew for a function that is not the same object
@functools.lru_cache(maxsize=4)
def _program(
  config: ml_collections.FrozenConfigDict,
  image_shape: tuple[int, int, int],
  class_counts: tuple[int, ...],
  total_steps: int,
  layout: sharding.Layout,
) -> Program:
  model = registry.build(config.model, len(class_counts), image_shape)
  tx, schedule = optimizers.build(config, total_steps)
  counts = np.array(class_counts)
  parts = (config, model, tx, counts, total_steps, layout)
  frozen = make_step(*parts, gradient_fn=gradient_of_the_mean, frozen=True)
  cut = surgery_lib.build(config, counts)
  return Program(model, tx, schedule, cut, make_step(*parts), frozen)


def _counts_that_matter(
  config: ml_collections.ConfigDict, class_counts: np.ndarray
) -> tuple[int, ...]:
  """`losses.counts_that_matter`, and the counts where surgery reads them."""
  if surgery_lib.reads_counts(config):
    return tuple(class_counts.tolist())
  return losses.counts_that_matter(config, class_counts)


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """Everything about a run that is fixed before its first step."""

  config: ml_collections.ConfigDict
  data: pipeline.Data
  plan: Plan
  program: Program
  layout: sharding.Layout
  key: Array  # decides everything random on the devices
  streams: Mapping[str, sampling.Stream]  # give the positions that `train_steps` reads

  @classmethod
  def of(cls, config: ml_collections.ConfigDict, data: pipeline.Data) -> 'Job':
    """The run that a config describes on its data; UserError where it cannot be run."""
    second_stages.check_source(config.stage)
    plan = Plan.of(config, len(data.train))
    layout = sharding.layout(config)
    decisive = {name: config[name] for name in config if name not in _NOT_COMPILED}
    program = _program(
      ml_collections.FrozenConfigDict(decisive),
      data.image_shape,
      _counts_that_matter(config, data.class_counts),
      plan.total,
      layout,
    )
    net = Net.of_shapes(program.model, Metadata.of(data, config.model))
    probe.check_room(net, config, layout.devices)
    surgery.check_room(config, net, layout.devices)
    own = training_stream(config, data.train.labels)
    partner = mixing.partners(config.mixing, own)
    streams = {'own': own} | ({'partner': partner} if partner else {})
    key = layout.place(jax.random.key(config.seed))
    return cls(config, data, plan, program, layout, key, streams)

  @property
  def batch_size(self) -> int:
    """Images of a step."""
    return self.config.train.batch_size

  def step_fn(self, step: int) -> StepFn:
    """What is done at step number `step`, and until the next step of `plan.dispatches`."""
    return self.program.frozen_step_fn if step < self.plan.frozen else self.program.step_fn

  def net(self, state: TrainState) -> Net:
    """The net of a state, as it is evaluated."""
    metadata, tau = Metadata.of(self.data, self.config.model), self.config.loss.post_hoc_tau
    return Net.of(self.program.model, state, metadata, tau)

  def net_in_training(self, state: TrainState) -> Net:
    """The net of a state with the parameters that the optimiser moves."""
    return self.net(state.replace(averages={}))

  def begin(self, resumes: bool = False) -> tuple[TrainState, dict[str, Any]]:
    """The state before the first step, and what result.json says about its origin.

    A run that `resumes` takes only shapes from this state, so it does not need its first stage.
    """
    config = self.config
    averages = config.train.ema_decay > 0
    model, tx = self.program.model, self.program.tx
    state = state_lib.create(model, tx, self.data.image_shape, config.seed, averages)
    if resumes:
      kept = surgery_lib.initial(config, len(self.data.class_names))
      return self.layout.place_state(state.replace(surgery=kept)), {}
    state = state.replace(surgery=surgery.begin(config, self.data))
    origin = {'init': pretrained.record(config.model.init)} if config.model.init else {}
    state = self.layout.place_state(state_lib.with_pretrained(state, config.model))
    if config.stage.method == 'none':
      return state, origin
    state, about = start_second_stage.start(model, state, config, self.data)
    return self.layout.place_state(state), origin | {'stage': about}
