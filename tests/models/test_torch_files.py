"""Files of torch.save, read without PyTorch: formats, types, views, and files that mean harm."""

import io
import os
import pickle
import resource
import struct
import time
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from csba_jax.errors import UserError
from csba_jax.models import torch_files
from csba_jax.models.torch_files import MAGIC, STORAGES, read_tensors

TYPES = ['float16', 'bfloat16', 'float32', 'float64', 'uint8', 'int8', 'int16', 'int32', 'int64']


class Storage:
  """What torch writes for a storage: a persistent id."""

  def __init__(self, key, length, kind='FloatStorage', more=()):
    self.id = ('storage', Named('torch', kind), key, 'cpu', length, *more)


class Named:
  """A global of a module that need not be there."""

  def __init__(self, module, name):
    self.words = module, name


class Call:
  """function(*arguments) at the time of reading."""

  def __init__(self, module, name, *arguments):
    self.function, self.arguments = Named(module, name), arguments


class Writer(pickle._Pickler):
  """Pickler, in Python, of the classes above."""

  def persistent_id(self, value):
    return value.id if isinstance(value, Storage) else None

  def save(self, value, save_persistent_id=True):
    if isinstance(value, Named):
      self.write('c{}\n{}\n'.format(*value.words).encode())
    elif isinstance(value, Call):
      self.save(value.function)
      self.save(value.arguments)
      self.write(pickle.REDUCE)
    else:
      super().save(value, save_persistent_id)


def pickled(value, protocol=2):
  file = io.BytesIO()
  Writer(file, protocol).dump(value)
  return file.getvalue()


def tensor(storage, offset, shape, strides):
  return Call(
    *('torch._utils', '_rebuild_tensor_v2'),
    *(storage, offset, shape, strides, False, OrderedDict()),
  )


def zipped(program, storages, compression=zipfile.ZIP_STORED, **more):
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w', compression) as archive:
    archive.writestr('net/data.pkl', program)
    for name, content in more.items():
      archive.writestr(f'net/{name}', content)
    for key, content in storages.items():
      archive.writestr(f'net/data/{key}', content)
  return file.getvalue()


NUMBERS = np.arange(24, dtype=np.float32)
PLAIN = tensor(Storage('0', 24), 0, (4, 6), (6, 1))


def good(**more):
  value = OrderedDict(weight=PLAIN, view=tensor(Storage('0', 24), 3, (3, 2), (1, 4)))
  return zipped(pickled(value), {'0': NUMBERS.tobytes()}, **more)


def old(value, storages):
  parts = [MAGIC, 1001, {'little_endian': True}, value, list(storages)]
  return b''.join(map(pickled, parts)) + b''.join(
    struct.pack('<q', len(numbers)) + numbers.tobytes() for numbers in storages.values()
  )


@pytest.fixture
def read(tmp_path):
  def read(content):
    path = tmp_path / 'weights.pth'
    path.write_bytes(content)
    return read_tensors(path)

  return read


def refused(read, content):
  with pytest.raises(UserError) as error:
    read(content)
  assert '\n' not in str(error.value)
  assert len(str(error.value)) < 700
  return error.value.found


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_both_formats_and_views(read, protocol):
  value = OrderedDict(weight=PLAIN, view=tensor(Storage('0', 24), 3, (3, 2), (1, 4)))
  new = zipped(pickled(value, protocol), {'0': NUMBERS.tobytes()}, byteorder='little')
  for content in (new, old(value, {'0': NUMBERS})):
    found = read(content)
    assert list(found) == ['weight', 'view']
    np.testing.assert_array_equal(found['weight'], NUMBERS.reshape(4, 6))
    np.testing.assert_array_equal(found['view'], [[3, 7], [4, 8], [5, 9]])
    assert found['view'].flags.c_contiguous
    assert found['view'].flags.writeable


def test_state_dict_of_a_checkpoint_and_parameters(read):
  hooks = OrderedDict()
  parameter = Call('torch._utils', '_rebuild_parameter', PLAIN, True, hooks)
  value = {'epoch': 3, 'loss': 0.5, 'state_dict': {'a.b': parameter, 'note': 'x', 'none': None}}
  found = read(zipped(pickled(value), {'0': NUMBERS.tobytes()}))
  assert list(found) == ['a.b']
  np.testing.assert_array_equal(found['a.b'], NUMBERS.reshape(4, 6))


@pytest.mark.parametrize('kind', STORAGES)
def test_types(read, kind):
  raw = {
    'BFloat16Storage': np.array([0x3F80, 0xC040, 0], '<u2'),
    'BoolStorage': np.array([1, 255, 0], np.uint8),
  }.get(kind)
  expected = {'BFloat16Storage': np.float32([1, -3, 0]), 'BoolStorage': np.array([1, 1, 0], bool)}
  if raw is None:
    raw = expected[kind] = np.array([1, 3, 0], STORAGES[kind])
  value = {'x': tensor(Storage('k', 3, kind), 0, (3,), (1,))}
  for content in (zipped(pickled(value), {'k': raw.tobytes()}), old(value, {'k': raw})):
    found = read(content)['x']
    np.testing.assert_array_equal(found, expected[kind])
    assert found.dtype == expected[kind].dtype


def test_scalars_and_empty_tensors(read):
  value = {
    'scalar': tensor(Storage('0', 24), 5, (), ()),
    'empty': tensor(Storage('0', 24), 0, (0, 7), (7, 1)),
    'one': tensor(Storage('0', 24), 2, (1, 2), (2**61, 1)),
  }
  found = read(zipped(pickled(value), {'0': NUMBERS.tobytes()}))
  assert found['scalar'] == 5
  assert found['scalar'].shape == ()
  assert found['empty'].shape == (0, 7)
  np.testing.assert_array_equal(found['one'], [[2, 3]])


HOSTILE = {
  'a call of the system': (Call('os', 'system', 'touch HARM'), "'os.system', which no dict"),
  'another global': ({'x': Named('builtins', 'eval')}, "'builtins.eval', which no dict"),
  'a part of torch': (Call('torch', 'load', 'x'), "'torch.load', which no dict"),
  'a call of a storage': (Call('torch', 'FloatStorage', 5), 'a call of torch.FloatStorage'),
  'an object': ({'x': slice(1)}, "'__builtin__.slice', which no dict"),
  'no dict': ([PLAIN], 'no tensors'),
  'no tensors': ({'x': 1}, 'no tensors'),
  'tensors deeper': ({'model': {'x': PLAIN}}, 'no tensors'),
  'too large': ({'x': tensor(Storage('0', 24), 0, (5, 5), (5, 1))}, 'larger than its storage'),
  'too far': ({'x': tensor(Storage('0', 24), 1, (4, 6), (6, 1))}, 'larger than its storage'),
  'strides too long': ({'x': tensor(Storage('0', 24), 0, (4,), (8,))}, 'larger than its storage'),
  'stride 0': ({'x': tensor(Storage('0', 24), 0, (2**40,), (0,))}, 'larger than its storage'),
  'an offset below 0': ({'x': tensor(Storage('0', 24), -1, (2,), (1,))}, 'a size or stride'),
  'a stride below 0': ({'x': tensor(Storage('0', 24), 9, (2,), (-1,))}, 'a size or stride'),
  'a huge size': ({'x': tensor(Storage('0', 24), 0, (2**70,), (1,))}, 'a size or stride'),
  'a size of a text': ({'x': tensor(Storage('0', 24), 0, ('a',), (1,))}, 'a size or stride'),
  'fewer strides': ({'x': tensor(Storage('0', 24), 0, (2, 2), (1,))}, '2 axes and 1 strides'),
  'many axes': ({'x': tensor(Storage('0', 24), 0, (1,) * 40, (1,) * 40)}, '40 axes'),
  'an impossible shape': (
    {'x': tensor(Storage('0', 24), 0, (0, 2**40, 2**40), (1, 1, 1))},
    'impossible shape',
  ),
  'a huge storage': ({'x': tensor(Storage('0', 2**50), 0, (2**50,), (1,))}, 'bytes of tensors'),
  'a large storage': ({'x': tensor(Storage('0', 100), 0, (2,), (1,))}, '96 bytes for 100 numbers'),
  'no such storage': ({'x': tensor(Storage('9', 2), 0, (2,), (1,))}, "no 'data/9' in it"),
  'a path': ({'x': tensor(Storage('../a', 2), 0, (2,), (1,))}, "no 'data/../a' in it"),
  'unknown numbers': (
    {'x': tensor(Storage('0', 2, 'ComplexFloatStorage'), 0, (2,), (1,))},
    'Complex',
  ),
  'two types': (
    {
      'x': tensor(Storage('0', 24), 0, (2,), (1,)),
      'y': tensor(Storage('0', 24, 'IntStorage'), 0, (2,), (1,)),
    },
    "two kinds of storage '0'",
  ),
  'a view of a storage': (
    {'x': tensor(Storage('0', 24, more=(('0', 1, 2),)), 0, (2,), (1,))},
    'a damaged storage',
  ),
  'a length of a text': ({'x': tensor(Storage('0', '9'), 0, (2,), (1,))}, 'a damaged storage'),
  'no storage': ({'x': tensor(3, 0, (2,), (1,))}, 'a damaged tensor'),
  'a parameter of nothing': ({'x': Call('torch._utils', '_rebuild_parameter')}, 'parameter'),
  'a key of a tuple': ({(1, 2): PLAIN}, 'other keys than texts and numbers'),
}


@pytest.mark.parametrize('case', HOSTILE)
def test_hostile_values(read, case, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  value, expected = HOSTILE[case]
  program = pickled(value)
  assert expected in refused(read, zipped(program, {'0': NUMBERS.tobytes()}))
  refused(read, old(value, {'0': NUMBERS}))
  assert os.listdir() == ['weights.pth']  # no HARM


DEEP = b'\x80\x02)' + 100_000 * b'\x85'
PROGRAMS = {
  'a deep tuple': (DEEP + b'.', 'no tensors'),
  'a deep tuple as a key': (b'\x80\x02}' + DEEP[2:] + b'Ns.', 'other keys'),
  'deep dicts': (b'\x80\x02' + 50_000 * b'}K\x01' + b'N' + 50_000 * b's' + b'.', 'no tensors'),
  'a tuple doubled 60 times as a key': (
    b'\x80\x02})' + b''.join(b'q%ch\x00\x86' % 0 for _ in range(60)) + b'Ns.',
    'other keys',
  ),
  'a dict in itself': (b'\x80\x02}q\x00X\x0a\x00\x00\x00state_dicth\x00s.', 'no tensors'),
  'an end too early': (b'\x80\x02}', 'an end within the data'),
  'a huge text': (b'\x80\x02X\xff\xff\xff\xff.', 'an end within the data'),
  'a text that is none': (b'\x80\x02X\x01\x00\x00\x00\xff.', 'not UTF-8'),
  'a huge place to keep': (b'\x80\x02}r\xff\xff\xff\xff.', 'no tensors'),
  'nothing kept': (b'\x80\x02h\x05.', 'a damaged pickle'),
  'nothing on the stack': (b'\x80\x02.', 'a damaged pickle'),
  'no mark': (b'\x80\x02u.', 'a damaged pickle'),
  'a call of a number': (b'\x80\x02K\x01)R.', 'a damaged pickle'),
  'odd items': (b'\x80\x02}(K\x01u.', 'other keys'),
  'items of a list': (b'\x80\x02]K\x01K\x01s.', 'a damaged pickle'),
  'attributes of a number': (b'\x80\x02K\x01Nb.', 'a damaged pickle'),
  'a global of numbers': (b'\x80\x04K\x01K\x01\x93.', 'a damaged pickle'),
  'a line without an end': (b'\x80\x02cos', 'an end within the data'),
  'an OrderedDict of much': (b'\x80\x02ccollections\nOrderedDict\n](]e\x85R.', 'OrderedDict'),
  'a step that executes': (b"\x80\x02(S'x'\nios\nsystem\n.", "step b'S'"),
  'a class of an object': (b'\x80\x02cos\nsystem\n)\x81.', "'os.system'"),
  'an extension': (b'\x80\x02\x82\x01.', 'step'),
}


@pytest.mark.parametrize('case', PROGRAMS)
def test_hostile_programs(read, case):
  program, expected = PROGRAMS[case]
  began, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert expected in refused(read, zipped(program, {}))
  refused(read, b''.join(map(pickled, [MAGIC, 1001, {}])) + program)
  assert time.monotonic() - began < 20
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1_000_000  # KiB


def test_too_many_steps_end(read, monkeypatch):
  monkeypatch.setattr(torch_files, 'MOST_STEPS', 10_000)
  assert 'more than 10,000 steps' in refused(read, zipped(b'\x80\x02' + 10_000 * b'}', {}))


def test_many_names_of_a_large_tensor_are_not_copied(read):
  numbers = np.zeros(10_000, np.float32)
  for count, good in ((2, True), (3, False)):
    views = {f'{i}': tensor(Storage('0', 10_000), 0, (10_000,), (1,)) for i in range(count)}
    content = zipped(pickled(views), {'0': numbers.tobytes()})
    if good:
      assert len(read(content)) == 2
    else:
      assert 'bytes of tensors in a file of' in refused(read, content)


def test_a_long_tuple_used_often_takes_no_longer(read):
  """100,000 uses of a tuple of 100,000 numbers, each as the shape of a tensor or as a storage."""
  long = b'\x80\x02(' + 100_000 * b'N' + b'tq\x00'
  assert 'storage' in refused(read, zipped(long + 100_000 * b'h\x00Q', {}))
  call = b'ctorch._utils\n_rebuild_tensor_v2\nq\x01'
  assert 'tensor' in refused(read, zipped(long + call + 100_000 * b'h\x01h\x00R', {}))


def test_damaged_archives(read):
  assert 'another format' in refused(read, b'')
  assert 'another format' in refused(read, b'\x80\x02K\x01.')
  assert 'another format' in refused(read, b'{"safetensors": 1}')
  assert 'a damaged zip file' in refused(read, b'PK\x03\x04' + bytes(100))
  assert 'a damaged zip file' in refused(read, good()[:-40])
  assert 'a damaged zip file' in refused(read, good().replace(NUMBERS.tobytes(), bytes(96)))
  assert 'byte order' in refused(read, good(byteorder='big'))
  assert 'without one data.pkl' in refused(read, good().replace(b'data.pkl', b'dada.pkl'))
  bomb = zipped(b'\x80\x02' + bytes(10**7), {}, zipfile.ZIP_DEFLATED)
  assert 'compressed or too large' in refused(read, bomb)


def test_damaged_old_files(read):
  value = {'x': PLAIN}
  content = old(value, {'0': NUMBERS})
  assert 'an end within' in refused(read, content[:-1])
  head = b''.join(map(pickled, [MAGIC, 1001, {}, value]))
  assert 'no list' in refused(read, head + pickled(3))
  assert 'that no tensors have' in refused(read, head + pickled(['1']))
  assert 'that no tensors have' in refused(read, head + pickled([('0',)]))
  twice = struct.pack('<q', 24) + NUMBERS.tobytes()
  assert 'that no tensors have' in refused(read, head + pickled(['0', '0']) + 2 * twice)
  assert 'another count' in refused(read, head + pickled(['0']) + struct.pack('<q', 2**60))
  assert "no storage '0'" in refused(read, head + pickled([]))


@pytest.mark.parametrize('kind', ['zip', 'old'])
def test_random_damage_ends_in_arrays_or_one_line(read, kind):
  content = good() if kind == 'zip' else old({'x': PLAIN}, {'0': NUMBERS})
  rng = np.random.default_rng(0)
  outcomes = set()
  for trial in range(300):
    damaged = bytearray(content)
    for place in rng.integers(len(content), size=rng.integers(1, 4)):
      damaged[place] = rng.integers(256)
    if trial % 5 == 0:
      damaged = damaged[: rng.integers(len(damaged))]
    try:
      found = read(bytes(damaged))
      assert all(isinstance(array, np.ndarray) for array in found.values())
      outcomes.add('arrays')
    except UserError as error:
      outcomes.add('refused' if '\n' not in str(error) else 'refused in several lines')
  assert outcomes == {'arrays', 'refused'}


def test_a_path_that_is_no_file(tmp_path):
  for path in (tmp_path / 'none.pth', tmp_path):
    with pytest.raises(UserError, match='a file of PyTorch at'):
      read_tensors(path)


@pytest.mark.seconds
@pytest.mark.parametrize('zipped', [True, False])
def test_files_that_torch_wrote(read, zipped):
  torch = pytest.importorskip('torch')
  base = torch.arange(60).reshape(3, 4, 5)
  value = {name: base.to(getattr(torch, name)) for name in TYPES}
  value |= {'bool': base % 2 == 0, 'scalar': torch.tensor(2.5), 'empty': torch.zeros(0, 3)}
  shared = torch.arange(40.0)
  value |= {'a': shared[3:].view(-1)[::3], 'b': shared.view(5, 8).t()[2:, 1:], 'c': shared}
  value['parameter'] = torch.nn.Parameter(torch.ones(2, 3))
  file = io.BytesIO()
  torch.save({'state_dict': value}, file, _use_new_zipfile_serialization=zipped)
  found = read(file.getvalue())
  assert list(found) == list(value)
  for name, array in found.items():
    expected = value[name].detach()
    expected = (expected.float() if name == 'bfloat16' else expected).numpy()
    np.testing.assert_array_equal(array, expected)
    assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
  net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
  file = io.BytesIO()
  torch.save(net.state_dict(), file, _use_new_zipfile_serialization=zipped)
  assert list(read(file.getvalue())) == list(net.state_dict())
