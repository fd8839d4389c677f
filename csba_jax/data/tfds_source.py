"""Reads TFDS data sets that are prepared as array_record, without TensorFlow."""

import contextlib
import functools
import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from csba_jax.data.decoding import Unreadable, decode_image, decoder_version
from csba_jax.data.sources import Source, content_sum, digest, or_unreadable
from csba_jax.errors import UserError
from csba_jax.files import expanded

if TYPE_CHECKING:
  from tensorflow_datasets.core import DatasetBuilder, DatasetInfo
  from tensorflow_datasets.core.data_sources import ArrayRecordDataSource
  from tensorflow_datasets.features import FeatureConnector, Image


class TfdsSource(Source):
  """A TFDS image-classification data set that is prepared as array_record.

  If all images have one size and image_size is 0, pixels do not change. Else images are turned
  upright, scaled and cropped as in `ImageFolderSource`. Images of one channel keep one channel.

  Args:
    name: 'cifar10', 'cifar10:3.0.2', 'set/config' or 'set/config:1.0.0'; without a version it is
      the newest one that is prepared.
    split: 'train', 'test', or any slice that TFDS understands, such as 'train[:10%]'.
    data_dir: folder of prepared data sets; '' means $TFDS_DATA_DIR, else ~/tensorflow_datasets.
    image_size: side of the square to scale and crop to; 0 keeps the size that all images have.

  Raises:
    UserError: a set that is not prepared (with the command for it), another file format, an unknown
      split, not exactly one image and one class label, or images of several sizes and image_size 0.
  """

  def __init__(self, name: str, split: str, data_dir: str = '', image_size: int = 0):
    folder = _prepared_folder(name, _root(data_dir))
    builder = _array_record_builder(name, folder)
    image_key, self._label_key = _feature_keys(builder.info)
    feature = builder.info.features[image_key]
    self.class_names = tuple(builder.info.features[self._label_key].names)
    self.name = f'{builder.info.name}-{split}'
    self.image_shape, self._image_size = _tfds_image_shape(name, feature, image_size)
    self._image_key = image_key
    self._info, self._folder, self._split = builder.info, folder, split
    self.files = _shards(builder.info, split)
    self._records = _records(builder, split, self._label_key)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, i: int) -> dict:
    return self._decode(self._read([i])[0])

  def read(self, positions: Sequence[int]) -> list[dict | Unreadable]:
    """As `Source.read`; a block of records is read ten times as fast as single ones."""
    return [or_unreadable(self._decode, record) for record in self._read(positions)]

  @property
  def labels(self) -> np.ndarray:
    """[N] int32; the first access reads all records, without decoding images."""
    return self._index[0]

  @property
  def names(self) -> tuple[str, ...]:
    """The ids of the data set if it has them, else split/position; it reads as `labels` does."""
    return self._index[1]

  def _decode(self, record: dict) -> dict:
    """Decodes a record to an item of the source."""
    data, channels = record[self._image_key], self.image_shape[-1]
    image = decode_image(data, channels=channels, image_size=self._image_size)
    if image.shape != self.image_shape:
      raise Unreadable(f'decodes to {image.shape}, but the set declares {self.image_shape}')
    return {'image': image, 'label': int(record[self._label_key]), 'sha256': content_sum(data)}

  def _read(self, positions: Sequence[int]) -> list[dict]:
    """Records; only their labels are decoded."""
    try:
      return self._records.__getitems__([int(i) for i in positions])
    except Exception as error:  # array_record has no error type for damaged bytes
      raise UserError(
        f'records of {self.name} in {self._folder}',
        f'{type(error).__name__}: {error}',
        f'prepare it again: {_build_command(self._info.name, "DATA_DIR")}',
      ) from error

  @functools.cached_property
  def _index(self) -> tuple[np.ndarray, tuple[str, ...]]:
    """(labels, names), which are read in blocks."""
    labels, names = np.empty(len(self), np.int32), []
    for start in range(0, len(self), 1000):
      block = range(start, min(start + 1000, len(self)))
      for i, record in zip(block, self._read(block), strict=True):
        labels[i] = record[self._label_key]
        found = record.get('id')
        names.append(found.decode() if isinstance(found, bytes) else f'{self._split}/{i:06d}')
    if labels.min() < 0:  # TFDS marks labels that a challenge keeps secret
      raise UserError(
        f'a label for every image of {self.name}',
        f'{(labels < 0).sum()} without one',
        'choose a split that has labels',
      )
    return labels, tuple(names)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Digest of name, split, size, decoder, classes, both JSON files, and the names of shards."""
    described = [(self._folder / n).read_bytes() for n in ('dataset_info.json', 'features.json')]
    shards = [path.name for path in self.files]
    request = [self._info.full_name, self._split, self._image_size, self.class_names]
    return digest(['tfds', *decoder_version(), *request, *described, *shards])


# It runs in a new process: TensorFlow would take accelerator memory that the training needs.
_PREPARE = """
import sys
import tensorflow as tf
import tensorflow_datasets as tfds
tf.config.set_visible_devices([], 'GPU')
name, root = sys.argv[1:]
tfds.builder(name, data_dir=root, file_format='array_record').download_and_prepare()
"""


def prepare(name: str, data_dir: str = '') -> None:
  """Downloads a data set and prepares it as array_record, unless it is prepared already.

  It needs TensorFlow. If TensorFlow is missing, pip installs it into a temporary folder; installed
  packages do not change.

  Args:
    name: as for `TfdsSource`.
    data_dir: as for `TfdsSource`.

  Raises:
    UserError: no such data set, no network or a full disk.
  """
  root = _root(data_dir)
  with contextlib.suppress(UserError):
    _prepared_folder(name, root)
    return
  with tempfile.TemporaryDirectory() as packages:
    steps = [[sys.executable, '-c', _PREPARE, name, str(root)]]
    if importlib.util.find_spec('tensorflow') is None:
      pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check']
      needed = ['tensorflow-cpu', 'tensorflow-datasets', 'array_record']
      steps.insert(0, [*pip, f'--target={packages}', *needed])
    paths = [packages, *filter(None, [os.environ.get('PYTHONPATH')])]
    variables = {'CUDA_VISIBLE_DEVICES': '-1', 'PYTHONPATH': os.pathsep.join(paths)}
    for step in steps:
      run = subprocess.run(step, env=os.environ | variables, capture_output=True, text=True)
      if run.returncode:
        last = (run.stderr.strip().splitlines() or [f'exit code {run.returncode}'])[-1]
        raise UserError(
          f'the TFDS set {name}, downloaded and prepared in {root}',
          last,
          f'prepare it: {_build_command(name, root)}',
        )


def _root(data_dir: str) -> pathlib.Path:
  return expanded(data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets')


def _prepared_folder(name: str, root: pathlib.Path) -> pathlib.Path:
  """The version folder of a prepared set: ROOT/SET[/CONFIG]/VERSION."""
  match = re.fullmatch(r'([\w.-]+)(?:/([\w.-]+))?(?::([\w.-]+))?', name)
  if not match:
    raise UserError(
      'a TFDS name: set, set:version, set/config or set/config:version',
      repr(name),
      'set it to a name such as cifar10',
    )
  base, version = root / match[1] / (match[2] or ''), match[3]
  versions = _versions(base)
  if not versions and not match[2] and base.is_dir():
    configs = {path.name: _versions(path) for path in sorted(base.iterdir()) if path.is_dir()}
    configs = {config: found for config, found in configs.items() if found}
    if len(configs) > 1:
      raise UserError(
        f'one configuration of {name} in {root}', ', '.join(configs), f'use {name}/CONFIG'
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
  """{version number: folder} of the versions that are prepared in a folder."""
  found = folder.glob('*/dataset_info.json')
  return {tuple(map(int, re.findall(r'\d+', p.parent.name))): p.parent for p in found}


def _build_command(name: str, root: str | os.PathLike) -> str:
  """The command that prepares a data set; it needs TensorFlow, which this project does not use."""
  return (
    f'tfds build {name} --file_format=array_record --data_dir={shlex.quote(str(root))} '
    '(in another environment: pip install tensorflow tensorflow-datasets array_record)'
  )


def _array_record_builder(name: str, folder: pathlib.Path) -> 'DatasetBuilder':
  """The TFDS builder of a prepared folder, set to read array_record."""
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder_from_directory(folder)
  except Exception as error:  # damaged JSON or an old version: TFDS has no common error type
    raise UserError(
      f'a prepared TFDS set in {folder}',
      f'{type(error).__name__}: {error}',
      f'delete the folder and prepare it again: {_build_command(name, "DATA_DIR")}',
    ) from error
  formats = [f.value for f in (builder.info.file_format, *builder.info.alternative_file_formats)]
  if 'array_record' not in formats:
    command = f'tfds convert_format --dataset_version_dir={shlex.quote(str(folder))}'
    raise UserError(
      f'{name} as array_record in {folder}, the only format that is read without TensorFlow',
      f'{" and ".join(formats)}',
      f'run {command} --out_file_format=array_record (in an environment with tensorflow)',
    )
  # as_data_source does it too, but the names of the files are needed earlier
  builder.info.set_file_format('array_record', override=True, override_if_initialized=True)
  return builder


def _feature_keys(info: 'DatasetInfo') -> tuple[str, str]:
  """(image key, label key): the supervised keys, else the only Image and the only ClassLabel."""
  import tensorflow_datasets as tfds

  def keys_of(kind: type['FeatureConnector']) -> list[str]:
    return sorted(key for key, feature in info.features.items() if isinstance(feature, kind))

  images, labels = keys_of(tfds.features.Image), keys_of(tfds.features.ClassLabel)
  pair = info.supervised_keys
  if pair and len(pair) == 2 and pair[0] in images and pair[1] in labels:
    return pair
  if len(images) != 1 or len(labels) != 1:
    raise UserError(
      f'one image and one class label in the records of {info.full_name}',
      f'images {images} and class labels {labels} among {sorted(info.features)}',
      'use an image-classification set',
    )
  return images[0], labels[0]


def _tfds_image_shape(
  name: str, feature: 'Image', image_size: int
) -> tuple[tuple[int, int, int], int]:
  """(image shape, side to scale to; 0 if pixels do not change)."""
  height, width, channels = feature.shape
  channels = 1 if channels == 1 else 3
  dtype = np.dtype(feature.np_dtype)  # feature.dtype would import TensorFlow
  if dtype != np.uint8:
    raise UserError(f'uint8 images in {name}', f'{dtype}', 'use another set')
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


def _shards(info: 'DatasetInfo', split: str) -> tuple[pathlib.Path, ...]:
  """The files of a split; UserError for an unknown, empty or incomplete split."""
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


def _records(builder: 'DatasetBuilder', split: str, label_key: str) -> 'ArrayRecordDataSource':
  """Random access to the records; only their labels are decoded."""
  import tensorflow_datasets as tfds

  others = [key for key in builder.info.features if key != label_key]
  return builder.as_data_source(
    split=split, decoders={key: tfds.decode.SkipDecoding() for key in others}
  )
