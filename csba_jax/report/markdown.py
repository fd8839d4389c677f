"""Blocks of a report as Markdown: for a terminal, and for GitHub."""

import html
import re
import textwrap
from collections.abc import Sequence

from csba_jax.report.html.blocks import (
  Block,
  Code,
  Figure,
  Finding,
  Fold,
  Items,
  Photos,
  Table,
  Text,
  Verdict,
)
from csba_jax.runtime import plain

WIDTH = 100  # of paragraphs
_SPECIAL = re.compile(
  r'[\\`*|~$]'  # code, emphasis, columns, strike-through, formulas
  r'|(?<![^\W_])_|_(?![^\W_])'  # emphasis: an underscore inside a word is none
  r'|\[(?=\^)|\](?=[(\[:])'  # footnotes, links and what they refer to
  r'|(?<=!)\['  # pictures
)
_TAG = re.compile(r'<(?=[A-Za-z/!?])|(?<=\S)>')
_ENTITY = re.compile(r'&(?=#?\w+;)')
# of a quotation, a list, a heading or its underline
_START = re.compile(r'(\s*)(>|[-+](?=\s|$)|[-=]+$|#(?=[#\s]|$)|\d+(?=[.)](?:\s|$)))')


def escape(text: str) -> str:
  """One line that Markdown shows as it is."""
  text = _ENTITY.sub('&amp;', plain.clean(text))
  text = _SPECIAL.sub(lambda match: '\\' + match.group(), text)
  return _TAG.sub(lambda match: '&lt;' if match.group() == '<' else '&gt;', text)


def render(blocks: Sequence[Block]) -> list[str]:
  """The blocks as paragraphs; text of users is escaped, so that it stays text."""
  return [part for block in blocks for part in _block(block)]


def _block(block: Block) -> list[str]:
  match block:
    case Text(text, kind):
      return [paragraph(text, '> ' if kind == 'note' else '')]
    case Items(items):
      return ['\n'.join(paragraph(item, '- ', '  ') for item in items)]
    case Verdict(title, verdict, sentences):
      mark = f': **{escape(verdict.upper())}**' if verdict else ''
      head = _wrapped(f'**{escape(title)}**{mark}', '- ', '  ')
      return ['\n'.join([head, *(paragraph(s, '  - ', '    ') for s in sentences)])]
    case Finding(verdict, sentence):
      return [_wrapped(f'**{escape(verdict.upper())}** {escape(sentence)}', '- ', '  ')]
    case Table():
      return [paragraph(block.caption), _table(block)]
    case Figure(caption) if block.file:
      return [f'![{block.file.partition(".")[0]} plot]({block.file})', paragraph(caption)]
    case Figure(caption, _, [table]):
      return [paragraph(caption), _table(table)]
    case Figure(caption, _, [*tables]):
      return [paragraph(caption), *render(tables)] if tables else []
    case Code(text):
      return [_code(text)]
    case Photos():
      return []
    case Fold(title, _, True):
      return [paragraph(f'{title}: in report.html.')]
    case Fold(title, inside):
      made = render(inside)
      head = f'<details>\n<summary>{html.escape(plain.clean(title))}</summary>'
      return [head, *made, '</details>'] if made else []


def paragraph(text: str, first: str = '', later: str | None = None) -> str:
  """Escaped text in lines of WIDTH; `first` and `later` begin the first line and the others."""
  return _wrapped(escape(text), first, first if later is None else later)


def _wrapped(text: str, first: str, later: str) -> str:
  lines = textwrap.wrap(
    text, WIDTH - len(first), break_long_words=False, break_on_hyphens=False
  ) or ['']
  lines = [_START.sub(_literal, line, count=1) if _START.match(line) else line for line in lines]
  return '\n'.join((later if i else first) + line for i, line in enumerate(lines))


def _literal(match: re.Match) -> str:
  """The start of a line that is text, though it looks like a list or a heading."""
  space, sign = match.groups()
  return f'{space}{sign}\\' if sign.isdigit() else f'{space}\\{sign}'


def _table(table: Table) -> str:
  """Columns padded for a terminal: words to the left, numbers to the right."""
  rows = [[escape(cell) for cell in row] for row in (table.head, *table.rows)]
  widths = [max(3, *(plain.columns(row[i]) for row in rows)) for i in range(len(table.head))]

  def line(row: Sequence[str]) -> str:
    cells = []
    for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
      space = ' ' * (width - plain.columns(cell))
      cells.append(cell + space if i < table.left else space + cell)
    return f'| {" | ".join(cells)} |'

  rule = ['-' * w if i < table.left else '-' * (w - 1) + ':' for i, w in enumerate(widths)]
  return '\n'.join([line(rows[0]), f'| {" | ".join(rule)} |', *map(line, rows[1:])])


def _code(text: str) -> str:
  """Fenced with more backticks than the text has in a row."""
  text = plain.clean_lines(text)
  fence = '`' * max(3, 1 + max((len(run) for run in re.findall('`+', text)), default=0))
  return f'{fence}text\n{text}\n{fence}'
