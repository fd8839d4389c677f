"""The flags of csba-predict that decide which class is predicted."""

from typing import Any

from absl import flags

CONFIDENCE = flags.DEFINE_float(
  'min_confidence', 0.0, 'Predict no class below this probability.', 0.0, 1.0
)
_THRESHOLDS = flags.DEFINE_enum(
  'thresholds',
  'none',
  ('none', 'macro_f1'),
  'macro_f1: weigh the classes so that macro-F1 of the validation images is best.',
)
_RECALL = flags.DEFINE_multi_string(
  'min_recall',
  [],
  'Weigh a class so that this share of its validation images is found; once for a class.',
)
_PRIOR = flags.DEFINE_string(
  'field_prior',
  None,
  'Class shares of the photos, where they differ from those of the training: uniform, or a CSV '
  'file of class,share.',
)


def of_predictor() -> dict[str, Any]:
  """Arguments of `predict.Predictor.load`."""
  return {
    'thresholds': _THRESHOLDS.value,
    'min_recall': _RECALL.value,
    'field_prior': _PRIOR.value,
  }
