"""What the figures share: sizes, names, matrices of classes, and how a figure is written."""

import itertools
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from csba_jax.errors import UserError
from csba_jax.files import write_atomically
from csba_jax.gradients import blocks
from csba_jax.gradients.conflict import Conflict
from csba_jax.gradients.gram import ClassGrams
from csba_jax.runtime import text_table

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure
  from matplotlib.image import AxesImage

DPI = 120
LARGEST_ANNOTATED = 20  # classes; with more, the numbers would be too small to read
SMALLEST_LIMIT = 0.05  # of a scale of colours, so that noise around 0 stays pale
COLORS = 'RdBu'  # red: conflict, blue: agreement
UNDEFINED = '0.85'
_FORMATS = ('png', 'pdf', 'svg')
CELL = 0.62  # inches of a row of a matrix with numbers
SMALLEST_FONT = 5  # points
LONGEST_NAME = 24  # letters of a class name; longer ones are cut and stay distinct
# families for letters that the default font lacks; those that are installed are used
_FONTS = ('Noto Sans CJK JP', 'Noto Sans', 'Arial Unicode MS', 'Hiragino Sans', 'Unifont')


def color_limit(matrices: Iterable[np.ndarray]) -> float:
  """End of a scale of colours that is symmetric around 0, for matrices that share it.

  max |m[c, d]| over all matrices m and all c != d where it is defined, at least SMALLEST_LIMIT; 1
  where nothing is defined.

  Args:
    matrices: each [C, C].
  """
  off = [np.abs(m[~np.eye(len(m), dtype=bool)]) for m in matrices]
  known = [values[np.isfinite(values)].max() for values in off if np.isfinite(values).any()]
  return max(SMALLEST_LIMIT, float(max(known))) if known else 1.0


def new_figure(width: float, height: float) -> 'Figure':
  """An empty figure of so many inches, outside of pyplot."""
  from matplotlib.figure import Figure  # it loads slowly, and only figures need it

  return Figure(figsize=(width, height), layout='constrained')


def save(figure: 'Figure', path: str | os.PathLike) -> None:
  """Writes a figure as a whole, in the format of the ending."""
  ending = Path(path).suffix[1:].lower()
  if ending not in _FORMATS:
    raise UserError(
      f'a path that ends in .{", .".join(_FORMATS)}', repr(os.fspath(path)), 'change the ending'
    )
  if not Path(path).absolute().parent.is_dir():
    raise UserError(f'a folder {Path(path).parent} that exists', 'none', 'make it')
  _add_letters(figure)
  with warnings.catch_warnings():
    # a letter that no installed font has is drawn as a box
    warnings.filterwarnings('ignore', r'Glyph \d+ .* missing from font')
    write_atomically(Path(path), lambda file: figure.savefig(file, format=ending, dpi=DPI))


def check(*conflicts: Conflict) -> None:
  """UserError unless each is a Conflict."""
  for conflict in conflicts:
    if not isinstance(conflict, Conflict):
      do = 'pass Conflict.of(grams)' if isinstance(conflict, ClassGrams) else 'pass a Conflict'
      raise UserError('a Conflict', type(conflict).__name__, do)


def shown(text: str, longest: int = 60) -> str:
  """A text of the user as it is drawn: short enough, and letter by letter."""
  return plain(blocks.shorten(text, longest))


def _add_letters(figure: 'Figure') -> None:
  """Lets texts with letters that the default font lacks use other fonts that are installed."""
  from matplotlib.text import Text

  texts = [text for text in figure.findobj(Text) if max(text.get_text(), default='') > '\u058f']
  if texts:
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    families = ['DejaVu Sans', *(name for name in _FONTS if name in installed)]
    for text in texts:
      text.set_fontfamily(families)


def square_figure(
  conflict: Conflict, values: np.ndarray, bold: np.ndarray, label: str
) -> tuple['Figure', 'Axes']:
  """A figure of a matrix [C, C] with classes on the axes, and numbers where there is room."""
  classes = len(conflict.class_names)
  figure, axes = square_axes(classes)
  image = draw_matrix(axes, conflict, values, color_limit([values]))
  labels = class_labels(conflict.class_names, conflict.class_counts, conflict.by_frequency)
  name_both(axes, labels, labels)
  if classes <= LARGEST_ANNOTATED:
    annotate(axes, conflict, values, bold)
  figure.colorbar(image, ax=axes, shrink=0.8, label=label)
  return figure, axes


def square_axes(classes: int) -> tuple['Figure', 'Axes']:
  """A figure for a matrix of classes, with room for a bar of colours."""
  side = max(4.5, CELL * min(classes, LARGEST_ANNOTATED) + 2.2)
  figure = new_figure(side + 1.2, side)
  return figure, figure.subplots()


def name_both(axes: 'Axes', left: Sequence[str], below: Sequence[str]) -> None:
  """Names of classes on both axes; of too many, those that can be read, at equal distances."""
  room = 72 * CELL * min(1, LARGEST_ANNOTATED / len(left))  # points for each class
  every = math.ceil(SMALLEST_FONT / (0.8 * room))
  size, at = min(10, 0.8 * room * every), range(0, len(left), every)
  turn = 45 if size == 10 else 90  # upright where 45 degrees would lay one name over the next
  across = 'top' if turn == 45 else 'center'
  axes.set_xticks(at, below[::every], rotation=turn, ha='right', va=across, rotation_mode='anchor')
  axes.set_yticks(at, left[::every])
  axes.tick_params(labelsize=size)


def draw_matrix(axes: 'Axes', conflict: Conflict, values: np.ndarray, limit: float) -> 'AxesImage':
  """Draws [C, C] in the order of frequency; the diagonal stays white, it is 1 by definition."""
  order = conflict.by_frequency
  values = values[np.ix_(order, order)]
  axes.set_facecolor(UNDEFINED)
  off = np.where(np.eye(len(order), dtype=bool) & ~np.isnan(values), 0, values)
  return axes.imshow(np.ma.masked_invalid(off), cmap=COLORS, vmin=-limit, vmax=limit)


def annotate(axes: 'Axes', conflict: Conflict, values: np.ndarray, bold: np.ndarray) -> None:
  """Writes the numbers into the cells of a matrix."""
  limit = color_limit([values])
  for (i, c), (j, d) in itertools.product(enumerate(conflict.by_frequency), repeat=2):
    if c == d or np.isnan(values[c, d]):
      text, color, weight = ('' if c == d else '?'), '0.4', 'normal'
    else:
      text = f'{round(values[c, d], 2) + 0.0:.2f}'.replace('0.', '.')  # no -.00
      color = 'white' if abs(values[c, d]) > 0.6 * limit else 'black'
      weight = 'bold' if bold[c, d] else 'normal'
    axes.text(j, i, text, ha='center', va='center', fontsize=8, color=color, weight=weight)


def class_colors(conflict: Conflict) -> list[tuple[object, int]]:
  """(color, class) from the largest class to the smallest, dark to light."""
  from matplotlib import colormaps

  order = conflict.by_frequency
  # yellow, the end of the scale, cannot be seen on white
  return [(colormaps['viridis'](0.92 * i / max(1, len(order) - 1)), c) for i, c in enumerate(order)]


def class_label(conflict: Conflict, c: int) -> str:
  """'name (images)' of a class."""
  return class_labels(conflict.class_names, conflict.class_counts, [c])[0]


def class_labels(
  names: Sequence[Any], counts: np.ndarray | None, order: Iterable[int]
) -> list[str]:
  """'name (images)', or 'name', of classes in an order; long names are cut and stay distinct."""
  cut = text_table.fit([str(name) for name in names], LONGEST_NAME)
  return [plain(cut[c] if counts is None else f'{cut[c]} ({counts[c]})') for c in order]


def plain(text: str) -> str:
  """A name as matplotlib draws it letter by letter: two $ would begin and end a formula."""
  return text.replace('$', r'\$')


def legend(axes: 'Axes', classes: int) -> None:
  """A legend, where the classes are few enough for one."""
  if classes <= LARGEST_ANNOTATED:
    axes.legend(
      fontsize=6, ncols=2 if classes > 6 else 1, loc='center left', bbox_to_anchor=(1, 0.5)
    )


def when(conflict: Conflict) -> str:
  """', step N' of a conflict that knows its step; else ''."""
  return f', step {conflict.about["step"]}' if 'step' in conflict.about else ''


def percent(rate: float) -> str:
  """A rate in percent."""
  return 'none' if np.isnan(rate) else f'{100 * rate:.0f} %'
