"""A classifier that can be used without its training data.

It holds the model, variables, preprocessing, class names and class counts.

What a folder of images would tell about a net is kept in the run's net.json, so that the net can be
used where its training data is not.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import Array

from csba_jax.data import pipeline
from csba_jax.errors import UserError
from csba_jax.methods import losses
from csba_jax.models import pretrained
from csba_jax.run.state import TrainState
from csba_jax.run.workdir import Workdir, read_json, read_result
from csba_jax.runtime import distributed, sharding

PyTree = Any
FILE = 'net.json'


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """From uint8 images to the input of a model:  x / divisor - offset, float32.

  By default 0..255 becomes -1..1. It uses no statistics of the data: the first
  normalisation layer of a net learns them. A net with pretrained weights takes the numbers that
  these were trained with, one for each channel.
  """

  divisor: float | tuple[float, ...] = 127.5
  offset: float | tuple[float, ...] = 1.0

  @classmethod
  def of(cls, model: ml_collections.ConfigDict) -> 'Preprocessing':
    """That of a net of config.model."""
    return cls(*pretrained.scaling(model.name)) if model.init else cls()

  def __call__(self, images: Array) -> Array:
    """uint8 [..., H, W, channels] -> float32 of the same shape."""
    divisor, offset = (_by_channel(x, images.ndim) for x in (self.divisor, self.offset))
    return images.astype(jnp.float32) / divisor - offset


def _by_channel(number: float | tuple[float, ...], dimensions: int) -> Any:
  """A number as it is; several as an array [1, ..., channels]."""
  if not isinstance(number, tuple):
    return number
  return np.asarray(number, np.float32).reshape((1,) * (dimensions - 1) + (-1,))


def _read_number(found: Any) -> float | tuple[float, ...]:
  several = isinstance(found, list | tuple)
  return tuple(map(float, found)) if several else float(found)


@dataclasses.dataclass(frozen=True, eq=False)
class Metadata:
  """What belongs to a net beside its model and its variables: the content of net.json."""

  class_names: tuple[str, ...]
  class_counts: np.ndarray  # [C] training images of each class
  image_shape: tuple[int, int, int]  # (height, width, channels)
  preprocessing: Preprocessing = Preprocessing()

  @classmethod
  def of(cls, data: pipeline.Data, model: ml_collections.ConfigDict | None = None) -> 'Metadata':
    """The metadata of a net that is trained on these data; `model` is config.model."""
    preprocessing = Preprocessing() if model is None else Preprocessing.of(model)
    return cls(data.class_names, data.class_counts, data.image_shape, preprocessing)

  def record(self) -> dict[str, Any]:
    """The metadata as JSON."""
    return {
      'class_names': list(self.class_names),
      'class_counts': np.asarray(self.class_counts).tolist(),
      'image_shape': list(self.image_shape),
      'preprocessing': dataclasses.asdict(self.preprocessing),
    }

  @classmethod
  def of_record(cls, record: Mapping[str, Any]) -> 'Metadata':
    """The inverse of `record`; raises what Python raises for a record of another form."""
    height, width, channels = map(int, record['image_shape'])
    names, counts = record['class_names'], np.array(record['class_counts'], np.int64)
    if not isinstance(names, list | tuple) or counts.shape != (len(names),):
      raise ValueError(f'{len(names)} class names, class counts of shape {list(counts.shape)}')
    if min(height, width, channels, *counts + 1) < 1:
      raise ValueError('a number below 0, or no pixels')
    return cls(
      tuple(map(str, names)),
      counts,
      (height, width, channels),
      Preprocessing(**{name: _read_number(x) for name, x in record['preprocessing'].items()}),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Net:
  """A classifier of images: all that is needed to use it or to measure it.

  Where only shapes matter, the variables may be shapes.
  """

  model: nn.Module
  variables: PyTree  # {'params', 'batch_stats'}, float32
  metadata: Metadata
  step: int = 0  # updates that the variables have had
  post_hoc_tau: float = 0.0  # of the logit adjustment that belongs to its predictions

  @classmethod
  def of(
    cls, model: nn.Module, state: TrainState, metadata: Metadata, post_hoc_tau: float = 0.0
  ) -> 'Net':
    """The net of a state as it is evaluated: moving averages where the state keeps them."""
    return cls(model, state.variables(), metadata, int(state.step), post_hoc_tau)

  @classmethod
  def of_shapes(cls, model: nn.Module, metadata: Metadata) -> 'Net':
    """The net before it has variables; nothing is compiled or allocated."""
    image = jax.ShapeDtypeStruct((1, *metadata.image_shape), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    return cls(model, {'batch_stats': {}} | shapes, metadata)

  @property
  def params(self) -> PyTree:
    """The parameters."""
    return self.variables['params']

  @property
  def batch_stats(self) -> PyTree:
    """Running mean and variance of each BatchNorm; {} for a net without one."""
    return self.variables['batch_stats']

  @property
  def num_classes(self) -> int:
    """Number of classes, C."""
    return len(self.metadata.class_names)

  @property
  def layout(self) -> sharding.Layout:
    """The devices where the variables are."""
    return sharding.Layout.of(self.variables)

  @property
  def shift(self) -> np.ndarray:
    """What is added to the logits, [C]; see `losses.post_hoc_shift`."""
    return losses.post_hoc_shift(self.post_hoc_tau, self.metadata.class_counts)

  def replace(self, **variables: PyTree) -> Self:
    """The net with other `params` or other `batch_stats`."""
    return dataclasses.replace(self, variables=self.variables | variables)

  def logits(self, images: np.ndarray | Array) -> Array:
    """Adjusted logits of a batch of images; the largest one is the predicted class.

    Args:
      images: uint8 [N, height, width, channels].

    Returns:
      [N, C] float32.

    Raises:
      UserError: images of another type or shape.
    """
    shape, dtype = tuple(np.shape(images)), getattr(images, 'dtype', type(images).__name__)
    if dtype != np.uint8 or shape[1:] != self.metadata.image_shape:
      wanted = ', '.join(map(str, self.metadata.image_shape))
      raise UserError(
        f'uint8 images [N, {wanted}]',
        f'{dtype} of shape {list(shape)}',
        'resize the images to this size, and pass their bytes without scaling them',
      )
    shift = jnp.asarray(self.shift)
    return _logits(self.model, self.metadata.preprocessing, self.variables, images, shift)


@functools.partial(jax.jit, static_argnames=('model', 'preprocessing'))
def _logits(
  model: nn.Module, preprocessing: Preprocessing, variables: PyTree, images: Array, shift: Array
) -> Array:
  return model.apply(variables, preprocessing(images), train=False) + shift[None]


def keep(folder: Workdir, metadata: Metadata) -> None:
  """Writes net.json when a run starts, and compares it when a run goes on.

  Raises:
    UserError: the file cannot be written, or the metadata of the run has changed.
  """
  if not distributed.is_first():
    return  # all processes have the same data
  if not folder.file(FILE).exists():
    folder.write_json(FILE, metadata.record())
    return
  there, here = read(folder.path).record(), metadata.record()
  if different := [name for name in here if here[name] != there[name]]:
    raise UserError(
      f'the {different[0]} that {folder.path} was started with: {there[different[0]]}',
      str(here[different[0]]),
      'use the data and the version of csba_jax of that run, or name another --workdir',
    )


def read(workdir: Path) -> Metadata:
  """The metadata in a workdir's net.json; UserError without a whole one."""
  record = read_json(workdir / FILE, 'a run that keeps its classes', 'class_names')
  try:
    return Metadata.of_record(record)
  except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
    raise UserError(
      f'the metadata of a net in {workdir / FILE}',
      f'a damaged record ({type(error).__name__}: {error})',
      'copy the file from a backup, or train in another --workdir',
    ) from error


def find(workdir: Path, config: ml_collections.ConfigDict) -> Metadata:
  """The metadata of a run, also of one from before net.json, where result.json has the classes.

  Raises:
    UserError: neither file is there, or one is damaged.
  """
  if (workdir / FILE).exists():
    return read(workdir)
  if not (workdir / 'result.json').exists():
    raise UserError(
      f'{FILE} or result.json in {workdir}',
      'a run of an earlier version that is not finished, which names no classes',
      'start csba-train with this --workdir again, which writes the file',
    )
  result = read_result(workdir)
  counts, size = np.array(result['class_counts'], np.int64), config.data.image_size
  return Metadata(tuple(result['class_names']), counts, (size, size, config.data.channels))
