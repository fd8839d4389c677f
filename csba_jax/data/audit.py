"""What there is in a folder of photos: counts, sizes, unreadable and odd files, and copies.

Each file is read once. Copies are byte-identical files, and photos that look the same
(`near_copies`). They matter in two ways: a copy of a training photo in the test part makes the
score too good, and copies in different classes have a wrong label at least once.
"""

import collections
import csv
import dataclasses
import functools
import io
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from csba_jax.data import cache, near_copies
from csba_jax.data.decoding import (
  PILLOW_FORMATS,
  Unreadable,
  decode_image,
  without_warnings_of_pillow,
)
from csba_jax.data.folder_listing import Listing, list_images
from csba_jax.data.image_folder import read_image
from csba_jax.data.sources import content_sum
from csba_jax.errors import UserError
from csba_jax.files import expanded, write_atomically

LOOK_SIZE = 64  # pixels of the square that is hashed
SMALL = 64  # pixels of the shorter side, below which a photo is small
LONG = 3.0  # longer side over shorter side, from which the cut to a square takes most of a photo
SCHEMA = 1
JSON_FILE = 'audit.json'
COPIES_FILE, COPIES_COLUMN = 'copies.csv', 'group'  # for data.manifest and data.group_column
TICKS = 32  # files from one call of `tick` to the next

# what is odd about a file, in the words of the report
TURNED, CLEAR = 'turned by EXIF', 'with a channel of transparency'
FRAMES, DEEP = 'several frames', 'more than 8 bits'
GREY, BLANK, TINY, NARROW = 'grey', 'of one colour', 'small', 'long and narrow'
ENDING = 'ending of another format'
ODD = {
  TURNED: 'They are turned upright.',
  CLEAR: 'What is transparent becomes white.',
  FRAMES: 'The first frame is used.',
  DEEP: 'The upper 8 bits are used.',
  GREY: 'They are used as they are, with three equal channels.',
  BLANK: 'They show nothing. Look at them, and remove those that are no photo.',
  TINY: f'Their shorter side is below {SMALL} pixels. Set data.image_size to what most have.',
  NARROW: f'One side is {LONG:g} times the other or more. The square from the middle is used.',
  ENDING: 'They are read by what they hold.',
}
_SUFFIXES = {
  'JPEG': ('.jpg', '.jpeg', '.jpe', '.jfif', '.jif', '.jfi', '.pjp', '.pjpeg'),
  'PNG': ('.png', '.apng'),
  'BMP': ('.bmp', '.dib'),
  'GIF': ('.gif',),
  'TIFF': ('.tif', '.tiff'),
  'WEBP': ('.webp',),
}
_EXIF_ORIENTATION = 274


@dataclasses.dataclass(frozen=True, eq=False)
class Audit:
  """What there is in a folder.

  Attributes:
    folder: its path, as it was given.
    paths: of N files.
    names: of the files, relative to the folder, with / and in one Unicode form.
    labels: [N] int32.
    class_names: C names.
    left_out: one line on what is no image; '' if there is nothing.
    unreadable: (name, reason) of each file that cannot be read.
    sizes: [N, 2] int64, width and height when upright; 0 of an unreadable file.
    formats: {format: files}, most frequent first.
    odd: {what is odd: names}.
    identical: names of each set of byte-identical files, two or more.
    copies: names of each set of photos that are byte-identical or look the same, two or more.
    part_of: 'train', 'val' or 'test' of each file, where the folder gives these parts; else None.
  """

  folder: str
  paths: tuple[pathlib.Path, ...]
  names: tuple[str, ...]
  labels: np.ndarray
  class_names: tuple[str, ...]
  left_out: str
  unreadable: tuple[tuple[str, str], ...]
  sizes: np.ndarray
  formats: dict[str, int]
  odd: dict[str, tuple[str, ...]]
  identical: tuple[tuple[str, ...], ...]
  copies: tuple[tuple[str, ...], ...]
  part_of: tuple[str, ...] | None = None

  @property
  def readable(self) -> np.ndarray:
    """Whether each file can be read, [N] bool."""
    return self.sizes[:, 0] > 0

  @property
  def class_counts(self) -> np.ndarray:
    """Readable photos of each class, [C]."""
    return np.bincount(self.labels[self.readable], minlength=len(self.class_names))

  @property
  def training_counts(self) -> np.ndarray:
    """The same, [C], of the training part alone where the folder gives parts."""
    kept = self.readable
    if self.part_of is not None:
      kept = kept & (np.asarray(self.part_of) == 'train')
    return np.bincount(self.labels[kept], minlength=len(self.class_names))

  @property
  def imbalance_factor(self) -> float:
    """`training_counts` of the largest class over those of the smallest; inf if one has none."""
    smallest = int(self.training_counts.min())
    return int(self.training_counts.max()) / smallest if smallest else float('inf')

  @property
  def redundant(self) -> np.ndarray:
    """Photos of each class beyond the first of its sets of copies, [C]."""
    class_of = dict(zip(self.names, self.labels.tolist(), strict=True))
    found = np.zeros(len(self.class_names), np.int64)
    for together in self.copies:
      for c, n in collections.Counter(class_of[name] for name in together).items():
        found[c] += n - 1
    return found

  @property
  def across_classes(self) -> tuple[tuple[str, ...], ...]:
    """Sets of copies with several labels, of which at least one is wrong."""
    return self._with_several(self.labels.tolist())

  @property
  def across_parts(self) -> tuple[tuple[str, ...], ...]:
    """Sets of copies in several of the given parts; () without parts."""
    return () if self.part_of is None else self._with_several(self.part_of)

  def _with_several(self, values: Sequence[object]) -> tuple[tuple[str, ...], ...]:
    """Sets of copies whose files have several values."""
    value_of = dict(zip(self.names, values, strict=True))
    return tuple(s for s in self.copies if len({value_of[name] for name in s}) > 1)

  @property
  def part_counts(self) -> dict[str, int]:
    """Readable photos of each given part; {} without parts."""
    parts = () if self.part_of is None else self.part_of
    kept = zip(parts, self.readable.tolist(), strict=False)
    return dict(collections.Counter(part for part, readable in kept if readable))

  def to_json(self) -> dict[str, Any]:
    """All of it as JSON can hold it."""
    sides = self.sizes[self.readable]
    return {
      'schema': SCHEMA,
      'folder': self.folder,
      'images': len(self.names),
      'classes': dict(zip(self.class_names, self.class_counts.tolist(), strict=True)),
      'imbalance_factor': self.imbalance_factor if self.training_counts.all() else None,
      'redundant': dict(zip(self.class_names, self.redundant.tolist(), strict=True)),
      'width_and_height': {
        name: np.percentile(sides, at, axis=0, method='nearest').tolist()
        for name, at in (('smallest', 0), ('median', 50), ('largest', 100))
        if len(sides)
      },
      'formats': self.formats,
      'left_out': self.left_out,
      'unreadable': [{'file': name, 'reason': reason} for name, reason in self.unreadable],
      'odd': {kind: list(names) for kind, names in self.odd.items()},
      'identical': [list(s) for s in self.identical],
      'copies': [list(s) for s in self.copies],
      'copies_across_classes': [list(s) for s in self.across_classes],
      'parts': self.part_counts,
      'copies_across_parts': [list(s) for s in self.across_parts],
    }


def audit_folder(
  directory: str | os.PathLike,
  layout: str = 'auto',
  tick: Callable[[int, int], None] = lambda done, total: None,
) -> Audit:
  """Reads every photo of a folder of CLASS/file, or PART/CLASS/file, once, and compares them.

  Args:
    directory: holds one folder for each class.
    layout: as of `image_folder.ImageFolderSource`.
    tick: called with (files read, files) now and then; may raise.

  Raises:
    UserError: as `folder_listing.list_images`; no file that can be read; a disk that fails.
  """
  listing = list_images(expanded(directory), layout)
  found = _look_at_all(listing, tick)
  kept = np.asarray([i for i, one in enumerate(found) if not one.reason], np.int64)
  if not len(kept):
    name, reason = listing.names[0], found[0].reason
    raise UserError(
      f'photos that can be read in {directory}',
      f'{len(found)} files that cannot, such as {name} ({reason})',
      'convert them to JPEG or PNG',
    )
  odd: dict[str, list[str]] = {kind: [] for kind in ODD}
  for name, one in zip(listing.names, found, strict=True):
    for kind in one.odd:
      odd[kind].append(name)
  formats = collections.Counter(one.format for one in found if one.format)
  sums = [found[i].content for i in kept.tolist()]
  looks = near_copies.Looks(
    np.asarray([found[i].hash for i in kept.tolist()], np.uint64),
    np.stack([found[i].thumbnail for i in kept.tolist()]),
  )
  same = near_copies.connected(np.arange(len(kept)), _chains(sums))
  near = near_copies.groups(looks)
  both = near_copies.connected(near, _chains(same.tolist()))
  names = [listing.names[i] for i in kept.tolist()]
  return Audit(
    folder=str(directory),
    paths=listing.paths,
    names=listing.names,
    labels=listing.labels,
    class_names=listing.class_names,
    left_out=listing.left_out,
    unreadable=tuple((n, o.reason) for n, o in zip(listing.names, found, strict=True) if o.reason),
    sizes=np.asarray([one.size for one in found], np.int64),
    formats=dict(formats.most_common()),
    odd={kind: tuple(files) for kind, files in odd.items() if files},
    identical=_sets(same, names),
    copies=_sets(both, names),
    part_of=listing.part_of,
  )


def save(audit: Audit, folder: pathlib.Path) -> list[pathlib.Path]:
  """Writes audit.json and copies.csv into a folder, atomically.

  copies.csv has a row for each photo that has copies: file and group. It is a manifest:
  --config.data.manifest=FOLDER/copies.csv --config.data.group_column=group keeps copies on one side
  of every split. Rows may be added and removed by hand.

  Raises:
    UserError: they cannot be written.
  """
  rows = io.StringIO(newline='')
  writer = csv.writer(rows, lineterminator='\n')
  writer.writerow(['file', COPIES_COLUMN])
  for number, together in enumerate(audit.copies):
    writer.writerows([name, number] for name in together)
  text = json.dumps(audit.to_json(), indent=1, ensure_ascii=False) + '\n'
  text = text.encode('utf-8', 'backslashreplace').decode()
  return write_all(folder, {JSON_FILE: text, COPIES_FILE: rows.getvalue()})


def check_outside(folder: str | os.PathLike, workdir: str | os.PathLike) -> None:
  """Raises UserError if the workdir lies in the folder of photos, where it would be a class."""
  if expanded(workdir).resolve().is_relative_to(expanded(folder).resolve()):
    raise UserError(
      'a --workdir outside the folder of photos', str(workdir), 'name a folder beside it'
    )


def write_all(folder: pathlib.Path, texts: dict[str, str]) -> list[pathlib.Path]:
  """Writes files {name: text} into a folder, each atomically.

  Raises:
    UserError: one of them cannot be written.
  """
  paths = []
  try:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
      data = io.BytesIO(text.encode('utf-8', 'surrogateescape'))
      write_atomically(folder / name, functools.partial(shutil.copyfileobj, data))
      paths.append(folder / name)
  except OSError as error:
    raise UserError(
      f'to write {", ".join(texts)} into {folder}',
      error.strerror or str(error),
      'set another folder',
    ) from error
  return paths


@dataclasses.dataclass(frozen=True, eq=False)
class _Photo:
  """What one file is; of an unreadable one the reason alone."""

  reason: str = ''
  format: str = ''
  size: tuple[int, int] = (0, 0)
  odd: tuple[str, ...] = ()
  content: bytes = b''
  hash: int = 0
  thumbnail: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint8))


def _look_at_all(listing: Listing, tick: Callable[[int, int], None]) -> list[_Photo]:
  found: list[_Photo] = []
  total = len(listing.paths)
  with without_warnings_of_pillow():
    for photo in cache.in_order(_look_at, listing.paths):
      found.append(photo)
      if len(found) % TICKS == 0 or len(found) == total:
        tick(len(found), total)
  return found


def _look_at(path: pathlib.Path) -> _Photo:
  """What a file is; a disk that fails is a UserError."""
  try:
    data = read_image(path)
    image = decode_image(data, channels=3, image_size=LOOK_SIZE)
    format_, size, odd = _head(data, path.suffix.lower())
  except Unreadable as error:
    return _Photo(reason=str(error))
  hash_, thumbnail = near_copies.look(image)
  if np.std(thumbnail) < near_copies.FLAT:
    odd = (*odd, BLANK)
  elif (image.max(-1) == image.min(-1)).all():
    odd = (*odd, GREY)
  return _Photo('', format_, size, odd, content_sum(data), int(hash_), thumbnail)


def _head(data: bytes, suffix: str) -> tuple[str, tuple[int, int], tuple[str, ...]]:
  """(format, upright width and height, what is odd) of a file that can be decoded."""
  from PIL import Image

  with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
    width, height = image.size
    told = image.format != 'PNG' or 'exif' in image.info  # else Pillow would decode it for that
    turn = _or(1, lambda: image.getexif().get(_EXIF_ORIENTATION, 1)) if told else 1
    if turn in (5, 6, 7, 8):
      width, height = height, width
    format_ = str(image.format)
    found = {
      TURNED: turn in range(2, 9),
      CLEAR: image.mode in ('RGBA', 'RGBa', 'LA', 'La', 'PA') or 'transparency' in image.info,
      FRAMES: _or(1, lambda: getattr(image, 'n_frames', 1)) > 1,
      DEEP: image.mode.startswith('I'),
      TINY: min(width, height) < SMALL,
      NARROW: max(width, height) >= LONG * min(width, height),
      ENDING: suffix != '' and suffix not in _SUFFIXES.get(format_, (suffix,)),
    }
  return format_, (width, height), tuple(kind for kind, odd in found.items() if odd)


def _or(otherwise: int, read: Callable[[], int]) -> int:
  """What `read` finds behind the pixels that were decoded; they may be all that is whole."""
  try:
    return read()
  except Exception:  # Pillow raises a dozen types on damaged files
    return otherwise


def _chains(keys: Sequence[object]) -> np.ndarray:
  """Pairs of neighbours among the positions of each key, [P, 2] int64."""
  last: dict[object, int] = {}
  found = []
  for i, key in enumerate(keys):
    if key in last:
      found.append((last[key], i))
    last[key] = i
  return np.asarray(found, np.int64).reshape(-1, 2)


def _sets(group_of: np.ndarray, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
  """Names of each group of two or more, in order of the first name of each."""
  sets: dict[int, list[str]] = {}
  several = np.bincount(group_of)[group_of] > 1
  for i in np.flatnonzero(several).tolist():
    sets.setdefault(int(group_of[i]), []).append(names[i])
  return tuple(map(tuple, sets.values()))
