"""A page of HTML from sections and blocks; it needs no network, no script and no other file."""

import base64
import html
from collections.abc import Sequence
from importlib import resources

from csba_jax.analysis.types import REFUTED, SUPPORTED, UNDECIDED, UNTESTED
from csba_jax.report.html.blocks import (
  Block,
  Code,
  Figure,
  Finding,
  Fold,
  Items,
  Photos,
  Section,
  Table,
  Text,
  Verdict,
)
from csba_jax.runtime import plain

_BADGES = {
  SUPPORTED: ('yes', '✓'),
  REFUTED: ('no', '✕'),
  UNDECIDED: ('open', '?'),
  UNTESTED: ('idle', '–'),
}
_OTHER = ('open', '?')  # of any other verdict
# the browser itself refuses to load or to run anything, whatever a class is named
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_PHOTOS = '; img-src data:'  # of a page that has photos in it


def document(title: str, lead: str, sections: Sequence[Section], photos: bool = False) -> str:
  """The whole page; text of users is escaped, only the figures' SVG is not.

  Args:
    title: one line.
    lead: the sentence below it.
    sections: each gets a link at the top.
    photos: whether the page may show `Photos`.
  """
  policy = _POLICY + (_PHOTOS if photos else '')
  title = escape(title)
  links = ''.join(f'<li><a href="#{s.anchor}">{escape(s.title)}</a></li>' for s in sections)
  style = style_sheet('figure.css') + style_sheet('page.css')
  if photos:
    style += style_sheet('photos.css')
  return '\n'.join(
    [
      '<!DOCTYPE html>',
      '<html lang="en">',
      '<head>',
      '<meta charset="utf-8">',
      f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      '<meta name="color-scheme" content="light dark">',
      f'<title>{title}</title>',
      f'<style>\n{style}</style>',
      '</head>',
      '<body>',
      '<header>',
      f'<h1>{title}</h1>',
      f'<p>{escape(lead)}</p>',
      f'<nav aria-label="Sections"><ul>{links}</ul></nav>',
      '</header>',
      '<main>',
      *map(_section, sections),
      '</main>',
      '</body>',
      '</html>',
      '',
    ]
  )


def style_sheet(name: str) -> str:
  """A style sheet of this package: figure.css has colours and figures, photos.css photos."""
  return resources.files('csba_jax.report.html').joinpath(name).read_text('utf-8')


def escape(text: str) -> str:
  """One line, safe as text and as the value of an attribute."""
  return html.escape(plain.clean(text))


def _section(section: Section) -> str:
  inside = '\n'.join(map(_block, section.blocks))
  title = f'<h2>{escape(section.title)}</h2>'
  return f'<section id="{section.anchor}">\n{title}\n{inside}\n</section>'


def _block(block: Block) -> str:
  match block:
    case Text(text, kind):
      return f'<p{_css(kind)}>{escape(text)}</p>'
    case Items(items, kind):
      inside = ''.join(f'<li>{escape(item)}</li>' for item in items)
      return f'<ul{_css(kind)}>{inside}</ul>'
    case Verdict():
      return _verdict(block)
    case Finding(verdict, sentence):
      css = _BADGES.get(verdict, _OTHER)[0]
      return f'<p class="claim {css}">{_badge(verdict)} {escape(sentence)}</p>'
    case Table():
      return _table(block)
    case Figure():
      return _figure(block)
    case Photos(photos):
      return f'<div class="photos">{"".join(_photo(*one) for one in photos)}</div>'
    case Code(text):
      return f'<pre tabindex="0"><code>{html.escape(plain.clean_lines(text))}</code></pre>'
    case Fold(title, inside, _):
      return _fold(title, [_block(one) for one in inside])


def _verdict(claim: Verdict) -> str:
  css = _BADGES.get(claim.verdict, _OTHER)[0]
  text = ''.join(f'<p>{escape(sentence)}</p>' for sentence in claim.sentences)
  title = f'<h3>{escape(claim.title)} {_badge(claim.verdict)}</h3>'
  return f'<article class="claim {css}">{title}{text}</article>'


def _badge(verdict: str) -> str:
  """The verdict with a mark that needs no colour; nothing for none."""
  css, mark = _BADGES.get(verdict, _OTHER)
  badge = f'<span class="badge {css}"><span aria-hidden="true">{mark}</span> '
  return f'{badge}{escape(verdict)}</span>' if verdict else ''


def _table(table: Table) -> str:
  caption = escape(table.caption)

  def line(row: Sequence[str], name: str) -> str:
    cells = []
    for i, cell in enumerate(row):
      names = ['w'] * (i < table.left) + ['long'] * (len(cell) > 48)
      scope = ' scope="col"' if name == 'th' else ''
      cells.append(f'<{name}{_css(" ".join(names))}{scope}>{escape(cell)}</{name}>')
    return f'<tr>{"".join(cells)}</tr>'

  head, body = line(table.head, 'th'), '\n'.join(line(row, 'td') for row in table.rows)
  box = f'<div class="box" role="region" tabindex="0" aria-label="{caption}">'
  inside = f'<table><thead>{head}</thead>\n<tbody>{body}</tbody></table>'
  return f'<figure class="table"><figcaption>{caption}</figcaption>{box}{inside}</div></figure>'


def _figure(figure: Figure) -> str:
  panels = ''.join(f'<div class="panel">{one}</div>' for one in figure.draw())
  caption = f'<figcaption>{escape(f"{figure.caption} {figure.key}")}</figcaption>'
  made = f'<figure><div class="panels">{panels}</div>{caption}</figure>'
  if figure.numbers and figure.on_page:
    made += '\n' + _fold('Numbers of this figure', [_table(table) for table in figure.numbers])
  return made


def _photo(data: bytes, words: str) -> str:
  source = f'data:image/jpeg;base64,{base64.b64encode(data).decode()}'
  words = escape(words)
  return f'<figure><img src="{source}" alt="{words}"><figcaption>{words}</figcaption></figure>'


def _fold(title: str, inside: Sequence[str]) -> str:
  text = '\n'.join(inside)
  return f'<details><summary>{escape(title)}</summary>\n{text}\n</details>'


def _css(kind: str) -> str:
  return f' class="{kind}"' if kind else ''
