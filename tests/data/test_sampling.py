"""Index streams: whole epochs or classes as often as they say, pure in (seed, step)."""

import numpy as np
import pytest

from csba_jax import config as config_lib
from csba_jax.data import sampling
from csba_jax.data.random_draws import permutation
from csba_jax.errors import UserError


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


COUNTS = np.array([600, 90, 25, 5])
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), COUNTS))
TOTAL = 200


def stream(name='class', start=0.0, seed=3, batch_size=50, labels=LABELS):
  section = config_lib.default().sampler
  section.update(name=name, start=start)
  return sampling.Stream.of(section, labels, batch_size, TOTAL, seed)


def frequencies(a_stream, steps):
  drawn = LABELS[np.concatenate([a_stream.positions(step) for step in steps])]
  return np.bincount(drawn, minlength=4) / len(drawn)


def by_hand(name, t):
  """Probability of each class at progress t, one class after the other (Kang et al. 2020)."""
  power = {'instance': 1, 'class': 0, 'square_root': 0.5, 'reversed': -1}
  if name == 'progressive':
    pairs = zip(by_hand('instance', t), by_hand('class', t), strict=True)
    return [(1 - t) * a + t * b for a, b in pairs]
  weights = [float(n) ** power[name] for n in COUNTS]
  return [w / sum(weights) for w in weights]


@pytest.mark.parametrize('name', sampling.SAMPLERS)
def test_probabilities_of_classes_equal_their_formula(name):
  for t in (0.0, 0.3, 0.99):
    found = sampling.SAMPLERS[name](COUNTS.astype(float), t)
    np.testing.assert_allclose(found, by_hand(name, t), rtol=1e-12)
    assert found.sum() == pytest.approx(1)


@pytest.mark.parametrize('name', sampling.SAMPLERS)
def test_classes_come_as_often_as_their_probabilities_say(name):
  steps = range(TOTAL)  # 10,000 images
  expected = np.mean([by_hand(name, step / TOTAL) for step in steps], axis=0)
  error = abs(frequencies(stream(name), steps) - expected)
  assert (error < 5 * np.sqrt(expected * (1 - expected) / 10_000)).all()


def test_progressive_goes_from_the_training_set_to_balance():
  early = frequencies(stream('progressive'), range(20))
  late = frequencies(stream('progressive'), range(TOTAL - 20, TOTAL))
  assert early[0] > 0.7
  assert abs(late - 0.25).max() < 0.1


def test_within_a_class_every_image_comes_equally_often():
  drawn = np.concatenate([stream('class').positions(step) for step in range(TOTAL)])
  of_class = np.bincount(drawn, minlength=len(LABELS))[LABELS == 2]  # 25 images, 2,500 draws
  assert of_class.sum() == pytest.approx(2500, abs=250)
  assert ((of_class - 100) ** 2 / 100).sum() < 60  # chi-square, 24 degrees of freedom


@pytest.mark.parametrize('name', sampling.SAMPLERS)
def test_a_step_asked_alone_is_the_step_of_the_stream(name):
  whole = [stream(name).positions(step) for step in range(12)]
  for step in (11, 3, 7):
    found = stream(name).positions(step)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, whole[step])
  assert (stream(name, seed=4).positions(3) != whole[3]).any()


def test_instance_is_the_stream_of_permutations():
  np.testing.assert_array_equal(
    stream('instance').positions(5), sampling.batch_positions(3, 5, len(LABELS), 50)
  )


def test_a_start_without_a_sampler():
  with pytest.raises(UserError, match=r'a sampler to defer with sampler\.start; found start 0\.8'):
    stream('instance', start=0.8)


def test_progress_ends_with_the_run():
  np.testing.assert_array_equal(
    stream('progressive').class_probabilities(2 * TOTAL), np.ones(4) / 4
  )


@pytest.mark.parametrize('name', sorted(set(sampling.SAMPLERS) - {'instance'}))
def test_deferred_sampling_is_instance_balanced_before_its_start(name):
  deferred, always, plain = stream(name, start=0.8), stream(name), stream('instance')
  for step, expected in ((0, plain), (159, plain), (160, always), (199, always)):
    np.testing.assert_array_equal(deferred.positions(step), expected.positions(step))


def test_the_classes_of_a_stream_are_pinned():
  # A change here means that no balanced run before it can be resumed or repeated.
  labels = np.repeat(np.arange(3), [5, 3, 2])
  found = stream('class', batch_size=8, labels=labels).positions(2)
  assert found.tolist() == [0, 1, 6, 1, 2, 8, 6, 3]


def test_an_unknown_sampler_lists_the_known_ones():
  with pytest.raises(UserError, match=r"sampler\.name among instance, class, .*; found 'smote'"):
    stream('smote')


def test_a_stream_with_a_batch_larger_than_the_data():
  with pytest.raises(UserError, match='a batch larger than the data'):
    stream(batch_size=len(LABELS) + 1)
