"""What there is in a folder of photos: counts, odd files and copies, and what is written."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from csba_jax.data import audit as audit_lib
from csba_jax.data.audit import audit_folder
from csba_jax.data.image_folder import ImageFolderSource
from csba_jax.errors import UserError


def put(folder, name, image, **how):
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **how)
  return path


@pytest.fixture(scope='module')
def photos(tmp_path_factory, scene):
  """Three classes; copies of both kinds, also across classes; one file of each odd kind."""
  folder = tmp_path_factory.mktemp('photos')
  for c, (name, n) in enumerate([('cat', 9), ('dog', 6), ('owl', 3)]):
    for i in range(n):
      put(folder, f'{name}/{i}.png', scene(100 * c + i))
  shutil.copy(folder / 'cat/0.png', folder / 'cat/same.png')
  shutil.copy(folder / 'cat/1.png', folder / 'dog/same.png')  # in two classes
  put(folder, 'cat/like.jpg', scene(2), quality=50)  # of cat/2.png
  put(folder, 'owl/like.jpg', scene(3), quality=50)  # of cat/3.png
  turned = Image.Exif()
  turned[274] = 6
  put(folder, 'dog/turned.jpg', scene(301)[:70], exif=turned.tobytes())
  clear = np.concatenate([scene(302), np.full((96, 96, 1), 99, np.uint8)], axis=-1)
  put(folder, 'dog/clear.png', clear)
  frames = [Image.fromarray(scene(seed)) for seed in (303, 304)]
  put(folder, 'dog/frames.gif', frames[0], save_all=True, append_images=frames[1:])
  put(folder, 'dog/deep.png', (scene(305)[..., 0].astype(np.int32) * 256).astype(np.uint16))
  put(folder, 'dog/grey.png', scene(306)[..., 0])
  put(folder, 'dog/blank.png', np.full((96, 96, 3), 7, np.uint8))
  put(folder, 'dog/small.png', scene(307, 40))
  put(folder, 'dog/long.png', np.concatenate([scene(308), scene(309), scene(310)], axis=1))
  put(folder, 'dog/wrong.jpg', scene(311), format='PNG')
  (folder / 'owl/broken.jpg').write_bytes(b'\xff\xd8\xff nothing')
  (folder / 'owl/notes.txt').write_text('no photo')
  return folder


@pytest.fixture(scope='module')
def found(photos):
  return audit_folder(photos)


def test_counts_leave_out_what_cannot_be_read(found):
  assert found.class_names == ('cat', 'dog', 'owl')
  assert found.class_counts.tolist() == [11, 16, 4]
  assert found.imbalance_factor == 4.0
  [(name, reason)] = found.unreadable
  assert name == 'owl/broken.jpg'
  assert reason == 'not an image of a known format'
  assert 'owl: 1 .txt' in found.left_out
  assert found.formats == {'PNG': 27, 'JPEG': 3, 'GIF': 1}


def test_each_odd_file_is_named_once_or_more(found):
  assert found.odd == {
    audit_lib.TURNED: ('dog/turned.jpg',),
    audit_lib.CLEAR: ('dog/clear.png',),
    audit_lib.FRAMES: ('dog/frames.gif',),
    audit_lib.DEEP: ('dog/deep.png',),
    audit_lib.GREY: ('dog/deep.png', 'dog/grey.png'),
    audit_lib.BLANK: ('dog/blank.png',),
    audit_lib.TINY: ('dog/small.png',),
    audit_lib.NARROW: ('dog/long.png',),
    audit_lib.ENDING: ('dog/wrong.jpg',),
  }
  sizes = dict(zip(found.names, found.sizes.tolist(), strict=True))
  assert sizes['dog/turned.jpg'] == [70, 96]  # upright
  assert sizes['dog/long.png'] == [288, 96]
  assert sizes['owl/broken.jpg'] == [0, 0]


def test_copies_within_and_across_classes(found):
  assert found.identical == (('cat/0.png', 'cat/same.png'), ('cat/1.png', 'dog/same.png'))
  assert found.copies == (
    ('cat/0.png', 'cat/same.png'),
    ('cat/1.png', 'dog/same.png'),
    ('cat/2.png', 'cat/like.jpg'),
    ('cat/3.png', 'owl/like.jpg'),
  )
  assert found.across_classes == (found.copies[1], found.copies[3])
  assert found.redundant.tolist() == [2, 0, 0]
  assert (found.part_counts, found.across_parts) == ({}, ())
  assert found.training_counts.tolist() == found.class_counts.tolist()


def test_what_is_written_is_a_manifest(found, photos, tmp_path):
  paths = audit_lib.save(found, tmp_path / 'new' / 'run')
  assert [path.name for path in paths] == ['audit.json', 'copies.csv']
  source = ImageFolderSource(photos, 16, manifest=paths[1], group_column='group')
  together = {}
  for name, group in zip(source.names, source.groups.tolist(), strict=True):
    together.setdefault(group, []).append(name)
  sets = [tuple(names) for names in together.values() if len(names) > 1]
  assert {frozenset(s) for s in sets} == {frozenset(s) for s in found.copies}
  kept = json.loads(paths[0].read_text('utf-8'))
  assert kept == found.to_json()
  assert kept['classes'] == {'cat': 11, 'dog': 16, 'owl': 4}
  assert kept['width_and_height']['largest'] == [288, 96]
  assert kept['copies_across_classes'][0] == ['cat/1.png', 'dog/same.png']


def test_names_that_need_quotes_in_the_manifest(tmp_path, scene):
  for name in ('a "b", c', 'd\ne'):
    put(tmp_path / 'photos', f'{name}/1.png', scene(1))
    put(tmp_path / 'photos', f'{name}/2.png', scene(2))
  found = audit_folder(tmp_path / 'photos')
  [_, path] = audit_lib.save(found, tmp_path)
  with path.open(newline='') as file:
    rows = list(csv.DictReader(file))
  assert sorted(row['file'] for row in rows) == sorted(found.names)
  source = ImageFolderSource(tmp_path / 'photos', 8, manifest=path, group_column='group')
  assert len(set(source.groups.tolist())) == 2


def test_names_in_other_encodings_and_forms(tmp_path, scene):
  """Linux takes any bytes; a Mac splits accents; a backslash is a letter like any other."""
  folder = tmp_path / 'photos'
  put(folder, 'a/1.png', scene(1))
  put(folder, 'b/2.png', scene(2))
  try:
    for name in (b'caf\xe9.png', 'e\u0301.png'.encode(), b'x\\1.png'):
      shutil.copy(folder / 'a/1.png', os.fsencode(folder / 'a') + b'/' + name)
  except OSError:
    pytest.skip('a file system with names in Unicode alone')
  found = audit_folder(folder)
  [together] = found.copies
  assert len(together) == 4
  [_, path] = audit_lib.save(found, tmp_path / 'run')
  source = ImageFolderSource(folder, 8, manifest=path, group_column='group')
  assert len(set(source.groups.tolist())) == 2
  assert all(path.exists() for path in found.paths)
  json.loads((tmp_path / 'run/audit.json').read_text('utf-8'))


def test_a_workdir_in_the_folder_would_be_a_class(tmp_path):
  with pytest.raises(UserError, match='a --workdir outside the folder of photos; found .*/run; '):
    audit_lib.check_outside(tmp_path, tmp_path / 'run')
  with pytest.raises(UserError, match='outside'):
    audit_lib.check_outside(tmp_path, tmp_path)
  audit_lib.check_outside(tmp_path / 'photos', tmp_path / 'run')


def test_progress_is_told_and_may_stop(photos, monkeypatch):
  monkeypatch.setattr(audit_lib, 'TICKS', 10)
  told = []
  audit_folder(photos, tick=lambda done, total: told.append((done, total)))
  assert told == [(10, 32), (20, 32), (30, 32), (32, 32)]

  def stop(done, total):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    audit_folder(photos, tick=stop)


def test_a_class_without_a_readable_photo_has_no_factor(tmp_path, scene):
  put(tmp_path, 'a/1.png', scene(0))
  (tmp_path / 'b').mkdir()
  (tmp_path / 'b/1.png').write_bytes(b'')
  found = audit_folder(tmp_path)
  assert found.imbalance_factor == float('inf')
  assert found.to_json()['imbalance_factor'] is None
  assert found.unreadable == (('b/1.png', 'empty file'),)


def test_photos_that_are_all_unreadable(tmp_path):
  for name in ('a', 'b'):
    (tmp_path / name).mkdir()
    (tmp_path / name / '1.jpg').write_bytes(b'x')
  with pytest.raises(UserError, match=r'2 files that cannot, such as a/1.jpg .*convert them'):
    audit_folder(tmp_path)


@pytest.mark.parametrize(('folders', 'words'), [((), 'no class folder'), (('a',), 'only one, a')])
def test_a_folder_without_classes(tmp_path, folders, words, scene):
  for name in folders:
    put(tmp_path, f'{name}/1.png', scene(0))
  with pytest.raises(UserError, match=words):
    audit_folder(tmp_path)


def test_a_place_that_cannot_be_written(found, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'to write audit.json, copies.csv into .*/file; found .*'):
    audit_lib.save(found, tmp_path / 'file')


def test_a_header_that_breaks_off_is_no_traceback(photos, tmp_path, scene):
  """A GIF whose second frame is cut: the first one is decoded, the frames cannot be counted."""
  put(tmp_path, 'a/1.png', scene(0))
  data = (photos / 'dog/frames.gif').read_bytes()
  (tmp_path / 'b').mkdir()
  for cut in range(20, len(data), 400):
    (tmp_path / 'b' / f'{cut}.gif').write_bytes(data[:cut])
  found = audit_folder(tmp_path)
  assert 0 < found.class_counts[1] < len(found.names) - 1


def test_copies_across_given_parts(tmp_path, scene):
  for part, seeds in (('train', (0, 1, 2)), ('test', (0, 5))):
    for c in (0, 100):
      for i, seed in enumerate(seeds):
        put(tmp_path, f'{part}/{c}/{i}.png', scene(c + seed))
  found = audit_folder(tmp_path)
  assert found.part_counts == {'train': 6, 'test': 4}
  assert found.class_counts.tolist() == [5, 5]
  assert found.training_counts.tolist() == [3, 3]
  assert found.across_parts == (
    ('train/0/0.png', 'test/0/0.png'),
    ('train/100/0.png', 'test/100/0.png'),
  )
  assert found.across_classes == ()
  kept = found.to_json()
  assert kept['parts'] == {'train': 6, 'test': 4}
  assert kept['copies_across_parts'][0] == ['train/0/0.png', 'test/0/0.png']


@pytest.mark.seconds
def test_real_photos_against_their_manifest(photo_folder):
  """The manifest names copies that its authors found with other hashes."""
  found = audit_folder(photo_folder)
  group_of = {name: i for i, names in enumerate(found.copies) for name in names}
  with open(f'{photo_folder}/manifest.csv', newline='') as file:
    rows = list(csv.DictReader(file))
  group, exact = {}, {}
  for row in rows:
    exact.setdefault(row['original_sha1'], []).append(row['file'])
    if row['dup_group']:
      group.setdefault(row['dup_group'], []).append(row['file'])

  def share_found(sets):
    sets = [s for s in sets if len(s) > 1]
    return np.mean([len({group_of.get(name, name) for name in s}) == 1 for s in sets])

  assert share_found(exact.values()) >= 0.95
  assert share_found(group.values()) >= 0.8
