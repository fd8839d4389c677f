"""Calibrated probabilities and decisions from the logits of validation images.

A run keeps these logits (validation.npz), so that its net can be calibrated where its data is not.
"""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from csba_jax.errors import UserError
from csba_jax.files import expanded
from csba_jax.methods import metrics

FILE = 'validation.npz'  # in a workdir
LEAST = 20  # validation images, below which nothing is fitted
TEMPERATURES = (0.05, 20.0)
PULL = (
  1.0  # strength of x^2 / 2, for x = 1 / temperature - 1 and each bias, beside one image's loss
)
_EXACT = {'ftol': 1e-14, 'gtol': 1e-9}
ROUNDS = 50  # in which weights are raised for wanted recalls, at most
TRIED = 200  # weights of a class that are tried, at most
COVERAGE = 0.8  # share of the images that `trust` lets the net answer


@dataclasses.dataclass(frozen=True, eq=False)
class Validation:
  """What a net says about validation images.

  Attributes:
    logits: [N, C] float32, adjusted as its predictions are.
    labels: [N] int32.
  """

  logits: np.ndarray
  labels: np.ndarray

  @property
  def shares(self) -> np.ndarray:
    """Share of each class among the images, [C]; each class counts half an image more."""
    counts = np.bincount(self.labels, minlength=self.logits.shape[1]) + 0.5
    return counts / counts.sum()

  def to_bytes(self) -> bytes:
    """The content of validation.npz."""
    file = io.BytesIO()
    np.savez(file, logits=self.logits, labels=self.labels)
    return file.getvalue()

  @classmethod
  def load(cls, workdir: Path, num_classes: int) -> 'Validation | None':
    """What a run has kept; None of a run without validation images, or of an older version.

    Raises:
      UserError: a file that is damaged or of another net.
    """
    path = workdir / FILE
    if not path.exists():
      return None
    try:
      with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
        found = cls(arrays['logits'], arrays['labels'])
      if found.logits.shape != (len(found.labels), num_classes) or not len(found.labels):
        raise ValueError(f'logits {found.logits.shape} of {len(found.labels)} images')
      if not np.isfinite(found.logits).all() or not found.labels.min() >= 0:
        raise ValueError('logits that are not finite, or labels below 0')
      if found.labels.max() >= num_classes:
        raise ValueError(f'label {found.labels.max()} of {num_classes} classes')
    except Exception as error:  # a damaged zip fails in a dozen ways
      raise UserError(
        f'the validation logits of a net with {num_classes} classes at {path}',
        f'{type(error).__name__}: {error}',
        'delete the file to predict without calibration',
      ) from error
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
  """From logits to probabilities:  softmax(logits / temperature + bias).

  Attributes:
    temperature: above 1 where the net is too sure.
    bias: [C]; 0 unless other class shares are wanted.
  """

  temperature: float
  bias: np.ndarray

  def adjusted(self, logits: np.ndarray) -> np.ndarray:
    """[N, C] logits -> logits / temperature + bias, float64."""
    return np.asarray(logits, np.float64) / self.temperature + self.bias

  def probabilities(self, logits: np.ndarray) -> np.ndarray:
    """[N, C] logits -> [N, C] float64, each row with sum 1."""
    from scipy.special import softmax

    return softmax(self.adjusted(logits), axis=-1)


def fit(validation: Validation | None, num_classes: int, shares: np.ndarray | None) -> Calibration:
  """The calibration with the least cross-entropy on validation images.

  Without `shares` only the temperature is fitted (Guo et al. 2017). With `shares` also a bias for
  each class, so that the probabilities are those of the validation part's class
  shares (Alexandari et al. 2020); then log(shares / validation shares) is added. Whatever prior the
  training loss has built into the logits, that is right for data with these shares.

  Args:
    validation: None leaves the temperature at 1.
    num_classes: C.
    shares: [C] class shares of the images to predict; None: as of the validation images.
  """
  nothing = np.zeros(num_classes)
  if validation is None or len(validation.labels) < LEAST:
    if shares is not None:
      raise UserError(
        f'at least {LEAST} validation images, for --field_prior',
        'none' if validation is None else str(len(validation.labels)),
        'leave out --field_prior, or train with a larger data.val_fraction',
      )
    return Calibration(1.0, nothing)
  temperature, bias = _fit(validation, shares is not None)
  if shares is not None:
    with np.errstate(divide='ignore'):  # a share of 0: never
      bias = bias + np.log(shares) - np.log(validation.shares)
  return Calibration(temperature, bias)


def _fit(validation: Validation, with_bias: bool) -> tuple[float, np.ndarray]:
  """(temperature, bias [C]) that minimise cross-entropy; convex in 1 / temperature and bias.

  Both are drawn towards 1 and 0, so that a few images that are all right do not make a net surer.
  """
  from scipy import optimize
  from scipy.special import log_softmax, softmax

  logits, labels = validation.logits.astype(np.float64), validation.labels
  n, classes = logits.shape
  truth = np.eye(classes)[labels]

  def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
    bias = x[1:] if with_bias else np.zeros(classes)
    z = x[0] * logits + bias
    pulled = np.asarray([x[0] - 1, *bias])
    value = -(truth * log_softmax(z, axis=1)).sum() + PULL / 2 * (pulled**2).sum()
    error = softmax(z, axis=1) - truth
    slope = [(error * logits).sum() + PULL * pulled[0]]
    slope += list(error.sum(0) + PULL * bias) if with_bias else []
    return value / n, np.asarray(slope) / n

  low, high = (1 / t for t in reversed(TEMPERATURES))
  start = np.asarray([1.0, *(np.zeros(classes) if with_bias else ())])
  bounds = [(low, high)] + [(None, None)] * (len(start) - 1)
  found = optimize.minimize(loss, start, jac=True, method='L-BFGS-B', bounds=bounds, options=_EXACT)
  return float(1 / found.x[0]), found.x[1:] if with_bias else np.zeros(classes)


def class_weights(
  validation: Validation | None,
  calibration: Calibration,
  thresholds: str,
  min_recall: Mapping[int, float],
) -> np.ndarray:
  """What multiplies each class's probability before the largest one is taken, [C].

  'macro_f1' chooses weights, class by class and twice around, that give the best macro-F1 on the
  validation images. Then the weights of the classes with a wanted recall are raised until the
  validation images have it, of all these classes at once.

  Args:
    validation: needed unless thresholds is 'none' and no recall is wanted.
    calibration: of the probabilities.
    thresholds: 'none' or 'macro_f1'.
    min_recall: {class: wanted recall on validation images, in (0, 1]}.

  Raises:
    UserError: too few validation images, none of a class, or recalls that cannot be had together.
  """
  classes = len(calibration.bias)
  found = np.ones(classes)
  if thresholds == 'none' and not min_recall:
    return found
  if validation is None or len(validation.labels) < LEAST:
    raise UserError(
      f'at least {LEAST} validation images, for --thresholds and --min_recall',
      'none' if validation is None else str(len(validation.labels)),
      'leave them out, or train with a larger data.val_fraction',
    )
  probabilities, labels = calibration.probabilities(validation.logits), validation.labels
  if thresholds == 'macro_f1':
    for c in list(range(classes)) * 2:
      found[c] = _best_weight(probabilities, labels, found, c)
  for _ in range(ROUNDS):
    before = found.copy()
    for c, recall in min_recall.items():
      found[c] = max(found[c], _weight_of_recall(probabilities, labels, found, c, recall))
    if (found == before).all():  # no class has taken images from another one
      return found
  raise UserError(
    'recalls of --min_recall that the validation images can have together',
    f'none after {ROUNDS} rounds, in which each class takes images from the others',
    'lower one of them',
  )


def macro_f1(predicted: np.ndarray, labels: np.ndarray, classes: int) -> float:
  """Mean F1 of the classes that have images; F1 = 2 TP / (images + predictions).

  It is called thousands of times, for which scikit-learn's takes too long.
  """
  images = np.bincount(labels, minlength=classes)
  right = np.bincount(labels[predicted == labels], minlength=classes)
  claimed = np.bincount(predicted, minlength=classes)
  some = images > 0
  return float((2 * right[some] / (images + claimed)[some]).mean())


def _levels(probabilities: np.ndarray, weights: np.ndarray, c: int) -> np.ndarray:
  """For each image the weight from which class c is the largest, [N]."""
  others = np.delete(probabilities * weights, c, axis=1).max(1)
  return others / np.maximum(probabilities[:, c], np.finfo(np.float64).tiny)


def _best_weight(
  probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray, c: int
) -> float:
  """The weight of class c with the best macro-F1; of equals the nearest to the one it has."""
  levels = np.sort(_levels(probabilities, weights, c))
  levels = levels[(levels > 1e-6) & (levels < 1e6)]
  between = np.sqrt(levels[1:] * levels[:-1])  # halfway, on a log scale, between two changes
  some = np.unique(np.linspace(0, len(between) - 1, TRIED).round().astype(int))
  tried = np.concatenate([[weights[c]], between[some] if len(between) else between])
  scores = []
  for weight in tried:
    changed = weights.copy()
    changed[c] = weight
    predicted = (probabilities * changed).argmax(1)
    scores.append(macro_f1(predicted, labels, len(weights)))
  best = np.flatnonzero(np.asarray(scores) >= max(scores) - 1e-12)
  return float(tried[best[np.abs(np.log(tried[best] / weights[c])).argmin()]])


def _weight_of_recall(
  probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray, c: int, recall: float
) -> float:
  """The smallest weight of class c with which that share of its images is found."""
  levels = np.sort(_levels(probabilities, weights, c)[labels == c])
  if not len(levels):
    raise UserError(
      'validation images of the class in --min_recall', 'none', 'leave it out, or add images of it'
    )
  needed = levels[int(np.ceil(recall * len(levels) - 1e-9)) - 1]
  return float(needed * (1 + 1e-9))


def calibration_error(validation: Validation, calibration: Calibration) -> float:
  """Expected calibration error of the validation images, as `metrics.summarise` has it."""
  logits, everyone = calibration.adjusted(validation.logits), np.ones(len(validation.labels), bool)
  sums = metrics.Confusion.from_logits(jnp.asarray(logits), validation.labels, everyone).to_host()
  found = metrics.summarise(sums, np.bincount(validation.labels, minlength=logits.shape[1]))
  return found['expected_calibration_error']


class Trust(NamedTuple):
  """What calibration on validation images gives on other images, and what abstention gives there.

  Attributes:
    temperature: that was fitted on the validation images.
    error: expected calibration error (without, with calibration).
    coverage: share of the images that are answered, those with the largest probabilities.
    accuracy: (of all images, of those that are answered).
    macro_f1: the same, over the classes that have images among them.
  """

  temperature: float
  error: tuple[float, float]
  coverage: float
  accuracy: tuple[float, float]
  macro_f1: tuple[float, float]


def trust(
  test: Validation, validation: Validation | None, coverage: float = COVERAGE
) -> Trust | None:
  """See `Trust`; None with fewer than LEAST validation images.

  Args:
    test: logits and labels that had no share in the calibration.
    validation: what the calibration is fitted on.
    coverage: of ceil(coverage n) images; of equal probabilities the first ones.
  """
  if validation is None or len(validation.labels) < LEAST:
    return None
  classes = test.logits.shape[1]
  plain, fitted = Calibration(1.0, np.zeros(classes)), fit(validation, classes, None)
  predicted = test.logits.argmax(1)
  sure = fitted.probabilities(test.logits).max(1)
  most = np.argsort(-sure, kind='stable')[: int(np.ceil(coverage * len(sure) - 1e-9))]
  right = predicted == test.labels
  return Trust(
    fitted.temperature,
    (calibration_error(test, plain), calibration_error(test, fitted)),
    coverage,
    (float(right.mean()), float(right[most].mean())),
    (
      macro_f1(predicted, test.labels, classes),
      macro_f1(predicted[most], test.labels[most], classes),
    ),
  )


def parse_recalls(texts: Sequence[str], class_names: Sequence[str]) -> dict[int, float]:
  """{class: recall} from 'NAME:0.8'.

  Raises:
    UserError: another form, an unknown class, or a recall outside (0, 1].
  """
  found = {}
  for text in texts:
    name, _, value = text.rpartition(':')
    try:
      recall = float(value)
    except ValueError:
      recall = 0.0
    if name not in class_names or not 0 < recall <= 1:
      raise UserError(
        '--min_recall=CLASS:RECALL with a recall above 0, at most 1',
        text,
        f'write it as {class_names[0]}:0.8; the classes are {", ".join(class_names[:8])}',
      )
    found[list(class_names).index(name)] = recall
  return found


def parse_shares(prior: str | None, names: Sequence[str]) -> np.ndarray | None:
  """Class shares [C] from 'uniform' or the path of a CSV file of class,share.

  Raises:
    UserError: a file that cannot be read, lacks a class or names another, or a share of 0 or less.
  """
  if prior is None:
    return None
  if prior == 'uniform':
    return np.full(len(names), 1 / len(names))
  expected = f'--field_prior=uniform, or a CSV file with a share above 0 of {", ".join(names[:8])}'
  if len(names) > 8:
    expected += f' and {len(names) - 8} more'
  try:
    with open(expanded(prior), encoding='utf-8-sig', newline='') as file:
      rows = [row for row in csv.reader(file) if row]
    values = _values(rows)
  except (OSError, ValueError, csv.Error) as error:
    raise UserError(expected, f'{prior}: {error}', 'write a line CLASS,SHARE for each') from error
  wrong = sorted(set(values) ^ set(names))
  if wrong:
    where = 'the file' if wrong[0] in values else 'the net'
    raise UserError(expected, f'{wrong[0]} in {where} alone', 'correct the names')
  shares = np.asarray([values[name] for name in names])
  return shares / shares.sum()


def _values(rows: list[list[str]]) -> Mapping[str, float]:
  """{class: share}; a first line without a number is a heading."""
  found: dict[str, float] = {}
  for number, row in enumerate(rows):
    try:
      name, value = row[0].strip(), float(row[1])
    except (IndexError, ValueError):
      if number == 0:
        continue
      raise ValueError(f'line {number + 1} is not CLASS,SHARE') from None
    if not 0 < value < float('inf') or name in found:
      raise ValueError(f'line {number + 1}: {",".join(row)}')
    found[name] = value
  return found
