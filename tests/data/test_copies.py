"""Byte-identical images: found, in one group, named, and on one side of every split."""

import csv
import json
import os

import numpy as np
import pytest
from PIL import Image

from csba_jax import config as config_lib
from csba_jax.data import cache, copies, pipeline
from csba_jax.data.image_folder import ImageFolderSource
from csba_jax.errors import UserError
from csba_jax.run import restore


def sums_of(kinds):
  """Content sums [N, 32] of images, equal for equal kinds; they end in zeros and begin alike."""
  found = np.zeros((len(kinds), 32), np.uint8)
  found[:, 20] = kinds
  return found


def connected(n, *partitions):
  """Groups of images that any partition joins, by merging until nothing changes: slow, obvious."""
  groups = list(range(n))
  while True:
    before = list(groups)
    for partition in partitions:
      for i in range(n):
        for j in range(n):
          if partition[i] == partition[j]:
            groups[i] = groups[j] = min(groups[i], groups[j])
    if groups == before:
      return [list(dict.fromkeys(groups)).index(g) for g in groups]  # in order of the first


@pytest.mark.parametrize('seed', range(20))
def test_groups_are_those_of_a_slow_reference(seed):
  rng = np.random.default_rng(seed)
  n = int(rng.integers(1, 15))
  kinds, manifest = rng.integers(0, 10, n), rng.integers(0, 10, n) * 7
  found = copies.find(sums_of(kinds))
  assert found.group_of.tolist() == connected(n, kinds)
  expected = [[i for i in range(n) if kinds[i] == kind] for kind in dict.fromkeys(kinds.tolist())]
  assert [list(s) for s in found.sets] == [s for s in expected if len(s) > 1]
  joined = copies.joined(found, manifest)
  if found.sets:
    assert joined.tolist() == connected(n, kinds, manifest)
    assert copies.joined(found, None).tolist() == connected(n, kinds)
    assert joined.dtype == np.int64


def test_without_copies_groups_stay_as_they_are():
  found = copies.find(sums_of([3, 1, 2]))
  assert found.sets == ()
  assert copies.joined(found, None) is None
  groups = np.array([5, 0, 5])
  assert copies.joined(found, groups) is groups


def arrays(kinds, labels, prefix=''):
  """Images of which only names, labels and sums matter."""
  n = len(kinds)
  names = tuple(f'{prefix}{i}' for i in range(n))
  labels = np.asarray(labels, np.int32)
  images = np.zeros((n, 1, 1, 1), np.uint8)
  return cache.ImageArrays(images, labels, None, sums_of(kinds), ('a', 'b'), names, ())


def lines(images, test_images=None, together=True):
  return copies.lines(copies.find(images.sums), images, test_images, together)


def test_lines():
  assert lines(arrays([1, 2, 3], [0, 0, 1])) == []
  images = arrays([1, 2, 2, 1, 2], [0, 1, 1, 0, 1])
  start = 'byte-identical copies of other images: 3, such as 3 of 0; '
  assert lines(images) == [start + 'all copies of an image stay on one side of every split']
  assert lines(images, together=False) == [
    start + 'data.group_copies=False does not keep them on one side of a split'
  ]


def test_copies_in_several_classes_are_labels_to_check(monkeypatch):
  images = arrays([1, 2, 2, 1, 2, 3, 3], [0, 1, 0, 1, 1, 1, 1])
  expected = [
    'sets of identical images in different classes: 2; check their labels:',
    '  0 = 3',
    '  1 = 2 = 4',
  ]
  assert lines(images)[1:] == lines(images, together=False)[1:] == expected
  monkeypatch.setattr(copies, 'NAMED', 1)
  assert lines(images)[1:] == [*expected[:2], '  and 1 more']


def test_a_separate_test_set_that_holds_copies():
  images, test = arrays([1, 2, 3], [0, 0, 1]), arrays([4, 3, 3, 1], [1, 0, 1, 0], 't')
  assert lines(images, test) == [
    'test images that are byte-identical to one outside the test set: 3 of 4, such as t1 to 2'
  ]
  assert lines(images, arrays([4], [0], 't')) == []


# ---- through a config


def photos(folder, kinds):
  """CLASS/number.png, of which photos of one kind are identical: kinds {class: [kind]}."""
  for name, members in kinds.items():
    (folder / name).mkdir(parents=True)
    for i, kind in enumerate(members):
      pixels = np.random.default_rng(kind).integers(0, 256, (8, 8, 3), np.uint8)
      Image.fromarray(pixels).save(folder / name / f'{i:02d}.png')
  return folder


KINDS = {'a': [*range(10), 0, 1, 2, 0, 1], 'b': [*range(20, 35), 20, 3]}


def config_of(folder, tmp_path, **fields):
  config = config_lib.default()
  config.data.update(source='image_folder', dir=str(folder), cache_dir=str(tmp_path / 'cache'))
  config.data.update(image_size=8, channels=3, num_classes=0, profile='natural')
  config.data.update(**fields)
  return config


def sides_of_copies(data):
  """The number of parts that each photo's content lies in."""
  content = data.splits.content
  parts = [set(content[i].tolist()) for i in (data.splits.train, data.splits.val, data.splits.test)]
  return [sum(kind in part for part in parts) for kind in set().union(*parts)]


@pytest.mark.parametrize('folds', [0, 3])
def test_copies_stay_on_one_side_without_a_manifest(tmp_path, folds):
  folder = photos(tmp_path / 'photos', KINDS)
  apart = 0
  for seed in range(5):
    for fold in range(max(folds, 1)):
      said = []
      config = config_of(folder, tmp_path, seed=seed, folds=folds, fold=fold, val_fraction=0.2)
      data = pipeline.load(config, said.append)
      assert set(sides_of_copies(data)) == {1}
      assert [line for line in said if not line.startswith('decoding')] == [
        'byte-identical copies of other images: 7, such as a/10.png of a/00.png; all copies of an '
        'image stay on one side of every split',
        'sets of identical images in different classes: 1; check their labels:',
        '  a/03.png = b/16.png',
      ]
      config.data.group_copies = False
      apart += max(sides_of_copies(pipeline.load(config, said.append))) > 1
      assert 'data.group_copies=False does not' in said[-3]
  assert apart


def test_without_copies_the_splits_are_those_of_before(tmp_path):
  folder = photos(tmp_path / 'photos', {'a': range(10), 'b': range(20, 40)})
  for folds in (0, 3):
    config = config_of(folder, tmp_path, folds=folds)
    grouped = pipeline.load(config, print).splits.sha256
    config.data.group_copies = False
    assert pipeline.load(config, print).splits.sha256 == grouped


def test_real_photos_have_the_copies_that_their_manifest_names(photo_folder):
  manifest = os.path.join(photo_folder, 'manifest.csv')
  source = ImageFolderSource(photo_folder, 48, manifest=manifest, group_column='dup_group')
  images = cache.load_arrays(source, log=print)
  found = copies.find(images.sums)
  assert (len(found.sets), sum(map(len, found.sets))) == (76, 169)
  # what the manifest says of the files that the photos were made from: byte-identical ones
  with open(manifest, encoding='utf-8') as file:
    originals = {row['file']: row['original_sha1'] for row in csv.DictReader(file)}
  sha1 = np.unique([originals[name] for name in images.names], return_inverse=True)[1]
  for original in np.flatnonzero(np.bincount(sha1) > 1):
    assert len(set(found.group_of[sha1 == original].tolist())) == 1
  # all of them are in one group of the manifest, so that with it nothing changes
  assert copies.joined(found, images.groups).tolist() == images.groups.tolist()
  said = copies.lines(found, images, None, True)
  assert said[0].startswith('byte-identical copies of other images: 93, such as ')
  assert said[1] == 'sets of identical images in different classes: 2; check their labels:'


# ---- content that changes under a run


def other_pixels(path):
  Image.new('RGB', (8, 8), 'red').save(path)


@pytest.mark.parametrize('together', [True, False])
def test_replaced_pixels_are_noticed(tmp_path, together):
  folder = photos(tmp_path / 'photos', {'a': range(10), 'b': range(20, 40)})
  config = config_of(folder, tmp_path, profile='exp', imbalance_factor=4.0, group_copies=together)
  path = tmp_path / 'splits.npz'
  data = pipeline.load(config, print)
  data.splits.save(path)
  used = sorted(data.splits.members.tolist())
  unused = sorted(set(range(30)) - set(used))
  assert unused
  other_pixels(folder / data.names[unused[0]])  # of no part: it does not matter
  pipeline.check_splits(pipeline.load(config, print), path)
  for i in (used[3], used[5], used[-1]):  # which become copies of each other
    other_pixels(folder / data.names[i])
  with pytest.raises(UserError) as error:
    pipeline.check_splits(pipeline.load(config, print), path)
  assert str(error.value) == (
    f'expected the {len(used)} images that {path} was made of; found 3 with the same name and '
    f'another content, such as {data.names[used[3]]}; to fix it: restore the old files, or use '
    'another --workdir to train on the new ones'
  )


def test_replaced_pixels_of_a_separate_test_set(tmp_path, monkeypatch):
  sources = [
    ImageFolderSource(photos(tmp_path / 'train', {'a': range(9), 'b': range(20, 40)}), 8),
    ImageFolderSource(photos(tmp_path / 'test', {'a': [50, 51], 'b': [52, 53]}), 8),
  ]
  config = config_of(tmp_path / 'train', tmp_path)
  monkeypatch.setattr(pipeline, 'open_sources', lambda data: tuple(sources))
  pipeline.load(config, print).splits.save(tmp_path / 'splits.npz')
  pipeline.check_splits(pipeline.load(config, print), tmp_path / 'splits.npz')
  other_pixels(tmp_path / 'test/b/00.png')
  with pytest.raises(UserError, match='found 1 with the same name .* such as b/00.png'):
    pipeline.check_splits(pipeline.load(config, print), tmp_path / 'splits.npz')


def test_splits_of_before_content_sums_are_as_good_as_they_were(tmp_path):
  folder = photos(tmp_path / 'photos', {'a': range(10), 'b': range(20, 40)})
  config = config_of(folder, tmp_path)
  data = pipeline.load(config, print)
  path = tmp_path / 'splits.npz'
  data.splits.save(path)
  with np.load(path) as kept:
    old = {name: kept[name] for name in kept.files if name != 'content'}
  np.savez(path, **old)
  other_pixels(folder / data.names[0])
  pipeline.check_splits(pipeline.load(config, print), path)  # nobody can know
  (folder / 'a/new.png').write_bytes((folder / 'a/00.png').read_bytes())
  with pytest.raises(
    UserError, match=r'or, as the run is of an older version, set .*group_copies=Fa'
  ):
    pipeline.check_splits(pipeline.load(config, print), path)


def test_a_run_of_before_the_field_was_split_without_it(tmp_path):
  stored = config_lib.default().to_dict()
  del stored['data']['group_copies']
  (tmp_path / 'config.json').write_text(json.dumps({'config': stored}))
  assert restore.config_of(tmp_path).data.group_copies is False


def test_copies_in_parts_that_the_folder_gives(tmp_path):
  """They stay where they are; the run says that the scores are too good."""
  for part, kinds in (('train', (1, 2, 3, 4)), ('val', (1, 5)), ('test', (1, 2, 6))):
    for c in 'ab':
      for i, kind in enumerate(kinds):
        path = tmp_path / 'photos' / part / c / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8), (kind, ord(c), 0)).save(path)
  config = config_lib.load('image_folder')
  config.data.dir, config.data.image_size = str(tmp_path / 'photos'), 8
  config.data.cache_dir = str(tmp_path / 'cache')
  said = []
  data = pipeline.load(config, said.append)
  assert [len(part) for part in (data.train, data.val, data.test)] == [8, 4, 6]
  assert data.names[0] == 'train/a/0.png'
  text = '\n'.join(said)
  assert 'byte-identical copies of other images: 6, such as ' in text
  assert '; each stays in the part that the folder gives it' in text
  assert data.source_counts.tolist() == [6, 6]  # without the test part
  assert (
    'test images that are copies of training images: 4, such as test/a/0.png of train/a/0.png; '
    in text
  )
  assert (
    'val images that are copies of training images: 2, such as val/a/0.png of train/a/0.png; '
    in text
  )
