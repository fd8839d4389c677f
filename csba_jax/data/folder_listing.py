"""The images in a folder of CLASS/file, in one order on every machine, and what is left out."""

import collections
import dataclasses
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
PARTS = ('train', 'training', 'val', 'valid', 'validation', 'dev', 'test', 'testing', 'eval')
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
  """

  paths: tuple[pathlib.Path, ...]
  names: tuple[str, ...]
  labels: np.ndarray
  class_names: tuple[str, ...]
  left_out: str


def list_images(directory: pathlib.Path, layout: str) -> Listing:
  """The images below DIRECTORY/CLASS.

  Files with an ending in IMAGE_SUFFIXES are images, whatever they hold, and those with an ending in
  SNIFFED if they begin as one. Hidden files, folders of systems and links to folders below the
  class folders are left out.

  Args:
    directory: holds one folder for each class.
    layout: see `image_folder.ImageFolderSource`.

  Raises:
    UserError: no such folder, fewer than two class folders, a class folder without an image or with
      a name that is not UTF-8, a folder that may not be listed, names that differ in their Unicode
      form alone, or the parts of a data set in place of classes.
  """
  folders, left_out = _class_folders(directory, layout)
  class_names = tuple(sorted(folders))
  paths, names, labels = [], [], []
  for label, class_name in enumerate(class_names):
    beside = collections.Counter[str]()
    images = list(_walk(folders[class_name], beside))
    if not images:
      of_all = f': {", ".join(_counted(beside))} left out' if beside else ''
      raise UserError(
        f'images ({", ".join(IMAGE_SUFFIXES)}) in every class folder',
        f'none in {class_name}{of_all}',
        'convert its files to one of these formats, add images to it, or move it elsewhere',
      )
    found = _one_form({p: p.relative_to(directory).as_posix() for p in images}, 'files')
    names += sorted(found)
    paths += [found[name] for name in sorted(found)]
    labels += [label] * len(found)
    left_out |= {class_name: beside} if beside else {}
  line = _describe(directory, left_out)
  return Listing(tuple(paths), tuple(names), np.asarray(labels, np.int32), class_names, line)


def _describe(directory: pathlib.Path, left_out: dict[str, collections.Counter[str]]) -> str:
  """'left out of photos: cat: 15 .heic, folder @eaDir; dog: 2 .txt'."""
  parts = [f'{name}: {", ".join(_counted(kinds))}' for name, kinds in left_out.items()]
  if len(parts) > NAMED + 1:
    parts[NAMED:] = [f'and in {len(parts) - NAMED} more classes']
  return f'left out of {directory.name}: {"; ".join(parts)}' if parts else ''


def _class_folders(
  directory: pathlib.Path, layout: str
) -> tuple[dict[str, pathlib.Path], dict[str, collections.Counter[str]]]:
  """({class name: folder}, {'beside the classes': what lies there and is left out})."""
  expected = 'a folder with one folder of images for each class'
  if not directory.is_dir():
    found = f'a file, {directory}' if directory.exists() else f'nothing at {directory}'
    raise UserError(expected, found, 'name the folder that holds the class folders')
  beside, folders = collections.Counter[str](), []
  try:
    for path in directory.iterdir():
      if not path.is_dir():
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith('.'):
          beside['image'] += 1
      elif _is_system(path.name):
        beside[f'folder {_escaped(path.name)}'] += 1
      else:
        folders.append(path)
  except OSError as error:
    raise _unlisted(directory, error) from error
  classes = _one_form({path: _utf8(path) for path in folders}, 'class folders')
  if layout == 'auto':
    _check_no_parts(directory, classes)
  if len(classes) < 2:
    raise UserError(
      expected,
      f'{f"only one, {next(iter(classes))}," if classes else "no class folder"} in {directory}',
      'arrange the images as DIRECTORY/CLASS/image.jpg, with two classes or more',
    )
  return classes, {'beside the classes': beside} if beside else {}


def _check_no_parts(directory: pathlib.Path, folders: dict[str, pathlib.Path]) -> None:
  """Raises UserError if the folders are the parts of a data set, by their names and content.

  They are if one of them has a name in PARTS and holds folders, and every other folder with such a
  name holds some of these or none: a rare class may be absent from a part, and a test part may
  have no labels.
  """
  parts = {name: path for name, path in folders.items() if name.casefold() in PARTS}
  inside = {name: _subfolders(path) for name, path in parts.items()}
  largest = max(inside.values(), key=len, default=set())
  if not largest or any(held - largest for held in inside.values()):
    return
  if len(parts) < 2 and (len(folders) > 1 or len(largest) < 2):
    return
  some = sorted(largest)[:NAMED]
  more = ', ...' if len(largest) > NAMED else ''
  part = max(inside, key=lambda name: (len(inside[name]), name.casefold().startswith('train')))
  raise UserError(
    f'one folder of images for each class in {directory}',
    f'{" and ".join(sorted(parts))} with the folders {", ".join(some)}{more} inside: parts of a '
    'data set, not classes',
    f'set data.dir to one part, such as {directory / part}, which is then split; or set '
    'data.layout=classes if these are names of classes',
  )


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
