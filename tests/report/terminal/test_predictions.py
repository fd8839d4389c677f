"""Lines on calibration."""

from csba_jax.measure.calibration import Trust
from csba_jax.report.terminal import predictions


def test_what_calibration_gives_on_the_test_part():
  found = Trust(1.834, (0.1424, 0.0611), 0.8, (0.64, 0.71), (0.58, 0.66))
  assert list(predictions.trust(found)) == [
    'calibration error 0.061 with temperature 1.83 of the validation images, 0.142 without',
    'the surest 80 % of the images: accuracy 0.710 (all: 0.640), macro-F1 0.660 (all: 0.580)',
  ]
  assert list(predictions.trust(None)) == []
