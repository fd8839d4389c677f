"""Plain text in columns, for a terminal."""

from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]]) -> str:
  """Rows as aligned columns: the first to the left, the others to the right; [] is a blank line."""
  widths = [
    max((len(row[i]) for row in rows if i < len(row)), default=0)
    for i in range(max(len(row) for row in rows))
  ]
  lines = []
  for row in rows:
    cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=False)]
    if row:
      cells[0] = row[0].ljust(widths[0])
    lines.append('  '.join(cells).rstrip())
  return '\n'.join(lines)
