"""Blocks of layers by their names, and names that fit into a figure."""

from collections.abc import Sequence

LARGEST_BLOCK = 14  # layers; a larger block is split by the next part of its names
ELLIPSIS = '\N{HORIZONTAL ELLIPSIS}'


def blocks(names: Sequence[str], depth: int = 1) -> list[tuple[str, list[int]]]:
  """Neighbours with the same first parts of their names: (name of the block, indices of layers).

  Layers whose names have no more parts form blocks without a name.

  Args:
    names: such as 'stage1/block0/conv1', in the order in which they are drawn.
    depth: parts of a name that make the block.

  Example:
    >>> blocks(['stem', 'stage1/conv', 'stage1/norm', 'head'])
    [('', [0]), ('stage1', [1, 2]), ('', [3])]
  """
  found: list[tuple[str, list[int]]] = []
  for i, name in enumerate(names):
    parts = name.split('/')
    block = '/'.join(parts[:depth]) if len(parts) > depth else '/'.join(parts[:-1])
    if not found or found[-1][0] != block:
      found.append((block, []))
    found[-1][1].append(i)
  split: list[tuple[str, list[int]]] = []
  for block, members in found:
    inner = [(block, members)]
    if len(members) > LARGEST_BLOCK and any(names[i].count('/') > depth for i in members):
      within = blocks([names[i] for i in members], depth + 1)
      inner = [(name, [members[j] for j in of]) for name, of in within]
    split += inner
  return split


def within(name: str, block: str) -> str:
  """The rest of a layer's name, where the name of its block is shown.

  Example:
    >>> within('stage1/block0/conv1', 'stage1')
    'block0/conv1'
  """
  return name[len(block) :].lstrip('/') if block else name


def shorten(text: str, longest: int) -> str:
  """The text with its middle left out where it is longer; ends tell more than middles.

  Example:
    >>> shorten('Electrical-Damage-of-the-Junction-Box', 20)
    'Electrical…ction-Box'
  """
  if len(text) <= longest:
    return text
  head = (longest - 1) // 2
  return text[: longest - 1 - head] + ELLIPSIS + text[len(text) - head :]


def wrap(name: str, longest: int) -> list[str]:
  """The name in lines of at most `longest` characters, broken after a '/'.

  Example:
    >>> wrap('stage1/block0/attention/query', 16)
    ['stage1/block0/', 'attention/query']
  """
  lines = ['']
  parts = name.split('/')
  for part in [f'{part}/' for part in parts[:-1]] + parts[-1:]:
    part = shorten(part, longest)
    if lines[-1] and len(lines[-1]) + len(part) > longest:
      lines.append('')
    lines[-1] += part
  return lines
