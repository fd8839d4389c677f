"""Plain text in columns, for a terminal, and names that fit into them."""

import functools
import shutil
from collections.abc import Sequence

from rich.cells import cell_len

FALLBACK_COLUMNS = 100  # where the output is no terminal, and $COLUMNS is not set
LONGEST_NAME = 40  # columns of a name at the beginning of a row
_CUT = '..'


def align(rows: Sequence[Sequence[str]]) -> str:
  """Rows as aligned columns: the first to the left, the others to the right; [] is a blank line."""
  widths = [
    max((cell_len(row[i]) for row in rows if i < len(row)), default=0)
    for i in range(max(len(row) for row in rows))
  ]
  lines = []
  for row in rows:
    # cell_len: some letters take two columns, and accents of their own none
    padding = [' ' * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=False)]
    cells = [space + cell for cell, space in zip(row, padding, strict=True)]
    if row:
      cells[0] = row[0] + padding[0]
    lines.append('  '.join(cells).rstrip())
  return '\n'.join(lines)


def columns() -> int:
  """Columns of the terminal."""
  return shutil.get_terminal_size((FALLBACK_COLUMNS, 24)).columns


def fit(names: Sequence[str], width: int) -> list[str]:
  """Names of at most `width` columns each: whole where they fit, else cut, and still distinct.

  A name that is too long keeps its beginning: 'Electrical-damage' -> 'Electr..'. If two become
  equal, all that are too long keep more and more of their end: 'Elec..ge'. If that does not tell
  them apart, they keep a part from their middle, '..ical-d', and at last they are numbered,
  'Electr~3'.

  Args:
    names: distinct, such as class names.
    width: at least 5.
  """
  ways = [functools.partial(_ends, tail=tail) for tail in range(width - len(_CUT))]
  ways += [functools.partial(_middle, start=start) for start in range(max(map(len, names)))]
  for way in ways:
    cut = [name if cell_len(name) <= width else way(name, width) for name in names]
    if len(set(cut)) == len(set(names)):
      return cut
  ends = [f'~{i}' for i in range(1, len(names) + 1)]
  return [
    name if cell_len(name) <= width else _head(name, width - len(end)) + end
    for name, end in zip(names, ends, strict=True)
  ]


def _ends(name: str, width: int, *, tail: int) -> str:
  """Beginning and end of a name, of which the end takes at most `tail` columns."""
  end = _head(name[::-1], tail)[::-1]
  return _head(name, width - len(_CUT) - cell_len(end)) + _CUT + end


def _middle(name: str, width: int, *, start: int) -> str:
  """A part of a name from a position on."""
  return _CUT + _head(name[start:], width - len(_CUT))


def _head(name: str, width: int) -> str:
  """The longest beginning of a name that takes at most `width` columns."""
  end = 0
  while end < len(name) and cell_len(name[: end + 1]) <= width:
    end += 1
  return name[:end]


def matrix(
  title: str, names: Sequence[str], counts: Sequence[int], cells: Sequence[Sequence[str]]
) -> str:
  """A square table with the names of its classes on both sides, cut where the terminal is narrow.

  Args:
    title: of the left column.
    names: C names.
    counts: C training images, which follow the names on the left.
    cells: [C][C] texts.
  """
  left = [f'{name} ({n})' for name, n in zip(fit(names, LONGEST_NAME), counts, strict=True)]
  room = (columns() - max(map(cell_len, [title, *left]))) // len(names) - 2
  widest = max(len(cell) for row in cells for cell in row)
  head = fit(names, max(room, widest, 8))
  return align([[title, *head], *([name, *row] for name, row in zip(left, cells, strict=True))])
