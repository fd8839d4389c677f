"""Tensors of a file that torch.save wrote, read without PyTorch and without executing anything.

Such a file holds a pickle, a program that can call any function of Python. Here a small machine
reads it: it knows the steps of a dict of tensors, and refuses all others before it takes them.
"""

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from csba_jax.errors import UserError, shown

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file of torch before 1.6
MOST_STEPS = 2_000_000  # of one pickle; 10,000 tensors take about 300,000
MOST_AXES = 32
LARGEST = 2  # all tensors together, in sizes of the file: some nets name one tensor twice
BFLOAT16 = 'bfloat16'  # NumPy has no such type; its numbers are the upper halves of float32
STORAGES: Mapping[str, str] = {
  'HalfStorage': '<f2',
  'BFloat16Storage': BFLOAT16,
  'FloatStorage': '<f4',
  'DoubleStorage': '<f8',
  'ByteStorage': '|u1',
  'CharStorage': '|i1',
  'ShortStorage': '<i2',
  'IntStorage': '<i4',
  'LongStorage': '<i8',
  'BoolStorage': '|b1',
}


class _Unreadable(Exception):
  """What was found in a file that cannot be read."""


class _Global(NamedTuple):
  """A name that a pickle would import."""

  name: str


class _Storage(NamedTuple):
  """Numbers that tensors share: `length` of one type, under a key of the file."""

  key: str
  dtype: str
  length: int

  def width(self) -> int:
    """Bytes of a number."""
    return 2 if self.dtype == BFLOAT16 else np.dtype(self.dtype).itemsize


class _Tensor(NamedTuple):
  """Element i of a tensor is number offset + <i, strides> of the storage."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def read_tensors(path: Path) -> dict[str, np.ndarray]:
  """{name: array} of a .pth, .pt or .bin file of torch.save, with the names of the file.

  Of a file {'state_dict': {...}, ...} the inner dict is read. Values that are no tensors are left
  out. bfloat16 becomes float32, with the same numbers; other types stay. Both formats are read, the
  zip of torch 1.6 and later and the one before. Allocates at most about six sizes of the file.

  Raises:
    UserError: no such file, another format or kind of number, a damaged file, a pickle that calls
      or imports anything but what a dict of tensors needs, or no tensors.
  """
  try:
    data = Path(path).read_bytes()
  except OSError as error:
    found = error.strerror or type(error).__name__
    raise UserError(f'a file of PyTorch at {path}', found, 'correct the path') from error
  try:
    return _tensors(data)
  except _Unreadable as error:
    raise UserError(
      f'a file at {path} that torch.save wrote, with tensors by name',
      str(error),
      'use another file, or write model.state_dict() alone with torch.save',
    ) from error


def _tensors(data: bytes) -> dict[str, np.ndarray]:
  value, load = _open_zip(data) if data[:4] == b'PK\x03\x04' else _open_old(data)
  if isinstance(value, dict) and isinstance(value.get('state_dict'), dict):
    value = value['state_dict']
  entries = value.items() if isinstance(value, dict) else ()
  found = {k: v for k, v in entries if isinstance(k, str) and isinstance(v, _Tensor)}
  if not found:
    raise _Unreadable('no tensors')
  storages = {tensor.storage for tensor in found.values()}
  total = max(
    sum(math.prod(tensor.shape) * tensor.storage.width() for tensor in found.values()),
    sum(storage.length * storage.width() for storage in storages),
  )
  if total > LARGEST * len(data):
    raise _Unreadable(f'{total:,} bytes of tensors in a file of {len(data):,}')
  numbers = {storage: _numbers(load(storage), storage) for storage in storages}
  return {name: _array(tensor, numbers[tensor.storage]) for name, tensor in found.items()}


def _numbers(data: bytes, storage: _Storage) -> np.ndarray:
  """The numbers of a storage, which views share."""
  kind = '<u2' if storage.dtype == BFLOAT16 else storage.dtype
  if kind == '|b1':  # any byte but 0 is true
    return np.frombuffer(data, np.uint8, storage.length) != 0
  return np.frombuffer(data, kind, storage.length)


def _array(tensor: _Tensor, numbers: np.ndarray) -> np.ndarray:
  """A tensor as an array of its own; its places in the storage have been checked."""
  if not math.prod(tensor.shape):
    found = np.empty(tensor.shape, numbers.dtype)
  else:
    width = numbers.dtype.itemsize
    steps = [width * s if n > 1 else 0 for n, s in zip(tensor.shape, tensor.strides, strict=True)]
    view = np.lib.stride_tricks.as_strided(
      numbers[tensor.offset :], tensor.shape, steps, writeable=False
    )
    found = np.array(view, order='C')
  if tensor.storage.dtype == BFLOAT16:
    found = (found.astype('<u4') << 16).view('<f4')
  return found.astype(found.dtype.newbyteorder('='), copy=False)


def _open_zip(data: bytes) -> tuple[Any, Callable[[_Storage], bytes]]:
  """(value of the pickle, reader of storages) of a file of torch since 1.6."""
  archive = _guarded(lambda: zipfile.ZipFile(io.BytesIO(data)))
  entries = {entry.filename: entry for entry in archive.infolist()}
  pickles = [name for name in entries if name.count('/') == 1 and name.endswith('/data.pkl')]
  if len(pickles) != 1:
    raise _Unreadable('a zip file without one data.pkl')
  folder = pickles[0].removesuffix('data.pkl')

  def read(name: str) -> bytes:
    entry = entries.get(folder + name)
    if entry is None:
      raise _Unreadable(f'no {shown(name)} in it')
    # torch compresses nothing; what is not compressed is no larger than the file
    if entry.compress_type != zipfile.ZIP_STORED or not 0 <= entry.file_size <= len(data):
      raise _Unreadable(f'{shown(name)}, compressed or too large')
    return _guarded(lambda: archive.read(entry))

  def load(storage: _Storage) -> bytes:
    content = read(f'data/{storage.key}')
    if len(content) != storage.length * storage.width():
      raise _Unreadable(f'{len(content):,} bytes for {storage.length:,} numbers')
    return content

  if folder + 'byteorder' in entries and read('byteorder') != b'little':
    raise _Unreadable('the byte order of another kind of machine')
  return _Machine(read('data.pkl')).run(), load


def _guarded(work: Callable[[], Any]) -> Any:
  """work(), where `zipfile` meets bytes that may be anything."""
  try:
    return work()
  except (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, OverflowError),
    *(RuntimeError, LookupError, ValueError),
  ) as error:
    raise _Unreadable(f'a damaged zip file ({shown(str(error))})') from error


def _open_old(data: bytes) -> tuple[Any, Callable[[_Storage], bytes]]:
  """(value of the pickle, reader of storages) of a file of torch before 1.6.

  Five pickles: MAGIC, a version, facts on the machine, the value, the keys of the storages. Then
  for each key the count of its numbers, as 8 bytes, and the numbers, always little-endian.
  """
  machine = _Machine(data)
  if data[:1] != b'\x80' or machine.run() != MAGIC:
    raise _Unreadable('another format')
  machine.run()
  machine.run()
  value, keys = machine.run(), machine.run()
  places: dict[str, int] = {}
  if not isinstance(keys, list):
    raise _Unreadable('no list of storages')
  for key in keys:
    storage = machine.storages.get(key) if isinstance(key, str) else None
    if storage is None or key in places:
      raise _Unreadable('a list of storages that no tensors have')
    if machine.number('<q') != storage.length:
      raise _Unreadable(f'another count of numbers in storage {shown(key)}')
    places[key] = machine.at
    machine.skip(storage.length * storage.width())

  def load(storage: _Storage) -> bytes:
    if storage.key not in places:
      raise _Unreadable(f'no storage {shown(storage.key)} in it')
    start = places[storage.key]
    return data[start : start + storage.length * storage.width()]

  return value, load


class _Machine:
  """Runs pickles one after another; their only values are plain ones, dicts and _Tensors.

  No value is hashed, compared or shown unless it is a text or a number: that of a deep or doubled
  tuple would not end.
  """

  def __init__(self, data: bytes):
    self.data, self.at = data, 0
    self.storages: dict[str, _Storage] = {}
    self.stack: list[Any] = []
    self.outer: list[list[Any]] = []  # stacks below each mark
    self.memo: dict[int, Any] = {}

  def run(self) -> Any:
    """The value of the next pickle."""
    self.stack, self.outer, self.memo = [], [], {}
    for _ in range(MOST_STEPS):
      code = self.take(1)
      if code == b'.':
        return self.pop()
      if code not in _STEPS:
        raise _Unreadable(f'step {code!r} of a pickle, which no dict of tensors needs')
      _STEPS[code](self)
    raise _Unreadable(f'more than {MOST_STEPS:,} steps in a pickle')

  def skip(self, count: int) -> None:
    """Moves on by so many bytes."""
    if not 0 <= count <= len(self.data) - self.at:
      raise _Unreadable('an end within the data')
    self.at += count

  def take(self, count: int) -> bytes:
    """The next bytes."""
    self.skip(count)
    return self.data[self.at - count : self.at]

  def number(self, kind: str) -> Any:
    """The next number of a kind of `struct`."""
    return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

  def text(self, count: int) -> str:
    """The next text of so many bytes."""
    try:
      return self.take(count).decode()
    except UnicodeDecodeError as error:
      raise _Unreadable('a text that is not UTF-8') from error

  def line(self) -> str:
    """The text up to the end of the line."""
    end = self.data.find(b'\n', self.at, self.at + 1000)
    found = self.text(end - self.at)  # where there is no end, less than nothing
    self.skip(1)
    return found

  def push(self, value: Any) -> None:
    """Onto the stack."""
    self.stack.append(value)

  def pop(self) -> Any:
    """The value on top of the stack."""
    if not self.stack:
      raise _Unreadable('a damaged pickle')
    return self.stack.pop()

  def pop_marked(self) -> list[Any]:
    """All values above the last mark."""
    if not self.outer:
      raise _Unreadable('a damaged pickle')
    found, self.stack = self.stack, self.outer.pop()
    return found

  def top(self, kind: type) -> Any:
    """The value on top, which stays there and must be of a kind."""
    if not self.stack or not isinstance(self.stack[-1], kind):
      raise _Unreadable('a damaged pickle')
    return self.stack[-1]

  def mark(self) -> None:
    """Opens a new stack above this one."""
    self.outer.append(self.stack)
    self.stack = []

  def keep(self, number: int) -> None:
    """Remembers the value on top."""
    self.memo[number] = self.top(object)

  def recall(self, number: int) -> None:
    """Pushes a value that was kept."""
    if number not in self.memo:
      raise _Unreadable('a damaged pickle')
    self.push(self.memo[number])

  def add_items(self, flat: list[Any]) -> None:
    """Adds [key, value, key, value, ...] to the dict on top."""
    self.top(dict).update(_dict_of(flat))

  def build(self) -> None:
    """Attributes of an OrderedDict, such as _metadata; dropped."""
    self.pop()
    self.top(dict)

  def add_global(self, module: Any, name: Any) -> None:
    """Pushes a name of a module; nothing is imported."""
    if not isinstance(module, str) or not isinstance(name, str):
      raise _Unreadable('a damaged pickle')
    dotted = f'{module}.{name}'
    prefix, _, last = dotted.rpartition('.')
    if dotted not in _CALLS and not (prefix in ('torch', 'torch.cuda') and last in STORAGES):
      raise _Unreadable(f'{shown(dotted)}, which no dict of tensors needs')
    self.push(_Global(dotted))

  def stack_global(self) -> None:
    """`add_global` of the two values on top."""
    name = self.pop()
    self.add_global(self.pop(), name)

  def call(self) -> None:
    """Calls one of _CALLS with the tuple on top."""
    arguments = self.pop()
    function = self.pop()
    if not isinstance(function, _Global) or type(arguments) is not tuple:
      raise _Unreadable('a damaged pickle')
    if function.name not in _CALLS:
      raise _Unreadable(f'a call of {function.name}')
    self.push(_CALLS[function.name](arguments))

  def add_storage(self) -> None:
    """('storage', type, key, device, length) on top becomes a _Storage."""
    match self.pop():
      case ('storage', kind, str(key), _, length) | ('storage', kind, str(key), _, length, None):
        pass
      case _:
        raise _Unreadable('a damaged storage')
    dtype = STORAGES.get(kind.name.rpartition('.')[2]) if isinstance(kind, _Global) else None
    if dtype is None or type(length) is not int or not 0 <= length < 2**62:
      raise _Unreadable('a damaged storage')
    storage = _Storage(key, dtype, length)
    if self.storages.setdefault(key, storage) != storage:
      raise _Unreadable(f'two kinds of storage {shown(key)}')
    self.push(storage)


def _dict_of(flat: list[Any]) -> dict[Any, Any]:
  keys = flat[::2]
  if len(flat) % 2 or not all(type(key) in (str, int, float, bool) for key in keys):
    raise _Unreadable('a dict with other keys than texts and numbers')
  return dict(zip(keys, flat[1::2], strict=True))


def _ordered_dict(arguments: tuple) -> dict[Any, Any]:
  if arguments:  # a call may not take longer than its step: the same list could come again
    raise _Unreadable('a damaged OrderedDict')
  return {}


def _tensor(arguments: tuple) -> _Tensor:
  """(storage, offset, shape, strides, ...), checked against the size of the storage."""
  match arguments:
    case (_Storage() as storage, int(offset), tuple(shape), tuple(strides), *_):
      pass
    case _:
      raise _Unreadable('a damaged tensor')
  if len(shape) != len(strides) or len(shape) > MOST_AXES:
    raise _Unreadable(f'a tensor of {len(shape)} axes and {len(strides)} strides')
  numbers = (offset, *shape, *strides)
  if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
    raise _Unreadable('a tensor with a size or stride that is no such number')
  last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
  inside = last < storage.length and math.prod(shape) <= storage.length
  if math.prod(shape) and not inside:
    raise _Unreadable(f'a tensor larger than its storage of {storage.length:,} numbers')
  if math.prod(max(n, 1) for n in shape) >= 2**58:  # an empty one
    raise _Unreadable('a tensor of an impossible shape')
  return _Tensor(storage, offset, shape, strides)


def _parameter(arguments: tuple) -> _Tensor:
  if not arguments or not isinstance(arguments[0], _Tensor):
    raise _Unreadable('a damaged parameter')
  return arguments[0]


_CALLS: Mapping[str, Callable[[tuple], Any]] = {
  'collections.OrderedDict': _ordered_dict,
  'torch._utils._rebuild_tensor_v2': _tensor,
  'torch._utils._rebuild_parameter': _parameter,
}


def _tuple(count: int) -> Callable[[_Machine], None]:
  return lambda m: m.push(tuple(reversed([m.pop() for _ in range(count)])))


# the steps of pickles of protocols 2 to 5 that dicts of tensors need
_STEPS: Mapping[bytes, Callable[[_Machine], object]] = {
  b'\x80': lambda m: m.take(1),  # the protocol
  b'\x95': lambda m: m.take(8),  # the length of a frame
  b'N': lambda m: m.push(None),
  b'\x88': lambda m: m.push(True),
  b'\x89': lambda m: m.push(False),
  b'K': lambda m: m.push(m.number('<B')),
  b'M': lambda m: m.push(m.number('<H')),
  b'J': lambda m: m.push(m.number('<i')),
  b'\x8a': lambda m: m.push(int.from_bytes(m.take(m.number('<B')), 'little', signed=True)),
  b'G': lambda m: m.push(m.number('>d')),
  b'X': lambda m: m.push(m.text(m.number('<I'))),
  b'\x8c': lambda m: m.push(m.text(m.number('<B'))),
  b'}': lambda m: m.push({}),
  b']': lambda m: m.push([]),
  b')': lambda m: m.push(()),
  b'(': _Machine.mark,
  b't': lambda m: m.push(tuple(m.pop_marked())),
  b'\x85': _tuple(1),
  b'\x86': _tuple(2),
  b'\x87': _tuple(3),
  b'a': lambda m: (value := m.pop(), m.top(list).append(value)),
  b'e': lambda m: (values := m.pop_marked(), m.top(list).extend(values)),
  b's': lambda m: m.add_items([m.pop(), m.pop()][::-1]),
  b'u': lambda m: m.add_items(m.pop_marked()),
  b'q': lambda m: m.keep(m.number('<B')),
  b'r': lambda m: m.keep(m.number('<I')),
  b'\x94': lambda m: m.keep(len(m.memo)),
  b'h': lambda m: m.recall(m.number('<B')),
  b'j': lambda m: m.recall(m.number('<I')),
  b'c': lambda m: m.add_global(m.line(), m.line()),
  b'\x93': _Machine.stack_global,
  b'R': _Machine.call,
  b'b': _Machine.build,
  b'Q': _Machine.add_storage,
}
