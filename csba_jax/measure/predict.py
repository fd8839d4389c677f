"""The classes of new photos, with calibrated probabilities; the training data is not needed."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from csba_jax.data import cache
from csba_jax.data.decoding import decode_image
from csba_jax.data.image_folder import read_image
from csba_jax.data.sources import Source, content_sum
from csba_jax.files import expanded
from csba_jax.measure import calibration as calibration_lib
from csba_jax.measure import grad_cam
from csba_jax.measure.calibration import Calibration, Validation
from csba_jax.run import restore
from csba_jax.run.net import Net

Explain = Callable[[Path, np.ndarray, np.ndarray], None]
BATCH = 32  # photos in one call of the net; a last batch is padded


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
  """What a net says about one photo.

  Attributes:
    file: its path.
    reason: why it cannot be read; '' if it can.
    label: the predicted class; -1 if it cannot be read, or the net is not sure enough.
    confidence: calibrated probability of the class that would be predicted.
    probabilities: [C]; all 0 of a photo that cannot be read.
  """

  file: Path
  reason: str
  label: int
  confidence: float
  probabilities: np.ndarray


class _Photos(Source):
  """Files as a source of images, without labels."""

  name = 'photos'

  def __init__(self, files: Sequence[Path], image_shape: tuple[int, int, int]):
    self.files, self.image_shape = files, image_shape

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, i: int) -> dict:
    data = read_image(self.files[i])
    size, _, channels = self.image_shape
    return {
      'image': decode_image(data, channels=channels, image_size=size),
      'sha256': content_sum(data),
    }


@dataclasses.dataclass(frozen=True, eq=False)
class Predictor:
  """A net, and what turns its logits into decisions.

  Attributes:
    net: of a run.
    validation: logits of the run's validation images; None if it has kept none.
    calibration: of the probabilities.
    weights: [C], what multiplies the probability of each class before the largest one is taken.
  """

  net: Net
  validation: Validation | None
  calibration: Calibration
  weights: np.ndarray

  @classmethod
  def load(
    cls,
    workdir: str,
    thresholds: str = 'none',
    min_recall: Sequence[str] = (),
    field_prior: str | None = None,
  ) -> 'Predictor':
    """The predictor of a run, from its workdir alone.

    Args:
      workdir: folder of a run.
      thresholds: 'none' or 'macro_f1', see `calibration.class_weights`.
      min_recall: 'CLASS:RECALL' each.
      field_prior: None, 'uniform', or the path of a CSV file of class,share.

    Raises:
      UserError: as of `restore.load_net`; too few validation images for what is wanted; an unknown
        class.
    """
    net = restore.load_net(workdir)  # the one that was tested, of which validation.npz is
    names = net.metadata.class_names
    recalls = calibration_lib.parse_recalls(min_recall, names)
    shares = calibration_lib.parse_shares(field_prior, names)
    validation = Validation.load(expanded(workdir), len(names))
    found = calibration_lib.fit(validation, len(names), shares)
    weights = calibration_lib.class_weights(validation, found, thresholds, recalls)
    return cls(net, validation, found, weights)

  def predict(
    self,
    files: Sequence[Path],
    min_confidence: float = 0.0,
    tick: Callable[[int, int], None] = lambda done, total: None,
    explain: Explain | None = None,
  ) -> Iterator[Prediction]:
    """A prediction for each file, in order; the files are read ahead by a few threads.

    The predicted class is that of the largest product of probability and weight. Its probability
    is the confidence.

    Args:
      files: any number; few of them are in memory at a time.
      min_confidence: below it no class is predicted.
      tick: called with (files done, files) now and then; may raise.
      explain: called with each file that can be read, the image as the net sees it, and the
        `heat_maps` of the most probable class.
    """
    done = 0
    photos = _Photos(files, self.net.metadata.image_shape)
    for block in cache.decoded(photos, lambda line: None, BATCH):
      probabilities = self.calibration.probabilities(_logits(self.net, block.images))
      if explain:
        self._explain(files[done:], block, probabilities, explain)
      found = iter(probabilities)
      for reason in block.reasons:
        yield _prediction(files[done], reason, found, self.weights, min_confidence)
        done += 1
      tick(done, len(files))

  def _explain(
    self, files: Sequence[Path], block: cache.Block, probabilities: np.ndarray, explain: Explain
  ) -> None:
    """Calls `explain` for each image of a block, whose files are the first ones."""
    readable = [file for file, reason in zip(files, block.reasons, strict=False) if not reason]
    labels = (probabilities * self.weights).argmax(1)

    def maps_of(some: np.ndarray, classes: np.ndarray) -> np.ndarray:
      return grad_cam.heat_maps(self.net, some, classes)

    maps = itertools.chain.from_iterable(in_batches(maps_of, block.images, labels))
    for file, image, one in zip(readable, block.images, maps, strict=True):
      explain(file, image, one)


def _prediction(
  file: Path, reason: str, found: Iterator[np.ndarray], weights: np.ndarray, least: float
) -> Prediction:
  if reason:
    return Prediction(file, reason, -1, 0.0, np.zeros(len(weights)))
  probabilities = next(found)
  label = int((probabilities * weights).argmax())
  confidence = float(probabilities[label])
  return Prediction(file, '', label if confidence >= least else -1, confidence, probabilities)


def _logits(net: Net, images: np.ndarray) -> np.ndarray:
  """[n, C] of any number of images."""
  if not len(images):
    return np.empty((0, net.num_classes), np.float32)
  return np.concatenate(list(in_batches(lambda batch: np.asarray(net.logits(batch)), images)))


def in_batches(work: Callable[..., np.ndarray], *arrays: np.ndarray) -> Iterator[np.ndarray]:
  """work(batch of each array) of all rows; it is compiled for one batch size, the last is padded.

  Yields the results batch by batch, without those of the padding.
  """
  for begin in range(0, len(arrays[0]), BATCH):
    some = [array[begin : begin + BATCH] for array in arrays]
    padded = [np.zeros((BATCH, *array.shape[1:]), array.dtype) for array in arrays]
    for whole, part in zip(padded, some, strict=True):
      whole[: len(part)] = part
    yield work(*padded)[: len(some[0])]
