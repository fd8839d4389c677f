"""The evidence of one run: what its net says about validation images, and its conflict."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from csba_jax.analysis.rates import share_ends
from csba_jax.gradients.conflict import Conflict, majority_minority
from csba_jax.measure.calibration import Validation
from csba_jax.methods import losses

QUANTILE = 1.959964  # of the normal distribution, for 95 %
# Images added to each class before an interval: of Agresti and Coull (1998) for a share (one that
# was found, one that was not), and of Agresti and Min (2005) for a difference of two shares of the
# same images (half an image for each pair of outcomes, two of which have the difference 0).
_OF_A_SHARE = {0: 1.0, 1: 1.0}
_OF_A_DIFFERENCE = {-1: 0.5, 0: 1.0, 1: 0.5}


class Interval(NamedTuple):
  """A value with its 95 % interval; NaN where there is none."""

  value: float
  low: float
  high: float

  def __str__(self) -> str:
    return f'{self.value:.2f} ({self.low:.2f} to {self.high:.2f})'


UNKNOWN = Interval(np.nan, np.nan, np.nan)


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
  """What the rules read.

  Attributes:
    class_names: C names.
    class_counts: [C] training images.
    validation: adjusted logits and labels of validation images; None without such images.
    corrects: whether the loss, its weights, the sampler or the predictions correct for class sizes.
    post_hoc_tau: of the logit adjustment that is in the logits already.
    conflict: of the class gradients on training images; None if it was not measured.
    contradictions: sets of copies that lie in more than one class.
    can_have_csba: whether the model can have that attention, and has not got it yet.
  """

  class_names: tuple[str, ...]
  class_counts: np.ndarray
  validation: Validation | None
  corrects: bool = False
  post_hoc_tau: float = 0.0
  conflict: Conflict | None = None
  contradictions: int = 0
  can_have_csba: bool = True

  @property
  def images(self) -> int:
    """Validation images."""
    return 0 if self.validation is None else len(self.validation.labels)

  @functools.cached_property
  def minority(self) -> np.ndarray:
    """Mask [C] of the classes that count as rare, see `conflict.majority_minority`."""
    return majority_minority(self.class_counts)[1]

  @functools.cached_property
  def support(self) -> np.ndarray:
    """Validation images of each class, [C]."""
    return np.bincount(self._known.labels, minlength=len(self.class_names))

  @functools.cached_property
  def predicted(self) -> np.ndarray:
    """Predicted class of each validation image, [N]."""
    return self._known.logits.argmax(1)

  @functools.cached_property
  def adjusted(self) -> np.ndarray:
    """The same after post-hoc logit adjustment with tau = 1 (Menon et al. 2021), [N].

    tau is not tuned: it is 1 for the prior of the training images.
    """
    return (self._known.logits + losses.post_hoc_shift(1.0, self.class_counts)).argmax(1)

  def recall(self, c: int) -> Interval:
    """Share of the validation images of class c that are found; exact (Clopper-Pearson)."""
    found = int((self.predicted[self._known.labels == c] == c).sum())
    return share(found, int(self.support[c]))

  @functools.cached_property
  def mean_recall(self) -> Interval:
    """Mean recall of the classes with validation images."""
    return self._mean(self.predicted == self._known.labels, _OF_A_SHARE)

  @functools.cached_property
  def gain(self) -> Interval:
    """What `adjusted` adds to the mean recall."""
    labels = self._known.labels
    values = (self.adjusted == labels).astype(int) - (self.predicted == labels)
    return self._mean(values, _OF_A_DIFFERENCE)

  @functools.cached_property
  def sureness(self) -> Interval:
    """Probability that the net is surer of a right answer than of a wrong one (AUC).

    Its margin between the two largest logits tells how sure it is. Near 0.5 it contradicts labels
    as surely as it agrees with them, as it does where labels are wrong. The interval is DeLong's.
    """
    top = np.sort(self._known.logits.astype(np.float64), axis=1)[:, -2:]
    margin, right = top[:, 1] - top[:, 0], self.predicted == self._known.labels
    return auc(margin[right], margin[~right])

  @property
  def _known(self) -> Validation:
    assert self.validation is not None
    return self.validation

  def _mean(self, values: np.ndarray, added: Mapping[int, float]) -> Interval:
    """Mean over classes of the mean of integers, [N].

    For the interval, `added` {value: images} joins each class, so that a class of three images that
    agree does not count as certain.
    """
    extra, weight = np.array(list(added)), np.array(list(added.values()))
    means, centres, variances = [], [], []
    for c in np.flatnonzero(self.support):
      own = values[self._known.labels == c].astype(np.float64)
      n = len(own) + weight.sum()
      centre = (own.sum() + weight @ extra) / n
      means.append(own.mean())
      centres.append(centre)
      variances.append(((own**2).sum() / n + weight @ extra**2 / n - centre**2) / n)
    value, middle = float(np.mean(means)), np.mean(centres)
    width = QUANTILE * np.sqrt(np.sum(variances)) / len(means)
    low, high = min(middle - width, value), max(middle + width, value)
    return Interval(value, float(max(low, min(extra))), float(min(high, max(extra))))


def share(found: int, of: int) -> Interval:
  """found / of with an exact 95 % interval of a proportion; UNKNOWN of nothing."""
  if not of:
    return UNKNOWN
  low, high = share_ends(np.asarray([found]), np.asarray([of]))
  return Interval(found / of, float(low[0]), float(high[0]))


def auc(larger: np.ndarray, smaller: np.ndarray) -> Interval:
  """P(a > b) + P(a = b) / 2 for a of `larger` and b of `smaller` (DeLong et al. 1988).

  UNKNOWN with fewer than two of either.
  """
  from scipy import stats

  m, n = len(larger), len(smaller)
  if min(m, n) < 2:
    return UNKNOWN
  ranks = stats.rankdata(np.concatenate([larger, smaller]))
  above = (ranks[:m] - stats.rankdata(larger)) / n  # share of `smaller` below each of `larger`
  below = 1 - (ranks[m:] - stats.rankdata(smaller)) / m
  value = float(above.mean())
  width = QUANTILE * float(np.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n))
  return Interval(value, max(value - width, 0.0), min(value + width, 1.0))
