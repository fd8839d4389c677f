"""Plots as inline SVG: text stays text, colours are the page's CSS variables, no ids, no scripts.

The page's style sheet knows the classes: s0, s1, ... series; k classes by hue; n, p negative and
positive cells; u undefined; a axes; g grid; z zero; b band; m small, muted text.
"""

import html
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from csba_jax.runtime import plain

LARGEST_ANNOTATED = 20  # classes; more numbers than that cannot be read
_LEVELS = 12  # steps of a colour scale
_NARROW, _WIDE = frozenset("iljtfrI .,:;|!'()[]/"), frozenset('mwMW%@—…')
_MARKERS = (  # around 0, 0; told apart without colour
  'm-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0-7.2 0z',
  'm-3.3-3.3h6.6v6.6h-6.6z',
  'm0-4.6l4.6 4.6l-4.6 4.6l-4.6-4.6z',
  'm0-4.4l4.3 7.4h-8.6z',
  'm0 4.4l4.3-7.4h-8.6z',
  'm-1.5-4.2h3v2.7h2.7v3h-2.7v2.7h-3v-2.7h-2.7v-3h2.7z',
)


class Series(NamedTuple):
  """One kind of mark: a row for each label, (value, low, high); NaN is not drawn."""

  name: str
  values: Sequence[tuple[float, float, float]]
  mark: int  # colour and marker


def dots(
  labels: Sequence[str],
  series: Sequence[Series],
  *,
  title: str,
  axis: str,
  zero: bool = False,
  band: float = 0.0,
  log: bool = False,
  limits: tuple[float, float] | None = None,
  notes: Sequence[str] = (),
  width: int = 700,
) -> str:
  """Values with intervals, a row for each label; `band` is marked on both sides of zero.

  Args:
    notes: a text at the right end of each row, such as its numbers.
  """
  labels = [short(label, 290) for label in labels]
  left = max([60, *(text_width(label) + 14 for label in labels)])
  key, top = _key(series, width) if len(series) > 1 else ('', 6)
  pitch = 9 if len(series) > 1 else 0
  row = max(22, pitch * len(series) + 11)
  bottom = top + row * len(labels)
  right = width - max([14, *(text_width(note, 11) + 16 for note in notes)])
  finite = [x for s in series for v in s.values for x in v if _drawable(x, log)]
  extra = [0.0] * zero + [-band, band] * bool(band)
  scale = _Scale([*finite, *extra], left, right, log=log, limits=limits)
  parts = [key]
  if band:
    x = scale(-band)
    parts.append(f'<rect class="b" x="{_n(x)}" y="{top}" width="{_n(scale(band) - x)}"')
    parts.append(f' height="{bottom - top}"/>')
  parts.append(_vertical_grid(scale, top, bottom))
  for i, label in enumerate(labels):
    middle = top + row * (i + 0.5)
    parts.append(_text(left - 8, middle + 4, label, anchor='end'))
    if i:
      parts.append(f'<path class="g" d="M{_n(left)} {_n(top + row * i)}H{width - 14}"/>')
  for i, note in enumerate(notes):
    parts.append(_text(width - 8, top + row * (i + 0.5) + 4, note, anchor='end', css='m'))
  if zero:
    parts.append(f'<path class="z" d="M{_n(scale(0))} {top}V{bottom}"/>')
  for s, one in enumerate(series):
    marks = []
    for i, (value, low, high) in enumerate(one.values):
      y = top + row * (i + 0.5) + pitch * (s - (len(series) - 1) / 2)
      if _drawable(low, log) and _drawable(high, log):
        marks.append(f'M{_n(scale(low))} {_n(y)}H{_n(scale(high))}')
      if _drawable(value, log):
        marks.append(f'M{_n(scale(value))} {_n(y)}{_MARKERS[one.mark % len(_MARKERS)]}')
    parts.append(f'<path class="s{one.mark % 6}" d="{"".join(marks)}"/>')
  parts.append(
    _text((left + right) / 2, bottom + 34, short(axis, right - left + 60), anchor='middle')
  )
  return _svg(width, bottom + 44, title, parts)


def heat_map(
  values: np.ndarray,
  labels: Sequence[str],
  *,
  title: str,
  limit: float,
  named: bool = True,
  percent: bool = False,
  diagonal: bool = False,
) -> str:
  """A matrix as coloured cells, rows and columns numbered alike; `named` writes the labels out.

  Args:
    limit: the value of the strongest colour, on both sides of zero.
    percent: numbers in the cells as whole percentages.
    diagonal: colours the diagonal too; else it is left empty, 1 by definition.
  """
  classes = len(values)
  small = classes <= LARGEST_ANNOTATED
  side = 26 if small else max(3, 540 // classes)
  shown = [short(label, 190, 11) for label in labels] if named and small else [''] * classes
  left = 26 + max([0, *(text_width(label, 11) + 8 for label in shown)])
  top = 44
  cells: dict[str, list[str]] = {}
  numbers = []
  for i, j in np.ndindex(values.shape):
    value = float(values[i, j])
    x, y = left + side * j, top + side * i
    if i == j and not diagonal:
      continue
    cells.setdefault(_shade(value, limit), []).append(
      f'M{_n(x)} {y}h{side - 1}v{side - 1}h{1 - side}z'
    )
    if small:
      numbers.append(_text(x + side / 2 - 0.5, y + side / 2 + 3, _cell(value, percent)))
  parts = [_text(0, 14, title, css='t')]
  parts += [f'<path {shade} d="{"".join(d)}"/>' for shade, d in sorted(cells.items())]
  every = 1 if small else math.ceil(classes / 20)
  for c in range(0, classes, every):
    middle = side * (c + 0.5) - 0.5
    parts.append(_text(left + middle, top - 6, str(c + 1), anchor='middle', css='m'))
    parts.append(_text(left - 6, top + middle + 4, str(c + 1), anchor='end', css='m'))
    if shown[c]:
      parts.append(_text(left - 26, top + middle + 4, shown[c], anchor='end', css='m'))
  parts.append(f'<g class="c">{"".join(numbers)}</g>')
  width = max(left + side * classes + 2, text_width(title, 13) + 4)
  return _svg(width, top + side * classes + 4, title, parts)


def lines(
  labels: Sequence[str], series: Sequence[Series], *, title: str, zero: bool = False
) -> str:
  """One small plot: values over the ordered labels, one line for each series."""
  width, height, left, top, bottom = 330, 222, 48, 28, 182
  finite = [s[0] for one in series for s in one.values if math.isfinite(s[0])]
  scale = _Scale([*finite, *([0.0] * zero)], bottom, top)
  step = (width - left - 12) / max(1, len(labels))
  xs = [left + step * (i + 0.5) for i in range(len(labels))]
  parts = [_text(0, 14, title, css='t')]
  for value, text in scale.ticks():
    y = _n(scale(value))
    parts.append(f'<path class="g" d="M{left} {y}H{width - 12}"/>')
    parts.append(_text(left - 6, scale(value) + 4, text, anchor='end', css='m'))
  if zero:
    parts.append(f'<path class="z" d="M{left} {_n(scale(0))}H{width - 12}"/>')
  for x, label in zip(xs, labels, strict=True):
    parts.append(_text(x, bottom + 16, short(label, step, 11), anchor='middle', css='m'))
  for one in series:
    known = [(x, scale(v[0])) for x, v in zip(xs, one.values, strict=True) if math.isfinite(v[0])]
    if not known:
      continue
    line = 'L'.join(f'{_n(x)} {_n(y)}' for x, y in known)
    marker = _MARKERS[one.mark % len(_MARKERS)]
    marks = ''.join(f'M{_n(x)} {_n(y)}{marker}' for x, y in known)
    css = f's{one.mark % 6}'
    parts.append(f'<path class="{css} l" d="M{line}"/><path class="{css}" d="{marks}"/>')
  return _svg(width, height - 18, title, parts)


def scatter(
  groups: Sequence[tuple[str, np.ndarray, np.ndarray]], *, title: str, axes: tuple[str, str]
) -> str:
  """Points of groups in the colours of a ramp, from the first group to the last."""
  width, left, top, bottom = 700, 62, 12, 352
  xs = [float(x) for _, group, _ in groups for x in group if math.isfinite(x)]
  ys = [float(y) for _, _, group in groups for y in group if math.isfinite(y)]
  horizontal = _Scale([*xs, 0.0], left, 470)
  vertical = _Scale([*ys, 0.0], bottom, top)
  parts = [_vertical_grid(horizontal, top, bottom)]
  for value, text in vertical.ticks():
    at = vertical(value)
    parts.append(f'<path class="g" d="M{left} {_n(at)}H470"/>')
    parts.append(_text(left - 6, at + 4, text, anchor='end', css='m'))
  parts.append(f'<path class="z" d="M{left} {_n(vertical(0))}H470"/>')
  parts.append(f'<path class="z" d="M{_n(horizontal(0))} {top}V{bottom}"/>')
  listed = groups if len(groups) <= LARGEST_ANNOTATED else []
  for i, (name, x, y) in enumerate(groups):
    marker = _MARKERS[i % len(_MARKERS)]
    both = [
      f'M{_n(horizontal(float(a)))} {_n(vertical(float(b)))}{marker}'
      for a, b in zip(x, y, strict=True)
      if math.isfinite(a) and math.isfinite(b)
    ]
    hue = f'style="--h:{round(275 - 225 * i / max(1, len(groups) - 1))}"'
    parts.append(f'<path class="k" {hue} d="{"".join(both)}"/>')
    if listed:
      at = top + 10 + 17 * i
      parts.append(f'<path class="k" {hue} d="M488 {at}{marker}"/>')
      parts.append(_text(498, at + 4, short(name, width - 500, 11), css='m'))
  parts.append(_text((left + 470) / 2, bottom + 34, short(axes[0], 408), anchor='middle'))
  parts.append(
    f'<text transform="translate(13 {(top + bottom) // 2})rotate(-90)" text-anchor="middle">'
    f'{html.escape(short(axes[1], bottom - top))}</text>'
  )
  return _svg(width, max(bottom + 44, top + 17 * len(listed) + 10), title, parts)


def key(series: Sequence[Series], width: int = 700) -> str:
  """What the marks of several plots stand for."""
  drawn, height = _key(series, width)
  title = f'Key: {", ".join(one.name for one in series)}'
  return _svg(width, height, title, [drawn]).replace('<svg class="wide"', '<svg class="key"', 1)


def standalone(drawn: str, style: str) -> str:
  """A drawing as the content of a file of its own, with its style sheet in it."""
  head, rest = drawn.split('>', 1)
  head = head.replace('<svg', '<svg xmlns="http://www.w3.org/2000/svg"', 1)
  paper = '<rect width="100%" height="100%" style="fill:var(--paper)"/>'
  return f'{head}><style>\n{style}</style>{paper}{rest}\n'


def short(text: str, width: float, size: float = 12) -> str:
  """The text, or its beginning and an ellipsis where it takes more pixels than that."""
  if text_width(text, size) <= width:
    return text
  kept = text
  while kept and text_width(kept + '…', size) > width:
    kept = kept[:-1]
  return kept + '…'


def text_width(text: str, size: float = 12) -> float:
  """How many pixels a text takes in a wide font (DejaVu Sans), no less than in most others."""
  return sum(map(_character, text)) * size


def _character(character: str) -> float:
  """Width of a character at size 1."""
  if character in _NARROW:
    return 0.42
  if character in _WIDE or plain.columns(character) == 2:
    return 1.02
  return 0.78 if character.isupper() else 0.64


class _Scale:
  """Values to pixels, with round ticks."""

  def __init__(
    self,
    values: Iterable[float],
    start: float,
    end: float,
    *,
    log: bool = False,
    limits: tuple[float, float] | None = None,
  ):
    known = list(values)
    low, high = limits or ((min(known), max(known)) if known else (1.0 if log else 0.0, 1.0))
    if log:
      low, high = math.log10(low), math.log10(high)
    if not high - low > 1e-9 * max(abs(low), abs(high)):
      reach = max(0.05 * abs(low), 0.01)
      low, high = low - reach, high + reach
    reach = 0.0 if limits else 0.04 * (high - low)
    self.low, self.high, self.start, self.end = low - reach, high + reach, start, end
    self.log = log

  def __call__(self, value: float) -> float:
    at = math.log10(value) if self.log else value
    share = (at - self.low) / (self.high - self.low)
    return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

  def ticks(self) -> list[tuple[float, str]]:
    if self.log and self.high - self.low >= 1:
      powers = range(math.floor(self.low), math.floor(self.high) + 1)
      between = (1,) if self.high - self.low >= 2 else (1, 2, 5)
      values = [k * 10.0**power for power in powers for k in between]
      return [(v, f'{v:g}') for v in values if self.low <= math.log10(v) <= self.high]
    low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
    rough = (high - low) / 7
    power = 10 ** math.floor(math.log10(rough))
    step = next(k for k in (1, 2, 5, 10) if k * power >= rough * 0.999) * power
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    if digits > 6 or high > 1e6:
      return [(k * step, f'{k * step:.2g}') for k in range(first, last + 1)]
    return [(k * step, _minus(f'{k * step + 0.0:.{digits}f}')) for k in range(first, last + 1)]


def _vertical_grid(scale: _Scale, top: float, bottom: float) -> str:
  parts = []
  for value, text in scale.ticks():
    x = scale(value)
    parts.append(f'<path class="g" d="M{_n(x)} {_n(top)}V{_n(bottom)}"/>')
    parts.append(_text(x, bottom + 16, text, anchor='middle', css='m'))
  return ''.join(parts)


def _key(series: Sequence[Series], width: float) -> tuple[str, int]:
  """The entries from left to right, in as many lines as they need, and the height of that."""
  parts, x, y = [], 8.0, 12
  for one in series:
    name = short(one.name, width - 40)
    needed = text_width(name) + 34
    if x > 8 and x + needed > width:
      x, y = 8.0, y + 20
    marker = _MARKERS[one.mark % len(_MARKERS)]
    parts.append(f'<path class="s{one.mark % 6}" d="M{_n(x)} {y}{marker}"/>')
    parts.append(_text(x + 10, y + 4, name))
    x += needed
  return ''.join(parts), y + 14


def _shade(value: float, limit: float) -> str:
  if math.isnan(value):
    return 'class="u"'
  level = min(_LEVELS, round(_LEVELS * abs(value) / limit))
  return f'class="{"n" if value < 0 else "p"}" fill-opacity="{level / _LEVELS:.2f}"'


def _cell(value: float, percent: bool) -> str:
  if math.isnan(value):
    return '–'
  if percent:
    return f'{100 * value:.0f}'
  return _minus(f'{round(value, 2) + 0.0:.2f}'.replace('0.', '.'))


def _minus(text: str) -> str:
  if not text.strip('-0.'):
    return text.lstrip('-')  # no minus zero
  return text.replace('-', '−')


def _text(x: float, y: float, text: str, *, anchor: str = '', css: str = '') -> str:
  where = f' text-anchor="{anchor}"' * bool(anchor) + f' class="{css}"' * bool(css)
  return f'<text x="{_n(x)}" y="{_n(y)}"{where}>{html.escape(text)}</text>'


def _svg(width: float, height: float, title: str, parts: Iterable[str]) -> str:
  size = f'width="{math.ceil(width)}" height="{math.ceil(height)}"'
  box = f'viewBox="0 0 {math.ceil(width)} {math.ceil(height)}"'
  css = ' class="wide"' if width >= 600 else ''
  return (
    f'<svg{css} role="img" aria-label="{html.escape(title)}" {size} {box}>{"".join(parts)}</svg>'
  )


def _n(x: float) -> str:
  """A coordinate in tenths of a pixel, as short as possible."""
  return f'{round(float(x), 1):g}'


def _drawable(x: float, log: bool) -> bool:
  return math.isfinite(x) and (x > 0 or not log)
