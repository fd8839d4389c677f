"""Images decoded once: a source's arrays in memory, kept on disk between runs."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import logging

from csba_jax.data.decoding import Unreadable
from csba_jax.data.sources import Source
from csba_jax.errors import UserError

INDEX = 'index.json'
NAMED = 20  # unreadable images named one by one
BLOCK = 128  # images a thread reads and decodes at a time


@dataclasses.dataclass(frozen=True, eq=False)
class ImageArrays:
  """All images of a source, decoded; everything is aligned with the images that were kept.

  Attributes:
    images: [N, H, W, channels] uint8, read-only.
    labels: [N] int32.
    groups: [N] int64, equal for duplicates; None when every image is on its own.
    class_names: C names.
    names: N names.
    skipped: (name, reason) of each image that could not be decoded and was left out.
  """

  images: np.ndarray
  labels: np.ndarray
  groups: np.ndarray | None
  class_names: tuple[str, ...]
  names: tuple[str, ...]
  skipped: tuple[tuple[str, str], ...]


def load_arrays(
  source: Source,
  cache_dir: str | os.PathLike = '',
  log: Callable[[str], None] = logging.warning,
) -> ImageArrays:
  """The decoded images of a source, from the cache if it holds them, else decoded and cached.

  The cache is CACHE_DIR/NAME-FINGERPRINT/: .npy files and an index with their SHA-256. It appears
  as a whole or not at all, so processes may race. A damaged one is built again, and where none can
  be written the run goes on without; either is one warning.

  Args:
    source: of the images.
    cache_dir: '' means $CSBA_CACHE_DIR, else ~/.cache/csba_jax.
    log: called with one line at a time: progress, and the warnings above.

  Raises:
    UserError: an unreadable image in a strict source, or a class without a readable one.
  """
  root = pathlib.Path(cache_dir or os.environ.get('CSBA_CACHE_DIR') or '~/.cache/csba_jax')
  safe_name = re.sub(r'[^\w.-]+', '-', source.name)
  folder = root.expanduser() / f'{safe_name}-{source.fingerprint[:16]}'
  arrays = _read_or_warn(folder, log)
  if arrays is None:
    arrays = decode_all(source, log)
    _write_or_warn(folder, arrays, log)
  _check_readable(source, arrays)  # a cache may have been built by a run that was not strict
  if arrays.skipped:
    log(f'{len(arrays.skipped)} of {len(source)} images left out:')
    for name, reason in arrays.skipped[:NAMED]:
      log(f'  {name} ({reason})')
    if len(arrays.skipped) > NAMED:
      log(f'  and {len(arrays.skipped) - NAMED} more')
  arrays.images.flags.writeable = False
  return arrays


def decode_all(source: Source, log: Callable[[str], None] = logging.warning) -> ImageArrays:
  """Decodes every image once, in a few threads; leaves out those that are Unreadable."""
  images = np.empty((len(source), *source.image_shape), np.uint8)
  log(f'decoding {len(source)} images of {source.name}: {images.nbytes / 1e6:.1f} MB')

  def decode(block: range) -> list[str]:
    """Fills in a block of images; returns for each '' or the reason why it cannot be read."""
    reasons = []
    for i, item in zip(block, source.read(block), strict=True):
      if not isinstance(item, Unreadable):
        images[i] = item['image']
      reasons.append(str(item) if isinstance(item, Unreadable) else '')
    return reasons

  n = len(source)
  blocks = [range(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]
  with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
    reasons = _with_progress(pool.map(decode, blocks), n, log)
  kept = np.asarray([i for i, reason in enumerate(reasons) if not reason], np.int64)
  for to, i in enumerate(kept.tolist()):  # in place: a second copy may not fit in memory
    if to != i:
      images[to] = images[i]
  return ImageArrays(
    images[: len(kept)],
    np.asarray(source.labels, np.int32)[kept],
    None if source.groups is None else np.asarray(source.groups, np.int64)[kept],
    tuple(source.class_names),
    tuple(source.names[i] for i in kept.tolist()),
    tuple((source.names[i], reason) for i, reason in enumerate(reasons) if reason),
  )


def _with_progress(blocks: Iterable[list], total: int, log: Callable[[str], None]) -> list:
  """The blocks as one list, with a line every five seconds."""
  found, last = [], time.monotonic()
  for block in blocks:
    found += block
    if time.monotonic() - last >= 5:
      last = time.monotonic()
      log(f'decoded {len(found)} of {total} images')
  return found


def _check_readable(source: Source, arrays: ImageArrays) -> None:
  """Raises UserError if a strict source lost an image, or a class all of them."""
  counts = np.bincount(arrays.labels, minlength=len(arrays.class_names))
  empty = [name for name, count in zip(arrays.class_names, counts, strict=True) if not count]
  if not arrays.skipped or not (source.strict or empty):
    return
  name, reason = arrays.skipped[0]
  found = f'{len(arrays.skipped)} unreadable, such as {name} ({reason})'
  if empty:
    raise UserError(
      f'readable images in every class of {source.name}',
      f'none in {", ".join(empty)}: {found}',
      'replace the unreadable files, or move that class out of the way',
    )
  raise UserError(
    f'{len(source)} readable images in {source.name}',
    found,
    'replace or delete it; for a folder, data.strict=False leaves unreadable files out',
  )


def _read_or_warn(folder: pathlib.Path, log: Callable[[str], None]) -> ImageArrays | None:
  """What `_write` wrote; None, with a warning unless there is nothing, if it cannot be trusted."""
  if not folder.is_dir():
    return None
  try:
    return _read(folder)
  except Exception as error:  # whatever the damage is, the answer is to decode again
    reason = ' '.join(str(error).split())
    log(f'cache {folder} is damaged ({type(error).__name__}: {reason}): decoding again')
    return None


def _read(folder: pathlib.Path) -> ImageArrays:
  """Reads and verifies a cache; raises whatever the damage raises."""
  index = json.loads((folder / INDEX).read_text(encoding='utf-8'))
  content = index['content']
  if index['sha256'] != _json_sha256(content):
    raise ValueError(f'{INDEX} does not have its sha256')
  found = {}
  for name, described in content['files'].items():
    with (folder / name).open('rb') as file:
      if hashlib.file_digest(file, 'sha256').hexdigest() != described['sha256']:
        raise ValueError(f'{name} does not have its sha256')
      file.seek(0)
      found[name] = np.load(file, allow_pickle=False)
  return ImageArrays(
    found['images.npy'],
    found['labels.npy'],
    found.get('groups.npy'),
    tuple(content['class_names']),
    tuple(content['names']),
    tuple((name, reason) for name, reason in content['skipped']),
  )


def _write_or_warn(folder: pathlib.Path, arrays: ImageArrays, log: Callable[[str], None]) -> None:
  """Writes a cache as a whole; if that cannot be done, warns and leaves nothing behind."""
  part = folder.with_name(f'.{folder.name}.{secrets.token_hex(4)}')
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    part.mkdir()
    _write(part, arrays)
    _put_in_place(part, folder)
  except OSError as error:
    log(f'no cache at {folder} ({error}): images will be decoded in every run')
  finally:
    shutil.rmtree(part, ignore_errors=True)


def _write(folder: pathlib.Path, arrays: ImageArrays) -> None:
  """Writes the arrays and the index that describes them into an empty folder."""
  files = {}
  for name in ('images', 'labels', 'groups'):
    array = getattr(arrays, name)
    if array is not None:
      path = folder / f'{name}.npy'
      np.save(path, array, allow_pickle=False)
      with path.open('rb') as file:
        sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
      files[path.name] = {'sha256': sha256, 'dtype': str(array.dtype), 'shape': list(array.shape)}
  content = {
    'files': files,
    'class_names': list(arrays.class_names),
    'names': list(arrays.names),
    'skipped': [list(pair) for pair in arrays.skipped],
  }
  index = {'content': content, 'sha256': _json_sha256(content)}
  (folder / INDEX).write_text(json.dumps(index), encoding='utf-8')


def _put_in_place(part: pathlib.Path, folder: pathlib.Path) -> None:
  """Renames a finished cache to its name; where another process was faster, its cache stays."""
  damaged = part.with_name(part.name + '.old')
  try:
    if folder.is_dir() and not _is_whole(folder):
      with contextlib.suppress(FileNotFoundError):  # another process did it first
        os.replace(folder, damaged)
    os.rename(part, folder)
  except OSError:
    if not folder.is_dir():
      raise
  finally:
    shutil.rmtree(damaged, ignore_errors=True)


def _is_whole(folder: pathlib.Path) -> bool:
  """Whether a cache can be read and verified."""
  try:
    _read(folder)
  except Exception:  # as in _read_or_warn
    return False
  return True


def _json_sha256(content: dict) -> str:
  """Hex SHA-256 of a dict as JSON."""
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
