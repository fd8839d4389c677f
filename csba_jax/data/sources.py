"""Where images come from: digits, TFDS sets in array_record, image folders. No TensorFlow."""

import csv
import functools
import hashlib
import io
import os
import pathlib
import re
import shlex
import unicodedata
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from csba_jax.errors import UserError

IMAGE_SUFFIXES = ('.bmp', '.gif', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
PILLOW_FORMATS = ('BMP', 'GIF', 'JPEG', 'PNG', 'TIFF', 'WEBP')
DECODING_VERSION = (
  1  # part of every fingerprint: raise it when the pixels below come out differently
)


class Unreadable(ValueError):
  """One image that cannot be decoded; the message is the reason."""


class Source:
  """Images by index. Subclasses give `__len__`, `__getitem__` and the attributes below.

  source[i] is {'image': uint8 [H, W, channels], 'label': int}. Indices run over candidates: it
  raises Unreadable for an image that cannot be decoded. `data.cache.load_arrays`, which decodes
  each image once, leaves those out and keeps everything else aligned.

  Attributes:
    name: for messages and folder names.
    class_names: C names.
    image_shape: (H, W, channels) of every image.
    labels: [N] int32.
    groups: [N] int64, equal for duplicates; None when every image is on its own.
    names: N names, the same on every machine.
    fingerprint: hex digits that change with the files and the way they are decoded; cheap.
    strict: whether an unreadable image is an error.
  """

  name: str
  class_names: tuple[str, ...]
  image_shape: tuple[int, int, int]
  labels: np.ndarray
  groups: np.ndarray | None = None
  names: tuple[str, ...]
  fingerprint: str
  strict: bool = True

  def read(self, positions: Sequence[int]) -> list[dict | Unreadable]:
    """The items at these positions, with Unreadable in place of those that cannot be decoded."""
    return [_or_unreadable(self.__getitem__, i) for i in positions]


class DigitsSource(Source):
  """The 1,797 handwritten digits of scikit-learn, 8x8: values 0..16 scaled to 0..255."""

  name = 'digits'
  class_names = tuple('0123456789')
  image_shape = (8, 8, 1)

  def __init__(self):
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 16 -> 255; + 0.5 rounds to nearest
    self._images = (digits.images * (255 / 16) + 0.5).astype(np.uint8)[..., None]
    self.labels = digits.target.astype(np.int32)
    self.names = tuple(f'digits/{i:04d}' for i in range(len(self.labels)))

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, i: int) -> dict:
    return {'image': self._images[i], 'label': int(self.labels[i])}

  @property
  def fingerprint(self) -> str:
    """Over the pixels themselves: they are few."""
    return _digest(['digits', DECODING_VERSION, self._images.tobytes(), self.labels.tobytes()])


class TfdsSource(Source):
  """A TFDS image-classification set that was prepared as array_record.

  Pixels are untouched where all images have one size and image_size is 0; else they are turned
  upright, scaled and cropped as in `ImageFolderSource`. 1-channel sets stay 1-channel.

  Args:
    name: 'cifar10', 'cifar10:3.0.2', 'set/config' or 'set/config:1.0.0'; without a version the
      newest one there.
    split: 'train', 'test', or any slice that TFDS understands, such as 'train[:10%]'.
    data_dir: folder of prepared sets; '' means $TFDS_DATA_DIR, else ~/tensorflow_datasets.
    image_size: side of the square to scale and crop to; 0 keeps images of one size as they are.

  Raises:
    UserError: not prepared (with the command that prepares it), another file format, an unknown
      split, no single image and class label, or images of several sizes without image_size.
  """

  def __init__(self, name: str, split: str, data_dir: str = '', image_size: int = 0):
    root = data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
    folder = _prepared_folder(name, pathlib.Path(root).expanduser())
    builder = _array_record_builder(name, folder)
    image_key, self._label_key = _feature_keys(builder.info)
    feature = builder.info.features[image_key]
    self.class_names = tuple(builder.info.features[self._label_key].names)
    self.name = f'{builder.info.name}-{split}'
    self.image_shape, self._image_size = _tfds_image_shape(name, feature, image_size)
    self._image_key = image_key
    self._info, self._folder, self._split = builder.info, folder, split
    self._files = _shards(builder.info, split)
    self._records = _records(builder, split, self._label_key)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, i: int) -> dict:
    return self._decode(self._read([i])[0])

  def read(self, positions: Sequence[int]) -> list[dict | Unreadable]:
    """As `Source.read`; blocks of records come ten times as fast as single ones."""
    return [_or_unreadable(self._decode, record) for record in self._read(positions)]

  @property
  def labels(self) -> np.ndarray:
    """[N] int32; the first use reads all records, without decoding an image."""
    return self._index[0]

  @property
  def names(self) -> tuple[str, ...]:
    """The set's own ids where it has them, else split/position; reads as `labels` does."""
    return self._index[1]

  def _decode(self, record: dict) -> dict:
    """A record as an item of the source."""
    data, channels = record[self._image_key], self.image_shape[-1]
    image = decode_image(data, channels=channels, image_size=self._image_size)
    if image.shape != self.image_shape:
      raise Unreadable(f'decodes to {image.shape}, but the set declares {self.image_shape}')
    return {'image': image, 'label': int(record[self._label_key])}

  def _read(self, positions: Sequence[int]) -> list[dict]:
    """Records with everything but the label undecoded."""
    try:
      return self._records.__getitems__([int(i) for i in positions])
    except Exception as error:  # array_record has no error type of its own for damaged bytes
      raise UserError(
        f'records of {self.name} in {self._folder}',
        f'{type(error).__name__}: {error}',
        f'prepare it again: {_build_command(self._info.name, "DATA_DIR")}',
      ) from error

  @functools.cached_property
  def _index(self) -> tuple[np.ndarray, tuple[str, ...]]:
    """(labels, names), read in blocks."""
    labels, names = np.empty(len(self), np.int32), []
    for start in range(0, len(self), 1000):
      block = range(start, min(start + 1000, len(self)))
      for i, record in zip(block, self._read(block), strict=True):
        labels[i] = record[self._label_key]
        found = record.get('id')
        names.append(found.decode() if isinstance(found, bytes) else f'{self._split}/{i:06d}')
    if labels.min() < 0:  # how TFDS marks what a challenge keeps to itself
      raise UserError(
        f'a label for every image of {self.name}',
        f'{(labels < 0).sum()} without one',
        'choose a split that has labels',
      )
    return labels, tuple(names)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Over name, split, size, classes, both JSON files, and name, size and time of every shard."""
    described = [(self._folder / n).read_bytes() for n in ('dataset_info.json', 'features.json')]
    shards = [(path.name, *_file_state(path)) for path in self._files]
    request = [self._info.full_name, self._split, self._image_size, self.class_names]
    return _digest(['tfds', *_decoder_version(), *request, *described, *shards])


class ImageFolderSource(Source):
  """A folder of CLASS/image files, each made RGB and square.

  Images: the first frame, turned upright by its EXIF, on white where it is transparent, made 8-bit
  RGB, scaled (bicubic, antialiased) so that its shorter side is image_size, cropped to the centre.
  Order: by class name, then by path inside `directory`, as Unicode code points: the same on every
  machine. Files may lie deeper than one level; hidden ones are ignored, as are files of other types
  and links to folders below the class folders.

  Args:
    directory: holds one folder a class; classes are numbered in the order of their names.
    image_size: side of the square.
    strict: an unreadable file is an error; else it is left out and named in `ImageArrays.skipped`.
    manifest: CSV file with duplicate groups; '' means every image is on its own.
    group_column: its column of groups; an empty cell, or no row, means on its own.
    file_column: its column of paths, relative to `directory`.

  Raises:
    UserError: no such folder, fewer than two class folders, a class folder without an image, a
      size below 1, or a manifest that lacks a column or names a file that is not there.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    image_size: int,
    strict: bool = False,
    manifest: str | os.PathLike = '',
    group_column: str = '',
    file_column: str = 'file',
  ):
    if image_size < 1:
      raise UserError('image_size of at least 1 pixel', f'{image_size}', 'set it, such as to 64')
    self.strict = strict
    self._directory = pathlib.Path(directory).expanduser()
    self._paths, self.names, self.labels, self.class_names = _list_images(self._directory)
    self.name = self._directory.resolve().name
    self.image_shape = (image_size, image_size, 3)
    self.groups = None
    if manifest or group_column:
      self.groups = _manifest_groups(manifest, group_column, file_column, self.names)

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, i: int) -> dict:
    size = self.image_shape[0]
    image = decode_image(_read_image(self._paths[i]), channels=3, image_size=size)
    return {'image': image, 'label': int(self.labels[i])}

  @functools.cached_property
  def fingerprint(self) -> str:
    """Over size, groups, and name, length, time and readability of every file."""
    files = [(n, *_file_state(p)) for n, p in zip(self.names, self._paths, strict=True)]
    groups = b'' if self.groups is None else self.groups.tobytes()
    return _digest(
      ['folder', *_decoder_version(), self.image_shape, self.class_names, groups, *files]
    )


def _or_unreadable(decode: Callable[..., dict], argument) -> dict | Unreadable:
  """decode(argument), or the Unreadable that it raises."""
  try:
    return decode(argument)
  except Unreadable as error:
    return error


def decode_image(data: bytes, *, channels: int, image_size: int) -> np.ndarray:
  """Encoded bytes -> uint8 [H, W, channels]; with image_size > 0 upright and square.

  Args:
    data: BMP, GIF (first frame), JPEG, PNG, TIFF or WebP.
    channels: 3 (RGB) or 1 (grey).
    image_size: side of the square; 0 leaves size and orientation alone.

  Raises:
    Unreadable: empty, truncated, no such format, or pixels without a fixed range.
  """
  from PIL import Image, ImageOps, UnidentifiedImageError

  if not data:
    raise Unreadable('empty file')
  try:
    with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
      if image_size:
        # JPEG decodes large photos at 1/2, 1/4, 1/8: faster; twice the size is left to filter.
        image.draft(None, (2 * image_size, 2 * image_size))
        image = ImageOps.exif_transpose(image)
      image = _flatten(image, 'RGB' if channels == 3 else 'L')
      if image_size:
        image = _centre_square(image, image_size)
      pixels = np.array(image)
  except UnidentifiedImageError:
    raise Unreadable('not an image of a known format') from None  # its own text holds an address
  except (Unreadable, MemoryError):
    raise
  except Exception as error:  # Pillow raises a dozen types on damaged files
    raise Unreadable(f'{type(error).__name__}: {error}') from error
  return pixels if channels == 3 else pixels[..., None]


def _flatten(image, mode: str):
  """Any Pillow image as 8-bit 'RGB' or 'L', on white where it is transparent."""
  from PIL import Image

  if image.mode == 'F':
    raise Unreadable('floating-point pixels have no fixed range')
  if image.mode.startswith('I'):  # 16-bit grey, which Pillow would clip at 255: take the high byte
    values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
    image = Image.fromarray((values >> 8).astype(np.uint8))
  if image.mode in ('RGBA', 'RGBa', 'LA', 'La', 'PA') or 'transparency' in image.info:
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image.convert('RGBA'))
  return image.convert(mode)


def _centre_square(image, image_size: int):
  """The central square, scaled: one resampling, the same as scaling first and then cropping."""
  from PIL import Image

  width, height = image.size
  side = min(width, height)
  left, top = (width - side) // 2, (height - side) // 2
  box = (left, top, left + side, top + side)
  return image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)


def _read_image(path: pathlib.Path) -> bytes:
  """The bytes of one file; a failing disk or network drive is no reason to leave images out."""
  try:
    return path.read_bytes()
  except (PermissionError, FileNotFoundError) as error:
    raise Unreadable(error.strerror) from error
  except OSError as error:
    raise UserError(f'to read {path}', str(error), 'check the disk or the network drive') from error


def _list_images(
  directory: pathlib.Path,
) -> tuple[tuple[pathlib.Path, ...], tuple[str, ...], np.ndarray, tuple[str, ...]]:
  """(paths, names relative to the directory, labels int32, class names), in the one order."""
  expected = 'a folder with one folder of images for each class'
  if not directory.is_dir():
    found = f'a file, {directory}' if directory.exists() else f'nothing at {directory}'
    raise UserError(expected, found, 'give the folder that holds the class folders')
  folders = {
    _portable(path.name): path
    for path in directory.iterdir()
    if path.is_dir() and not path.name.startswith('.')
  }
  class_names = tuple(sorted(folders))
  if len(class_names) < 2:
    found = f'only one, {class_names[0]},' if class_names else 'no class folder'
    raise UserError(
      expected,
      f'{found} in {directory}',
      'make it DIRECTORY/CLASS/image.jpg with two classes or more',
    )
  paths, names, labels = [], [], []
  for label, class_name in enumerate(class_names):
    images = {_portable(p.relative_to(directory).as_posix()): p for p in _walk(folders[class_name])}
    if not images:
      raise UserError(
        f'images ({", ".join(IMAGE_SUFFIXES)}) in every class folder',
        f'none in {class_name}',
        'add images to it, or move it out of the way',
      )
    names += sorted(images)
    paths += [images[name] for name in sorted(images)]
    labels += [label] * len(images)
  return tuple(paths), tuple(names), np.asarray(labels, np.int32), class_names


def _walk(folder: pathlib.Path) -> Iterable[pathlib.Path]:
  """Image files at any depth, hidden ones left out, in no particular order."""
  for parent, subfolders, files in os.walk(folder):
    subfolders[:] = [name for name in subfolders if not name.startswith('.')]
    for name in files:
      if not name.startswith('.') and pathlib.PurePath(name).suffix.lower() in IMAGE_SUFFIXES:
        yield pathlib.Path(parent, name)


def _portable(name: str) -> str:
  """One spelling for accented letters: macOS splits them, which would change names and order."""
  return unicodedata.normalize('NFC', name)


def _manifest_groups(
  manifest: str | os.PathLike, group_column: str, file_column: str, names: tuple[str, ...]
) -> np.ndarray:
  """Group of every image, [N] int64, numbered as they come; see ImageFolderSource."""
  if not manifest or not group_column:
    raise UserError(
      'data.manifest together with data.group_column',
      f'manifest {str(manifest)!r} and group_column {group_column!r}',
      'set both, or neither if no image has a duplicate',
    )
  rows = _read_manifest(manifest, (file_column, group_column))
  group_of_file = {}
  for row in rows:
    file = _portable(pathlib.PurePosixPath((row[file_column] or '').replace('\\', '/')).as_posix())
    if file in group_of_file:
      raise UserError(f'one row a file in {manifest}', f'two for {file}', 'remove one of them')
    group_of_file[file] = (row[group_column] or '').strip()
  if unknown := sorted(set(group_of_file) - set(names)):
    raise UserError(
      f'rows of {manifest} that name images of the folder',
      f'{len(unknown)} that match none, such as {unknown[0]!r}',
      f'give paths like {names[0]!r} in column {file_column!r}, or remove those rows',
    )
  ids: dict[str | int, int] = {}  # a group's cell, or the position of an image on its own
  keys = [group_of_file.get(name) or i for i, name in enumerate(names)]
  return np.asarray([ids.setdefault(key, len(ids)) for key in keys], np.int64)


def _read_manifest(manifest: str | os.PathLike, columns: tuple[str, ...]) -> list[dict]:
  """Rows of a CSV file that has these columns."""
  try:
    with open(manifest, encoding='utf-8-sig', newline='') as file:
      reader = csv.DictReader(file)
      found = list(reader.fieldnames or ())
      rows = list(reader)
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise UserError(f'a CSV file at {manifest}', str(error), 'correct data.manifest') from error
  if missing := [column for column in columns if column not in found]:
    raise UserError(
      f'columns {" and ".join(columns)} in {manifest}',
      f'no {" and no ".join(missing)} among {", ".join(found)}',
      'name the columns that hold the paths and the groups',
    )
  return rows


def _prepared_folder(name: str, root: pathlib.Path) -> pathlib.Path:
  """The version folder of a prepared set: ROOT/SET[/CONFIG]/VERSION."""
  match = re.fullmatch(r'([\w.-]+)(?:/([\w.-]+))?(?::([\w.-]+))?', name)
  if not match:
    raise UserError(
      'a TFDS name: set, set:version, set/config or set/config:version',
      repr(name),
      'give a name such as cifar10',
    )
  base, version = root / match[1] / (match[2] or ''), match[3]
  versions = _versions(base)
  if not versions and not match[2] and base.is_dir():
    configs = {path.name: _versions(path) for path in sorted(base.iterdir()) if path.is_dir()}
    configs = {config: found for config, found in configs.items() if found}
    if len(configs) > 1:
      raise UserError(
        f'one configuration of {name} in {root}', ', '.join(configs), f'choose: {name}/CONFIG'
      )
    versions = next(iter(configs.values()), {})
  if version is not None:
    versions = {key: path for key, path in versions.items() if path.name == version}
  if not versions:
    raise UserError(
      f'the TFDS set {name} prepared as array_record in {root}',
      'no such set there' if root.is_dir() else 'no such folder',
      f'set data.dir or TFDS_DATA_DIR to the folder that has it, or prepare it: '
      f'{_build_command(name, root)}',
    )
  return versions[max(versions)]


def _versions(folder: pathlib.Path) -> dict[tuple[int, ...], pathlib.Path]:
  """Version number -> folder, of the versions that are prepared in a folder."""
  found = folder.glob('*/dataset_info.json')
  return {tuple(map(int, re.findall(r'\d+', p.parent.name))): p.parent for p in found}


def _build_command(name: str, root: str | os.PathLike) -> str:
  """What prepares a set; the tfds command needs TensorFlow, which this project does without."""
  return (
    f'tfds build {name} --file_format=array_record --data_dir={shlex.quote(str(root))} '
    '(in an environment of its own: pip install tensorflow tensorflow-datasets array_record)'
  )


def _array_record_builder(name: str, folder: pathlib.Path):
  """The TFDS builder of a prepared folder, reading array_record."""
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder_from_directory(folder)
  except Exception as error:  # damaged JSON, a version too old: TFDS has no common error type
    raise UserError(
      f'a prepared TFDS set in {folder}',
      f'{type(error).__name__}: {error}',
      f'delete the folder and prepare it again: {_build_command(name, "DATA_DIR")}',
    ) from error
  formats = [f.value for f in (builder.info.file_format, *builder.info.alternative_file_formats)]
  if 'array_record' not in formats:
    command = f'tfds convert_format --dataset_version_dir={shlex.quote(str(folder))}'
    raise UserError(
      f'{name} as array_record in {folder}, because only that is read without TensorFlow',
      f'{" and ".join(formats)}',
      f'{command} --out_file_format=array_record (in an environment with tensorflow)',
    )
  # as_data_source does the same, but later: the names of the files are needed before
  builder.info.set_file_format('array_record', override=True, override_if_initialized=True)
  return builder


def _feature_keys(info) -> tuple[str, str]:
  """(image key, label key): the supervised pair, else the only Image and the only ClassLabel."""
  import tensorflow_datasets as tfds

  def keys_of(kind) -> list[str]:
    return sorted(key for key, feature in info.features.items() if isinstance(feature, kind))

  images, labels = keys_of(tfds.features.Image), keys_of(tfds.features.ClassLabel)
  pair = info.supervised_keys
  if pair and len(pair) == 2 and pair[0] in images and pair[1] in labels:
    return pair
  if len(images) != 1 or len(labels) != 1:
    raise UserError(
      f'one image and one class label in the records of {info.full_name}',
      f'images {images} and class labels {labels} among {sorted(info.features)}',
      'choose an image-classification set',
    )
  return images[0], labels[0]


def _tfds_image_shape(name: str, feature, image_size: int) -> tuple[tuple[int, int, int], int]:
  """(image shape, side to scale to or 0 for untouched pixels)."""
  height, width, channels = feature.shape
  channels = 1 if channels == 1 else 3
  dtype = np.dtype(feature.np_dtype)  # feature.dtype would import TensorFlow
  if dtype != np.uint8:
    raise UserError(f'uint8 images in {name}', f'{dtype}', 'choose another set')
  one_size = None not in (height, width)
  if one_size and image_size in (0, height) and image_size in (0, width):
    return (height, width, channels), 0
  if image_size < 1:
    raise UserError(
      f'an image_size for {name}, whose images have several sizes',
      f'image_size {image_size}',
      'set data.image_size to the side of the square to scale and crop to, such as 64',
    )
  return (image_size, image_size, channels), image_size


def _shards(info, split: str) -> tuple[pathlib.Path, ...]:
  """The files that a split reads; raises UserError for an unknown, empty or incomplete split."""
  try:
    instructions = info.splits[split].file_instructions
    examples = info.splits[split].num_examples
  except (KeyError, ValueError):
    examples = 0
  if examples < 1:
    raise UserError(
      f'a split of {info.full_name}: {", ".join(info.splits)}, or a slice such as train[:10%]',
      repr(split),
      'correct the split',
    )
  files = tuple(dict.fromkeys(pathlib.Path(i.filename) for i in instructions))
  if missing := [path for path in files if not path.is_file()]:
    raise UserError(
      f'all {len(files)} files of {info.full_name} {split}',
      f'{len(missing)} missing, such as {missing[0]}',
      f'copy the set again, or delete it and prepare it: {_build_command(info.name, "DATA_DIR")}',
    )
  return files


def _records(builder, split: str, label_key: str):
  """Random access to the records, everything but the label left undecoded."""
  import tensorflow_datasets as tfds

  others = [key for key in builder.info.features if key != label_key]
  return builder.as_data_source(
    split=split, decoders={key: tfds.decode.SkipDecoding() for key in others}
  )


def _file_state(path: pathlib.Path) -> tuple[int, ...]:
  """(size, time of change, whether it may be read); empty for a link that leads nowhere."""
  try:
    state = path.stat()
  except FileNotFoundError:
    return ()
  return state.st_size, state.st_mtime_ns, os.access(path, os.R_OK)


def _decoder_version() -> tuple[int, str]:
  """Pixels may change with our code or with Pillow."""
  import PIL

  return DECODING_VERSION, PIL.__version__


def _digest(parts: Iterable) -> str:
  """Hex SHA-256 over the representations of the parts."""
  digest = hashlib.sha256()
  for part in parts:
    digest.update(repr(part).encode() + b'\0')
  return digest.hexdigest()
