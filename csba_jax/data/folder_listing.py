"""The images in a folder of CLASS/file, in one order on every machine, and what is left out."""

import collections
import dataclasses
import itertools
import os
import pathlib
import re
import unicodedata
from collections.abc import Iterable

import numpy as np

from csba_jax.errors import UserError

IMAGE_SUFFIXES = ('.bmp', '.gif', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
# Files with one of these endings, or without any, are images if they begin as one. No other file
# is: photo.jpg~ and thumbnails of cameras (.thm) begin like that too, and are copies.
SNIFFED = ('', '.apng', '.dib', '.jfi', '.jfif', '.jif', '.jpe', '.pjp', '.pjpeg')
_HEADS = re.compile(
  rb'\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|BM....\0{4}|II\*\0|MM\0\*', re.DOTALL
)
# Folders of thumbnails, deleted files and archives, which hold copies; hidden ones are one too.
SYSTEM_FOLDERS = (
  *('@eadir', '@tmp', '#recycle', '#snapshot'),  # Synology
  *('@__thumb', '@recycle', '@recently-snapshot'),  # QNAP
  *('__macosx', '$recycle.bin', 'system volume information', 'lost+found', '__pycache__'),
)
TRAIN, VAL, TEST = 'train', 'val', 'test'
PARTS = {  # name of a folder: part of a data set
  **dict.fromkeys(('train', 'training'), TRAIN),
  **dict.fromkeys(('val', 'valid', 'validation', 'dev'), VAL),
  **dict.fromkeys(('test', 'testing', 'eval'), TEST),
}
_OF_PHONES = {'.heic', '.heif'}
NAMED = 8  # classes, folders or kinds of files that one line names
_NOUN = re.compile('^(image|link|hidden file|file|folder)')  # of a kind that is left out


@dataclasses.dataclass(frozen=True, eq=False)
class Listing:
  """The images of a folder, by class and then by path, as Unicode code points.

  Attributes:
    paths: N paths.
    names: N names, relative to the folder, with / and in one Unicode form.
    labels: [N] int32.
    class_names: C names, sorted.
    left_out: one line that counts by class and ending what is no image; '' if there is nothing.
    part_of: TRAIN, VAL or TEST of each image, where the folder is divided into these parts; else
      None.
  """

  paths: tuple[pathlib.Path, ...]
  names: tuple[str, ...]
  labels: np.ndarray
  class_names: tuple[str, ...]
  left_out: str
  part_of: tuple[str, ...] | None = None


def list_images(directory: pathlib.Path, layout: str) -> Listing:
  """The images below DIRECTORY/CLASS, or DIRECTORY/PART/CLASS where the folder has parts.

  Files with an ending in IMAGE_SUFFIXES are images, whatever they hold, and those with an ending in
  SNIFFED if they begin as one. Hidden files, folders of systems and links to folders below the
  class folders are left out.

  Args:
    directory: holds one folder for each class.
    layout: see `image_folder.ImageFolderSource`.

  Raises:
    UserError: no such folder, fewer than two class folders, a class folder without an image or with
      a name that is not UTF-8, a folder that may not be listed, names that differ in their Unicode
      form alone; two folders for one part, parts without one to train on, or a class that this one
      does not have.
  """
  parts = _parts(directory) if layout == 'auto' and directory.is_dir() else {}
  return _of_parts(directory, parts) if parts else _of_classes(directory)


def _of_parts(directory: pathlib.Path, parts: dict[str, pathlib.Path]) -> Listing:
  """The images of {part: folder}, training images first; names begin with the folder."""
  if TRAIN not in parts:
    raise UserError(
      f'a folder {TRAIN} among the parts of a data set in {directory}',
      ' and '.join(sorted(folder.name for folder in parts.values())),
      f'rename the folder to train on to {TRAIN}; or set data.layout=classes if these are names of '
      'classes',
    )
  ordered = [part for part in (TRAIN, VAL, TEST) if part in parts]
  listings = {part: _of_classes(parts[part], needs_all=part == TRAIN) for part in ordered}
  class_names = listings[TRAIN].class_names
  number_of = {name: c for c, name in enumerate(class_names)}
  for part, found in listings.items():
    if unknown := sorted(set(found.class_names) - set(class_names)):
      raise UserError(
        f'classes that {parts[TRAIN]} has in {parts[part]}',
        f'{", ".join(unknown[:NAMED])} there alone',
        'give the folders of a class one name in all parts, or move this one elsewhere; or set '
        'data.layout=classes if these are names of classes',
      )
  labels = [
    np.asarray([number_of[name] for name in found.class_names], np.int32)[found.labels]
    for found in listings.values()
  ]
  lines = [found.left_out for found in listings.values() if found.left_out]
  lines += _beside_parts(directory, parts)
  return Listing(
    tuple(path for found in listings.values() for path in found.paths),
    tuple(f'{portable(parts[part].name)}/{n}' for part in ordered for n in listings[part].names),
    np.concatenate(labels),
    class_names,
    '; '.join(lines),
    tuple(part for part in ordered for _ in listings[part].names),
  )


def _beside_parts(directory: pathlib.Path, parts: dict[str, pathlib.Path]) -> list[str]:
  """A line that names what lies beside the parts and is not read, or nothing."""
  images, folders = 0, []
  for path in _entries(directory):
    if path.is_dir():
      if path not in parts.values() and not _is_system(path.name):
        folders.append(_escaped(path.name))
    elif path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith('.'):
      images += 1
  found = [f'folder {name}' for name in sorted(folders)[:NAMED]]
  found += [f'{images} image{"s" * (images != 1)}'] if images else []
  return [f'left out of {directory.name}, beside the parts: {", ".join(found)}'] if found else []


def _of_classes(directory: pathlib.Path, needs_all: bool = True) -> Listing:
  """The images of a folder of class folders.

  Args:
    needs_all: whether there must be two classes, each with an image; else one image is enough.
  """
  folders, left_out = _class_folders(directory, 2 if needs_all else 1)
  paths, names, labels = [], [], []
  class_names: list[str] = []
  for class_name in sorted(folders):
    beside = collections.Counter[str]()
    images = list(_walk(folders[class_name], beside))
    if not images and needs_all:
      of_all = f': {", ".join(_counted(beside))} left out' if beside else ''
      raise UserError(
        f'images ({", ".join(IMAGE_SUFFIXES)}) in every class folder',
        f'none in {class_name}{of_all}',
        f'convert its files to one of these formats{_reader_of(beside)}, add images to it, or move '
        'it elsewhere',
      )
    left_out |= {class_name: beside} if beside else {}
    if not images:
      continue
    found = _one_form({p: p.relative_to(directory).as_posix() for p in images}, 'files')
    names += sorted(found)
    paths += [found[name] for name in sorted(found)]
    labels += [len(class_names)] * len(found)
    class_names.append(class_name)
  line = _describe(directory, left_out)
  return Listing(tuple(paths), tuple(names), np.asarray(labels, np.int32), tuple(class_names), line)


def images_below(path: pathlib.Path) -> list[pathlib.Path]:
  """The image files at any depth of a folder, by path as Unicode code points; or one file itself.

  Raises:
    UserError: there is nothing, or no image.
  """
  if path.is_file():
    return [path]
  if not path.is_dir():
    raise UserError('a photo or a folder of photos', f'nothing at {path}', 'correct the path')
  beside = collections.Counter[str]()
  found = sorted(_walk(path, beside), key=lambda p: p.as_posix())
  if not found:
    others = f': {", ".join(_counted(beside))} left out' if beside else ''
    raise UserError(
      f'images ({", ".join(IMAGE_SUFFIXES)}) in {path}',
      f'none{others}',
      f'name another folder, or convert the files to one of these formats{_reader_of(beside)}',
    )
  return found


def _reader_of(beside: collections.Counter[str]) -> str:
  """Which package reads the files of phones that were left out; '' if there are none."""
  return ' (Python reads .heic with the package pillow-heif)' if set(beside) & _OF_PHONES else ''


def _describe(directory: pathlib.Path, left_out: dict[str, collections.Counter[str]]) -> str:
  """'left out of photos: cat: 15 .heic, folder @eaDir; dog: 2 .txt'."""
  parts = [f'{name}: {", ".join(_counted(kinds))}' for name, kinds in left_out.items()]
  if len(parts) > NAMED + 1:
    parts[NAMED:] = [f'and in {len(parts) - NAMED} more classes']
  return f'left out of {directory.name}: {"; ".join(parts)}' if parts else ''


def _class_folders(
  directory: pathlib.Path, least: int
) -> tuple[dict[str, pathlib.Path], dict[str, collections.Counter[str]]]:
  """({class name: folder}, {'beside the classes': what lies there and is left out})."""
  expected = 'a folder with one folder of images for each class'
  if not directory.is_dir():
    found = f'a file, {directory}' if directory.exists() else f'nothing at {directory}'
    raise UserError(expected, found, 'name the folder that holds the class folders')
  beside, folders = collections.Counter[str](), []
  for path in _entries(directory):
    if not path.is_dir():
      if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith('.'):
        beside['image'] += 1
    elif _is_system(path.name):
      beside[f'folder {_escaped(path.name)}'] += 1
    else:
      folders.append(path)
  classes = _one_form({path: _utf8(path) for path in folders}, 'class folders')
  if len(classes) < least:
    raise UserError(
      expected,
      f'{f"only one, {next(iter(classes))}," if classes else "no class folder"} in {directory}',
      'arrange the images as DIRECTORY/CLASS/image.jpg, with two classes or more',
    )
  return classes, {'beside the classes': beside} if beside else {}


def _parts(directory: pathlib.Path) -> dict[str, pathlib.Path]:
  """{part: its folder} of a data set that is divided; {} where the folders are classes.

  They are parts if two of them have names of different parts and a folder of the same name inside;
  or if one has such a name and two folders or more inside, and there is no other folder, or only
  those of parts without labels. A rare class may be absent from a part.

  Raises:
    UserError: two folders of one part; or one such folder beside others that hold no folders, which
      may mean either.
  """
  folders = {p.name: p for p in _entries(directory) if p.is_dir() and not _is_system(p.name)}
  inside = {name: _subfolders(path) for name, path in folders.items()}
  named = {name: inside[name] for name in folders if name.casefold() in PARTS and inside[name]}
  shared = any(
    named[one] & named[two]
    for one, two in itertools.combinations(named, 2)
    if PARTS[one.casefold()] != PARTS[two.casefold()]
  )
  others = [name for name in folders if name not in named]
  alone = len(named) == 1 and len(next(iter(named.values()))) > 1
  if alone and not any(inside[name] for name in others):
    if unknown := sorted(name for name in others if name.casefold() not in PARTS):
      (name,) = named
      raise UserError(
        f'folders of classes, or of parts, in {directory}',
        f'{name} with folders inside, and {unknown[0]} with none',
        f'move all but {name} elsewhere to train on it; or set data.layout=classes if these are '
        'names of classes',
      )
  elif not shared:
    return {}
  found: dict[str, pathlib.Path] = {}
  for name in sorted(named):
    part = PARTS[name.casefold()]
    if part in found:
      raise UserError(
        f'one folder for the {part} part in {directory}',
        f'{found[part].name} and {name}',
        'put one of them into the other, or move it elsewhere',
      )
    found[part] = folders[name]
  return found


def _entries(directory: pathlib.Path) -> list[pathlib.Path]:
  """What lies in a folder; UserError if it may not be listed."""
  try:
    return list(directory.iterdir())
  except OSError as error:
    raise _unlisted(directory, error) from error


def _subfolders(folder: pathlib.Path) -> set[str]:
  """Names of the folders in a folder, without those of systems."""
  try:
    return {portable(p.name) for p in folder.iterdir() if p.is_dir() and not _is_system(p.name)}
  except OSError as error:
    raise _unlisted(folder, error) from error


def _walk(folder: pathlib.Path, beside: collections.Counter[str]) -> Iterable[pathlib.Path]:
  """Image files at any depth, in any order; counts in `beside`, by kind, what is left out."""

  def stop(error: OSError) -> None:
    raise _unlisted(folder, error) from error

  for parent, subfolders, files in os.walk(folder, onerror=stop):
    for name in subfolders:
      if _is_system(name):
        beside[f'folder {_escaped(name)}'] += 1
      elif os.path.islink(os.path.join(parent, name)):
        beside['link to a folder'] += 1
    subfolders[:] = [name for name in subfolders if not _is_system(name)]
    for name in files:
      path = pathlib.Path(parent, name)
      suffix = path.suffix.lower()
      if name.startswith('.'):
        beside['hidden file'] += 1
      elif suffix in IMAGE_SUFFIXES or (suffix in SNIFFED and _begins_as_image(path)):
        yield path
      else:
        beside[_escaped(suffix) or 'file without an ending'] += 1


def _begins_as_image(path: pathlib.Path) -> bool:
  """Whether the first bytes of a file are those of a format that `decode_image` reads."""
  try:
    with path.open('rb') as file:
      head = file.read(12)
  except OSError:
    return True  # decoding says why it cannot be read
  return bool(_HEADS.match(head))


def _is_system(folder: str) -> bool:
  """Whether a folder of this name is hidden, or made by an operating or storage system."""
  return folder.startswith('.') or folder.casefold() in SYSTEM_FOLDERS


def _counted(kinds: collections.Counter[str]) -> list[str]:
  """'15 .heic', '1 image', 'folder @eaDir': most frequent first."""
  named = []
  for kind, n in sorted(kinds.items(), key=lambda item: (-item[1], item[0])):
    one = kind if kind.startswith('folder ') else f'1 {kind}'
    named.append(one if n == 1 else f'{n} ' + _NOUN.sub(r'\1s', kind, count=1))
  return [*named[:NAMED], f'{len(named) - NAMED} more kinds'] if len(named) > NAMED + 1 else named


def _one_form(names: dict[pathlib.Path, str], what: str) -> dict[str, pathlib.Path]:
  """{portable name: path}; UserError if two names differ in nothing but their Unicode form."""
  found: dict[str, pathlib.Path] = {}
  for path, name in sorted(names.items()):
    same = found.setdefault(portable(name), path)
    if same != path:
      raise UserError(
        f'names of {what} that differ in more than their Unicode form',
        f'{names[same]!a} and {name!a}, which both read {portable(name)}',
        f'move what one of them holds into the other, or rename one, in {path.parent}',
      )
  return found


def _utf8(path: pathlib.Path) -> str:
  """The name of a class folder.

  Raises:
    UserError: it is not in UTF-8, so that it can be neither printed nor drawn.
  """
  try:
    path.name.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f'names of class folders in UTF-8 in {_escaped(str(path.parent))}',
      _escaped(path.name),
      'rename the folder, with letters that your system shows',
    ) from error
  return path.name


def _escaped(name: str) -> str:
  r"""A name with \xNN for bytes that are no UTF-8."""
  return os.fsencode(name).decode('utf-8', 'backslashreplace')


def _unlisted(folder: pathlib.Path, error: OSError) -> UserError:
  """The error for a folder whose files cannot be listed."""
  return UserError(
    f'to list the files in {folder}', str(error), 'grant access to it, or move it elsewhere'
  )


def portable(name: str) -> str:
  """One encoding of accented letters: macOS splits them, which would change names and order."""
  return unicodedata.normalize('NFC', name)
