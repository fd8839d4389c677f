"""Metrics: sums on the device, ratios on the host; padding has weight 0."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array
from numpy.typing import ArrayLike

from csba_jax.data import class_counts as class_counts_lib

CALIBRATION_BINS = 15  # equal widths, as in Guo et al. 2017


class Confusion(struct.PyTreeNode):
  """Sums over examples, from which every metric follows; sums of two sets of examples add up."""

  counts: Array  # [C, C] int32, counts[true, predicted]
  loss: Array  # [] sum of cross-entropies, nats
  bin_counts: Array  # [bins] int32, examples by confidence of the prediction
  bin_correct: Array  # [bins] int32
  bin_confidence: Array  # [bins] sums of confidences

  @classmethod
  def from_logits(cls, logits: Array, labels: Array, mask: Array) -> 'Confusion':
    """[N, C] logits, [N] int labels, [N] mask (0 or False = padding)."""
    num_classes = logits.shape[-1]
    weight = mask.astype(jnp.int32)
    counts = jnp.zeros((num_classes, num_classes), jnp.int32)
    predicted = logits.argmax(-1)
    confidence = jax.nn.softmax(logits.astype(jnp.float32)).max(-1)
    # bin i holds (i / bins, (i + 1) / bins]
    bins = jnp.clip(jnp.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0)
    zeros = jnp.zeros(CALIBRATION_BINS, jnp.int32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return cls(
      counts=counts.at[labels, predicted].add(weight),
      loss=jnp.where(weight > 0, losses, 0.0).sum(),
      bin_counts=zeros.at[bins].add(weight),
      bin_correct=zeros.at[bins].add(weight * (predicted == labels)),
      bin_confidence=zeros.astype(jnp.float32).at[bins].add(jnp.where(weight > 0, confidence, 0.0)),
    )

  def merge(self, other: 'Confusion') -> 'Confusion':
    """Sums over both sets of examples; on the host, in float64, where either side is there."""
    if isinstance(self.counts, np.ndarray) != isinstance(other.counts, np.ndarray):
      self, other = self.to_host(), other.to_host()
    return jax.tree.map(lambda a, b: a + b, self, other)

  def to_host(self) -> 'Confusion':
    """The same sums in NumPy int64 and float64, so that many batches are merged exactly."""
    wide = {'i': np.int64, 'f': np.float64}
    host = jax.device_get(self)
    return jax.tree.map(lambda x: np.asarray(x, wide[np.asarray(x).dtype.kind]), host)


def summarise(confusion: Confusion, train_counts: np.ndarray) -> dict[str, Any]:
  """Every metric of an evaluation, as plain numbers; an undefined metric is NaN.

  Precision, recall and F1 of class c are tp / predicted, tp / support and 2 tp / (predicted +
  support); F1 and precision of a class that is never predicted are 0. A class without examples has
  NaN recall and F1: macro-F1 and balanced accuracy (the mean recall) leave it out, and
  `classes_without_examples` counts it. Group accuracies are mean recalls over the many-, medium-
  and few-shot classes (more than 100, 20 to 100, fewer than 20 training images). The expected
  calibration error has 15 bins of equal width (Guo et al. 2017).

  Args:
    confusion: sums over the whole evaluation, see `Confusion.to_host`.
    train_counts: [C] training images of each class.
  """
  counts = np.asarray(confusion.counts, np.float64)
  true_positive, support, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
  present = support > 0
  precision = _ratio(true_positive, predicted, empty=0.0)
  recall = _ratio(true_positive, support, empty=np.nan)
  f1 = np.where(present, _ratio(2 * true_positive, predicted + support, empty=0.0), np.nan)
  examples = support.sum()
  bins = np.asarray(confusion.bin_counts, np.float64)
  gap = np.abs(_ratio(confusion.bin_correct - confusion.bin_confidence, bins, empty=0.0))
  groups = class_counts_lib.shot_groups(train_counts)
  return {
    'examples': int(examples),
    'loss': float(_ratio(confusion.loss, examples, empty=np.nan)),
    'accuracy': float(_ratio(true_positive.sum(), examples, empty=np.nan)),
    'macro_f1': _mean(f1),
    'balanced_accuracy': _mean(recall),
    'group_accuracy': {name: _mean(recall[classes]) for name, classes in groups.items()},
    'expected_calibration_error': float(_ratio((bins * gap).sum(), examples, empty=np.nan)),
    'classes_without_examples': int((~present).sum()),
    'per_class': {
      'precision': precision.tolist(),
      'recall': recall.tolist(),
      'f1': f1.tolist(),
      'support': support.astype(int).tolist(),
    },
    'confusion_matrix': counts.astype(int).tolist(),
  }


def macro_f1_at(counts: np.ndarray, shares: np.ndarray) -> float:
  """Macro-F1 if the classes had these shares: row c of the confusion matrix is scaled to share c.

  Precision depends on how frequent the classes are. So on a long-tailed part of the data, a net
  that corrects the prior looks worse than where it is used.

  Args:
    counts: [C, C] confusion matrix; rows are true classes.
    shares: [C] shares of the classes; they need not sum to 1.

  Returns:
    Macro-F1 over the classes that have examples; NaN without any.
  """
  counts, shares = np.asarray(counts, np.float64), np.asarray(shares, np.float64)
  support = counts.sum(1)
  rows = _ratio(counts * shares[:, None], support[:, None], empty=0.0)
  f1 = _ratio(2 * np.diag(rows), rows.sum(1) + rows.sum(0), empty=0.0)
  return _mean(np.where(support > 0, f1, np.nan))


def _ratio(numerator: ArrayLike, denominator: ArrayLike, empty: float) -> np.ndarray:
  """numerator / denominator in float64, `empty` where the denominator is 0."""
  numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
  zero = denominator == 0
  return np.where(zero, empty, numerator / np.where(zero, 1.0, denominator))


def _mean(values: np.ndarray) -> float:
  """Mean of the values that are not NaN; NaN if there are none."""
  values = values[~np.isnan(values)]
  return float(values.mean()) if values.size else float('nan')
