"""Loads the data of a config: source, cache and splits, as arrays ready for the device."""

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ml_collections
import numpy as np
from jax import Array

from csba_jax.data import cache, copies, splits
from csba_jax.data.image_folder import ImageFolderSource
from csba_jax.data.rows import Rows
from csba_jax.data.sources import DigitsSource, Source
from csba_jax.data.tfds_source import TfdsSource
from csba_jax.errors import UserError
from csba_jax.runtime import backend, sharding

PIXELS = 2**26  # bytes of each part that `Data.sha256` reads, or up to twice as many


@dataclasses.dataclass(frozen=True)
class Part:
  """Images of one part of the data: uint8 [N, H, W, ch] and int32 labels [N].

  If the data is streamed, `images` stay in the cache on disk and are read when they are indexed.
  """

  images: np.ndarray | Rows
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  @property
  def streamed(self) -> bool:
    """Whether the images stay on disk."""
    return isinstance(self.images, Rows)


@dataclasses.dataclass(frozen=True)
class Data:
  """The three parts of a run's data. `train` and `val` are of one long-tailed set, or given."""

  train: Part
  val: Part  # of length 0 where data.val_fraction is 0 and the source gives none
  test: Part
  class_names: tuple[str, ...]
  splits: splits.Splits
  source_counts: np.ndarray  # [C] images of each class in the training source, before any split,
  # without those that the source gives to the test part
  skipped: tuple[tuple[str, str], ...]  # (name, reason) of images that could not be read
  names: tuple[str, ...]  # of the training source, then of a separate test set

  @property
  def class_counts(self) -> np.ndarray:
    """Training images of each class, [C]."""
    return self.splits.class_counts

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(height, width, channels)."""
    return self.train.images.shape[1:]

  def sha256(self) -> dict[str, str]:
    """Digests of the splits, of the names and labels in them, and of the pixels.

    Of a large part it reads evenly spaced images: PIXELS bytes, or up to twice as many.
    """
    pixels = hashlib.sha256()
    for part in (self.train, self.val, self.test):
      stride = max(1, len(part) * math.prod(self.image_shape) // PIXELS)
      pixels.update(part.images[::stride].tobytes())
    of_splits, of_source = self.splits.sha256, self.splits.source_sha256
    return {'splits': of_splits, 'names and labels': of_source, 'pixels': pixels.hexdigest()}


def load(
  config: ml_collections.ConfigDict,
  warn: Callable[[str], None],
  check: Callable[[splits.Splits], None] = lambda _: None,
) -> Data:
  """Reads the data that `config` names, from its cache if there is one, checks and splits it.

  Args:
    config: of a run.
    warn: called with one line at a time.
    check: called with the splits of all images before one is decoded, and not where all of them
      are in the cache; may raise.

  Raises:
    UserError: data that is missing, unreadable, or not as config.data describes it.
  """
  training, separate_test = open_sources(config.data)
  if training.left_out:
    warn(training.left_out)
  _check_declared(config.data, training)
  mapped = _streams(config.data, training, separate_test)
  before = functools.cache(
    lambda: check(_split(config.data, training, separate_test, training.groups, training.part_of))
  )
  where = (config.data.cache_dir, warn, mapped, before)
  images = cache.load_arrays(training, *where)
  test_images = cache.load_arrays(separate_test, *where) if separate_test else None
  identical = copies.find(images.sums)
  together = config.data.group_copies
  part_of = _parts_of(images.names, training)
  for line in copies.lines(identical, images, test_images, together, part_of):
    warn(line)
  groups = copies.joined(identical, images.groups) if together else images.groups
  sources = [arrays for arrays in (images, test_images) if arrays]
  split = dataclasses.replace(
    _split(config.data, images, test_images, groups, part_of),
    source_sha256=_digest(*sources),
    content=np.concatenate([arrays.sums[:, :8] for arrays in sources]).view('<u8')[:, 0],
  )
  for line in splits.absences(
    split,
    images.labels,
    groups,
    test_images.labels if test_images else None,
    class_names=images.class_names,
    folds=config.data.folds,
  ):
    warn(line)

  own = slice(None) if part_of is None else np.asarray(part_of) != 'test'

  def part(arrays: cache.ImageArrays, indices: np.ndarray) -> Part:
    images: np.ndarray | Rows
    if mapped:
      assert isinstance(arrays.images, np.memmap)
      images = Rows(arrays.images, indices)
    else:
      images = arrays.images[indices]
    return Part(images, arrays.labels[indices])

  return Data(
    train=part(images, split.train),
    val=part(images, split.val),
    test=part(test_images or images, split.test),
    class_names=images.class_names,
    splits=split,
    source_counts=np.bincount(images.labels[own], minlength=len(images.class_names)),
    skipped=images.skipped,
    names=tuple(name for arrays in sources for name in arrays.names),
  )


def _split(
  data: ml_collections.ConfigDict,
  images: Source | cache.ImageArrays,
  test_images: Source | cache.ImageArrays | None,
  groups: np.ndarray | None,
  part_of: Sequence[str] | None,
) -> splits.Splits:
  """The splits that a config's data section describes, of images or of a source's labels."""
  return splits.make_splits(
    images.labels,
    groups,
    test_images.labels if test_images else None,
    class_names=images.class_names,
    imbalance_factor=data.imbalance_factor,
    profile=data.profile,
    class_order=data.class_order,
    val_fraction=data.val_fraction,
    test_fraction=data.test_fraction,
    folds=data.folds,
    fold=data.fold,
    seed=data.seed,
    part_of=part_of,
    largest_class=data.largest_class,
    disjoint_subsets=data.disjoint_subsets,
  )


def _parts_of(names: Sequence[str], source: Source) -> tuple[str, ...] | None:
  """The part of each image that could be read, if the source has parts."""
  if source.part_of is None:
    return None
  found = dict(zip(source.names, source.part_of, strict=True))
  return tuple(found[name] for name in names)


def open_sources(data: ml_collections.ConfigDict) -> tuple[Source, Source | None]:
  """(training source, test source or None) for a config's data section; decodes no image."""
  of_folders = (data.manifest, data.group_column, data.strict, data.layout != 'auto')
  if data.source != 'image_folder' and any(of_folders):
    raise UserError(
      'data.manifest, data.group_column, data.strict and data.layout only with '
      'data.source=image_folder',
      f'one of them with data.source={data.source}',
      'remove it',
    )
  if data.source == 'digits':
    return DigitsSource(), None
  if data.source == 'tfds':
    train = TfdsSource(data.name, data.train_split, data.dir, data.image_size)
    if not data.test_split:
      return train, None
    return train, TfdsSource(data.name, data.test_split, data.dir, data.image_size)
  directory = data.dir or os.environ.get('CSBA_IMAGE_FOLDER', '')
  if not directory:
    raise UserError(
      'a folder of CLASS/file images',
      'no folder',
      'set --config.data.dir or $CSBA_IMAGE_FOLDER',
    )
  folder = ImageFolderSource(
    directory,
    data.image_size,
    strict=data.strict,
    manifest=data.manifest,
    group_column=data.group_column,
    layout=data.layout,
  )
  return folder, None


def _streams(data: ml_collections.ConfigDict, *sources: Source | None) -> bool:
  """Whether the images of these sources stay on disk."""
  if data.input != 'auto':
    return data.input == 'stream'
  found = sum(len(source) * math.prod(source.image_shape) for source in sources if source)
  return found > backend.IN_MEMORY_BYTES


def _digest(*arrays: cache.ImageArrays) -> str:
  """Hex SHA-256 over names, labels and classes, which say what image an index means."""
  digest = hashlib.sha256()
  for part in arrays:
    digest.update(json.dumps([part.class_names, part.names]).encode())
    digest.update(part.labels.astype('<i4').tobytes())
  return digest.hexdigest()


def _check_declared(data: ml_collections.ConfigDict, source: Source) -> None:
  size, _, channels = source.image_shape
  for field, found in (
    ('num_classes', len(source.class_names)),
    ('image_size', size),
    ('channels', channels),
  ):
    declared = data[field]
    if declared != found and not (field == 'num_classes' and declared == 0):
      raise UserError(
        f'data.{field} as in the data ({found})',
        str(declared),
        f'set --config.data.{field}={found}',
      )


def check_splits(data: Data, path: Path) -> None:
  """Raises UserError if the splits saved at `path` are not those of `data`: the data has changed.

  The indices, names and labels are compared, and the content of the images in the three parts where
  the file has it.
  """
  kept = splits.Splits.load(path)
  before, now = kept.content, data.splits.content
  same_names = kept.source_sha256 == data.splits.source_sha256
  if same_names and before is not None and now is not None:
    _check_content(data.names, kept, before, now, path)
  there, here = (f'{s.sha256[:12]} of {s.source_sha256[:12]}' for s in (kept, data.splits))
  if there != here:
    old = ', or, as the run is of an older version, set --config.data.group_copies=False'
    raise UserError(
      f'the splits that {path} holds (sha256 {there})',
      f'others (sha256 {here}): the data has changed, or data.group_copies',
      f'restore the old data and field, or use another --workdir{old if before is None else ""}',
    )


def _check_content(
  names: tuple[str, ...], kept: splits.Splits, before: np.ndarray, now: np.ndarray, path: Path
) -> None:
  """Raises UserError if images of the kept splits have another content than before."""
  members = np.sort(kept.members)
  changed = members[before[members] != now[members]]
  if len(changed):
    raise UserError(
      f'the {len(members)} images that {path} was made of',
      f'{len(changed)} with the same name and another content, such as {names[changed[0]]}',
      'restore the old files, or use another --workdir to train on the new ones',
    )


def eval_batches(
  part: Part, batch_size: int, layout: sharding.Layout
) -> Iterator[tuple[Array, Array, Array]]:
  """(images, labels, mask) batches of one size; every image once, the last batch padded.

  The size is rounded up to a multiple of the number of devices. Each batch is split over the
  devices of the layout, and each process reads its own rows.
  """
  size = -(-batch_size // layout.devices) * layout.devices
  rows = layout.rows(size)
  for start in range(0, len(part), size):
    index = start + rows
    mask = index < len(part)
    index = np.where(mask, index, 0)
    yield layout.place_rows((part.images[index], part.labels[index], mask), size)
