"""Settings of a run, chosen for a folder of photos and the hardware; each with its reason."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from csba_jax.data.audit import COPIES_COLUMN, Audit
from csba_jax.errors import UserError

SIZES = (32, 48, 64, 96, 128, 160, 224)  # pixels of a square
# Pixels a second that are trained on, for each core and for each GPU. Two cores of an AMD EPYC
# train with 100 to 170 images/s of 160 x 160, 1.3 to 2.2 million pixels a core (csba-train --data
# on the solar panels, JAX 0.11), and with fewer where images are small. GPU: a guess; not measured.
CPU_RATE, GPU_RATE = 1.5e6, 1.0e8
LEAST_EPOCHS, MOST_EPOCHS = 5, 100
VALIDATIONS = 5
IMBALANCED = 1.5  # imbalance factor from which the loss corrects for class sizes
LEAST_PHOTOS = 4
BATCHES = ((5_000, 32), (50_000, 64), (math.inf, 128))  # (training images below, batch)


@dataclasses.dataclass(frozen=True)
class Choice:
  """One setting.

  Attributes:
    field: of the config.
    value: of the field.
    reason: one sentence.
  """

  field: str
  value: Any
  reason: str


class Pace(NamedTuple):
  """How fast a net trains, and for how long it should.

  Attributes:
    cost: time that a pixel takes; 1 for the net that is trained from scratch.
    steps: of the training, at least.
    epochs: of the training, at least.
  """

  cost: float
  steps: int
  epochs: int


FROM_SCRATCH = Pace(1.0, 1000, 20)
# Cost on CPU: 6.3 of EfficientNet-Lite0, 7.7 of ResNet-18 (benchmarks/README.md); ResNet-50 is not
# measured.
FINE_TUNED = Pace(7.0, 300, 10)
FINE_TUNING: tuple[tuple[str, Any, str], ...] = (  # field, value, reason
  ('model.width', 1.0, 'that of the weights'),
  ('train.frozen', 0.2, 'the classifier starts anew, and would spoil the weights at first'),
  (
    'train.learning_rate',
    0.01,
    'the weights are good already; 0.05 was worse (docs/pretrained.md)',
  ),
)


@dataclasses.dataclass(frozen=True)
class Hardware:
  """What a run has.

  Attributes:
    cores: CPU cores.
    gpus: accelerators.
  """

  cores: int
  gpus: int = 0

  @property
  def rate(self) -> float:
    """Pixels a second."""
    return self.gpus * GPU_RATE if self.gpus else self.cores * CPU_RATE

  @property
  def words(self) -> str:
    """'2 CPU cores'."""
    number, name = (self.gpus, 'GPU') if self.gpus else (self.cores, 'CPU core')
    return f'{number} {name}{"s" * (number != 1)}'


def choose(
  audit: Audit,
  config: Mapping[str, Any],
  given: Mapping[str, Any],
  hardware: Hardware,
  minutes: float,
  folder: str,
  copies_file: str,
  pretrained: str | None = None,
) -> list[Choice]:
  """The settings of a run on the photos of an audit.

  Image size and epochs are the largest of what is useful that trains in about `minutes`: the time
  is proportional to photos x epochs x pixels.

  Args:
    audit: of the folder.
    config: the recipe, as data.val_fraction and so on.
    given: {field: value} that the user has set; these are not chosen, and the others fit them.
    hardware: of the machine.
    minutes: that training may take.
    folder: absolute path of the photos.
    copies_file: path of the manifest of the copies.
    pretrained: the model whose weights model.init names; None: without such weights.

  Raises:
    UserError: a class without a photo to train on, or too few photos.
  """
  training = _training(audit, config['data'])
  chosen = [
    Choice('data.dir', folder, 'the folder of --data'),
    Choice('data.num_classes', len(audit.class_names), 'its class folders'),
  ]
  if audit.copies and not given.keys() & {'data.manifest', 'data.group_column'}:
    reason = f'{len(audit.copies):,} sets of copies stay on one side of every split'
    if audit.part_of is not None:
      reason = f'{len(audit.copies):,} sets of copies stay together where the folder has no part'
    chosen += [
      Choice('data.manifest', copies_file, reason),
      Choice('data.group_column', COPIES_COLUMN, 'the column of the sets in that file'),
    ]
  batch = given.get('train.batch_size') or _batch(training)
  chosen.append(Choice('train.batch_size', batch, f'{training:,} photos to train on'))
  pace = FINE_TUNED if pretrained else FROM_SCRATCH
  size, epochs, reasons = _size_and_epochs(audit, training, batch, given, pace, hardware, minutes)
  chosen += [
    Choice('data.image_size', size, reasons[0]),
    Choice('augment.crop_padding', size // 16, 'a sixteenth of the image size'),
    Choice('train.epochs', epochs, reasons[1]),
    Choice(
      'train.eval_every',
      math.ceil(int(given.get('train.epochs') or epochs) / VALIDATIONS),
      f'{VALIDATIONS} validations: the best of many, on few photos, is chosen by chance',
    ),
    _loss(audit),
    Choice('model.attention', 'none', 'no study has shown yet that it helps (docs/study.md)'),
  ]
  if pretrained:
    chosen.append(Choice('model.name', pretrained, 'the net of the weights in model.init'))
    chosen += [Choice(*row) for row in FINE_TUNING]
  return [choice for choice in chosen if choice.field not in given]


def _training(audit: Audit, data: Mapping[str, Any]) -> int:
  """How many photos are trained on: exactly without copies, else about.

  Raises:
    UserError: a class without a photo to train on, or fewer than 4 photos.
  """
  counts = audit.training_counts
  if not counts.all():
    raise UserError(
      'a photo to train on in every class',
      f'none that can be read of {audit.class_names[int(counts.argmin())]}',
      'add photos to its folder, or move the folder elsewhere',
    )
  parts = audit.part_counts
  if 'test' not in parts:
    counts = _kept(counts, 1 / data['folds'] if data['folds'] else data['test_fraction'])
  if 'val' not in parts:
    counts = _kept(counts, data['val_fraction'])
  training = int(counts.sum())
  if training < LEAST_PHOTOS:
    raise UserError(
      f'at least {LEAST_PHOTOS} photos to train on', str(training), 'add photos to the folder'
    )
  return training


def _kept(counts: np.ndarray, fraction: float) -> np.ndarray:
  """Photos of each class after a share of each was held out, as `splits.stratified_split` does."""
  if not fraction:
    return counts
  held = np.clip(np.floor(fraction * counts + 0.5).astype(int), 1, np.maximum(counts - 1, 0))
  return counts - held


def _batch(training: int) -> int:
  """A power of two, at most that of BATCHES and half of the images: groups may take some more."""
  most = next(batch for below, batch in BATCHES if training < below)
  return min(most, 1 << int(math.log2(training / 2)))


def _size_and_epochs(
  audit: Audit,
  training: int,
  batch: int,
  given: Mapping[str, Any],
  pace: Pace,
  hardware: Hardware,
  minutes: float,
) -> tuple[int, int, tuple[str, str]]:
  """(image size, epochs, the reason of each)."""
  steps = math.ceil(training / batch)
  wanted = min(max(math.ceil(pace.steps / steps), pace.epochs), MOST_EPOCHS)
  epochs = int(given.get('train.epochs') or wanted)
  median = int(np.median(audit.sizes[audit.readable].min(1)))
  useful = [size for size in SIZES if size <= median] or [SIZES[0]]
  pixels = 60 * minutes * hardware.rate / pace.cost
  within = f'{minutes:g} minutes on {hardware.words}'
  fitting = [size for size in useful if training * epochs * size**2 <= pixels]
  size = int(given.get('data.image_size') or (fitting[-1] if fitting else useful[0]))
  side = f'the median shorter side is {median} pixels'
  why_size = side
  if not fitting or fitting[-1] < useful[-1]:
    why_size = f'{side}; a larger one would take more than {within}'
  why_epochs = f'{epochs * steps:,} steps'
  affordable = int(pixels / (training * size**2))
  if 'train.epochs' not in given and affordable < epochs:
    epochs = max(affordable, LEAST_EPOCHS)
    why_epochs = f'more would take over {within}'
  if (longer := epochs * training * size**2 / pixels) > 1.5:
    why_epochs += f'; expect about {longer * minutes:.0f} minutes'
  return size, epochs, (why_size, why_epochs)


def _loss(audit: Audit) -> Choice:
  """By how much classes differ in size."""
  factor = audit.imbalance_factor
  if factor < IMBALANCED:
    return Choice('loss.name', 'cross_entropy', f'classes are of like size: factor {factor:.3g}')
  reason = f'the largest class has {factor:.3g} times the photos of the smallest'
  return Choice('loss.name', 'balanced_softmax', f'it corrects for class sizes: {reason}')
