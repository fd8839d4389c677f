"""Sources: every image mode, every broken file, every wrong folder; no TensorFlow."""

import hashlib
import importlib.util
import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import threading
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image

from csba_jax.data import cache, decoding, image_folder, sources, tfds_source
from csba_jax.errors import UserError

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encoded(image, suffix='png', **options):
  """The bytes of a Pillow image in a file format."""
  buffer = io.BytesIO()
  image.save(buffer, {'jpg': 'JPEG', 'tif': 'TIFF'}.get(suffix, suffix.upper()), **options)
  return buffer.getvalue()


def decode(data, image_size=4, channels=3):
  return decoding.decode_image(data, channels=channels, image_size=image_size)


def halves(left, right, mode='RGB', size=(4, 4)):
  """An image with one value in the left half and another in the right half."""
  image = Image.new(mode, size, left)
  image.paste(right, (size[0] // 2, 0, size[0], size[1]))
  return image


# ---- decode_image


@pytest.mark.parametrize('suffix', ['png', 'bmp', 'gif', 'tif', 'webp'])
def test_lossless_formats_keep_their_pixels(suffix):
  options = {'lossless': True} if suffix == 'webp' else {}
  pixels = decode(encoded(halves(RED, BLUE), suffix, **options))
  assert pixels.shape == (4, 4, 3)
  assert pixels.dtype == np.uint8
  assert (pixels[:, :2] == RED).all()
  assert (pixels[:, 2:] == BLUE).all()


def test_jpeg():
  pixels = decode(encoded(halves(RED, BLUE, size=(16, 16)), 'jpg', quality=95, subsampling=0), 16)
  assert abs(pixels[:, :8].astype(int) - RED).max() < 6
  assert abs(pixels[:, 8:].astype(int) - BLUE).max() < 6


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation_is_applied(orientation):
  upright = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
  turn = {  # how a camera stores the upright picture under each orientation
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a),
    7: lambda a: np.rot90(a.T, 2),
    8: lambda a: np.rot90(a, -1),
  }[orientation]
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = encoded(Image.fromarray(np.ascontiguousarray(turn(upright))), exif=exif)
  assert decode(data)[..., 0].tolist() == upright.tolist()
  # pixels of a set that is to be left alone are not turned either
  assert decode(data, image_size=0)[..., 0].tolist() == turn(upright).tolist()


@pytest.mark.parametrize('mode', ['RGBA', 'LA'])
def test_transparency_becomes_white(mode):
  clear, half, full = (0, 128, 255)
  black = (0, 0, 0) if mode == 'RGBA' else (0,)
  image = Image.new(mode, (4, 4), (*black, clear))
  image.paste((*black, half), (0, 0, 4, 1))
  image.paste((*black, full), (0, 1, 4, 2))
  pixels = decode(encoded(image))
  assert (pixels[0] == 255 - 128).all()
  assert (pixels[1] == 0).all()
  assert (pixels[2:] == 255).all()


@pytest.mark.parametrize('suffix', ['png', 'gif'])
def test_palette_with_transparency(suffix):
  image = Image.new('P', (4, 4), 1)
  image.putpalette([*RED, *BLUE])
  image.paste(0, (0, 0, 4, 2))
  pixels = decode(encoded(image, suffix, transparency=0))
  assert (pixels[:2] == WHITE).all()
  assert (pixels[2:] == BLUE).all()


def test_palette_with_an_alpha_for_every_entry():
  image = Image.new('P', (4, 4), 1)
  image.putpalette([*RED, *BLUE])
  image.paste(0, (0, 0, 4, 2))
  pixels = decode(encoded(image, transparency=bytes([0, 255])))
  assert (pixels[:2] == WHITE).all()
  assert (pixels[2:] == BLUE).all()


@pytest.mark.parametrize(('mode', 'colour'), [('RGB', RED), ('L', 7), ('1', 0)])
def test_a_transparent_colour(mode, colour):
  image = Image.new(mode, (4, 4), colour)
  assert (decode(encoded(image, transparency=colour)) == 255).all()


def test_palette_without_transparency():
  image = halves(RED, BLUE).convert('P', palette=Image.Palette.ADAPTIVE, colors=2)
  pixels = decode(encoded(image))
  assert (pixels[:, :2] == RED).all()
  assert (pixels[:, 2:] == BLUE).all()


def test_grey_and_one_bit():
  assert decode(encoded(Image.new('L', (4, 4), 77))).tolist() == [[[77] * 3] * 4] * 4
  pixels = decode(encoded(halves(0, 1, '1')))
  assert (pixels[:, :2] == 0).all()
  assert (pixels[:, 2:] == 255).all()


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_16_bit_grey_is_not_clipped(suffix):
  image = Image.fromarray(np.array([[0, 255, 256, 32768], [65535] * 4] * 2, np.uint16))
  assert image.mode == 'I;16'
  pixels = decode(encoded(image, suffix))
  assert pixels[..., 0].tolist() == [[0, 0, 1, 128], [255] * 4] * 2


GREY_32 = {  # largest value of an image: the 8-bit values of 0, 7, 200 and itself
  255: [0, 7, 200, 255],
  256: [0, 0, 12, 16],
  4095: [0, 0, 12, 255],
  4096: [0, 0, 0, 16],
  65535: [0, 0, 0, 255],
}


@pytest.mark.parametrize('largest', GREY_32)
def test_32_bit_grey_has_the_smallest_range_that_holds_its_values(largest):
  image = Image.fromarray(np.array([[0, 7, 200, largest]] * 4, np.int32))
  assert image.mode == 'I'
  assert decode(encoded(image, 'tif'))[0, :, 0].tolist() == GREY_32[largest]


@pytest.mark.parametrize('values', [(0, 65536), (-1, 255), (-(2**31), 2**31 - 1)])
def test_32_bit_grey_of_no_usual_range(values):
  data = encoded(Image.fromarray(np.array([values] * 2, np.int32)), 'tif')
  message = f'32-bit pixels from {values[0]} to {values[1]} have no fixed range: save it as 16-bit'
  with pytest.raises(decoding.Unreadable, match=message):
    decode(data)


def test_12_bit_tiff():
  """Pillow reads it and cannot write it: two samples in three bytes, upper bits first."""
  values = np.array([[0, 15, 16, 4095]] * 4)
  bits = ''.join(f'{v:012b}' for v in values.flat)
  data = int(bits, 2).to_bytes(len(bits) // 8, 'big')
  pixels = decode(tiff(data, {258: 12}))
  assert pixels[..., 0].tolist() == [[0, 0, 1, 255]] * 4


def tiff(data, tags):
  """An uncompressed little-endian grey TIFF of 4x4 pixels, whose tags hold one short each."""
  tags = {256: 4, 257: 4, 259: 1, 262: 1, 273: 8, 277: 1, 278: 4, 279: len(data)} | tags
  entries = b''.join(struct.pack('<HHIHH', tag, 3, 1, tags[tag], 0) for tag in sorted(tags))
  directory = struct.pack('<H', len(tags)) + entries + bytes(4)
  return b'II*\0' + struct.pack('<I', 8 + len(data)) + data + directory


def test_a_tiff_that_declares_its_largest_value_has_that_range():
  data = np.array([[0, 15, 16, 4095]] * 4, '<u2').tobytes()
  assert decode(tiff(data, {258: 16, 281: 4095}))[0, :, 0].tolist() == [0, 0, 1, 255]
  assert decode(tiff(data, {258: 16, 281: 1000}))[0, :, 0].tolist() == [0, 0, 0, 15]  # it does not
  assert decode(tiff(data, {258: 16}))[0, :, 0].tolist() == [0, 0, 0, 15]


def test_signed_16_bit_tiff():
  data = np.array([[-5, 0, 128, 32767]] * 4, '<i2').tobytes()
  assert decode(tiff(data, {258: 16, 339: 2}))[0, :, 0].tolist() == [0, 0, 1, 255]


def png_header(width, height):
  """A PNG that says how large it is, and ends there."""
  data = b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 6, 0, 0, 0)
  header = struct.pack('>I', 13) + data + struct.pack('>I', zlib.crc32(data))
  return b'\x89PNG\r\n\x1a\n' + header + struct.pack('>I', 10) + b'IDAT'


@pytest.mark.parametrize(
  ('side', 'words'), [(13000, '169 megapixels'), (30000, 'over 179 megapixels')]
)
def test_an_image_that_is_too_large_is_refused_by_its_size(side, words):
  with (
    decoding.without_warnings_of_pillow(),
    pytest.raises(
      decoding.Unreadable, match=f'^{words}, and at most 100 are decoded: make it smaller$'
    ),
  ):
    decode(png_header(side, side))


def test_pixels_are_counted_as_they_are_decoded(monkeypatch):
  taken = []
  monkeypatch.setattr(decoding, '_budget', decoding.PixelBudget(640 * 480 // 2))
  take = decoding.PixelBudget.take
  monkeypatch.setattr(
    decoding.PixelBudget, 'take', lambda self, n: taken.append(n) or take(self, n)
  )
  photo = Image.new('RGB', (640, 480), RED)
  decode(encoded(photo, 'jpg'), 16)  # at an eighth of the size
  decode(encoded(photo, 'jpg', progressive=True), 16)  # whose coefficients are all in memory
  assert taken == [80 * 60, 640 * 480 // 2]
  with pytest.raises(decoding.Unreadable, match='megapixels'):
    decode(encoded(photo), 16)
  assert taken[2] == 640 * 480


def test_threads_share_the_budget():
  budget, inside, most = decoding.PixelBudget(10), [], []
  entered, go_on = threading.Semaphore(0), threading.Event()

  def work(pixels):
    with budget.take(pixels):
      inside.append(pixels)
      most.append(sum(inside))
      entered.release()
      go_on.wait(10)
      inside.remove(pixels)

  threads = [threading.Thread(target=work, args=[n]) for n in (6, 4, 5, 10, 1)]
  for thread in threads[:2]:
    thread.start()
    assert entered.acquire(timeout=10)
  for thread in threads[2:]:
    thread.start()
  assert not entered.acquire(timeout=0.1)  # the budget is used up
  go_on.set()
  for thread in threads:
    thread.join(10)
  assert len(most) == 5
  assert max(most) == 10
  with pytest.raises(decoding.Unreadable), budget.take(11):
    pass
  with pytest.raises(KeyError), budget.take(10):
    raise KeyError
  with budget.take(10):  # an error gives back what it took
    pass


def test_cmyk():
  ink = Image.new('CMYK', (16, 16), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
  assert decode(encoded(ink, 'tif'), 16)[0, 0].tolist() == [255, 0, 0]
  assert abs(decode(encoded(ink, 'jpg', quality=95), 16)[0, 0].astype(int) - RED).max() < 6


def test_animated_gif_gives_its_first_frame():
  frames = [Image.new('RGB', (4, 4), colour) for colour in (RED, BLUE, WHITE)]
  data = encoded(frames[0], 'gif', save_all=True, append_images=frames[1:])
  assert Image.open(io.BytesIO(data)).n_frames == 3
  assert (decode(data) == RED).all()


def test_phone_jpegs_that_hold_several_pictures():
  first, second = Image.new('RGB', (16, 16), RED), Image.new('RGB', (16, 16), BLUE)
  data = encoded(first, 'mpo', save_all=True, append_images=[second], quality=95)
  assert abs(decode(data).astype(int) - RED).max() < 6


def test_floating_point_pixels_are_refused():
  data = encoded(Image.fromarray(np.full((4, 4), 0.5, np.float32)), 'tif')
  with pytest.raises(decoding.Unreadable, match='floating-point pixels have no fixed range'):
    decode(data)


def test_one_channel():
  pixels = decode(encoded(Image.new('L', (4, 4), 9)), channels=1)
  assert pixels.shape == (4, 4, 1)
  assert (pixels == 9).all()


@pytest.mark.parametrize('size', [(8, 4), (4, 8), (9, 4)])
def test_centre_crop(size):
  ramp = np.broadcast_to(np.arange(size[0], dtype=np.uint8) * 10, size[::-1])
  if size[1] > size[0]:
    ramp = np.broadcast_to(np.arange(size[1], dtype=np.uint8)[:, None] * 10, size[::-1])
  pixels = decode(encoded(Image.fromarray(np.ascontiguousarray(ramp))))[..., 0]
  left, top = ((n - 4) // 2 for n in size)
  assert pixels.tolist() == ramp[top : top + 4, left : left + 4].tolist()


def test_shrinking_filters_and_equals_scaling_before_cropping():
  checks = np.indices((64, 96)).sum(0) % 2 * 255
  pixels = decode(encoded(Image.fromarray(checks.astype(np.uint8))), 8)
  assert abs(pixels.astype(int) - 127).max() <= 2  # without a filter: 0 or 255
  noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
  first = Image.fromarray(noise).resize((12, 8), Image.Resampling.BICUBIC)
  expected = np.asarray(first.crop((2, 0, 10, 8))).astype(int)
  # the columns next to the cut see no neighbours beyond it
  assert abs(decode(encoded(Image.fromarray(noise)), 8)[:, 2:-2] - expected[:, 2:-2]).max() <= 1


def test_a_small_image_is_enlarged():
  assert decode(encoded(Image.new('RGB', (2, 3), RED)), 8).shape == (8, 8, 3)


def test_a_large_photo_is_decoded_small_but_the_same():
  x, y = np.meshgrid(np.linspace(0, 255, 640), np.linspace(0, 255, 480))
  photo = Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))
  whole = np.asarray(photo.crop((80, 0, 560, 480)).resize((16, 16), Image.Resampling.BICUBIC))
  found = decode(encoded(photo, 'jpg', quality=95), 16)
  assert abs(found.astype(int) - whole).max() <= 3


def broken_files():
  noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
  jpeg, png = encoded(noise, 'jpg'), encoded(noise)
  return {
    'zero byte': (b'', 'empty file'),
    'truncated jpeg': (jpeg[: len(jpeg) // 2], 'truncated'),
    'truncated png': (png[: len(png) // 2], 'truncated|broken'),
    'header only': (jpeg[:20], 'OSError|not an image|truncated'),
    'text': (b'<html>404 Not Found</html>', 'not an image of a known format'),
    'damaged png': (png[:60] + b'\0' * 40 + png[100:], 'broken|decod|CRC|checksum'),
  }


@pytest.mark.parametrize('kind', broken_files())
def test_broken_files_are_unreadable(kind):
  data, reason = broken_files()[kind]
  with pytest.raises(decoding.Unreadable, match=reason):
    decode(data, 32)


def test_other_formats_are_not_run():
  postscript = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n'
  with pytest.raises(decoding.Unreadable, match='not an image of a known format'):
    decode(postscript)


# ---- DigitsSource


def test_digits():
  from sklearn.datasets import load_digits

  digits, source = load_digits(), sources.DigitsSource()
  assert len(source) == len(source.names) == len(set(source.names)) == 1797
  assert source.class_names == tuple('0123456789')
  assert source.labels.tolist() == digits.target.tolist()
  assert source.labels.dtype == np.int32
  assert source.groups is None
  item = source[5]
  assert item['image'].shape == source.image_shape == (8, 8, 1)
  assert item['image'].dtype == np.uint8
  assert item['image'][..., 0].tolist() == np.rint(digits.images[5] * 15.9375).tolist()
  assert item['label'] == digits.target[5]
  assert item['sha256'] == hashlib.sha256(item['image'].tobytes()).digest()
  assert [i['label'] for i in source.read([3, 5])] == digits.target[[3, 5]].tolist()
  assert source.fingerprint == sources.DigitsSource().fingerprint


# ---- ImageFolderSource


@pytest.fixture
def folder(tmp_path):
  """CLASS/file: two classes and three good images, whose order differs from that of any listing."""
  root = tmp_path / 'photos'
  for name, colour in (('b/2.png', BLUE), ('b/10.JPG', RED), ('a/deep/er/1.tiff', WHITE)):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    suffix = 'jpg' if name.endswith('JPG') else 'png'  # the suffix of a file is not believed
    (root / name).write_bytes(encoded(Image.new('RGB', (6, 5), colour), suffix))
  return root


def open_folder(root, image_size=4, **options):
  return image_folder.ImageFolderSource(root, image_size, **options)


def test_folder_order_labels_and_items(folder):
  source = open_folder(folder)
  assert len(source) == 3
  assert source.name == 'photos'
  assert source.class_names == ('a', 'b')
  assert source.names == ('a/deep/er/1.tiff', 'b/10.JPG', 'b/2.png')
  assert source.labels.tolist() == [0, 1, 1]
  assert source.labels.dtype == np.int32
  assert source.groups is None
  assert not source.strict
  assert source.image_shape == (4, 4, 3)
  assert (source[2]['image'] == BLUE).all()
  assert source[2]['label'] == 1
  expected = hashlib.sha256((folder / 'b/2.png').read_bytes()).digest()
  assert source[2]['sha256'] == expected
  assert [(i['image'][0, 0].tolist(), i['label']) for i in source.read([0, 2])] == [
    ([*WHITE], 0),
    ([*BLUE], 1),
  ]


def test_order_does_not_depend_on_the_file_system(folder, monkeypatch):
  expected = open_folder(folder).names
  walk, iterdir = os.walk, pathlib.Path.iterdir

  def backwards(top, **options):
    for parent, folders, files in walk(top, **options):
      folders.sort(reverse=True)
      yield parent, folders, sorted(files, reverse=True)

  monkeypatch.setattr(os, 'walk', backwards)
  monkeypatch.setattr(pathlib.Path, 'iterdir', lambda p: iter(sorted(iterdir(p), reverse=True)))
  assert open_folder(folder).names == expected


def test_accents_are_spelt_one_way(tmp_path):
  for form in ('NFC', 'NFD'):
    for name in ('Zebra', unicodedata.normalize(form, 'Été')):
      (tmp_path / form / name).mkdir(parents=True)
      (tmp_path / form / name / unicodedata.normalize(form, 'é.png')).write_bytes(b'x')
  found = [open_folder(tmp_path / form) for form in ('NFC', 'NFD')]
  assert found[0].names == found[1].names
  assert found[0].class_names == found[1].class_names == ('Zebra', 'Été')


@pytest.mark.parametrize('suffix', ['jpg', 'jpeg', 'png', 'bmp', 'gif', 'webp', 'tif', 'tiff'])
def test_every_suffix_in_any_case(folder, suffix):
  (folder / f'a/x.{suffix}').write_bytes(b'x')
  (folder / f'a/y.{suffix.upper()}').write_bytes(b'x')
  assert {f'a/x.{suffix}', f'a/y.{suffix.upper()}'} < set(open_folder(folder).names)


def test_broken_files_stay_candidates_and_say_why(folder):
  (folder / 'a/0.png').write_bytes(b'')
  (folder / 'a/gone.png').symlink_to(folder / 'nowhere.png')
  source = open_folder(folder)
  assert len(source) == 5
  with pytest.raises(decoding.Unreadable, match='empty file'):
    source[0]
  items = source.read(range(5))
  assert [isinstance(item, decoding.Unreadable) for item in items] == [
    True,
    False,
    True,
    False,
    False,
  ]
  assert str(items[2]) == 'No such file or directory'
  assert source.fingerprint


def test_a_failing_disk_is_not_a_bad_image(folder, monkeypatch):
  def failing(path):
    raise OSError(5, 'Input/output error', str(path))

  source = open_folder(folder)
  monkeypatch.setattr(pathlib.Path, 'read_bytes', failing)
  with pytest.raises(UserError, match=r'to read .*1\.tiff; found .*Input/output.*check the disk'):
    source[0]


def test_fingerprint_changes_with_files_and_decoding(folder):
  first = open_folder(folder).fingerprint
  assert first == open_folder(folder).fingerprint
  found = {first, open_folder(folder, 5).fingerprint}
  (folder / 'b/3.png').write_bytes(b'x')
  found.add(open_folder(folder).fingerprint)
  (folder / 'b/3.png').rename(folder / 'b/4.png')
  found.add(open_folder(folder).fingerprint)
  assert len(found) == 4
  assert [path.name for path in open_folder(folder).files] == [
    '1.tiff',
    '10.JPG',
    '2.png',
    '4.png',
  ]


def test_fingerprint_changes_with_the_decoder(folder, monkeypatch):
  first = open_folder(folder).fingerprint
  monkeypatch.setattr(decoding, 'DECODING_VERSION', -1)
  assert open_folder(folder).fingerprint != first


@pytest.mark.parametrize('image_size', [0, -1])
def test_image_size_of_a_folder(folder, image_size):
  with pytest.raises(UserError, match='image_size of at least 1 pixel'):
    open_folder(folder, image_size)


# ---- manifest


def write_manifest(folder, text, encoding='utf-8'):
  path = folder.parent / 'manifest.csv'
  path.write_text(text, encoding=encoding)
  return {'manifest': path, 'group_column': 'dup'}


def test_manifest_groups(folder):
  (folder / 'b/3.png').write_bytes(b'x')
  text = 'file,dup\nb/2.png, twins \na/deep/er/1.tiff,twins\nb/3.png,\n'  # b/10.JPG has no row
  groups = open_folder(folder, **write_manifest(folder, text)).groups
  assert groups.dtype == np.int64
  assert groups.tolist() == [0, 1, 0, 2]  # 1.tiff, 10.JPG, 2.png, 3.png


def test_a_group_named_like_a_position_is_another_group(folder):
  groups = open_folder(folder, **write_manifest(folder, 'file,dup\nb/2.png,1\n')).groups
  assert len(set(groups.tolist())) == 3


def test_manifest_from_a_spreadsheet_on_windows(folder):
  text = 'dup,path\r\n7,b\\2.png\r\n7,./b/10.JPG\r\n'
  options = write_manifest(folder, text, encoding='utf-8-sig') | {'file_column': 'path'}
  assert open_folder(folder, **options).groups.tolist() == [0, 1, 1]
  options = write_manifest(folder, 'path,dup\nb/2.png,7\n', 'utf-8-sig') | {'file_column': 'path'}
  assert open_folder(folder, **options).groups.tolist() == [0, 1, 2]


def test_manifest_is_part_of_the_fingerprint(folder):
  plain = open_folder(folder).fingerprint
  grouped = open_folder(folder, **write_manifest(folder, 'file,dup\nb/2.png,1\n')).fingerprint
  pair = open_folder(
    folder, **write_manifest(folder, 'file,dup\nb/2.png,1\nb/10.JPG,1')
  ).fingerprint
  assert len({plain, grouped, pair}) == 3


def test_manifest_named_relative_to_the_folder(folder, tmp_path, monkeypatch):
  """A config need not contain the folder of the photos; a path from elsewhere works too."""
  pair, alone = 'file,dup\nb/2.png,7\nb/10.JPG,7\n', 'file,dup\nb/2.png,7\n'
  (folder / 'lists').mkdir()
  (folder / 'lists/dup.csv').write_text(pair)
  (folder / 'lists/1.png').write_bytes((folder / 'b/2.png').read_bytes())  # a class of its own
  (folder / 'dup.csv').write_text(pair)
  elsewhere = tmp_path / 'elsewhere'
  elsewhere.mkdir()
  monkeypatch.chdir(elsewhere)

  def groups(manifest):
    return open_folder(folder, manifest=manifest, group_column='dup').groups.tolist()

  assert groups('dup.csv') == groups('lists/dup.csv') == [0, 1, 1, 2]
  assert groups(folder / 'dup.csv') == groups(str(folder / 'dup.csv')) == [0, 1, 1, 2]
  (elsewhere / 'dup.csv').write_text(alone)
  assert groups('dup.csv') == [0, 1, 1, 2]  # the folder's comes first
  assert groups(str(elsewhere / 'dup.csv')) == [0, 1, 2, 3]
  (folder / 'dup.csv').unlink()
  assert groups('dup.csv') == [0, 1, 2, 3]
  (elsewhere / 'dup.csv').unlink()
  with pytest.raises(UserError, match='a CSV file at dup.csv; found .*No such file'):
    groups('dup.csv')


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('file,group\nb/2.png,1\n', 'columns file and dup in .*; found no dup among file, group'),
    ('path,group\nb/2.png,1\n', 'found no file and no dup among path, group'),
    ('', 'columns file and dup'),
    (
      'file,dup\nb/2.png,1\nb/9.png,1\n2.png,1\n',
      r"found 2 that match none, such as '2\.png'; .*like 'a/deep/er/1\.tiff'",
    ),
    ('file,dup\nb/2.png,1\nb/2.png,2\n', r'one row for a file .* found two for b/2\.png'),
    ('file,dup\n"b/2.png,\0', 'a CSV file|match none'),
  ],
)
def test_manifest_errors(folder, text, message):
  with pytest.raises(UserError, match=message):
    open_folder(folder, **write_manifest(folder, text))


def test_manifest_missing_or_not_text(folder):
  options = write_manifest(folder, '')
  options['manifest'].write_bytes(b'\xff\xfe\0\xff')
  with pytest.raises(UserError, match=r'a CSV file at .*; found .*decode'):
    open_folder(folder, **options)
  options['manifest'].unlink()
  with pytest.raises(UserError, match=r'a CSV file at .*; found .*No such file'):
    open_folder(folder, **options)


def test_manifest_and_group_column_go_together(folder):
  options = write_manifest(folder, 'file,dup\n')
  with pytest.raises(UserError, match=r'data\.manifest together with data\.group_column'):
    open_folder(folder, manifest=options['manifest'])
  with pytest.raises(UserError, match=r"found manifest '' and group_column 'dup'"):
    open_folder(folder, group_column='dup')


def test_real_photos(photo_folder):
  manifest = os.path.join(photo_folder, 'manifest.csv')
  source = open_folder(photo_folder, 64, manifest=manifest, group_column='dup_group')
  assert np.bincount(source.labels).tolist() == [207, 189, 188, 102, 69, 123]
  assert len(np.unique(source.groups)) == 878 - 164
  assert source[877]['image'].shape == (64, 64, 3)
  assert source[877]['image'].std() > 10


# ---- TfdsSource


def write_tfds(
  root, records, *, name='tiny', shape=(4, 4, 3), file_format='array_record', **changes
):
  """A prepared TFDS set without TensorFlow: train holds the records, test the first of them.

  Args:
    root: the data_dir.
    records: dicts of feature values, bytes or int.
    shape: of the image feature; None for a dimension that varies.
    changes: 'features' and 'info' replace entries of the JSON files, 'alternatives' adds formats.
  """
  from array_record.python import array_record_module
  from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

  folder = root / name / changes.get('version', '1.0.0')
  folder.mkdir(parents=True)
  splits = {'train': records, 'test': records[:1]}
  for split, members in splits.items():
    path = folder / f'{name.split("/")[0]}-{split}.array_record-00000-of-00001'
    writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
    for record in members:
      features = {
        key: tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[value]))
        if isinstance(value, bytes)
        else tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=[value]))
        for key, value in record.items()
      }
      example = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features))
      writer.write(example.SerializeToString())
    writer.close()
  module = 'tensorflow_datasets.core.features.'
  dimensions = [str(-1 if n is None else n) for n in shape]
  features = {
    'image': {
      'pythonClassName': module + 'image_feature.Image',
      'image': {'dtype': 'uint8', 'shape': {'dimensions': dimensions}, 'encodingFormat': 'png'},
    },
    'label': {
      'pythonClassName': module + 'class_label_feature.ClassLabel',
      'classLabel': {'numClasses': '2'},
    },
    'id': {'pythonClassName': module + 'text_feature.Text', 'text': {}},
  } | changes.get('features', {})
  features = {key: value for key, value in features.items() if key in records[0]}
  (folder / 'features.json').write_text(
    json.dumps(
      {
        'pythonClassName': module + 'features_dict.FeaturesDict',
        'featuresDict': {'features': features},
      }
    )
  )
  pair = [{'featureKey': 'image'}, {'featureKey': 'label'}]
  info = {
    'name': name.split('/')[0],
    'version': folder.name,
    'fileFormat': file_format,
    'alternativeFileFormats': changes.get('alternatives', []),
    'supervisedKeys': {'tuple': {'items': pair}},
    'splits': [
      {
        'name': split,
        'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
        'numBytes': '100',
        'shardLengths': [str(len(members))],
      }
      for split, members in splits.items()
    ],
  } | changes.get('info', {})
  (folder / 'dataset_info.json').write_text(
    json.dumps({key: value for key, value in info.items() if value is not None})
  )
  for key in ('label', 'second'):
    (folder / f'{key}.labels.txt').write_text('cat\ndog\n')
  return folder


def records(images, suffix='png', **options):
  return [
    {'image': encoded(image, suffix, **options), 'label': i % 2, 'id': f'id_{i}'.encode()}
    for i, image in enumerate(images)
  ]


PICTURES = [
  Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)) for i in range(5)
]


def open_tfds(root, name='tiny', split='train', **options):
  return tfds_source.TfdsSource(name, split, str(root), **options)


def test_png_records_keep_their_pixels(tmp_path):
  write_tfds(tmp_path, records(PICTURES))
  source = open_tfds(tmp_path)
  assert len(source) == 5
  assert source.name == 'tiny-train'
  assert source.class_names == ('cat', 'dog')
  assert source.labels.tolist() == [0, 1, 0, 1, 0]
  assert source.labels.dtype == np.int32
  assert source.names == ('id_0', 'id_1', 'id_2', 'id_3', 'id_4')
  assert source.image_shape == (4, 4, 3)
  assert source.groups is None
  for i in range(5):
    item = source[np.int64(i)]
    assert item['image'].tolist() == np.asarray(PICTURES[i]).tolist()
    assert item['sha256'] == hashlib.sha256(encoded(PICTURES[i])).digest()
    assert source[i]['label'] == i % 2
  assert [item['label'] for item in source.read([3, 0])] == [1, 0]


def test_image_size_of_the_set_itself_changes_nothing(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6
  write_tfds(tmp_path, records(PICTURES, exif=exif))
  assert open_tfds(tmp_path, image_size=4)[1]['image'].tolist() == np.asarray(PICTURES[1]).tolist()


def test_jpeg_records(tmp_path):
  write_tfds(tmp_path, records([halves(RED, BLUE, size=(16, 16))], 'jpg'), shape=(16, 16, 3))
  assert abs(open_tfds(tmp_path)[0]['image'][:, :6].astype(int) - RED).max() < 10


def test_one_channel_records_stay_so(tmp_path):
  write_tfds(tmp_path, records([Image.new('L', (4, 4), 200)]), shape=(4, 4, 1))
  source = open_tfds(tmp_path)
  assert source[0]['image'].tolist() == [[[200]] * 4] * 4
  assert open_tfds(tmp_path, image_size=2)[0]['image'].shape == (2, 2, 1)


def test_grey_jpegs_in_a_colour_set(tmp_path):
  write_tfds(tmp_path, records([Image.new('L', (4, 4), 200)]))
  assert open_tfds(tmp_path)[0]['image'].tolist() == [[[200] * 3] * 4] * 4


def test_images_of_several_sizes_need_an_image_size(tmp_path):
  pictures = [Image.new('RGB', (6, 4), RED), Image.new('RGB', (3, 9), BLUE)]
  write_tfds(tmp_path, records(pictures), shape=(None, None, 3))
  with pytest.raises(UserError, match=r'an image_size for tiny, whose images have several sizes'):
    open_tfds(tmp_path)
  source = open_tfds(tmp_path, image_size=4)
  assert source.image_shape == (4, 4, 3)
  assert (source[1]['image'] == BLUE).all()


def test_names_without_ids(tmp_path):
  write_tfds(tmp_path, [{k: r[k] for k in ('image', 'label')} for r in records(PICTURES)])
  assert open_tfds(tmp_path).names[4] == 'train/000004'


def test_splits_and_slices(tmp_path):
  write_tfds(tmp_path, records(PICTURES))
  assert len(open_tfds(tmp_path, split='test')) == 1
  assert open_tfds(tmp_path, split='train[40%:]').names == ('id_2', 'id_3', 'id_4')
  found = {open_tfds(tmp_path, split=s).fingerprint for s in ('train', 'test', 'train[40%:]')}
  assert len(found) == 3


@pytest.mark.parametrize('split', ['validation', 'train[', 'train[2:2]', ''])
def test_unknown_or_empty_split(tmp_path, split):
  write_tfds(tmp_path, records(PICTURES))
  with pytest.raises(UserError, match=r'a split of tiny/1\.0\.0: train, test, or a slice .* found'):
    open_tfds(tmp_path, split=split)


def test_fingerprint_of_a_set(tmp_path):
  folder = write_tfds(tmp_path, records(PICTURES))
  found = {open_tfds(tmp_path).fingerprint, open_tfds(tmp_path, image_size=2).fingerprint}
  assert open_tfds(tmp_path).fingerprint in found
  (folder / 'label.labels.txt').write_text('dog\ncat\n')
  found.add(open_tfds(tmp_path).fingerprint)
  shard = folder / 'tiny-train.array_record-00000-of-00001'
  assert open_tfds(tmp_path).files == (shard,)
  assert len(found) == 3


def test_newest_version_a_named_version_and_configurations(tmp_path):
  write_tfds(tmp_path, records(PICTURES[:1]), version='9.0.0')
  write_tfds(tmp_path, records(PICTURES), version='10.0.0')
  assert len(open_tfds(tmp_path)) == 5
  assert len(open_tfds(tmp_path, 'tiny:9.0.0')) == 1
  write_tfds(tmp_path, records(PICTURES[:2]), name='set/one', info={'configName': 'one'})
  assert len(open_tfds(tmp_path, 'set')) == len(open_tfds(tmp_path, 'set/one:1.0.0')) == 2
  write_tfds(tmp_path, records(PICTURES[:3]), name='set/two', info={'configName': 'two'})
  assert len(open_tfds(tmp_path, 'set/two')) == 3
  with pytest.raises(
    UserError, match=r'one configuration of set in .* found one, two; .* set/CONFIG'
  ):
    open_tfds(tmp_path, 'set')


# what a child process would find as TensorFlow and TFDS
STUB = """
import os, pathlib

class config:
  set_visible_devices = staticmethod(lambda devices, kind: None)

def builder(name, data_dir, file_format):
  if name == 'unheard':
    raise ValueError('no set of this name')
  class Builder:
    def download_and_prepare(self):
      gpus = os.environ['CUDA_VISIBLE_DEVICES']
      pathlib.Path(data_dir, 'asked').write_text(f'{name} {file_format} {gpus}')
  return Builder()
"""


# what it would find as pip, where there is no TensorFlow
STUB_OF_PIP = """
import pathlib, shutil, sys
(target,) = [a.removeprefix('--target=') for a in sys.argv if a.startswith('--target=')]
shutil.copytree(pathlib.Path(__file__).with_name('packages'), target, dirs_exist_ok=True)
pathlib.Path(__file__).with_name('installed').write_text(' '.join(sys.argv[1:]))
"""


@pytest.fixture
def stubs(tmp_path, monkeypatch):
  """A folder of packages with TensorFlow for child processes, and how this process sees it."""
  packages, seen = tmp_path / 'stubs' / 'packages', tmp_path / 'seen'
  for folder, names in ((packages, ('tensorflow', 'tensorflow_datasets')), (seen, ('tensorflow',))):
    folder.mkdir(parents=True)
    for name in names:
      (folder / f'{name}.py').write_text(STUB)
  (packages.parent / 'pip.py').write_text(STUB_OF_PIP)
  monkeypatch.setenv('PYTHONPATH', str(packages))
  monkeypatch.syspath_prepend(seen)
  return packages


def test_an_absent_set_is_prepared_as_array_record_off_the_accelerator(tmp_path, stubs):
  tfds_source.prepare('cifar10', str(tmp_path))
  assert (tmp_path / 'asked').read_text() == 'cifar10 array_record -1'


def test_without_tensorflow_one_is_put_where_it_changes_nothing(tmp_path, stubs, monkeypatch):
  monkeypatch.setenv('PYTHONPATH', str(stubs.parent))
  (tmp_path / 'seen' / 'tensorflow.py').unlink()
  importlib.invalidate_caches()
  if importlib.util.find_spec('tensorflow') is not None:
    pytest.skip('TensorFlow is installed')
  tfds_source.prepare('cifar10', str(tmp_path))
  assert (tmp_path / 'asked').read_text() == 'cifar10 array_record -1'
  words = (stubs.parent / 'installed').read_text().split()
  (target,) = [word.partition('=')[2] for word in words if word.startswith('--target=')]
  assert not pathlib.Path(target).exists()  # gone with the work


def test_a_prepared_set_is_left_alone(tmp_path, stubs, monkeypatch):
  write_tfds(tmp_path, records(PICTURES))
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  tfds_source.prepare('tiny')
  assert not (tmp_path / 'asked').exists()


def test_a_set_that_cannot_be_prepared_is_one_line(tmp_path, stubs):
  message = (
    r'TFDS set unheard, downloaded and .*; found ValueError: no set of this name; .*tfds build'
  )
  with pytest.raises(UserError, match=message):
    tfds_source.prepare('unheard', str(tmp_path))


@pytest.mark.parametrize('name', ['tiny', 'tiny:2.0.0', 'tiny/config'])
def test_an_absent_set_names_folder_and_command(tmp_path, name):
  write_tfds(tmp_path / 'here', records(PICTURES), name='tiny' if ':' in name else 'other')
  message = (
    rf'TFDS set {name} prepared as array_record in .*/here; found no such set there; .*'
    rf'tfds build {name} --file_format=array_record --data_dir=.*/here '
  )
  with pytest.raises(UserError, match=message):
    open_tfds(tmp_path / 'here', name)
  with pytest.raises(UserError, match=r'in .*/nowhere; found no such folder'):
    open_tfds(tmp_path / 'nowhere', name)


def test_a_name_that_is_no_name(tmp_path):
  with pytest.raises(UserError, match=r"a TFDS name: .* found '\.\./\.\./etc'"):
    open_tfds(tmp_path, '../../etc')


def test_data_dir_comes_from_the_environment(tmp_path, monkeypatch):
  write_tfds(tmp_path / 'env', records(PICTURES))
  write_tfds(tmp_path / 'home/tensorflow_datasets', records(PICTURES[:2]))
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'env'))
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  assert len(tfds_source.TfdsSource('tiny', 'train')) == 5
  monkeypatch.delenv('TFDS_DATA_DIR')
  assert len(tfds_source.TfdsSource('tiny', 'train')) == 2


def test_another_file_format(tmp_path):
  write_tfds(tmp_path, records(PICTURES), file_format='tfrecord')
  message = (
    r'tiny as array_record in .*1\.0\.0, the only format .* found tfrecord; .*'
    r'tfds convert_format --dataset_version_dir=.*1\.0\.0 --out_file_format=array_record'
  )
  with pytest.raises(UserError, match=message):
    open_tfds(tmp_path)


def test_array_record_beside_another_format(tmp_path):
  write_tfds(tmp_path, records(PICTURES), file_format='tfrecord', alternatives=['array_record'])
  assert open_tfds(tmp_path)[2]['image'].tolist() == np.asarray(PICTURES[2]).tolist()


def test_features_other_than_one_image_and_one_label(tmp_path):
  label = {
    'pythonClassName': 'tensorflow_datasets.core.features.class_label_feature.ClassLabel',
    'classLabel': {'numClasses': '2'},
  }
  two = [record | {'second': 1} for record in records(PICTURES)]
  options = {'features': {'second': label}}
  write_tfds(tmp_path / 'pair', two, **options)
  assert open_tfds(tmp_path / 'pair').labels.tolist() == [0, 1, 0, 1, 0]  # the supervised pair
  write_tfds(tmp_path / 'none', two, info={'supervisedKeys': None}, **options)
  with pytest.raises(UserError, match=r"images \['image'\] and class labels \['label', 'second'\]"):
    open_tfds(tmp_path / 'none')
  write_tfds(tmp_path / 'only', records(PICTURES), info={'supervisedKeys': None})
  assert len(open_tfds(tmp_path / 'only')) == 5


def test_images_of_16_bit(tmp_path):
  image = {
    'pythonClassName': 'tensorflow_datasets.core.features.image_feature.Image',
    'image': {'dtype': 'uint16', 'shape': {'dimensions': ['4', '4', '1']}},
  }
  write_tfds(tmp_path, records(PICTURES), features={'image': image})
  with pytest.raises(UserError, match='uint8 images in tiny; found uint16'):
    open_tfds(tmp_path)


def test_records_without_a_label(tmp_path):
  write_tfds(tmp_path, [record | {'label': -1} for record in records(PICTURES)])
  with pytest.raises(UserError, match='a label for every image of tiny-train; found 5 without one'):
    _ = open_tfds(tmp_path).labels


def test_an_image_of_another_shape_than_declared(tmp_path):
  write_tfds(tmp_path, records([*PICTURES, Image.new('RGB', (5, 4))]))
  found = open_tfds(tmp_path).read([0, 5])
  assert str(found[1]) == 'decodes to (4, 5, 3), but the set declares (4, 4, 3)'


def test_a_missing_shard(tmp_path):
  folder = write_tfds(tmp_path, records(PICTURES))
  (folder / 'tiny-train.array_record-00000-of-00001').unlink()
  with pytest.raises(
    UserError, match=r'all 1 files of tiny/1\.0\.0 train; found 1 missing, such as'
  ):
    open_tfds(tmp_path)


@pytest.mark.parametrize('keep', [0, 100, -1, -5000])
def test_a_truncated_shard(tmp_path, keep):
  folder = write_tfds(tmp_path, records(PICTURES))
  shard = folder / 'tiny-train.array_record-00000-of-00001'
  shard.write_bytes(shard.read_bytes()[:keep])
  with pytest.raises(UserError, match=r'records of tiny-train in .*prepare it again: tfds build'):
    _ = open_tfds(tmp_path).labels


@pytest.mark.parametrize('file', ['dataset_info.json', 'features.json'])
def test_damaged_json(tmp_path, file):
  folder = write_tfds(tmp_path, records(PICTURES))
  (folder / file).write_text('{"nam')
  with pytest.raises(
    UserError, match=r'a prepared TFDS set in .*1\.0\.0; found .*delete the folder'
  ):
    open_tfds(tmp_path)


def test_a_cache_belongs_to_the_content_of_the_shards(tmp_path):
  pictures = {'v1': PICTURES, 'v2': PICTURES[::-1]}
  for version in pictures:
    for path in write_tfds(tmp_path / version, records(pictures[version], 'bmp')).iterdir():
      os.utime(path, (1, 1))
  shards = {v: open_tfds(tmp_path / v).files[0].stat().st_size for v in pictures}
  assert shards['v1'] == shards['v2']
  lines = []
  for version in ('v1', 'v2', 'v1', 'v2'):
    source = open_tfds(tmp_path / version)
    arrays = cache.load_arrays(source, tmp_path / 'cache', lines.append)
    assert arrays.images.tolist() == [np.asarray(image).tolist() for image in pictures[version]]
    assert [s.tobytes() for s in arrays.sums] == [source[i]['sha256'] for i in range(5)]
  assert len([line for line in lines if line.startswith('decoding')]) == 2


def test_real_cifar10(data_root):
  source = tfds_source.TfdsSource('cifar10', 'test', data_root)
  assert len(source) == 10000
  assert np.bincount(source.labels).tolist() == [1000] * 10
  assert source.class_names[3] == 'cat'
  assert source.image_shape == (32, 32, 3)
  assert source[9999]['image'].shape == (32, 32, 3)
  assert len(set(source.names)) == 10000


# ---- in a fresh process

ROOT = pathlib.Path(__file__).parents[2]


def test_import_is_light_and_tensorflow_never_comes(tmp_path):
  write_tfds(tmp_path, records(PICTURES))
  code = (
    'import sys\n'
    'from csba_jax.data import cache, copies, image_folder, rows, sampling, splits, tfds_source\n'
    "heavy = {'PIL', 'sklearn', 'tensorflow_datasets', 'tensorflow', 'jax', 'matplotlib'}\n"
    'assert not heavy & set(sys.modules), heavy & set(sys.modules)\n'
    "source = tfds_source.TfdsSource('tiny', 'train', sys.argv[1])\n"
    'source[0], source.labels, source.fingerprint\n'
    "assert 'tensorflow' not in sys.modules\n"
  )
  subprocess.run([sys.executable, '-c', code, str(tmp_path)], check=True, cwd=ROOT)
