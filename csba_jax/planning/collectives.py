"""The collectives of a compiled program, read from its HLO text: kinds, numbers and bytes.

An instruction counts once, even inside a loop.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable

import numpy as np

KINDS = (
  'all-reduce',
  'reduce-scatter',
  'all-gather',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)
# bits of a number; other types (token, opaque) hold no numbers
_BITS = {
  'pred': 8,
  **{f'{sign}{bits}': bits for sign in 'su' for bits in (2, 4, 8, 16, 32, 64)},
  **{f'f{bits}': bits for bits in (16, 32, 64)},
  'bf16': 16,
  'c64': 64,
  'c128': 128,
}
_OPERATION = re.compile(rf' ({"|".join(sorted(KINDS, key=len, reverse=True))})(-start)?\(')
_MESH = re.compile(
  r'replica_groups=@?mesh\[(.*?)\]'
  r'(?:,\s*device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,\s]+))\))?'
  r'\s*\{(.*?)\}'
)
_PARTIAL = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_ARRAY = re.compile(r'\b([a-z][a-z0-9]*)\[([0-9,]*)\]')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One instruction that sends data between devices.

  Attributes:
    kind: one of KINDS.
    arrays: the result on each device, such as 'f32[3,3,16]', one for each part of a tuple.
    bytes: size of that result.
    group: ids of the devices of the first group; devices send only within their group.
    source: the operation of the program that it comes from, as JAX names it.
  """

  kind: str
  arrays: tuple[str, ...]
  bytes: int
  group: tuple[int, ...]
  source: str = ''

  @property
  def sent(self) -> float:
    """Bytes that a device sends in a ring of its group, of n devices, for a result of R bytes.

    all-reduce 2 R (n - 1) / n; reduce-scatter R (n - 1), its input has n R; all-gather, all-to-all
    R (n - 1) / n; permute and broadcast R.
    """
    n = len(self.group)
    if n < 2:
      return 0.0
    share = {'all-reduce': 2 * (n - 1) / n, 'reduce-scatter': n - 1}
    if self.kind in ('collective-permute', 'collective-broadcast'):
      return float(self.bytes)
    return self.bytes * share.get(self.kind, (n - 1) / n)

  def spans(self, per_node: int) -> bool:
    """Whether a group has devices of several nodes, if devices are numbered node by node."""
    return len({device // per_node for device in self.group}) > 1


@dataclasses.dataclass(frozen=True)
class Traffic:
  """The sums over all collectives of one kind, on each device."""

  number: int
  bytes: int  # of results
  sent: float  # bytes, see `Collective.sent`


def read(hlo: str, devices: int) -> list[Collective]:
  """The collectives of a program.

  Args:
    hlo: `compiled.as_text()`; asynchronous pairs count once, at their start.
    devices: number of devices of the program; an instruction without groups has one group of all.
  """
  found = []
  for line in hlo.splitlines():
    operation = _OPERATION.search(line)
    if not operation or ' = ' not in line[: operation.start() + 1]:
      continue
    kind, start = operation.groups()
    shape = re.sub(r'/\*.*?\*/', '', line[: operation.start()].split(' = ', 1)[1]).strip()
    if start and kind != 'all-reduce':  # (operands, results, context of the runtime)
      shape = _parts(shape)[1]
    arrays = [f'{dtype}[{size}]' for dtype, size in _ARRAY.findall(shape)]
    source = re.search(r'op_name="([^"]*)"', line)
    found.append(
      Collective(
        kind=kind,
        arrays=tuple(arrays),
        bytes=sum(map(_bytes, arrays)),
        group=_group(line, devices),
        source=source.group(1) if source else '',
      )
    )
  return found


def by_kind(collectives: Iterable[Collective]) -> dict[str, Traffic]:
  """The sums for each kind that occurs, in the order of KINDS."""
  collectives = list(collectives)
  found = {}
  for kind in KINDS:
    own = [c for c in collectives if c.kind == kind]
    if own:
      found[kind] = Traffic(len(own), sum(c.bytes for c in own), sum(c.sent for c in own))
  return found


def size(array: str) -> int:
  """Number of elements of an array such as 'f32[3,3,16]'."""
  return math.prod(_integers(array.partition('[')[2]))


def _bytes(array: str) -> int:
  dtype = array.partition('[')[0]
  bits = 8 if dtype.startswith('f8') else _BITS.get(dtype, 0)
  return math.ceil(size(array) * bits / 8)


def _parts(shape: str) -> list[str]:
  """'(a, (b, c))' -> ['a', '(b, c)']; a shape that is no tuple is the only part."""
  if not shape.startswith('('):
    return [shape]
  parts, depth, begin = [], 0, 1
  for i, letter in enumerate(shape):
    depth += (letter in '([{') - (letter in ')]}')
    if (letter == ',' and depth == 1) or (letter == ')' and depth == 0):
      parts.append(shape[begin:i].strip())
      begin = i + 1
  return parts


def _group(line: str, devices: int) -> tuple[int, ...]:
  """The devices of the first group of an instruction.

  HLO writes groups in three ways: as lists, {{0,1},{2,3}}; as the rows of a reshaped array,
  [2,4]<=[4,2]T(1,0); by axes of a mesh, mesh['x'=2,'y'=4] {'x'}. {} means all devices.
  """
  pairs = re.search(r'source_target_pairs=\{\{(.*?)\}\}', line)
  if pairs:
    return tuple(sorted({int(n) for n in re.findall(r'\d+', pairs.group(1))}))
  listed = re.search(r'replica_groups=\{\{([\d,]*)\}', line)
  if listed:
    return tuple(int(n) for n in listed.group(1).split(',') if n)
  rows = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', line)
  if rows:
    return _first_row(*rows.groups())
  mesh = _MESH.search(line)
  if mesh:
    return _first_of_mesh(*mesh.groups())
  return tuple(range(devices))


@functools.lru_cache
def _first_row(shape: str, dims: str, order: str | None) -> tuple[int, ...]:
  return tuple(_order(dims, order).reshape(_integers(shape))[0].tolist())


@functools.lru_cache
def _first_of_mesh(
  axes: str, dims: str | None, order: str | None, listed: str | None, over: str
) -> tuple[int, ...]:
  """The first group over axes of a mesh; 'x':(2)4 takes a part of an axis, the 4 after a factor 2.

  The devices of the mesh are in ascending order, in the order of a reshaped array, or listed.
  """
  lengths, taken = [], []
  parts = {name: _integers(f'{p},{n}') for name, p, n in _PARTIAL.findall(over)}
  for name, length in re.findall(r"'([^']+)'=(\d+)", axes):
    if parts.get(name):
      before, part = parts[name]
      lengths += [before, part, int(length) // (before * part)]
      taken += [False, True, False]
    else:
      lengths.append(int(length))
      taken.append(name in parts)
  ids: np.ndarray = np.arange(math.prod(lengths))
  if dims:
    ids = _order(dims, order).ravel()
  elif listed:
    ids = np.array(_integers(listed))
  index = tuple(slice(None) if take else 0 for take in taken)
  return tuple(ids.reshape(lengths)[index].ravel().tolist())


def _order(dims: str, order: str | None) -> np.ndarray:
  """[4,2]T(1,0): 0 to 7 in four rows, transposed."""
  ids = np.arange(math.prod(_integers(dims))).reshape(_integers(dims))
  return ids.transpose(_integers(order)) if order else ids


def _integers(text: str) -> list[int]:
  return [int(n) for n in re.findall(r'\d+', text)]
