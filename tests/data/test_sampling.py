"""The index stream: whole epochs, pure in (seed, step), whatever is asked first."""

import numpy as np
import pytest

from csba_jax.data import sampling
from csba_jax.errors import UserError
from csba_jax.longtail import permutation


@pytest.mark.parametrize(
  ('n', 'batch_size'), [(10, 3), (10, 4), (10, 10), (7, 5), (12, 4), (1, 1), (5, 1)]
)
def test_batches_are_consecutive_pieces_of_the_stream(n, batch_size):
  epochs = 6
  stream = np.concatenate([permutation((3, 'train', e), n) for e in range(epochs)])
  for step in range(epochs * n // batch_size):
    batch = sampling.batch_positions(3, step, n, batch_size)
    assert batch.dtype == np.int32
    assert batch.tolist() == stream[step * batch_size : (step + 1) * batch_size].tolist()


def test_every_example_once_an_epoch():
  n, batch_size = 103, 8
  stream = np.concatenate([sampling.batch_positions(0, s, n, batch_size) for s in range(103)])
  for epoch in stream.reshape(batch_size, n):
    assert sorted(epoch.tolist()) == list(range(n))


def test_a_resumed_stream_goes_on_where_it_stopped():
  whole = [sampling.batch_positions(1, s, 20, 6) for s in range(30)]
  sampling._epoch_order.cache_clear()
  for step in (29, 3, 17, 0):  # in no order, and without what came before
    assert sampling.batch_positions(1, step, 20, 6).tolist() == whole[step].tolist()


def test_a_caller_cannot_change_the_stream():
  first = sampling.batch_positions(0, 0, 8, 8)
  first[:] = 0
  assert sorted(sampling.batch_positions(0, 0, 8, 8).tolist()) == list(range(8))


def test_seeds_and_epochs_differ():
  found = {sampling.batch_positions(s, e, 30, 30).tobytes() for s in range(3) for e in range(3)}
  assert len(found) == 9


def test_stream_is_pinned():
  # A change here means that no run before it can be resumed or repeated.
  assert sampling.batch_positions(0, 2, 10, 4).tolist() == [1, 3, 1, 0]


def test_a_large_step_does_not_overflow():
  batch = sampling.batch_positions(0, 2**40, 10, 4)
  assert len(batch) == 4


def test_a_batch_larger_than_the_data():
  with pytest.raises(
    UserError, match=r'1 to 10 images; found batch_size 11, a batch larger than the'
  ):
    sampling.batch_positions(0, 0, 10, 11)


@pytest.mark.parametrize('batch_size', [0, -1])
def test_an_empty_batch(batch_size):
  with pytest.raises(UserError, match='1 to 10 images; found batch_size'):
    sampling.batch_positions(0, 0, 10, batch_size)
