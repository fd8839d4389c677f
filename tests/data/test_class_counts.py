"""Profiles, counts, priors, shot groups, and permutations that are the same everywhere."""

import fractions
import hashlib
import math

import numpy as np
import pytest

from csba_jax.data import class_counts as class_counts_lib
from csba_jax.data import random_draws
from csba_jax.errors import UserError


def test_exp_profile_is_the_published_cifar10_lt():
  counts = class_counts_lib.profile_counts(5000, 10, 100, 'exp')
  assert counts.tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
  assert counts.sum() == 12406
  assert counts.dtype == np.int64


def test_exp_profile_of_cifar100_lt():
  counts = class_counts_lib.profile_counts(500, 100, 100, 'exp')
  assert counts.sum() == 10847  # the number the literature gives
  assert (counts[0], counts[-1]) == (500, 5)


@pytest.mark.parametrize('num_classes', [1, 2, 3, 6, 10, 27])
@pytest.mark.parametrize('imbalance_factor', [1, 1.5, 10, 49, 100])
def test_exp_profile_equals_exact_integer_arithmetic(num_classes, imbalance_factor):
  # n <= n_max * IF ** (-c / (C - 1))  <=>  n ** (C - 1) * IF ** c <= n_max ** (C - 1), in rationals
  n_max, factor, steps = 490, fractions.Fraction(imbalance_factor), max(num_classes - 1, 1)
  expected = [
    max(n for n in range(n_max + 1) if n**steps * factor**c <= n_max**steps)
    for c in range(num_classes)
  ]
  found = class_counts_lib.profile_counts(n_max, num_classes, imbalance_factor, 'exp')
  assert found.tolist() == expected


def test_exp_profile_survives_rounding():
  assert 49 * (1 / 49) < 1  # what int() would cut to 0
  assert 243 / 243.0 ** (2 / 5) < 27
  assert class_counts_lib.profile_counts(243, 6, 243, 'exp').tolist() == [243, 81, 27, 9, 3, 1]
  for n_max in range(1, 500):
    assert class_counts_lib.profile_counts(n_max, 2, n_max, 'exp').tolist() == [n_max, 1]


@pytest.mark.parametrize(
  ('num_classes', 'expected'),
  [(4, [100, 100, 33, 33]), (5, [100, 100, 33, 33, 33]), (1, [33])],
)
def test_step_profile_keeps_the_middle_class_in_the_small_half(num_classes, expected):
  assert class_counts_lib.profile_counts(100, num_classes, 3, 'step').tolist() == expected


@pytest.mark.parametrize('profile', ['exp', 'step'])
def test_factor_one_is_balanced(profile):
  assert class_counts_lib.profile_counts(7, 5, 1, profile).tolist() == [7] * 5


@pytest.mark.parametrize('imbalance_factor', [0.01, 0, -1, math.inf, math.nan])
def test_factor_below_one_names_the_inverse(imbalance_factor):
  message = r'found (0|-|inf|nan).*inverse, such as 0\.01, give 1 / 0\.01 = 100'
  with pytest.raises(UserError, match=message):
    class_counts_lib.profile_counts(5000, 10, imbalance_factor, 'exp')


def test_empty_class_is_named_with_the_largest_factor():
  with pytest.raises(
    UserError, match='0 images for class 9 .*set data.imbalance_factor to 50 or less$'
  ):
    class_counts_lib.profile_counts(50, 10, 51, 'exp')
  with pytest.raises(UserError, match=r'0 images for class 5 '):
    class_counts_lib.profile_counts(50, 10, 51, 'step')
  for profile in ('exp', 'step'):
    assert class_counts_lib.profile_counts(50, 10, 50, profile)[-1] == 1


def test_unknown_profile():
  with pytest.raises(UserError, match=r"'exp' or 'step'; found 'pareto'"):
    class_counts_lib.profile_counts(50, 10, 2, 'pareto')


def test_class_counts():
  labels = np.array([2, 0, 2, 2], np.int32)
  counts = class_counts_lib.class_counts(labels, 4)
  assert counts.tolist() == [1, 0, 3, 0]
  assert class_counts_lib.class_counts(np.array([], np.int32), 2).tolist() == [0, 0]


@pytest.mark.parametrize('labels', [[0, 4], [-1, 0]])
def test_class_counts_refuses_labels_without_a_class(labels):
  with pytest.raises(UserError, match='labels from 0 to 3; found labels from'):
    class_counts_lib.class_counts(np.array(labels), 4)


def test_shot_groups_at_their_borders():
  groups = class_counts_lib.shot_groups(np.array([101, 100, 20, 19, 0, 5000]))
  assert {name: found.tolist() for name, found in groups.items()} == {
    'many': [0, 5],
    'medium': [1, 2],
    'few': [3, 4],
  }


def test_permutation_is_pinned():
  # A change here means other subsets, splits and batches than every run before it.
  assert random_draws.permutation((0, 'train', 0), 10).tolist() == [5, 6, 2, 7, 8, 9, 0, 4, 1, 3]
  found = random_draws.permutation((7, 'long tail', 3), 5000).astype('<i8').tobytes()
  assert (
    hashlib.sha256(found).hexdigest()
    == 'e9a89c530660b888de480f3ab19095920b68b2b7d58163a6835be45be6120940'
  )


def test_permutation_depends_on_every_word():
  words = [(0, 'a', 0), (1, 'a', 0), (0, 'b', 0), (0, 'a', 1), (0, 'a')]
  found = {random_draws.permutation(w, 50).tobytes() for w in words}
  assert len(found) == len(words)
  assert random_draws.permutation((np.int64(0), 'a', 0), 50).tobytes() in found


def test_permutation_is_one_and_looks_uniform():
  places = np.zeros((6, 6), np.int64)
  for seed in range(3000):
    order = random_draws.permutation((seed,), 6)
    assert sorted(order.tolist()) == list(range(6))
    places[np.arange(6), order] += 1
  assert abs(places / 500 - 1).max() < 0.2  # 0.2 is 4.9 standard deviations of a cell
  assert random_draws.permutation((0,), 0).tolist() == []


def test_draws_are_even_and_depend_on_the_words_alone():
  found = random_draws.draws(('a', 1), 6, 60_000)
  assert found.dtype == np.int64
  counts = np.bincount(found, minlength=6)
  assert len(counts) == 6
  assert np.abs(counts - 10_000).max() < 500  # five standard deviations
  np.testing.assert_array_equal(random_draws.draws(('a', 1), 6, 100), found[:100])
  assert (random_draws.draws(('a', 2), 6, 100) != found[:100]).any()
  pinned = random_draws.draws(('pinned', 0), 10, 8).tolist()
  assert pinned == [7, 0, 5, 8, 1, 1, 7, 9], 'other images are drawn now'


def test_inverse_frequency_weights_by_hand():
  # 1, 1/3, 1/6 of the rarest class's, sum 3
  found = class_counts_lib.class_weights('inverse', np.array([60, 30, 10]))
  np.testing.assert_allclose(found, np.array([1 / 6, 1 / 3, 1]) * 2, rtol=1e-12)


@pytest.mark.parametrize('beta', [0.5, 0.9, 0.999, 0.9999])
def test_effective_numbers_are_the_sum_of_powers(beta):
  counts = np.array([40, 7, 2, 1])
  effective = [sum(beta**i for i in range(n)) for n in counts]  # = (1 - beta^n) / (1 - beta)
  found = class_counts_lib.class_weights('effective', counts, beta)
  assert found.sum() == pytest.approx(4)
  np.testing.assert_allclose(found * effective, found[0] * effective[0], rtol=1e-9)


def test_the_ends_of_beta_are_equal_weights_and_inverse_frequency():
  counts = np.array([500, 20, 3])
  np.testing.assert_allclose(class_counts_lib.class_weights('effective', counts, 0.0), np.ones(3))
  found = class_counts_lib.class_weights('effective', counts, 1 - 1e-12)
  np.testing.assert_allclose(found, class_counts_lib.class_weights('inverse', counts), rtol=1e-6)


@pytest.mark.parametrize('name', class_counts_lib.WEIGHTS)
def test_weights_sum_to_the_number_of_classes(name):
  counts = class_counts_lib.profile_counts(5000, 10, 100, 'exp')
  weights = class_counts_lib.class_weights(name, counts)
  assert weights.sum() == pytest.approx(10)
  assert (np.diff(weights) >= 0).all()  # rarer classes weigh no less


def test_priors_sum_to_one():
  np.testing.assert_allclose(class_counts_lib.prior(np.array([3, 1])), [0.75, 0.25])
  with pytest.raises(UserError, match='at least 1 training image in every class; found none of cl'):
    class_counts_lib.prior(np.array([3, 0, 1]))


@pytest.mark.parametrize('beta', [-0.1, 1.0, 1.5, math.nan])
def test_a_beta_out_of_range(beta):
  with pytest.raises(UserError, match=r'0 <= beta < 1; found beta .*set --config\.loss\.beta'):
    class_counts_lib.class_weights('effective', np.array([2, 1]), beta)


def test_unknown_weights_list_the_known_ones():
  with pytest.raises(UserError, match=r"loss\.weights among none, inverse, effective; found 'x'"):
    class_counts_lib.class_weights('x', np.array([2, 1]))


def test_uniform_draws_are_uniform_and_depend_on_the_words_alone():
  draws = random_draws.uniforms((1, 'a'), 20_000)
  assert ((draws >= 0) & (draws < 1)).all()
  counts = np.histogram(draws, 20, (0, 1))[0]
  assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi-square, 19 degrees of freedom
  np.testing.assert_array_equal(random_draws.uniforms((1, 'a'), 7), draws[:7])
  assert (random_draws.uniforms((1, 'b'), 7) != draws[:7]).all()
