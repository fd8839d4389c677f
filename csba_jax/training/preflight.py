"""What can be wrong about a config is found here, before an image is decoded or a folder is made.

The order, the same for every binary: fields alone (`config.check`), then the parts that they name
and whether these go together (`check`), then the devices (`check_devices`), then the data as far as
its labels tell (`check_counts`).
"""

from collections.abc import Iterable

import ml_collections
import numpy as np

from csba_jax import config as config_lib
from csba_jax.data import augment, class_counts, mixing, policy, sampling
from csba_jax.data.splits import Splits
from csba_jax.fields import RANGES
from csba_jax.methods import losses, optimizers, second_stages, surgery
from csba_jax.models import attention, classifiers, pretrained, registry
from csba_jax.run import schedule
from csba_jax.runtime import sharding


def check(config: ml_collections.ConfigDict) -> None:
  """Raises UserError for a config that cannot be run, whatever the data; starts no device."""
  config_lib.check(config)
  counts = np.ones(config.data.num_classes or 2)
  second_stages.find(config.stage, config.model.head)
  second_stages.check_source(config.stage)
  registry.check(config.model)
  if config.model.init:
    pretrained.check(config.model, config.data.channels)
  losses.build(config, counts, total_steps=1)
  augment.build(config.augment)
  mixing.build(config.mixing, counts, total_steps=1)
  optimizers.build(config, total_steps=1)
  surgery.check(config)
  sampling.Stream.of(config.sampler, np.arange(2), batch_size=2, total_steps=1, seed=config.seed)


def check_devices(config: ml_collections.ConfigDict) -> None:
  """Raises UserError where the devices that there are do not suit config.parallel."""
  sharding.layout(config)


def check_counts(config: ml_collections.ConfigDict, splits: Splits) -> None:
  """Raises UserError for a batch or a length of the run that a training part cannot have.

  Args:
    splits: of the data, or of all its images before those that cannot be decoded are left out.
  """
  labels = np.repeat(np.arange(len(splits.class_counts)), splits.class_counts)
  schedule.training_stream(config, labels)


def choices() -> dict[str, str]:
  """The values that fields take, in words: ranges, and the names of the tables of functions."""
  tables: dict[str, Iterable[str]] = {
    'augment.policy': policy.POLICIES,
    'model.name': registry.MODELS,
    'model.attention': attention.ATTENTIONS,
    'model.head': classifiers.KINDS,
    'loss.name': losses.LOSSES,
    'loss.weights': class_counts.WEIGHTS,
    'sampler.name': sampling.SAMPLERS,
    'mixing.name': mixing.MIXINGS,
    'stage.method': second_stages.SECOND_STAGES,
    'surgery.name': surgery.NAMES,
    'train.optimizer': optimizers.OPTIMIZERS,
    'train.schedule': optimizers.SCHEDULES,
  }
  ranges = {field: wanted for field, (wanted, _) in RANGES.items()}
  return ranges | {field: ', '.join(table) for field, table in tables.items()}
