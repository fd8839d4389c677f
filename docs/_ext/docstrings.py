"""Docstrings of csba_jax in a form that Sphinx reads as they are meant.

They are written for a reader of the code. Sphinx reads reStructuredText, where |g_c|, x * y, a
lone C. and an indented formula are markup. This module knows nothing of Sphinx.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator

_SECTION = re.compile(r'(Args|Attributes|Examples?|Raises|Returns|Yields|Notes?):')
_ITEM = re.compile(r"(- |\d+\. |(?='\w+': ))")
# A name in backticks or an *emphasised* word, which stay; or a sign that is markup elsewhere: *, |,
# \, x_ and a lone C.
_CODE_OR_SIGN = re.compile(
  r'``.*?``|`[^`\n]+`|(?<![\w*])\*\w+\*(?![\w*])'
  r'|[|*\\]|(?<=\w)_(?!\w)|(?<=\b[A-Za-z])\.(?=\s|$)'
)


def readable(lines: list[str]) -> list[str]:
  """Lines of a Google-style docstring: signs escaped, formulas as literal blocks, lists apart."""
  out = []
  for section, body in _sections(lines):
    out += [f'{section}:'] * bool(section)
    if section.startswith('Example'):
      out += body
    elif section == 'Returns':
      out += textwrap.indent('\n'.join(_returned(body)), '  ').split('\n')
    elif section:
      out += map(escaped, body)
    else:
      out += _apart(body)
  return out


def escaped(line: str) -> str:
  """The line with a backslash before each sign of markup outside of backticks."""
  return _CODE_OR_SIGN.sub(lambda found: found[0] if len(found[0]) > 1 else f'\\{found[0]}', line)


def _sections(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
  """('', text) and (name of a section, its lines), in their order."""
  name, body = '', []
  for line in lines:
    ends = name and line.strip() and not line.startswith(' ')
    found = _SECTION.fullmatch(line)
    if found or ends:
      yield name, body
      name, body = found[1] if found else '', []
    if not found:
      body.append(line)
  yield name, body


def _returned(body: list[str]) -> list[str]:
  """The section Returns, at the margin; a colon in it does not end the name of a type."""
  body = list(_apart(textwrap.dedent('\n'.join(body)).split('\n')))
  while body and not body[0]:
    body.pop(0)
  return [f': {body[0]}', *body[1:]] if body and ':' in body[0] else body


def _apart(lines: list[str]) -> Iterator[str]:
  """Text with formulas as literal blocks, and with blank lines around them and around lists."""
  before, formula = '', False
  for line in lines:
    indented, item = line.startswith(' '), _ITEM.match(line)
    in_list = before.startswith(' ') or _ITEM.match(before)
    if formula and not indented:
      formula = False
      yield from [''] * bool(line.strip())
    elif before.strip() and (item or (line.strip() and in_list and not indented)):
      yield ''
    elif before.strip() and indented and not in_list:
      formula = True
      yield from ('', '::', '')
    if formula:
      yield line
    else:
      key = '- ' if item and not item[0] else ''
      yield f'{key}{escaped(line)}'
    before = line


def field_comments(cls: type) -> dict[str, str]:
  """{field: comment behind it} of a class with annotated fields, such as a dataclass."""
  try:
    source = textwrap.dedent(inspect.getsource(cls))
    (definition,) = ast.parse(source).body
  except (OSError, TypeError, SyntaxError, ValueError):
    return {}
  if not isinstance(definition, ast.ClassDef):  # of a class that other code makes
    return {}
  lines, found = source.splitlines(), {}
  for node in definition.body:
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
      rest = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
      if rest.strip().startswith('#'):
        found[node.target.id] = re.sub(r' {2,}', ': ', rest.strip().lstrip('# '))
  return found


def attributes(cls: type) -> list[str]:
  """The section Attributes of a Google-style docstring, from the comments behind the fields."""
  said = [f'  {name}: {comment}' for name, comment in field_comments(cls).items()]
  return ['', 'Attributes:', *said] if said else []
