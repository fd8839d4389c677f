"""What the tests of data share: made-up photos."""

import numpy as np
import pytest


@pytest.fixture(scope='session')
def scene():
  """A function that makes a smooth photo from a seed."""
  return _scene


def _scene(seed, size=96):
  """A smooth made-up photo, uint8 [size, size, 3]: random waves of a few lengths."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:size, :size] / size
  image = np.zeros((size, size, 3))
  for _ in range(12):
    across, down, phase = *rng.normal(0, 4, 2), rng.uniform(0, 6.3)
    image += rng.normal(0, 1, 3) * np.cos(6.3 * (across * x + down * y) + phase)[..., None]
  image -= image.min()
  return (255 * image / image.max()).astype(np.uint8)
