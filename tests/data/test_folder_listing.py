"""The listing of a folder: what is an image, what is left out and said, and what is refused."""

import collections
import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from csba_jax.data.folder_listing import IMAGE_SUFFIXES, PARTS, SYSTEM_FOLDERS, list_images
from csba_jax.errors import UserError

HEADS = {'jpeg': b'\xff\xd8\xff\xe0', 'png': b'\x89PNG\r\n\x1a\n'}


def listed(root, layout='auto'):
  return list_images(Path(root), layout)


def put(root, *names, data=b'x'):
  for name in names:
    path = Path(root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.fixture
def folder(tmp_path):
  put(tmp_path / 'photos', 'a/1.png', 'b/1.png', 'b/2.JPG')
  return tmp_path / 'photos'


def test_no_such_folder(tmp_path):
  with pytest.raises(
    UserError, match=r'one folder of images for each class; found nothing at .*/no'
  ):
    listed(tmp_path / 'no')


def test_a_file_in_place_of_a_folder(tmp_path):
  (tmp_path / 'photos.zip').write_bytes(b'')
  with pytest.raises(UserError, match=r'found a file, .*photos\.zip'):
    listed(tmp_path / 'photos.zip')


def test_no_class_folders(tmp_path):
  (tmp_path / 'a.png').write_bytes(b'')
  with pytest.raises(UserError, match=r'found no class folder in .*DIRECTORY/CLASS/image\.jpg'):
    listed(tmp_path)


def test_one_class_only(tmp_path):
  (tmp_path / 'dust').mkdir()
  with pytest.raises(UserError, match='found only one, dust, in'):
    listed(tmp_path)


def test_a_class_folder_without_an_image(folder):
  (folder / 'empty').mkdir()
  (folder / 'empty/notes.txt').write_bytes(b'x')
  with pytest.raises(UserError, match='in every class folder; found none in empty'):
    listed(folder)


# ---- what is left out


def test_what_is_left_out_is_counted_by_class_and_ending(folder):
  put(folder, *(f'a/{i}.heic' for i in range(15)), 'a/x.HEIC', 'a/deep/notes.txt', 'a/raw')
  put(folder, 'a/.DS_Store', 'a/._1.png', 'b/photo.jpg~', 'stray.png', 'README.md', '.hidden.png')
  found = listed(folder)
  assert found.names == ('a/1.png', 'b/1.png', 'b/2.JPG')
  assert found.left_out == (
    'left out of photos: beside the classes: 1 image; '
    'a: 16 .heic, 2 hidden files, 1 .txt, 1 file without an ending; b: 1 .jpg~'
  )


def test_nothing_left_out_is_no_line(folder):
  put(folder, 'manifest.csv')
  assert listed(folder).left_out == ''


@pytest.mark.parametrize('name', ['@eaDir', '.thumbnails', '__MACOSX', '#recycle', '.git'])
def test_system_folders_are_left_out_by_name_and_said(folder, name):
  put(folder, f'{name}/x/1.png', f'a/{name}/1.png/THUMB_S.jpg', f'b/deep/{name}/1.png')
  put(folder, f'b/{name}/1.png')
  found = listed(folder)
  assert found.class_names == ('a', 'b')
  assert len(found.names) == 3
  assert found.left_out == (
    f'left out of photos: beside the classes: folder {name}; a: folder {name}; b: 2 folders {name}'
  )


def test_system_folders_are_spelt_as_they_are_compared():
  assert all(name == name.casefold() for name in (*SYSTEM_FOLDERS, *PARTS))


def test_links_to_folders_are_counted(folder, tmp_path):
  put(tmp_path, 'elsewhere/3.png')
  (folder / 'a/more').symlink_to(tmp_path / 'elsewhere')
  (folder / 'c').symlink_to(tmp_path / 'elsewhere')  # a class itself may be one
  found = listed(folder)
  assert found.names == ('a/1.png', 'b/1.png', 'b/2.JPG', 'c/3.png')
  assert found.left_out == 'left out of photos: a: 1 link to a folder'


def test_the_line_stays_short(tmp_path):
  put(tmp_path, *(f'c{i:02d}/{name}' for i in range(30) for name in ('1.png', 'x.heic')))
  put(tmp_path, *(f'c00/x.{i:02d}x' for i in range(30)))
  line = listed(tmp_path).left_out
  assert line.endswith('c07: 1 .heic; and in 22 more classes')
  assert '1 .06x, 1 .07x, 23 more kinds; c01: 1 .heic' in line
  assert '\n' not in line


def test_a_class_with_nothing_left_says_what_was_left_out(folder):
  put(folder, *(f'c/{i}.heic' for i in range(3)))
  with pytest.raises(
    UserError, match=r'found none in c: 3 \.heic left out; to fix it: convert its files'
  ):
    listed(folder)


@pytest.mark.parametrize('name', ['x.jfif', 'x.JFIF', 'x', 'x.pjpeg', 'x.apng'])
@pytest.mark.parametrize('kind', HEADS)
def test_files_without_a_usual_ending_are_read_if_they_begin_as_an_image(folder, name, kind):
  put(folder, f'a/{name}', data=HEADS[kind] + b'rest')
  assert f'a/{name}' in listed(folder).names
  put(folder, f'a/{name}', data=b'%PDF-1.7 and more')
  assert f'a/{name}' not in listed(folder).names


@pytest.mark.parametrize('kind', ['bmp', 'gif', 'jpeg', 'png', 'tiff', 'webp'])
def test_every_format_is_known_by_its_first_bytes(folder, kind):
  Image.new('RGB', (5, 4)).save(folder / 'a/noname', kind)
  assert 'a/noname' in listed(folder).names


def test_copies_and_raw_photos_are_not_read_by_content(folder):
  put(folder, 'a/1.png~', 'a/1.thm', 'a/1.jpg_original', data=HEADS['jpeg'])
  put(folder, 'a/1.nef', data=b'II*\0')  # TIFF, of which Pillow reads the preview
  assert len(listed(folder).names) == 3


def test_a_folder_that_may_not_be_listed_is_refused(folder, monkeypatch):
  (folder / 'a/deep').mkdir()
  scandir = os.scandir

  def guarded(path):
    if os.fspath(path).endswith('deep'):
      raise PermissionError(13, 'Permission denied', os.fspath(path))
    return scandir(path)

  monkeypatch.setattr(os, 'scandir', guarded)
  with pytest.raises(UserError, match=r'to list the files in .*/a; found .*denied.*a/deep'):
    listed(folder)
  monkeypatch.setattr(Path, 'iterdir', lambda self: guarded(f'{self}/deep'))
  with pytest.raises(UserError, match='to list the files in .*photos; found .*denied'):
    listed(folder)


# ---- names


def forms(name):
  return [unicodedata.normalize(form, name) for form in ('NFC', 'NFD')]


def test_two_class_folders_that_differ_in_unicode_form_are_refused(folder):
  put(folder, *(f'{name}/1.png' for name in forms('café')))
  with pytest.raises(UserError) as error:
    listed(folder)
  assert str(error.value).startswith(
    'expected names of class folders that differ in more than their Unicode form; '
    r"found 'cafe\u0301' and 'caf\xe9', which both read café; to fix it: move what one of them"
  )


@pytest.mark.parametrize('pattern', ['a/{}.png', 'a/{}/1.png'])
def test_two_files_that_differ_in_unicode_form_are_refused(folder, pattern):
  put(folder, *(pattern.format(name) for name in forms('é')))
  with pytest.raises(UserError, match='names of files that differ in more than their Unicode'):
    listed(folder)


def test_a_class_folder_that_is_no_utf8_is_refused(folder):
  os.mkdir(os.fsencode(folder) + b'/caf\xe9')
  with pytest.raises(UserError, match=r'in UTF-8 in .*photos; found caf\\xe9; to fix it: rename'):
    listed(folder)


def test_a_file_that_is_no_utf8_is_read(folder):
  for name in (b'a/caf\xe9.png', b'a/x.caf\xe9'):
    Path(os.fsdecode(os.fsencode(folder) + b'/' + name)).write_bytes(b'x')
  found = listed(folder)
  assert found.names[1] == 'a/caf\udce9.png'
  assert found.left_out == r'left out of photos: a: 1 .caf\xe9'


# ---- the parts of a data set


@pytest.mark.parametrize(
  ('folders', 'parts'),
  [
    (('train', 'val'), ('train', 'val')),
    (('Training', 'VALIDATION', 'testing'), ('train', 'val', 'test')),
    (('eval', 'train'), ('train', 'test')),
    (('train',), ('train',)),
  ],
)
def test_parts_are_no_classes(tmp_path, folders, parts):
  put(tmp_path, *(f'{folder}/{name}/1.png' for folder in folders for name in ('cat', 'dog')))
  found = listed(tmp_path)
  assert found.class_names == ('cat', 'dog')
  assert found.labels.tolist() == [0, 1] * len(parts)
  assert found.part_of == tuple(part for part in parts for _ in range(2))
  for name, path, part in zip(found.names, found.paths, found.part_of, strict=True):
    folder = name.partition('/')[0]
    assert folder in folders
    assert PARTS[folder.casefold()] == part
    assert path == tmp_path / name
  if len(folders) > 1:
    found = listed(tmp_path, 'classes')
    assert found.class_names == tuple(sorted(folders))
    assert found.part_of is None


def test_parts_that_lack_a_class_or_labels(tmp_path):
  put(tmp_path, 'train/cat/1.png', 'train/dog/1.png', 'train/ox/1.png')
  put(tmp_path, 'val/dog/1.png', 'val/cat/note.txt', 'test/1.png', 'old/cat/1.png', '1.png')
  found = listed(tmp_path)
  assert found.class_names == ('cat', 'dog', 'ox')
  assert found.labels.tolist() == [0, 1, 2, 1]  # by the classes of the training part
  assert found.part_of == ('train', 'train', 'train', 'val')
  beside = f'left out of {tmp_path.name}, beside the parts: folder old, folder test, 1 image'
  assert found.left_out == f'left out of val: cat: 1 .txt; {beside}'


@pytest.mark.parametrize('names', [('cat', 'cow'), ('cat', 'cow', 'dog', 'ox')])
def test_a_class_that_cannot_be_trained_on(tmp_path, names):
  """As a misspelled name is: this is no folder of the classes train and test."""
  put(tmp_path, 'train/cat/1.png', 'train/dog/1.png', 'train/ox/1.png')
  put(tmp_path, *(f'test/{name}/1.png' for name in names))
  with pytest.raises(UserError, match=r'/train has in .*/test; found cow there alone'):
    listed(tmp_path)


def test_an_empty_class_folder_of_a_part_that_is_not_trained_on(tmp_path):
  put(tmp_path, 'train/cat/1.png', 'train/dog/1.png', 'val/dog/1.png')
  (tmp_path / 'val/cat').mkdir()
  found = listed(tmp_path)
  assert found.names == ('train/cat/1.png', 'train/dog/1.png', 'val/dog/1.png')
  assert found.labels.tolist() == [0, 1, 1]
  (tmp_path / 'train/ox').mkdir()
  with pytest.raises(UserError, match='in every class folder; found none in ox; '):
    listed(tmp_path)


def test_one_part_beside_folders_that_may_be_classes(tmp_path):
  put(tmp_path, 'train/cat/1.png', 'train/dog/1.png', 'new/1.png')
  with pytest.raises(UserError, match=r'train with folders inside, and new with none; .*layout'):
    listed(tmp_path)
  assert listed(tmp_path, 'classes').class_names == ('new', 'train')
  put(tmp_path, 'new/day/1.png')
  assert listed(tmp_path).class_names == ('new', 'train')


def test_parts_without_one_to_train_on(tmp_path):
  put(tmp_path, *(f'{part}/{name}/1.png' for part in ('valid', 'test') for name in ('a', 'b')))
  with pytest.raises(UserError, match=r'a folder train among .*; found test and valid; .*rename'):
    listed(tmp_path)


def test_two_folders_for_one_part(tmp_path):
  put(tmp_path, *(f'{part}/{c}/1.png' for part in ('train', 'dev', 'val') for c in 'ab'))
  with pytest.raises(UserError, match=r'one folder for the val part in .*; found dev and val; '):
    listed(tmp_path)


@pytest.mark.parametrize(
  'names',
  [
    ('train/1.png', 'test/1.png'),  # no folders inside
    ('train/steam/1.png', 'test/glass/1.png'),  # folders, but others
    ('train/steam/1.png', 'bus/steam/1.png'),  # one name of a part only
    ('cat/day/1.png', 'dog/day/1.png'),  # equal folders, but no names of parts
    ('train/@eaDir/1.png', 'test/@eaDir/1.png', 'train/1.png', 'test/1.png'),
  ],
)
def test_classes_that_are_called_like_parts(tmp_path, names):
  put(tmp_path, *names)
  found = listed(tmp_path)
  assert found.class_names == tuple(sorted({name.partition('/')[0] for name in names}))
  assert collections.Counter(found.labels.tolist()).keys() == {0, 1}


def test_every_usual_ending_is_read_whatever_the_file_holds(folder):
  put(folder, *(f'a/x{suffix}' for suffix in IMAGE_SUFFIXES))
  assert len(listed(folder).names) == 3 + len(IMAGE_SUFFIXES)
