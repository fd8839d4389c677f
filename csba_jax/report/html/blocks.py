"""What a report is made of, before it is a page or Markdown; all text is plain and unescaped."""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Text(NamedTuple):
  """A paragraph; `kind` is '', 'note' (something is amiss) or 'small'."""

  text: str
  kind: str = ''


class Items(NamedTuple):
  """A list; `kind` as of Text."""

  items: Sequence[str]
  kind: str = ''


class Verdict(NamedTuple):
  """A claim, its verdict, and what speaks for that."""

  title: str
  verdict: str
  sentences: Sequence[str]


class Finding(NamedTuple):
  """What one verdict means, in one sentence."""

  verdict: str
  sentence: str


class Table(NamedTuple):
  """Rows of text; the first `left` columns are words, the others numbers."""

  caption: str
  head: Sequence[str]
  rows: Sequence[Sequence[str]]
  left: int = 1


class Figure(NamedTuple):
  """A picture on the page; in Markdown its file or its numbers take its place, if there are any."""

  caption: str  # what it shows, n and interval level
  draw: Callable[[], Sequence[str]]  # SVG elements, side by side where there is room
  numbers: Sequence[Table] = ()
  on_page: bool = True  # numbers also on the page, folded away; else the picture shows them
  key: str = ''  # what the colours of the picture mean
  file: str = ''  # beside the report, which Markdown shows in place of numbers


class Photos(NamedTuple):
  """Small photos in a row, for the page alone: (JPEG file as bytes, words below it) of each."""

  photos: Sequence[tuple[bytes, str]]


class Code(NamedTuple):
  """Text of a machine, line by line."""

  text: str


class Fold(NamedTuple):
  """What most readers pass over."""

  title: str
  blocks: Sequence['Block']
  page_only: bool = False  # too much for Markdown


Block = Text | Items | Verdict | Finding | Table | Figure | Photos | Code | Fold


class Section(NamedTuple):
  """A heading and what is below it; `anchor` is where a link to it leads on the page."""

  title: str
  anchor: str
  blocks: Sequence[Block]
