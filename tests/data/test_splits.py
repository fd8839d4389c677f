"""Splits: stratified, nested, duplicates together, the same everywhere, safe on disk."""

import dataclasses
import hashlib
import os
import pickle

import numpy as np
import pytest

from csba_jax.data import splits
from csba_jax.data.class_counts import profile_counts
from csba_jax.data.folds import cross_validation_folds
from csba_jax.errors import UserError

NAMES = ('bird', 'clean', 'dust')


def random_labels(seed, n=200, num_classes=5):
  """Imbalanced labels in random order; every class occurs."""
  rng = np.random.default_rng(seed)
  labels = rng.choice(num_classes, n, p=np.arange(1, num_classes + 1) / sum(range(num_classes + 1)))
  labels[:num_classes] = np.arange(num_classes)
  return labels.astype(np.int32)


def make(labels, groups=None, test_labels=None, **changes):
  """make_splits with defaults for the arguments that a test does not need."""
  arguments = {
    'class_names': tuple(f'class {c}' for c in range(int(max(labels)) + 1)),
    'imbalance_factor': 1.0,
    'profile': 'natural',
    'class_order': 'index',
    'val_fraction': 0.1,
    'test_fraction': 0.2,
    'seed': 0,
  }
  return splits.make_splits(labels, groups, test_labels, **(arguments | changes))


# ---- stratified_split


@pytest.mark.parametrize('fraction', [0.01, 0.1, 0.25, 0.5, 0.9])
def test_stratified_counts_are_rounded_class_by_class(fraction):
  for seed in range(5):
    labels = random_labels(seed)
    kept, held = splits.stratified_split(labels, fraction, seed)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    assert kept.tolist() == sorted(kept)
    assert held.tolist() == sorted(held)
    assert kept.dtype == held.dtype == np.int64
    for c in range(5):
      n = int((labels == c).sum())
      wanted = int(fraction * n + 0.5)
      expected = min(max(wanted, 1), n - 1)
      assert (labels[held] == c).sum() == expected


def test_stratified_split_does_not_take_the_last_image():
  kept, held = splits.stratified_split(np.array([0, 1, 1, 2, 2, 2]), 0.9, 0)
  assert np.bincount(np.array([0, 1, 1, 2, 2, 2])[kept]).tolist() == [1, 1, 1]
  assert len(held) == 3


def test_stratified_split_with_a_class_absent():
  kept, held = splits.stratified_split(np.array([0, 0, 3, 3]), 0.5, 0)
  assert len(kept) == len(held) == 2


def test_nothing_is_held_at_fraction_zero():
  kept, held = splits.stratified_split(np.array([0, 0, 1]), 0.0, 0)
  assert kept.tolist() == [0, 1, 2]
  assert held.tolist() == []
  assert held.dtype == np.int64
  assert splits.stratified_split(np.array([], np.int32), 0.5, 0)[0].tolist() == []


def test_groups_of_one_are_no_groups():
  for seed in range(5):
    labels = random_labels(seed)
    alone = np.random.default_rng(seed).permutation(len(labels)) * 7
    plain = splits.stratified_split(labels, 0.2, seed)
    assert [p.tolist() for p in plain] == [
      p.tolist() for p in splits.stratified_split(labels, 0.2, seed, alone)
    ]


def test_groups_are_never_taken_apart_and_every_class_is_kept():
  for seed in range(60):
    rng = np.random.default_rng(seed)
    labels = random_labels(seed, n=60)
    groups = rng.integers(0, rng.integers(2, 60), len(labels))  # they cross classes freely
    kept, held = splits.stratified_split(labels, rng.choice([0.1, 0.3, 0.6]), seed, groups)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    assert not set(groups[kept]) & set(groups[held])
    assert set(labels[kept]) == set(labels)


def test_groups_inside_classes_stay_close_to_stratified():
  for seed in range(60):
    rng = np.random.default_rng(seed)
    labels, fraction = random_labels(seed), rng.choice([0.1, 0.3, 0.6])
    groups = labels * 1000 + rng.integers(0, 30, len(labels))
    _, held = splits.stratified_split(labels, fraction, seed, groups)
    for c in range(5):
      n = (labels == c).sum()
      sizes = np.unique(groups[labels == c], return_counts=True)[1]
      wanted = min(max(int(fraction * n + 0.5), 1), n - 1)
      found = (labels[held] == c).sum()
      assert abs(found - wanted) < sizes.max()
      assert found >= 1 or len(sizes) == 1


def test_a_class_of_large_groups_still_gives_its_smallest():
  labels, groups = np.zeros(12, np.int32), np.repeat([0, 1, 2], [5, 3, 4])
  _, held = splits.stratified_split(labels, 0.1, 0, groups)
  assert set(groups[held]) == {1}


def test_a_group_that_crosses_classes_counts_in_both():
  labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
  groups = np.array([9, 0, 1, 2, 9, 3, 4, 5])
  for seed in range(20):
    _, held = splits.stratified_split(labels, 0.25, seed, groups)
    assert np.bincount(labels[held], minlength=2).tolist() == [1, 1]
    assert (0 in held) == (4 in held)


def test_a_class_of_one_group_is_kept_whole():
  labels, groups = np.array([0, 0, 0, 1, 1]), np.array([8, 8, 8, 1, 2])
  _, held = splits.stratified_split(labels, 0.4, 0, groups)
  assert labels[held].tolist() == [1]


def test_every_image_is_held_about_as_often():
  labels = np.repeat([0, 1], [20, 10])
  held = np.concatenate([splits.stratified_split(labels, 0.2, seed)[1] for seed in range(1000)])
  assert abs(np.bincount(held, minlength=30) / 200 - 1).max() < 0.3


@pytest.mark.parametrize('fraction', [-0.1, 1.0, 1.5, float('nan')])
def test_a_fraction_out_of_range(fraction):
  with pytest.raises(UserError, match=r'fraction in \[0, 1\); found'):
    splits.stratified_split(np.array([0, 1]), fraction, 0)


# ---- cross_validation_folds


def folds_of(labels, folds, seed=0, groups=None):
  names = tuple(f'class {c}' for c in range(int(max(labels)) + 1))
  return cross_validation_folds(labels, folds, seed, groups, names)


@pytest.mark.parametrize('folds', [2, 3, 5])
def test_folds_are_stratified_to_one_image(folds):
  for seed in range(5):
    labels = random_labels(seed, n=203)
    at = folds_of(labels, folds, seed)
    assert at.shape == labels.shape
    assert at.dtype == np.int64
    assert set(at) == set(range(folds))
    for c in range(5):
      held = np.bincount(at[labels == c], minlength=folds)
      assert held.max() - held.min() <= 1


def test_folds_are_drawn_by_the_seed_alone():
  labels = random_labels(0)
  groups = np.arange(200) // 2
  for of in (None, groups):
    repeats = [folds_of(labels, 5, seed, of).tolist() for seed in (0, 0, 1, 2)]
    assert repeats[0] == repeats[1]
    assert len({tuple(repeat) for repeat in repeats}) == 3


@pytest.mark.parametrize('folds', [2, 5])
def test_folds_keep_groups_together_and_stay_near_stratified(folds):
  for seed in range(10):
    rng = np.random.default_rng(seed)
    labels = random_labels(seed, n=400)
    groups = labels * 1000 + rng.integers(0, 150, len(labels))
    at = folds_of(labels, folds, seed, groups)
    assert set(at) == set(range(folds))
    for group in np.unique(groups):
      assert len(set(at[groups == group])) == 1
    for c in range(5):
      held, largest = np.bincount(at[labels == c], minlength=folds), np.bincount(groups).max()
      assert held.max() - held.min() <= 2 * largest + 1


def test_groups_that_cross_classes_stay_in_one_fold():
  labels = random_labels(1)
  groups = np.random.default_rng(1).integers(0, 90, 200)
  at = folds_of(labels, 4, 0, groups)
  assert all(len(set(at[groups == group])) == 1 for group in np.unique(groups))


@pytest.mark.parametrize('smallest', [2, 4])
def test_a_class_with_fewer_images_than_folds(smallest):
  labels = np.repeat([0, 1], [20, smallest])
  names = ('clean', 'dust')
  for groups in (None, np.arange(len(labels))):
    with pytest.raises(UserError) as error:
      cross_validation_folds(labels, 5, 0, groups, names)
    assert str(error.value) == (
      f'expected at least as many images of every class as data.folds = 5; found {smallest} of '
      f'dust; to fix it: set data.folds to {smallest} or fewer'
    )
    assert {*range(smallest)} == set(folds_of(labels, smallest, 0, groups))


@pytest.mark.parametrize(
  ('images', 'groups', 'found'),
  [
    (1, None, '1 of dust'),
    (1, [99], '1 of dust in 1 group'),
    (6, [99] * 6, '6 of dust in 1 group'),
  ],
)
def test_a_class_that_cannot_be_both_tested_and_trained_on(images, groups, found):
  labels = np.repeat([0, 1], [20, images])
  groups = groups and np.array([*range(20), *groups])
  arguments = {'class_names': ('clean', 'dust'), 'val_fraction': 0.0}
  for fold in range(3):
    with pytest.raises(UserError) as error:
      make(labels, groups, folds=3, fold=fold, **arguments)
    assert f'found {found}; to fix it: set data.folds to 0, which leaves dust un' in str(
      error.value
    )
  made = make(labels, groups, **arguments)  # what the message says
  assert made.class_counts[1] == images
  (line,) = splits.absences(made, labels, groups, class_names=('clean', 'dust'))
  assert line.startswith('no test image of dust: macro-F1 is the mean of the other classes; add')


def test_more_folds_than_groups():
  labels, groups = np.tile([0, 1, 2], 12), np.repeat([7, 8, 8], 12)
  with pytest.raises(UserError) as error:
    folds_of(labels, 5, 0, groups)
  assert str(error.value) == (
    'expected at least as many groups that stay together as data.folds = 5; found 2; '
    'to fix it: set data.folds to 2 or fewer'
  )
  assert set(folds_of(labels, 2, 0, groups)) == {0, 1}


def test_a_fold_that_gets_no_group():
  counts = [1, 2, 3, 4, 2]
  labels, groups = np.repeat([0, 0, 0, 1, 1], counts), np.repeat([0, 2, 3, 1, 3], counts)
  with pytest.raises(
    UserError, match=r'for data.folds = 4 test parts; found groups for 3; .* to 2'
  ):
    folds_of(labels, 4, 0, groups)
  assert set(folds_of(labels, 2, 0, groups)) == {0, 1}


@pytest.mark.seconds
def test_advice_on_folds_is_not_refused_in_its_turn():
  seen = set()
  for seed in range(300):
    rng = np.random.default_rng(seed)
    labels = random_labels(seed, n=int(rng.integers(8, 40)), num_classes=3)
    groups = rng.integers(0, rng.integers(2, 20), len(labels))
    folds = int(rng.integers(3, 8))
    while True:
      try:
        for fold in range(folds):
          make(labels, groups, folds=folds, fold=fold)
        break
      except UserError as error:
        seen.add(error.expected.split(' data.folds')[0])
        do = error.do
      if do.startswith('set data.folds to 0'):
        make(labels, groups)
        break
      if not do.startswith('set data.folds'):  # an image of another group: what the text says
        labels, groups = np.append(labels, [0, 1, 2]), np.append(groups, 99 + np.arange(3))
        continue
      fewer = int(do.split()[3])
      assert 2 <= fewer < folds
      folds = fewer
  assert len(seen) >= 3


def test_every_image_is_tested_once_in_a_cross_validation():
  labels = random_labels(2, n=300)
  groups = np.random.default_rng(2).integers(0, 200, 300)
  for of in (None, groups):
    parts = [make(labels, of, folds=5, fold=fold, seed=7) for fold in range(5)]
    tests = np.concatenate([part.test for part in parts])
    assert sorted(tests.tolist()) == list(range(300))
    for fold, part in enumerate(parts):
      assert part.test.tolist() == np.flatnonzero(folds_of(labels, 5, 7, of) == fold).tolist()
      assert sorted([*part.train, *part.val, *part.test]) == list(range(300))
      assert part.test.dtype == np.int64
      assert not part.test_is_separate
      if of is not None:
        assert not set(of[part.test]) & set(of[np.concatenate([part.train, part.val])])


def test_folds_take_the_place_of_the_test_fraction_and_are_never_cut():
  labels = random_labels(3, n=400)
  plain = make(labels, folds=4, fold=1)
  assert plain.test.tolist() == make(labels, folds=4, fold=1, test_fraction=0.9).test.tolist()
  cut = make(labels, folds=4, fold=1, imbalance_factor=8, profile='exp', class_order='frequency')
  assert cut.test.tolist() == plain.test.tolist()
  assert len(cut.train) < len(plain.train)


def test_folds_beside_a_separate_test_set():
  with pytest.raises(
    UserError,
    match=r'data\.folds only for a source without .*; found 5 folds and a separate .* to 0',
  ):
    make(random_labels(0), test_labels=np.arange(5), folds=5)


# ---- make_splits


def test_parts_are_disjoint_and_complete():
  for seed in range(10):
    labels = random_labels(seed, n=400)
    found = make(labels, seed=seed)
    assert sorted([*found.train, *found.val, *found.test]) == list(range(400))
    assert not found.test_is_separate
    assert found.class_counts.tolist() == np.bincount(labels[found.train]).tolist()


def test_parts_keep_groups_together():
  for seed in range(20):
    labels = random_labels(seed, n=300)
    groups = np.random.default_rng(seed).integers(0, 200, 300)
    found = make(labels, groups, seed=seed, profile='exp', class_order='frequency')
    sides = [set(groups[part]) for part in (found.train, found.val, found.test)]
    assert sum(map(len, sides)) == len(set.union(*sides))


def test_the_test_part_does_not_depend_on_the_imbalance():
  labels = random_labels(3, n=400)
  arguments = {'profile': 'exp', 'class_order': 'frequency'}
  parts = [make(labels, imbalance_factor=f, **arguments) for f in (1, 10)]
  assert parts[0].test.tolist() == parts[1].test.tolist()
  assert np.bincount(labels[parts[0].test]).tolist() == [
    max(int(0.2 * n + 0.5), 1) for n in np.bincount(labels)
  ]


def test_a_separate_test_set_is_used_whole():
  labels = np.repeat(np.arange(10), 50)
  found = make(labels, test_labels=np.arange(10), imbalance_factor=10, profile='exp')
  assert found.test_is_separate
  assert found.test.tolist() == list(range(10))
  counts = profile_counts(50, 10, 10, 'exp')
  held = np.maximum((0.1 * counts + 0.5).astype(int), 1)
  assert found.class_counts.tolist() == (counts - held).tolist()
  assert np.bincount(labels[found.val]).tolist() == held.tolist()


def test_disjoint_subsets_share_no_image_with_each_other_and_the_test_part_is_the_same():
  labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 100))
  changes = {'profile': 'exp', 'imbalance_factor': 5.0, 'largest_class': 30, 'disjoint_subsets': 3}
  found = [
    make(labels, test_labels=np.tile(np.arange(4), 5), class_names=tuple('abcd'), seed=s, **changes)
    for s in range(3)
  ]
  kept = [np.concatenate([split.train, split.val]) for split in found]
  assert len(np.unique(np.concatenate(kept))) == sum(len(part) for part in kept)
  for part, split in zip(kept, found, strict=True):
    assert np.bincount(labels[part]).tolist() == profile_counts(30, 4, 5, 'exp').tolist()
    assert split.test.tolist() == [*range(20)]


@pytest.mark.parametrize('fields', [{}, {'folds': 2}, {'part_of': ['train'] * 170 + ['val'] * 30}])
def test_disjoint_subsets_beside_a_test_part_that_is_drawn(fields):
  with pytest.raises(UserError) as error:
    make(random_labels(0), profile='exp', disjoint_subsets=2, **fields)
  assert str(error.value) == (
    'expected a test part of its own with data.disjoint_subsets: one that is drawn has images of '
    'other subsets; found data.test_fraction or data.folds; to fix it: set '
    '--config.data.disjoint_subsets=0, or use data with a test part'
  )


def test_no_validation_part():
  found = make(random_labels(0), val_fraction=0.0)
  assert found.val.tolist() == []
  assert found.classes_without_val == ()


def test_classes_without_a_validation_image_are_told():
  labels = np.repeat([0, 1, 2], [20, 1, 20])
  found = make(labels, test_labels=np.arange(3))
  assert splits.absences(found, labels, None, np.arange(3), class_names=NAMES) == [
    'no validation image of clean: the best checkpoint is chosen without it; add images of it'
  ]
  assert found.classes_without_val == (1,)
  assert found.class_counts.tolist() == [18, 1, 18]


def test_seed_changes_every_part():
  labels = random_labels(0, n=400)
  a, b = make(labels, seed=0), make(labels, seed=1)
  for part in ('train', 'val', 'test'):
    assert getattr(a, part).tolist() != getattr(b, part).tolist()
  assert a.sha256 != b.sha256


def test_numpy_seed_is_an_int():
  labels = random_labels(0)
  assert make(labels, seed=np.int64(3)).sha256 == make(labels, seed=3).sha256


@pytest.mark.parametrize('field', ['val_fraction', 'test_fraction'])
@pytest.mark.parametrize('value', [-0.1, 1.0])
def test_fractions_out_of_range_are_named(field, value):
  with pytest.raises(UserError, match=rf'data\.{field} in \[0, 1\); found {value}'):
    make(random_labels(0), **{field: value})


def test_no_test_images():
  with pytest.raises(UserError, match=r'test images; found none .*data\.test_fraction above 0'):
    make(random_labels(0), test_fraction=0.0)
  one_group = np.zeros(200, int)
  with pytest.raises(UserError, match=r'none: every class has one .*correct the groups in'):
    make(random_labels(0), one_group)


def test_parts_without_a_class_are_told_with_what_to_do():
  labels, groups = np.repeat([0, 1, 2], 12), np.array([*range(24), *[99] * 12])
  described = {'class_names': NAMES}
  assert splits.absences(make(labels, groups), labels, groups, **described) == [
    'no test image of dust: macro-F1 is the mean of the other classes; add images of it that no '
    'group holds together with its others',
    'no validation image of dust: the best checkpoint is chosen without it; add images of it that '
    'no group holds together with its others',
  ]
  found = make(labels, test_labels=np.array([0, 1]))
  assert splits.absences(found, labels, None, np.array([0, 1]), **described) == [
    'no test image of dust: macro-F1 is the mean of the other classes; add images of it to the '
    'test set'
  ]
  groups[-5:] = 100  # two groups for three folds
  lines = [
    splits.absences(
      make(labels, groups, folds=3, fold=fold, val_fraction=0.0),
      *(labels, groups),
      folds=3,
      **described,
    )
    for fold in range(3)
  ]
  (line,) = (line for of_fold in lines for line in of_fold)
  assert line.endswith('together with its others, or set data.folds to 2 or fewer')
  assert splits.absences(make(labels), labels, **described) == []


def test_a_line_does_not_name_hundreds_of_classes():
  labels, names = np.arange(300) % 100, tuple(f'class {c}' for c in range(100))
  found = make(labels, test_labels=np.array([5]))
  (line,) = splits.absences(found, labels, None, np.array([5]), class_names=names)
  assert line.startswith('no test image of class 0, class 1, ')
  assert ', class 8 and 91 more: macro' in line


def test_groups_are_moved_so_that_validation_has_every_class_too():
  # the test part takes the groups of 2 and of 1 images, and only one group is left
  labels = np.array([*[0] * 30, *[1] * 13])
  groups = np.array([*range(30), *[90] * 10, *[91] * 2, 92])
  for seed in range(20):
    found = make(labels, groups, seed=seed)
    assert splits.absences(found, labels, groups, class_names=NAMES[:2]) == []
    sides = [set(groups[part]) for part in (found.train, found.val, found.test)]
    assert sum(map(len, sides)) == len(set(groups))
    assert sorted([*found.train, *found.val, *found.test]) == [*range(43)]
    assert found.class_counts.tolist() == np.bincount(labels[found.train]).tolist()


def test_a_class_without_training_images_is_named():
  with pytest.raises(UserError, match=r'of every class in the training set; found none of dust'):
    make(np.array([0, 0, 0, 1, 1, 1]), class_names=NAMES)


def test_a_class_without_any_images_is_named_before_the_profile_trips_over_it():
  arguments = {'class_names': NAMES, 'profile': 'exp', 'imbalance_factor': 2.0}
  with pytest.raises(UserError, match=r'every class in the training set; found none of bird'):
    make(np.repeat([1, 2], 10), **arguments)


def test_a_factor_that_the_data_cannot_give():
  with pytest.raises(UserError, match='set data.imbalance_factor to 8 or less'):
    make(np.repeat([0, 1], 10), profile='exp', imbalance_factor=20)


def test_splits_are_pinned():
  labels = np.tile(np.arange(10, dtype=np.int32), 5000)
  found = make(labels, test_labels=labels[:10000], profile='exp', imbalance_factor=100.0)
  assert found.class_counts.tolist() == [4500, 2697, 1616, 969, 580, 348, 209, 125, 75, 45]
  assert found.sha256 == '93ebe9a3d40ff22849b2f9fc99766b3da2129016019d894ed488df1a0c54d3ad'


def test_splits_of_the_photos_respect_their_duplicates(photo_folder):
  from csba_jax.data.image_folder import ImageFolderSource

  manifest = os.path.join(photo_folder, 'manifest.csv')
  photos = ImageFolderSource(photo_folder, 64, manifest=manifest, group_column='dup_group')
  crossing = sum(len(set(photos.labels[photos.groups == g])) > 1 for g in np.unique(photos.groups))
  assert crossing == 3
  for seed in range(5):
    found = make(photos.labels, photos.groups, seed=seed, class_names=photos.class_names)
    sides = [set(photos.groups[part]) for part in (found.train, found.val, found.test)]
    assert sum(map(len, sides)) == len(set(photos.groups))
    wanted = np.floor(0.2 * np.bincount(photos.labels) + 0.5)
    assert abs(np.bincount(photos.labels[found.test]) - wanted).max() <= 1
    assert found.classes_without_val == ()


@pytest.mark.seconds
def test_committed_studies_keep_their_splits(photo_folder):
  import json
  from pathlib import Path

  from csba_jax.data.image_folder import ImageFolderSource

  path = Path(__file__).parents[2] / 'results/solar/results.jsonl'
  records = [json.loads(line) for line in path.read_text('utf-8').splitlines()]
  manifest = os.path.join(photo_folder, 'manifest.csv')
  photos = ImageFolderSource(photo_folder, 48, manifest=manifest, group_column='dup_group')
  fields = ('imbalance_factor', 'profile', 'class_order', 'val_fraction', 'test_fraction', 'seed')
  found = {}
  for record in records:
    data = record['config']['data']
    key = (bool(data['manifest']), data['folds'], data['fold'], *(data[field] for field in fields))
    if key not in found:
      chosen = dict(zip(fields, key[3:], strict=True)) | {'folds': key[1], 'fold': key[2]}
      groups = photos.groups if key[0] else None
      made = make(photos.labels, groups, class_names=photos.class_names, **chosen)
      found[key] = made.sha256
    assert record['result']['splits_sha256'] == found[key]
  assert len(found) == 30


# ---- sha256, save, load


def test_sha256_is_over_little_endian_lengths_and_indices():
  found = make(np.repeat([0, 1], 10))
  data = b''
  for part in (found.train, found.val, found.test):
    data += len(part).to_bytes(8, 'little')
    data += b''.join(int(i).to_bytes(8, 'little') for i in part)
  assert found.sha256 == hashlib.sha256(data).hexdigest()
  big_endian = dataclasses.replace(found, train=found.train.astype('>i4'))
  assert big_endian.sha256 == found.sha256


def test_sha256_tells_where_a_part_ends():
  found = make(np.repeat([0, 1], 10))
  moved = dataclasses.replace(
    found, train=np.r_[found.train, found.val[:1]], val=np.r_[found.val[1:]]
  )
  assert moved.sha256 != found.sha256


def test_save_and_load(tmp_path):
  found = make(np.repeat([0, 1, 2], [20, 1, 20]), test_labels=np.arange(3))
  path = tmp_path / 'splits.npz'
  found.save(path)
  found.save(path)  # over itself
  again = splits.Splits.load(path)
  assert [p.name for p in tmp_path.iterdir()] == ['splits.npz']
  for field in dataclasses.fields(found):
    np.testing.assert_array_equal(getattr(again, field.name), getattr(found, field.name))
    assert type(getattr(again, field.name)) is type(getattr(found, field.name))
  assert again.sha256 == found.sha256


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
  old, new = make(np.repeat([0, 1], 10)), make(np.repeat([0, 1], 10), seed=1)
  path = tmp_path / 'splits.npz'
  old.save(path)

  def full_disk(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full_disk)
  with pytest.raises(OSError, match='No space'):
    new.save(path)
  assert [p.name for p in tmp_path.iterdir()] == ['splits.npz']
  assert splits.Splits.load(path).sha256 == old.sha256


@pytest.mark.parametrize('keep', [0, 1, 100, -1, -30])
def test_a_truncated_file(tmp_path, keep):
  path = tmp_path / 'splits.npz'
  make(np.repeat([0, 1], 10)).save(path)
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(UserError, match=r'Splits\.save wrote at .*splits\.npz; .* to split again'):
    splits.Splits.load(path)


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path):
  path = tmp_path / 'splits.npz'
  found = make(np.repeat([0, 1], 4), test_fraction=0.3)
  found.save(path)
  whole = path.read_bytes()
  for at in range(0, len(whole), 23):
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    try:
      again = splits.Splits.load(path)
    except UserError:
      continue
    assert again.sha256 == found.sha256  # a byte of zip bookkeeping, such as a time stamp


def test_indices_that_do_not_have_their_sha256(tmp_path):
  path = tmp_path / 'splits.npz'
  make(np.repeat([0, 1], 10)).save(path)
  with np.load(path) as arrays:
    changed = dict(arrays) | {'train': np.arange(3)}
  np.savez(path, **changed)
  with pytest.raises(UserError, match=r'found indices with sha256 .*, saved as '):
    splits.Splits.load(path)


def test_content_sums_are_kept_and_fit(tmp_path):
  path, found = tmp_path / 'splits.npz', make(np.repeat([0, 1], 10))
  found.save(path)
  assert splits.Splits.load(path).content is None  # as in files of older versions
  content = np.arange(20, dtype=np.uint64) << 59
  dataclasses.replace(found, content=content).save(path)
  again = splits.Splits.load(path)
  assert again.content.tolist() == content.tolist()
  sum_of_bytes = hashlib.sha256(b''.join(int(x).to_bytes(8, 'little') for x in content))
  assert again.content_sha256 == sum_of_bytes.hexdigest()
  assert found.content_sha256 == ''
  assert again.members.tolist() == [*found.train, *found.val, *found.test]
  for wrong in (content[1:], content[:, None]):
    dataclasses.replace(found, content=wrong).save(path)
    with pytest.raises(UserError, match=r'found content sums \(.*\) and an image 19'):
      splits.Splits.load(path)
  separate = make(np.repeat([0, 1], 10), test_labels=np.array([0, 1, 1]))
  dataclasses.replace(separate, content=np.arange(23, dtype=np.uint64)).save(path)
  assert splits.Splits.load(path).members[-3:].tolist() == [20, 21, 22]


def test_a_missing_file_and_a_pickle(tmp_path):
  with pytest.raises(UserError, match=r'found FileNotFoundError.*correct the path'):
    splits.Splits.load(tmp_path / 'splits.npz')
  (tmp_path / 'splits.npz').write_bytes(pickle.dumps({'train': [1]}))
  with pytest.raises(UserError, match='found '):
    splits.Splits.load(tmp_path / 'splits.npz')


# ---- parts that the source gives


def given_parts(n, shares, seed=0):
  """A part for each of n images."""
  return tuple(
    np.random.default_rng(seed).choice(list(shares), n, p=list(shares.values())).tolist()
  )


def at(part_of, part):
  return np.flatnonzero(np.asarray(part_of) == part).tolist()


def test_images_stay_in_the_parts_that_are_given():
  labels = np.tile(np.arange(5), 40).astype(np.int32)
  part_of = given_parts(200, {'train': 0.6, 'val': 0.2, 'test': 0.2})
  found = make(labels, part_of=part_of)
  assert found.train.tolist() == at(part_of, 'train')
  assert found.val.tolist() == at(part_of, 'val')
  assert found.test.tolist() == at(part_of, 'test')
  assert not found.test_is_separate
  groups = np.zeros(200, np.int64)  # copies that the folder has put into several parts
  assert make(labels, groups, part_of=part_of).sha256 == found.sha256


@pytest.mark.parametrize('lacking', ['val', 'test', 'both'])
def test_a_part_that_is_not_there_is_taken_from_the_training_part(lacking):
  labels, groups = random_labels(1), np.arange(200) // 2
  shares = {'val': {'train': 0.8, 'test': 0.2}, 'test': {'train': 0.8, 'val': 0.2}}
  part_of = given_parts(200, shares.get(lacking, {'train': 1.0}))
  found = make(labels, groups, part_of=part_of)
  together = np.sort(np.concatenate([found.train, found.val, found.test])).tolist()
  assert together == list(range(200))
  given = at(part_of, 'train')
  rest = np.asarray(given)
  if lacking in ('test', 'both'):
    kept, held = splits.stratified_split(labels[rest], 0.2, 0, groups[rest])
    assert found.test.tolist() == rest[held].tolist()
    rest = rest[kept]
  else:
    assert found.test.tolist() == at(part_of, 'test')
  if lacking in ('val', 'both'):
    kept, held = splits.stratified_split(labels[rest], 0.1, 0, groups[rest])
    assert found.val.tolist() == rest[held].tolist()
    rest = rest[kept]
  else:
    assert found.val.tolist() == at(part_of, 'val')
  assert found.train.tolist() == rest.tolist()


def test_the_training_part_alone_is_cut_to_a_long_tail():
  labels = np.tile(np.arange(4), 100).astype(np.int32)
  part_of = ('train',) * 200 + ('val',) * 100 + ('test',) * 100
  found = make(labels, part_of=part_of, profile='exp', imbalance_factor=10.0)
  assert found.class_counts.tolist() == profile_counts(50, 4, 10.0, 'exp').tolist()
  assert (len(found.val), len(found.test)) == (100, 100)


def test_classes_that_a_given_part_lacks():
  labels = np.asarray([0, 1, 2, 0, 1, 0, 1, 2], np.int32)
  part_of = ('train',) * 3 + ('val',) * 2 + ('test',) * 3
  found = make(labels, part_of=part_of, val_fraction=0.0)
  assert found.classes_without_val == (2,)
  with pytest.raises(UserError, match='images of every class in the training set; found none of'):
    make(labels, part_of=('test', *part_of[1:]))


def test_folds_of_given_parts():
  with pytest.raises(UserError, match='without parts of its own; found 5 folds and given parts; '):
    make(random_labels(0), part_of=('train',) * 200, folds=5)
