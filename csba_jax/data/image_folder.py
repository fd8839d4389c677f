"""Folders of photos, CLASS/file.jpg, with an optional CSV file that names duplicates."""

import csv
import functools
import io
import os
import pathlib

import numpy as np

from csba_jax.data.decoding import Unreadable, decode_image, decoder_version
from csba_jax.data.folder_listing import list_images, portable
from csba_jax.data.sources import Source, content_sum, digest, disk_error
from csba_jax.errors import UserError
from csba_jax.files import expanded


class ImageFolderSource(Source):
  """A folder of CLASS/image files; every image is made RGB and square.

  An image is the first frame of its file. It is turned upright as its EXIF data says, put on white
  where it is transparent, made 8-bit RGB, scaled (bicubic, antialiased) so that its shorter side is
  image_size, and cropped to the centre. Images are ordered by class name, then by path inside
  `directory`, as Unicode code points, so that the order is the same on every machine. A class
  folder may have subfolders. `folder_listing` says which files are images, and what is left out.

  Args:
    directory: holds one folder for each class; classes are numbered in the order of their names.
    image_size: side of the square.
    strict: whether an unreadable file is an error; else it is listed in `ImageArrays.skipped`.
    manifest: CSV file that says which images are duplicates of each other; a path, or a file name
      in `directory`. '' means that there are no duplicates.
    group_column: its column of duplicate groups. An image has no duplicate if its cell is empty, or
      if it has no row.
    file_column: its column of paths, relative to `directory`.
    layout: 'auto' takes the parts of a data set, such as train and test, as parts, with the class
      folders inside; 'classes' takes every folder as a class.

  Raises:
    UserError: as in `folder_listing.list_images`; a size below 1; or a manifest that lacks a column
      or names a file that is not there.
  """

  labels: np.ndarray
  names: tuple[str, ...]

  def __init__(
    self,
    directory: str | os.PathLike,
    image_size: int,
    strict: bool = False,
    manifest: str | os.PathLike = '',
    group_column: str = '',
    file_column: str = 'file',
    layout: str = 'auto',
  ):
    if image_size < 1:
      raise UserError('image_size of at least 1 pixel', f'{image_size}', 'set it, such as to 64')
    self.strict = strict
    self._directory = expanded(directory)
    listing = list_images(self._directory, layout)
    self.files, self.names, self.labels = listing.paths, listing.names, listing.labels
    self.class_names, self.left_out = listing.class_names, listing.left_out
    self.part_of = listing.part_of
    self.name = self._directory.resolve().name
    self.image_shape = (image_size, image_size, 3)
    self.groups = None
    if manifest or group_column:
      beside = self._directory / manifest
      found = beside if manifest and beside.is_file() else manifest
      self.groups = _manifest_groups(found, group_column, file_column, self.names)

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, i: int) -> dict:
    data = read_image(self.files[i])
    image = decode_image(data, channels=3, image_size=self.image_shape[0])
    return {'image': image, 'label': int(self.labels[i]), 'sha256': content_sum(data)}

  @functools.cached_property
  def fingerprint(self) -> str:
    """Digest of image_size, decoder, groups, and the names of classes and images."""
    groups = b'' if self.groups is None else self.groups.tobytes()
    return digest(
      ['folder', *decoder_version(), self.image_shape, self.class_names, groups, *self.names]
    )


def read_image(path: pathlib.Path) -> bytes:
  """The bytes of one file; a failing disk or network drive is an error, not an unreadable image."""
  try:
    return path.read_bytes()
  except (PermissionError, FileNotFoundError) as error:
    raise Unreadable(error.strerror) from error
  except OSError as error:
    raise disk_error(path, error) from error


def _manifest_groups(
  manifest: str | os.PathLike, group_column: str, file_column: str, names: tuple[str, ...]
) -> np.ndarray:
  """Duplicate group of every image, [N] int64, numbered in order; see ImageFolderSource."""
  if not manifest or not group_column:
    raise UserError(
      'data.manifest together with data.group_column',
      f'manifest {str(manifest)!r} and group_column {group_column!r}',
      'set both, or none of them if no image has a duplicate',
    )
  rows = _read_manifest(manifest, (file_column, group_column))
  group_of_file, known = {}, set(names)
  for row in rows:
    file = portable(row[file_column] or '')
    if file not in known:  # as Windows writes it, or with ./ before it
      file = pathlib.PurePosixPath(file.replace('\\', '/')).as_posix()
    if file in group_of_file:
      raise UserError(f'one row for a file in {manifest}', f'two for {file}', 'remove one of them')
    group_of_file[file] = (row[group_column] or '').strip()
  if unknown := sorted(set(group_of_file) - known):
    raise UserError(
      f'rows of {manifest} that name images of the folder',
      f'{len(unknown)} that match none, such as {unknown[0]!r}',
      f'write paths like {names[0]!r} into column {file_column!r}, or remove those rows; '
      'if photos were moved or removed, audit the folder again, with another --workdir',
    )
  # keys: the cell of a group, or the index of an image without duplicates
  ids: dict[str | int, int] = {}
  keys = [group_of_file.get(name) or i for i, name in enumerate(names)]
  return np.asarray([ids.setdefault(key, len(ids)) for key in keys], np.int64)


def _read_manifest(manifest: str | os.PathLike, columns: tuple[str, ...]) -> list[dict]:
  """Rows of a CSV file in UTF-8 that has these columns; names of files may have other bytes."""
  expected, wrong = f'a CSV file at {manifest}', None
  try:
    data = pathlib.Path(manifest).read_bytes()
    try:
      text = data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
      wrong, text = error, data.decode('utf-8-sig', 'surrogateescape')
    reader = csv.DictReader(io.StringIO(text, newline=''))
    found = list(reader.fieldnames or ())
    rows = list(reader)
  except (OSError, csv.Error) as error:
    raise UserError(expected, str(error), 'correct data.manifest') from error
  if wrong and not set(columns) <= set(found):
    raise UserError(expected, str(wrong), 'correct data.manifest') from wrong
  if missing := [column for column in columns if column not in found]:
    raise UserError(
      f'columns {" and ".join(columns)} in {manifest}',
      f'no {" and no ".join(missing)} among {", ".join(found)}',
      f'set data.group_column to the column of groups, and write the paths into {columns[0]!r}',
    )
  return rows
