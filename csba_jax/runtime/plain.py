"""Text of users, such as names of classes, as a page or a terminal can hold it."""

import unicodedata
from typing import Any

_OVERRIDES = frozenset('\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069')


def clean(text: Any) -> str:
  """One line without what a page cannot hold: control characters, half characters, overrides."""
  return ' '.join(line for line in map(str.strip, _printable(str(text)).split('\n')) if line)


def clean_lines(text: Any) -> str:
  """The same, with its lines and their indentation."""
  return _printable(str(text))


def columns(text: str) -> int:
  """How many columns of a terminal a text takes."""
  return sum(
    0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in 'WF' else 1
    for c in text
  )


def _printable(text: str) -> str:
  text = text.replace('\r\n', '\n').replace('\r', '\n').replace('\t', '  ')
  return ''.join(
    '\N{REPLACEMENT CHARACTER}'
    if c != '\n' and (unicodedata.category(c) in ('Cc', 'Cs') or c in _OVERRIDES)
    else c
    for c in text
  )
