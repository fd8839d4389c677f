"""Flat and class-stacked batches."""

import numpy as np
import pytest

from csba_jax.gradients import batches

LABEL = np.array([3, 0, 1, 0, 3, 0, 1])


def test_stack_keeps_every_image_once_in_the_row_of_its_class():
  batch = {'x': np.arange(7) * 10, 'nested': {'y': np.arange(14).reshape(7, 2)}, 'label': LABEL}
  mask = np.array([1, 1, 1, 0, 1, 1, 1])
  found = batches.stack({**batch, 'mask': mask}, 5)
  assert found['mask'].shape == found['label'].shape == found['x'].shape == (5, 2)
  assert found['nested']['y'].shape == (5, 2, 2)
  rows = [np.asarray(found['x'])[c][found['mask'][c]].tolist() for c in range(5)]
  assert rows == [[10, 50], [20, 60], [], [0, 40], []]
  np.testing.assert_array_equal(found['nested']['y'][..., 0] * 5, found['x'])
  flat = batches.flatten(found)
  assert flat['nested']['y'].shape == (10, 2)
  assert sorted(np.asarray(flat['x'])[np.asarray(flat['mask'])]) == [0, 10, 20, 40, 50, 60]


@pytest.mark.seconds
def test_stacks_are_less_than_a_half_longer_than_the_largest_class():
  for largest in range(1, 40):
    found = batches.stack({'label': np.repeat([0, 1], [largest, 1])}, 2)
    n = found['label'].shape[1]
    assert n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
    assert largest <= n < 1.5 * largest, largest


@pytest.mark.parametrize('shape', [(5,), (2, 5), (8,), (1, 8)])
def test_padding_is_masked_and_leaves_the_images_in_place(shape):
  label = np.zeros(shape, int)
  batch = {'x': np.arange(label.size).reshape(shape), 'label': label}
  found = batches.pad(batch, 8)
  assert found['x'].shape == (*shape[:-1], 8)
  np.testing.assert_array_equal(found['x'][..., : shape[-1]], batch['x'])
  kept = np.asarray(batches.valid(found))
  np.testing.assert_array_equal(kept, np.broadcast_to(np.arange(8) < shape[-1], kept.shape))


def test_padding_keeps_the_mask_that_was_there():
  found = batches.pad({'label': np.zeros(3, int), 'mask': np.array([1, 0, 1])}, 4)
  np.testing.assert_array_equal(found['mask'], [True, False, True, False])
