"""The long-tailed subset: its counts, what is nested in what, and disjoint subsets."""

import hashlib
import itertools

import numpy as np
import pytest

from csba_jax.data.class_counts import profile_counts
from csba_jax.data.long_tail import long_tail_subset
from csba_jax.errors import UserError


def test_subset_counts_follow_the_profile():
  labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 500))
  subset = long_tail_subset(labels, 10, 100, 'exp', 'index', 0)
  assert np.bincount(labels[subset]).tolist() == profile_counts(500, 10, 100, 'exp').tolist()
  assert subset.tolist() == sorted(set(subset.tolist()))


def test_subset_takes_what_there_is():
  labels = np.repeat(np.arange(4), [100, 20, 90, 80])
  subset = long_tail_subset(labels, 4, 8, 'exp', 'index', 0)
  assert np.bincount(labels[subset]).tolist() == [100, 20, 25, 12]  # the profile: 100 50 25 12


def test_subset_by_frequency_with_ties_by_index():
  labels = np.repeat(np.arange(4), [30, 90, 30, 60])
  subset = long_tail_subset(labels, 4, 27, 'exp', 'frequency', 0)
  assert np.bincount(labels[subset]).tolist() == [10, 90, 3, 30]  # order 1 3 0 2 of 90 30 10 3


@pytest.mark.parametrize('profile', ['exp', 'step'])
@pytest.mark.parametrize('class_order', ['index', 'frequency'])
def test_a_larger_factor_is_nested_in_a_smaller(profile, class_order):
  for seed in range(5):
    sizes = [40, 80, 120, 160, 200]
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(5), sizes))
    larger = None
    for factor in (1, 2, 5, 10, 20):
      found = set(long_tail_subset(labels, 5, factor, profile, class_order, seed).tolist())
      assert larger is None or found <= larger
      larger = found


def test_natural_keeps_all():
  labels = np.repeat(np.arange(5), 40)
  assert long_tail_subset(labels, 5, 1.0, 'natural', 'index', 0).tolist() == [*range(200)]


def test_natural_does_not_use_an_imbalance_factor():
  with pytest.raises(
    UserError, match=r"found imbalance_factor 10; .*set data.profile to 'exp' or 'step'"
  ):
    long_tail_subset(np.array([0, 1]), 2, 10, 'natural', 'index', 0)


def test_unknown_profile_and_order():
  with pytest.raises(UserError, match="found 'zipf'"):
    long_tail_subset(np.array([0, 1]), 2, 10, 'zipf', 'index', 0)
  with pytest.raises(UserError, match="'index' or 'frequency'; found 'random'"):
    long_tail_subset(np.array([0, 1]), 2, 10, 'exp', 'random', 0)


def test_factor_that_empties_a_class():
  with pytest.raises(
    UserError, match=r'0 images for class 1 .*set data.imbalance_factor to 3 or less$'
  ):
    long_tail_subset(np.array([0, 0, 0, 1]), 2, 10, 'exp', 'index', 0)


def test_subset_is_pinned():
  # A change here means a long-tailed set that no earlier result was measured on.
  labels = np.tile(np.arange(10, dtype=np.int32), 5000)
  subset = long_tail_subset(labels, 10, 100, 'exp', 'index', 0)
  assert (
    hashlib.sha256(subset.astype('<i8').tobytes()).hexdigest()
    == '120ef13fa15226e3073200c70243ab41521f59e3ed5b7be92a2a58577a8dccae'
  )


# ---- a smaller largest class


@pytest.mark.parametrize(('profile', 'class_order'), [('exp', 'index'), ('step', 'frequency')])
def test_the_largest_class_is_cut_and_the_profile_with_it(profile, class_order):
  labels = np.random.default_rng(0).permutation(np.repeat(np.arange(6), 300))
  found = long_tail_subset(labels, 6, 10, profile, class_order, 3, 120)
  assert np.bincount(labels[found]).tolist() == profile_counts(120, 6, 10, profile).tolist()
  whole = long_tail_subset(labels, 6, 10, profile, class_order, 3)
  assert set(found.tolist()) < set(whole.tolist())  # the same permutations
  np.testing.assert_array_equal(
    whole, long_tail_subset(labels, 6, 10, profile, class_order, 3, 300)
  )


def test_a_largest_class_that_is_not_there():
  with pytest.raises(UserError) as error:
    long_tail_subset(np.repeat([0, 1], [30, 50]), 2, 2, 'exp', 'index', 0, 31)
  assert str(error.value) == (
    'expected data.largest_class of at most 30: images of the first class; found 31; '
    'to fix it: set a smaller data.largest_class'
  )


# ---- disjoint subsets


@pytest.mark.parametrize(('subsets', 'largest'), [(2, 0), (5, 0), (7, 20), (20, 15)])
def test_disjoint_subsets_have_no_image_in_common_and_the_counts_of_the_profile(subsets, largest):
  labels = np.random.default_rng(1).permutation(np.repeat(np.arange(4), 300))
  found = [
    long_tail_subset(labels, 4, 5, 'exp', 'index', seed, largest, subsets)
    for seed in range(subsets)
  ]
  wanted = profile_counts(largest or 300 // subsets, 4, 5, 'exp').tolist()
  assert all(np.bincount(labels[subset]).tolist() == wanted for subset in found)
  for a, b in itertools.combinations(found, 2):
    assert not set(a.tolist()) & set(b.tolist())


def test_disjoint_subsets_can_take_every_image_of_the_largest_class():
  labels = np.tile(np.arange(3), 100)
  found = [long_tail_subset(labels, 3, 4, 'exp', 'index', s, 20, 5) for s in range(5)]
  taken = np.sort(np.concatenate(found))
  np.testing.assert_array_equal(taken[labels[taken] == 0], np.flatnonzero(labels == 0))


def test_disjoint_subsets_stay_nested_in_the_factor_and_disjoint_across_factors():
  labels = np.random.default_rng(2).permutation(np.repeat(np.arange(3), [90, 60, 60]))
  small, large = (
    [set(long_tail_subset(labels, 3, f, 'exp', 'frequency', s, 0, 3).tolist()) for s in range(3)]
    for f in (10, 2)
  )
  assert all(a < b for a, b in zip(small, large, strict=True))
  assert not any(small[i] & large[j] for i, j in itertools.permutations(range(3), 2))


def test_disjoint_subsets_are_drawn_and_not_taken_in_order():
  labels = np.repeat(np.arange(2), 1000)
  found = long_tail_subset(labels, 2, 1, 'exp', 'index', 0, 100, 10)
  head = found[labels[found] == 0]
  assert 400 < head.mean() < 600  # 499.5 on average, with a standard error of 27
  assert len(np.unique(head // 100)) == 10


@pytest.mark.parametrize('seed', [3, -1, 100])
def test_a_seed_that_is_none_of_the_subsets(seed):
  with pytest.raises(UserError) as error:
    long_tail_subset(np.repeat([0, 1], 30), 2, 2, 'exp', 'index', seed, 0, 3)
  assert str(error.value) == (
    f'expected a seed from 0 to 2 with 3 disjoint subsets; found {seed}; '
    'to fix it: set data.seed, or more data.disjoint_subsets'
  )


def test_a_class_with_fewer_images_than_subsets():
  labels = np.repeat([0, 1, 2], [100, 40, 4])
  assert len(long_tail_subset(labels, 3, 5, 'exp', 'index', 3, 0, 4)) > 0
  with pytest.raises(UserError) as error:
    long_tail_subset(labels, 3, 5, 'exp', 'index', 0, 0, 5)
  assert str(error.value) == (
    'expected an image of every class for each of 5 disjoint subsets; found 4 images of class 2, '
    'counted from 0; to fix it: set a smaller data.disjoint_subsets'
  )


@pytest.mark.parametrize(('subsets', 'largest', 'most', 'found'), [(4, 8, 7, 8), (15, 3, 2, 3)])
def test_more_subsets_than_there_are_images_for(subsets, largest, most, found):
  with pytest.raises(UserError) as error:
    long_tail_subset(np.repeat([0, 1], 30), 2, 2, 'exp', 'index', 0, largest, subsets)
  assert str(error.value) == (
    f'expected data.largest_class of at most {most}: images of the first class, for each of '
    f'{subsets} disjoint subsets; found {found}; to fix it: set a smaller '
    'data.largest_class, or fewer data.disjoint_subsets'
  )


@pytest.mark.parametrize(('largest', 'subsets'), [(5, 0), (0, 2), (5, 2)])
def test_natural_is_neither_cut_nor_shared_out(largest, subsets):
  with pytest.raises(UserError) as error:
    long_tail_subset(np.repeat([0, 1], 30), 2, 1, 'natural', 'index', 0, largest, subsets)
  assert str(error.value) == (
    "expected largest_class 0 and disjoint_subsets 0 with profile 'natural', which keeps every "
    f"image; found {largest} and {subsets}; to fix it: set data.profile to 'exp' or 'step', or "
    'both to 0'
  )


def test_disjoint_subset_is_pinned():
  # A change here means a subset that no earlier result was measured on.
  labels = np.tile(np.arange(10, dtype=np.int32), 5000)
  subset = long_tail_subset(labels, 10, 20, 'exp', 'index', 7, 500, 10)
  found = hashlib.sha256(subset.astype('<i8').tobytes()).hexdigest()
  assert found.startswith('bc15dc5ea357')
