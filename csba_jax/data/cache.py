"""Decodes the images of a source once and keeps them on disk; a run reads or maps them."""

import collections
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
from absl import logging

from csba_jax.data import file_sums, locks
from csba_jax.data.decoding import Unreadable, without_warnings_of_pillow
from csba_jax.data.sources import Source, digest
from csba_jax.errors import UserError
from csba_jax.files import expanded

INDEX, IMAGES = 'index.json', 'images.npy'
DECODING = 'decoding-'  # in the name of a folder while images are decoded into it
NAMED = 20  # unreadable images that are named one by one, at most
BLOCK = 128  # images that a thread reads and decodes at a time, at most
BLOCK_BYTES = 8 * 2**20  # of their pixels, at most

Item = TypeVar('Item')
Found = TypeVar('Found')


@dataclasses.dataclass(frozen=True, eq=False)
class ImageArrays:
  """All decoded images of a source; labels, groups and names belong to the images that were kept.

  Attributes:
    images: [N, H, W, channels] uint8, read-only; a np.memmap of the cache if asked for.
    labels: [N] int32.
    groups: [N] int64, equal for duplicates; None when every image is on its own.
    sums: [N, 32] uint8, SHA-256 of what each image was decoded from (`sources.content_sum`).
    class_names: C names.
    names: N names.
    skipped: (name, reason) of each image that could not be decoded and was left out.
  """

  images: np.ndarray
  labels: np.ndarray
  groups: np.ndarray | None
  sums: np.ndarray
  class_names: tuple[str, ...]
  names: tuple[str, ...]
  skipped: tuple[tuple[str, str], ...]


def load_arrays(
  source: Source,
  cache_dir: str | os.PathLike = '',
  log: Callable[[str], None] = logging.warning,
  mapped: bool = False,
  before: Callable[[], object] = lambda: None,
) -> ImageArrays:
  """The decoded images of a source; if the cache does not hold them, they are decoded and cached.

  The cache is CACHE_DIR/NAME-KEY/: .npy files and an index with their SHA-256. The key is a digest
  of the source's fingerprint and of the content of its files (`file_sums`), so that other files
  never get these pixels, and the same files do wherever they lie. The cache is renamed into place
  once it is complete, so several processes may write it at once. A damaged cache is decoded again.
  If no cache can be written, the run continues without one. Both give one warning.

  With `mapped` the images are never in memory as a whole. One process decodes them into the file,
  block by block, while the others wait; all read them from the file. The format is the same. At
  each start only the shape and length of the file of images are compared with the index, because
  reading all of it may take minutes. If $CSBA_VERIFY_CACHE is set, its SHA-256 is compared too.

  Args:
    source: where the images come from.
    cache_dir: '' means $CSBA_CACHE_DIR, else ~/.cache/csba_jax.
    log: called with one line at a time: progress, and the warnings above.
    mapped: whether `images` is a map of the file in the cache.
    before: called before images are decoded, if they are; may raise.

  Raises:
    UserError: an unreadable image in a strict source, or a class without a readable image; a file
      that changes while it is decoded; with `mapped`, a cache that cannot be written or a disk that
      is too small (checked before decoding).
  """
  root = expanded(cache_dir or os.environ.get('CSBA_CACHE_DIR') or '~/.cache/csba_jax')
  files = file_sums.read(source.files, root, log)
  safe_name = re.sub(r'[^\w.-]+', '-', source.name)
  folder = root / f'{safe_name}-{digest([source.fingerprint, *files.sums])[:16]}'
  arrays = _read_or_warn(folder, mapped, log)
  if arrays is None:
    before()
  if arrays is None and mapped:
    arrays = _decode_to_disk(source, files, folder, log)
  elif arrays is None:
    arrays = decode_all(source, log)
    _check_unchanged(source, files)
    _write_or_warn(folder, arrays, log)
  _check_readable(source, arrays)  # a cache may have been built by a run that was not strict
  if arrays.skipped:
    log(f'{len(arrays.skipped)} of {len(source)} images cannot be decoded and are left out:')
    for name, reason in arrays.skipped[:NAMED]:
      log(f'  {name} ({reason})')
    if len(arrays.skipped) > NAMED:
      log(f'  and {len(arrays.skipped) - NAMED} more')
  arrays.images.flags.writeable = False
  return arrays


def decode_all(source: Source, log: Callable[[str], None] = logging.warning) -> ImageArrays:
  """Decodes every image once, in a few threads, and leaves out those that are Unreadable."""
  images = np.empty((len(source), *source.image_shape), np.uint8)
  sums, reasons, end = [], [], 0
  for block in decoded(source, log):
    images[end : end + len(block.images)] = block.images
    sums += block.sums
    reasons += block.reasons
    end += len(block.images)
  return _aligned(source, images[:end], sums, reasons)


class Block(NamedTuple):
  """Some images in their order: [n, H, W, ch] and their content sums; for each '' or its fault."""

  images: np.ndarray
  sums: list[bytes]
  reasons: list[str]


def decoded(source: Source, log: Callable[[str], None], multiple: int = 1) -> Iterator[Block]:
  """The images of a source in blocks; their lengths are multiples of `multiple` where it fits."""
  total, size = len(source), int(np.prod(source.image_shape))
  log(f'decoding {total} images of {source.name}: {total * size / 1e6:.1f} MB')
  length = max(1, min(BLOCK, BLOCK_BYTES // size))
  length -= length % multiple if length > multiple else 0

  def decode(block: range) -> Block:
    items = source.read(block)
    kept = [item for item in items if not isinstance(item, Unreadable)]
    empty = np.empty((0, *source.image_shape), np.uint8)
    images = np.stack([item['image'] for item in kept]) if kept else empty
    reasons = [str(item) if isinstance(item, Unreadable) else '' for item in items]
    return Block(images, [item['sha256'] for item in kept], reasons)

  done, last = 0, time.monotonic()
  blocks = (range(i, min(i + length, total)) for i in range(0, total, length))
  with without_warnings_of_pillow():
    for found in in_order(decode, blocks):
      yield found
      done += len(found.reasons)
      if time.monotonic() - last >= 5:
        last = time.monotonic()
        log(f'decoded {done} of {total} images')


def in_order(function: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
  """Yields function(item) of each item, in order; a few threads work a few items ahead."""
  threads = min(4, os.cpu_count() or 1)
  waiting: collections.deque[Future[Found]] = collections.deque()
  with ThreadPoolExecutor(threads) as pool:
    try:
      for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > 2 * threads:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
    finally:  # also after an error, or if the caller stops early
      pool.shutdown(cancel_futures=True)


def _aligned(
  source: Source, images: np.ndarray, sums: list[bytes], reasons: list[str]
) -> ImageArrays:
  """The images that could be read, with their labels, groups and names."""
  kept = np.asarray([i for i, reason in enumerate(reasons) if not reason], np.int64)
  return ImageArrays(
    images,
    np.asarray(source.labels, np.int32)[kept],
    None if source.groups is None else np.asarray(source.groups, np.int64)[kept],
    np.frombuffer(b''.join(sums), np.uint8).reshape(-1, 32),
    tuple(source.class_names),
    tuple(source.names[i] for i in kept.tolist()),
    tuple((source.names[i], reason) for i, reason in enumerate(reasons) if reason),
  )


def _check_readable(source: Source, arrays: ImageArrays) -> None:
  """Raises UserError if a strict source has an unreadable image, or a class no readable one."""
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
      'replace the unreadable files, or move the folder of that class elsewhere',
    )
  raise UserError(
    f'{len(source)} readable images in {source.name}',
    found,
    'replace or delete it; for a folder, set data.strict=False to leave out unreadable files',
  )


def _check_unchanged(source: Source, files: file_sums.FileSums) -> None:
  """Raises UserError if a file is no longer what its sum was made of."""
  if changed := files.changed():
    raise UserError(
      f'files of {source.name} that stay as they are while they are decoded',
      f'{len(changed)} that changed, such as {changed[0]}',
      'start again once nothing writes to them',
    )


def _read_or_warn(
  folder: pathlib.Path, mapped: bool, log: Callable[[str], None]
) -> ImageArrays | None:
  """What `_write` wrote; None if there is nothing, or, with a warning, if it is damaged."""
  if not folder.is_dir():
    return None
  try:
    return _read(folder, mapped)
  except Exception as error:  # whatever the damage is: decode again
    reason = ' '.join(str(error).split())
    log(f'cache {folder} is damaged ({type(error).__name__}: {reason}): decoding again')
    return None


def _read(folder: pathlib.Path, mapped: bool) -> ImageArrays:
  """Reads and verifies a cache; damage may raise any exception."""
  index = json.loads((folder / INDEX).read_text(encoding='utf-8'))
  content = index['content']
  if index['sha256'] != _json_sha256(content):
    raise ValueError(f'{INDEX} does not match its sha256')
  found = {}
  for name, described in content['files'].items():
    with (folder / name).open('rb') as file:
      if mapped and name == IMAGES:
        found[name] = _map(file, described)
        if not os.environ.get('CSBA_VERIFY_CACHE'):
          continue
      if hashlib.file_digest(file, 'sha256').hexdigest() != described['sha256']:
        raise ValueError(f'{name} does not match its sha256')
      if name not in found:
        file.seek(0)
        found[name] = np.load(file, allow_pickle=False)
  return ImageArrays(
    found[IMAGES],
    found['labels.npy'],
    found.get('groups.npy'),
    found['sums.npy'],
    tuple(content['class_names']),
    tuple(content['names']),
    tuple((name, reason) for name, reason in content['skipped']),
  )


def _map(file: BinaryIO, described: Mapping) -> np.memmap:
  """The map of a .npy file; ValueError if the file does not fit its description in the index."""
  images = np.load(file.name, mmap_mode='r', allow_pickle=False)
  length = os.fstat(file.fileno()).st_size
  if [str(images.dtype), list(images.shape)] != [described['dtype'], described['shape']]:
    raise ValueError(f'{IMAGES} holds {images.dtype} {images.shape}')
  if length != images.offset + images.nbytes:
    raise ValueError(f'{IMAGES} has {length} bytes, not {images.offset + images.nbytes}')
  return images


def _write_or_warn(folder: pathlib.Path, arrays: ImageArrays, log: Callable[[str], None]) -> None:
  """Writes a cache; if that fails, warns and removes what it wrote."""
  part = folder.with_name(f'.{folder.name}.{secrets.token_hex(4)}')
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    part.mkdir()
    _write(part, arrays)
    _put_in_place(part, folder, False)
  except OSError as error:
    log(f'no cache at {folder} ({error}): images will be decoded in every run')
  finally:
    shutil.rmtree(part, ignore_errors=True)


def _decode_to_disk(
  source: Source, files: file_sums.FileSums, folder: pathlib.Path, log: Callable[[str], None]
) -> ImageArrays:
  """Decodes a source into its cache, block by block, and maps it."""
  part = folder.with_name(f'.{folder.name}.{DECODING}{secrets.token_hex(4)}')
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder, log):
      arrays = _read_or_warn(folder, True, lambda line: None)  # another process may have written it
      if arrays is None:
        part.mkdir()
        _check_room(source, folder.parent)
        _write(part, _decode_into(part / IMAGES, source, log))
        _check_unchanged(source, files)
        _put_in_place(part, folder, True)
        arrays = _read(folder, mapped=True)
      return arrays
  except OSError as error:
    raise _no_cache(source, folder.parent, str(error)) from error
  finally:
    shutil.rmtree(part, ignore_errors=True)


def _decode_into(path: pathlib.Path, source: Source, log: Callable[[str], None]) -> ImageArrays:
  """`decode_all` into a .npy file, with writes: on a full disk they raise.

  Writing through a memory map would kill the process there.
  """
  sums, reasons = [], []
  with path.open('wb') as file:
    _write_header(file, (len(source), *source.image_shape))
    for block in decoded(source, log):
      file.write(block.images.data)
      sums += block.sums
      reasons += block.reasons
    file.seek(0)
    _write_header(file, (len(sums), *source.image_shape))  # of the same length: numpy pads it
  return _aligned(source, np.load(path, mmap_mode='r'), sums, reasons)


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
  """Writes the header of a .npy file of bytes."""
  header = {'descr': '|u1', 'fortran_order': False, 'shape': shape}
  np.lib.format.write_array_header_1_0(file, header)


@contextlib.contextmanager
def _alone(folder: pathlib.Path, log: Callable[[str], None]) -> Iterator[None]:
  """Lets one process at a time decode into a cache; it removes what killed processes left."""
  path = folder.with_name(f'.{folder.name}.lock')
  waiting = f'waiting for another process that decodes into {folder}'
  with locks.alone(path, waiting, log) as held:
    if held:  # else each process decodes for itself
      for left in folder.parent.glob(f'.{folder.name}.{DECODING}*'):
        shutil.rmtree(left, ignore_errors=True)
    yield


def _check_room(source: Source, root: pathlib.Path) -> None:
  """Raises UserError if the disk has too little space for images, labels and names."""
  needed = len(source) * (int(np.prod(source.image_shape)) + 256) + 2**20
  free = shutil.disk_usage(root).free
  if free < needed:
    raise _no_cache(source, root, f'{free / 1e9:.3g} GB free of {needed / 1e9:.3g} GB')


def _no_cache(source: Source, root: pathlib.Path, found: str) -> UserError:
  return UserError(
    f'space in {root} for the decoded images of {source.name}, which data.input=stream reads',
    found,
    'free some space, set --config.data.cache_dir or $CSBA_CACHE_DIR to a folder on a larger disk, '
    'or set --config.data.input=memory',
  )


def _write(folder: pathlib.Path, arrays: ImageArrays) -> None:
  """Writes the arrays and their index; the file of images may exist already."""
  files = {}
  for name in ('images', 'labels', 'groups', 'sums'):
    array = getattr(arrays, name)
    if array is not None:
      path = folder / f'{name}.npy'
      if not path.exists():
        np.save(path, array, allow_pickle=False)
      with path.open('rb') as file:
        os.fsync(file.fileno())  # of a mapped cache only the length is checked
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


def _put_in_place(part: pathlib.Path, folder: pathlib.Path, mapped: bool) -> None:
  """Renames a finished cache into place; if another process was faster, its cache stays."""
  damaged = part.with_name(part.name + '.old')
  try:
    if folder.is_dir() and not _is_whole(folder, mapped):
      with contextlib.suppress(FileNotFoundError):  # another process did it first
        os.replace(folder, damaged)
    os.rename(part, folder)
  except OSError:
    if not folder.is_dir():
      raise
  finally:
    shutil.rmtree(damaged, ignore_errors=True)


def _is_whole(folder: pathlib.Path, mapped: bool) -> bool:
  """Whether a cache can be read and verified."""
  try:
    _read(folder, mapped)
  except Exception:  # as in _read_or_warn
    return False
  return True


def _json_sha256(content: dict) -> str:
  """Hex SHA-256 of a dict as JSON."""
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
