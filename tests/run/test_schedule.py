"""The stream of batches that a run trains on, from its config and its plan."""

import numpy as np

from csba_jax.data import sampling
from csba_jax.run.schedule import Plan, training_stream


def test_the_stream_of_a_run_has_its_seed_batch_size_and_length(driver):
  config = driver.tiny_config(sampler__name='class', sampler__start=0.5, seed=3)
  labels = np.arange(100) % 10
  stream = training_stream(config, labels)
  assert stream.total_steps == Plan.of(config, 100).total == 3 * 4  # epochs of ceil(100 / 32) steps
  assert stream.first == 6  # half of the run
  np.testing.assert_array_equal(stream.positions(5), sampling.batch_positions(3, 5, 100, 32))
  assert (stream.positions(6) != sampling.batch_positions(3, 6, 100, 32)).any()
  np.testing.assert_allclose(stream.class_probabilities(6), np.full(10, 0.1))
