"""Figures of conflict and gradient flow, as PNG, PDF or SVG, each written whole or not at all."""

import itertools
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from csba_jax.data.class_counts import by_frequency
from csba_jax.errors import UserError
from csba_jax.files import write_atomically
from csba_jax.gradients import blocks
from csba_jax.gradients.conflict import Conflict, conflict_matrix
from csba_jax.gradients.flow import Flow
from csba_jax.gradients.gram import ClassGrams
from csba_jax.runtime import text_table

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure
  from matplotlib.image import AxesImage

DPI = 120
LARGEST_ANNOTATED = 20  # classes; with more, the numbers would be too small to read
SMALLEST_LIMIT = 0.05  # of a scale of colours, so that noise around 0 stays pale
_COLORS = 'RdBu'  # red: conflict, blue: agreement
_UNDEFINED = '0.85'
_FORMATS = ('png', 'pdf', 'svg')
_CELL = 0.62  # inches of a row of a matrix with numbers
_SMALLEST_FONT = 5  # points
LONGEST_NAME = 24  # letters of a class name; longer ones are cut and stay distinct
# families for letters that the default font lacks; those that are installed are used
_FONTS = ('Noto Sans CJK JP', 'Noto Sans', 'Arial Unicode MS', 'Hiragino Sans', 'Unifont')


def heat_map(conflict: Conflict, path: str | os.PathLike, scope: str = 'shared') -> None:
  """The conflict matrix of one scope, classes by frequency, with their training images on the axes.

  Where there is a sampling error, bold numbers are distinguishable from 0. Grey: not resolvable.
  """
  _check(conflict)
  cosines = np.where(conflict.resolvable(scope), conflict.cosine(scope), np.nan)
  known = conflict.distinguishable(scope) & conflict.errors.any()
  figure, axes = _square(conflict, cosines, known, 'cosine of class gradients')
  bold = ', bold: 95 % interval without 0' if conflict.errors.any() else ''
  title = f'Conflict matrix, {_shown(scope)}{_when(conflict)}'
  target = _shown(str(conflict.about.get('target', 'not stated')))
  axes.set_title(f'{title}\ntarget {target}{bold}')
  _save(figure, path)


def difference(
  treated: Conflict, control: Conflict, layers: Sequence[str], path: str | os.PathLike
) -> None:
  """Cosines of one net minus cosines of another, over common layers; red means more conflict.

  Args:
    treated: of the net whose change is shown.
    control: of the net that it is compared with, on the same classes.
    layers: whose Grams are added up first, such as `diagnose.common_layers`.
    path: of the PNG.

  Raises:
    UserError: the classes differ, or one of the nets lacks a layer.
  """
  _check(treated, control)
  if treated.class_names != control.class_names:
    raise UserError('two nets for the same classes', 'other classes', 'compare runs on one set')
  cosines, reference = (
    conflict_matrix(np.sum([found.gram(layer) for layer in layers], axis=0))
    for found in (treated, control)
  )
  change = cosines - reference
  bold = np.zeros_like(change, bool)
  figure, axes = _square(control, change, bold, 'difference of cosines')
  nets = _plain(' - '.join(str(found.about.get('attention', '?')) for found in (treated, control)))
  axes.set_title(f'Conflict matrix, {nets}\nlayers that both have')
  _save(figure, path)


def class_f1(results: Mapping[str, Mapping[str, Any]], path: str | os.PathLike) -> None:
  """F1 on the test part by class, with one bar for each run; classes by training images.

  Args:
    results: {title: content of result.json}, all of the same classes.
    path: of the PNG.
  """
  first = next(iter(results.values()))
  counts = np.asarray(first['class_counts'])
  order = by_frequency(counts)
  figure = _figure(max(6, 0.7 * len(order) + 2), 4)
  axes = figure.subplots()
  wide = 0.8 / len(results)
  for i, (title, result) in enumerate(results.items()):
    f1 = np.array(result['per_class']['f1'], np.float64)[order]  # null, undefined: no bar
    axes.bar(np.arange(len(order)) - 0.4 + (i + 0.5) * wide, f1, wide, label=_plain(title))
  labels = _labels(first['class_names'], counts, order)
  axes.set_xticks(range(len(order)), labels, rotation=45, ha='right', rotation_mode='anchor')
  axes.set_ylim(0, 1)
  axes.set_ylabel('F1 on the test part')
  axes.set_xlabel('class (training images)')
  axes.grid(axis='y', alpha=0.3)
  axes.legend(loc='center left', bbox_to_anchor=(1, 0.5))
  _save(figure, path)


def confusion(result: Mapping[str, Any], path: str | os.PathLike, part: str = 'test') -> None:
  """The confusion matrix: shares of each true class as colours, images as numbers.

  Classes by training images. Grey: no image of the class was evaluated.

  Args:
    result: content of result.json.
    path: of the PNG.
    part: of the data, for the title.
  """
  order = by_frequency(result['class_counts'])
  counts = np.asarray(result['confusion_matrix'])[np.ix_(order, order)]
  total = counts.sum(1, keepdims=True)
  shares = np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)
  figure, axes = _square_axes(len(order))
  axes.set_facecolor(_UNDEFINED)
  image = axes.imshow(np.ma.masked_invalid(shares), cmap='Blues', vmin=0, vmax=1)
  tested = _labels(result['class_names'], total[np.argsort(order), 0], order)
  _name_both(axes, tested, _labels(result['class_names'], None, order))
  axes.set_ylabel('true class (images)')
  axes.set_xlabel('predicted class')
  if len(order) <= LARGEST_ANNOTATED:
    for (i, j), n in np.ndenumerate(counts):
      if n:
        color = 'white' if shares[i, j] > 0.6 else 'black'
        axes.text(j, i, f'{n}', ha='center', va='center', fontsize=8, color=color)
  figure.colorbar(image, ax=axes, shrink=0.8, label='share of the true class')
  axes.set_title(f'Confusion matrix, {part} part, {counts.sum()} images')
  _save(figure, path)


def layers(conflict: Conflict, path: str | os.PathLike) -> None:
  """One small conflict matrix for each layer, all with the same scale of colours.

  Classes are named at the left and at the bottom, by frequency; of many classes, a few.
  """
  _check(conflict)
  names = conflict.layers
  wide = min(8, math.ceil(math.sqrt(1.6 * len(names))))
  columns = min((wide, wide - 1), key=lambda number: -len(names) % max(1, number))
  columns = max(1, columns)
  rows = math.ceil(len(names) / columns)
  side = 2.2 if len(names) <= 8 else 1.5  # inches
  figure = _figure((side + 0.1) * columns + 2.2, (side + 0.45) * rows + 1.6)
  grid = figure.subplots(rows, columns, squeeze=False)
  limit = color_limit(conflict.cosine(name) for name in names)
  named = _named_ranks(len(conflict.class_names), 12 if side < 2 else LARGEST_ANNOTATED)
  labels = [_label(conflict, conflict.by_frequency[rank]) for rank in named]
  for axes in grid.flat[len(names) :]:
    axes.set_axis_off()
  for i, (axes, name) in enumerate(zip(grid.flat, names, strict=False)):
    image = _matrix(axes, conflict, conflict.cosine(name), limit)
    axes.set_xticks(named, labels if i // columns == rows - 1 else [], rotation=90, fontsize=5.5)
    axes.set_yticks(named, labels if i % columns == 0 else [], fontsize=5.5)
    axes.tick_params(length=2, width=0.5)
    rate = conflict.summary(name)['conflict_rate']
    title = [_shown(line) for line in blocks.wrap(name, int(15 * side))]
    axes.set_title('\n'.join([*title, f'{_percent(rate)} in conflict']), fontsize=6.5)
  bar = figure.colorbar(image, ax=grid, shrink=min(1, 3 / rows), label='cosine of class gradients')
  bar.ax.tick_params(labelsize=7)
  figure.suptitle(f'Conflict by layer{_when(conflict)}: share of pairs in conflict', fontsize=10)
  _save(figure, path)


def gradient_flow(conflict: Conflict, flow: Flow, path: str | os.PathLike) -> None:
  """How each class moves each layer: norm, share of the batch gradient and cosine with it.

  A line is a layer, a group of lines a block of the net. In each line the classes stand from the
  largest at the top to the smallest at the bottom.
  """
  _check(conflict)
  if not isinstance(flow, Flow) or flow.scopes != conflict.scopes:
    found = 'one of other scopes' if isinstance(flow, Flow) else type(flow).__name__
    raise UserError('the flow of this conflict', found, 'pass flow(conflict)')
  groups = blocks.blocks(conflict.layers)
  each = min(0.5, max(0.17, 9 / len(conflict.layers)))  # inches of a layer
  figure = _figure(11, each * len(conflict.layers) + 0.3 * len(groups) + 1.9)
  grid = figure.subplots(
    len(groups),
    4,
    squeeze=False,
    sharex='col',
    height_ratios=[len(members) + 0.25 for _, members in groups],
  )
  first = len(conflict.scopes) - len(conflict.layers)
  for row, (block, members) in zip(grid, groups, strict=True):
    _flow_of_block(row, conflict, flow, [first + i for i in members])
    row[0].set_yticks(
      range(len(members)),
      [_shown(blocks.within(conflict.layers[i], block), 36) for i in members],
      fontsize=7,
    )
    row[0].set_title(_shown(block, 60), loc='left', fontsize=8, weight='bold', pad=3)
  for axes, label in zip(grid[-1], _FLOW_LABELS, strict=True):
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(axis='x', labelsize=7)
  of_layers = slice(first, None)
  for column, values in ((0, flow.norms), (3, np.stack([flow.norm_ratio, flow.pull_ratio], 1))):
    if np.nanmax(values[of_layers], initial=0) > 0:
      _set_log([*grid[:, column]], values[of_layers])
  _flow_legends(figure, grid, conflict)
  figure.suptitle(f'Gradient flow by layer{_when(conflict)}', fontsize=11)
  _save(figure, path)


_FLOW_LABELS = (
  r'norm $|g_c|$',
  'share of the batch gradient',
  'cosine with the batch gradient',
  'majority / minority',
)
_RATIOS = (
  (r'mean $|g_c|$', 's', 'black'),
  (r'$|\sum_c \pi_c g_c|$', '^', 'tab:red'),
)


def _flow_of_block(
  row: Sequence['Axes'], conflict: Conflict, flow: Flow, scopes: Sequence[int]
) -> None:
  """One block of `gradient_flow`: four panels, in which layer i is the line at height i."""
  y = np.arange(len(scopes))
  colors, order = zip(*_class_colors(conflict), strict=True)
  classes = len(order)
  rise = np.linspace(-0.34, 0.34, classes) if classes > 1 else np.zeros(1)
  size = 3.5 if classes <= LARGEST_ANNOTATED else 1.3
  for axes, values in zip(row, (flow.norms, flow.shares, flow.cosines), strict=False):
    x = values[np.ix_(scopes, order)]
    axes.scatter(x, y[:, None] + rise, s=size**2, lw=0, c=[*colors] * len(y))
  for values, (_, marker, color), dy in zip(
    (flow.norm_ratio, flow.pull_ratio), _RATIOS, (-0.15, 0.15), strict=True
  ):
    row[3].plot(values[scopes], y + dy, marker, ms=3.5, mew=0, color=color)
  for axes, neutral in zip(row, (None, 0, 0, 1), strict=True):
    if neutral is not None:
      axes.axvline(neutral, color='0.3', lw=0.8, zorder=0)
    for line in y[1::2]:
      axes.axhspan(line - 0.5, line + 0.5, color='0.95', zorder=-1)
    axes.set_ylim(len(scopes) - 0.5, -0.5)  # the first layer on top
    axes.tick_params(axis='y', length=0)
    axes.grid(axis='x', alpha=0.3)
    axes.tick_params(axis='x', length=2)
    if axes is not row[0]:
      axes.set_yticks([])


def _set_log(column: Sequence['Axes'], values: np.ndarray) -> None:
  """Logarithmic axes with plain numbers, as many as there is room for."""
  from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

  known = values[values > 0]
  few = known.max() > 30 * known.min()
  for axes in column:
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if few else (1, 2, 5), numticks=7))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f'{x:g}'))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _flow_legends(figure: 'Figure', grid: np.ndarray, conflict: Conflict) -> None:
  """Which colour is which class, and which mark is which ratio, at the right."""
  from matplotlib.cm import ScalarMappable
  from matplotlib.colors import ListedColormap, Normalize
  from matplotlib.lines import Line2D

  colors = _class_colors(conflict)
  marks = [
    Line2D([], [], marker=marker, ls='', ms=4, mew=0, color=color, label=label)
    for label, marker, color in _RATIOS
  ]
  ratios = {'handles': marks, 'title': _FLOW_LABELS[3], 'fontsize': 7, 'title_fontsize': 7}
  if len(colors) <= LARGEST_ANNOTATED:
    dots = [
      Line2D([], [], marker='o', ls='', ms=4, mew=0, color=color, label=_label(conflict, c))
      for color, c in colors
    ]
    figure.legend(
      handles=dots,
      title='class (training images)',
      fontsize=7,
      title_fontsize=7,
      ncols=min(4, len(dots)),
      loc='outside lower left',
    )
  else:
    named = _named_ranks(len(colors), 3)  # long names fit
    scale = ScalarMappable(
      Normalize(-0.5, len(colors) - 0.5), ListedColormap([color for color, _ in colors])
    )
    bar = figure.colorbar(
      scale, ax=grid, location='bottom', fraction=0.02, aspect=80, pad=0.02, shrink=0.7
    )
    bar.set_ticks(named, labels=[_label(conflict, colors[rank][1]) for rank in named], fontsize=6)
    bar.set_label('class (training images), from the largest to the smallest', fontsize=7)
  figure.legend(loc='outside lower right', **ratios)


def _named_ranks(classes: int, most: int) -> list[int]:
  """Ranks by frequency of the classes that are named: all, or `most` at most, evenly spread."""
  if classes <= most:
    return list(range(classes))
  few = min(most, 5)
  return sorted({round(rank) for rank in np.linspace(0, classes - 1, few)})


def over_training(
  steps: np.ndarray, flows: Sequence[Flow], snapshots: Sequence[Conflict], path: str | os.PathLike
) -> None:
  """Conflict rates, norms by class and ratios of norms of the shared scope, by training step."""
  _check(*snapshots)
  figure = _figure(8, 9)
  top, middle, bottom = figure.subplots(3, 1, sharex=True)
  summaries = [snapshot.summary() for snapshot in snapshots]
  for name, label in (('conflict_rate', 'all pairs'), ('head_tail_conflict', 'majority-minority')):
    top.plot(steps, [summary[name] for summary in summaries], 'o-', ms=3, label=label)
  top.set_ylabel('conflict rate, shared')
  top.set_ylim(-0.02, 1.02)
  top.legend(fontsize=7)
  conflict, shared = snapshots[-1], snapshots[-1].at('shared')
  for color, c in _class_colors(conflict):
    norms = [flow.norms[shared, c] for flow in flows]
    middle.plot(steps, norms, 'o-', ms=3, lw=1, color=color, label=_label(conflict, c))
  middle.set_ylabel(r'$|g_c|$, shared')
  middle.set_yscale('log')
  _legend(middle, len(conflict.class_names))
  bottom.plot(
    steps, [f.norm_ratio[shared] for f in flows], 's-', ms=3, color='black', label=r'mean $|g_c|$'
  )
  bottom.plot(
    steps,
    [f.pull_ratio[shared] for f in flows],
    '^-',
    ms=3,
    color='tab:red',
    label=r'$|\sum_c \pi_c g_c|$',
  )
  bottom.axhline(1, color='black', lw=0.8)
  bottom.set_yscale('log')
  bottom.set_ylabel('majority / minority, shared')
  bottom.set_xlabel('step')
  bottom.legend(fontsize=7)
  for axes in (top, middle, bottom):
    axes.grid(alpha=0.3)
  top.set_title(f'Over training: {len(steps)} snapshots of a fixed probe')
  _save(figure, path)


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


def _figure(width: float, height: float) -> 'Figure':
  from matplotlib.figure import Figure  # it loads slowly, and only figures need it

  return Figure(figsize=(width, height), layout='constrained')


def _save(figure: 'Figure', path: str | os.PathLike) -> None:
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


def _check(*conflicts: Conflict) -> None:
  for conflict in conflicts:
    if not isinstance(conflict, Conflict):
      do = 'pass Conflict.of(grams)' if isinstance(conflict, ClassGrams) else 'pass a Conflict'
      raise UserError('a Conflict', type(conflict).__name__, do)


def _shown(text: str, longest: int = 60) -> str:
  """A text of the user as it is drawn: short enough, and letter by letter."""
  return _plain(blocks.shorten(text, longest))


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


def _square(
  conflict: Conflict, values: np.ndarray, bold: np.ndarray, label: str
) -> tuple['Figure', 'Axes']:
  """A figure of a matrix [C, C] with classes on the axes, and numbers where there is room."""
  classes = len(conflict.class_names)
  figure, axes = _square_axes(classes)
  image = _matrix(axes, conflict, values, color_limit([values]))
  labels = _labels(conflict.class_names, conflict.class_counts, conflict.by_frequency)
  _name_both(axes, labels, labels)
  if classes <= LARGEST_ANNOTATED:
    _annotate(axes, conflict, values, bold)
  figure.colorbar(image, ax=axes, shrink=0.8, label=label)
  return figure, axes


def _square_axes(classes: int) -> tuple['Figure', 'Axes']:
  """A figure for a matrix of classes, with room for a bar of colours."""
  side = max(4.5, _CELL * min(classes, LARGEST_ANNOTATED) + 2.2)
  figure = _figure(side + 1.2, side)
  return figure, figure.subplots()


def _name_both(axes: 'Axes', left: Sequence[str], below: Sequence[str]) -> None:
  """Names of classes on both axes; of too many, those that can be read, at equal distances."""
  room = 72 * _CELL * min(1, LARGEST_ANNOTATED / len(left))  # points for each class
  every = math.ceil(_SMALLEST_FONT / (0.8 * room))
  size, at = min(10, 0.8 * room * every), range(0, len(left), every)
  turn = 45 if size == 10 else 90  # upright where 45 degrees would lay one name over the next
  across = 'top' if turn == 45 else 'center'
  axes.set_xticks(at, below[::every], rotation=turn, ha='right', va=across, rotation_mode='anchor')
  axes.set_yticks(at, left[::every])
  axes.tick_params(labelsize=size)


def _matrix(axes: 'Axes', conflict: Conflict, values: np.ndarray, limit: float) -> 'AxesImage':
  """Draws [C, C] in the order of frequency; the diagonal stays white, it is 1 by definition."""
  order = conflict.by_frequency
  values = values[np.ix_(order, order)]
  axes.set_facecolor(_UNDEFINED)
  off = np.where(np.eye(len(order), dtype=bool) & ~np.isnan(values), 0, values)
  return axes.imshow(np.ma.masked_invalid(off), cmap=_COLORS, vmin=-limit, vmax=limit)


def _annotate(axes: 'Axes', conflict: Conflict, values: np.ndarray, bold: np.ndarray) -> None:
  limit = color_limit([values])
  for (i, c), (j, d) in itertools.product(enumerate(conflict.by_frequency), repeat=2):
    if c == d or np.isnan(values[c, d]):
      text, color, weight = ('' if c == d else '?'), '0.4', 'normal'
    else:
      text = f'{round(values[c, d], 2) + 0.0:.2f}'.replace('0.', '.')  # no -.00
      color = 'white' if abs(values[c, d]) > 0.6 * limit else 'black'
      weight = 'bold' if bold[c, d] else 'normal'
    axes.text(j, i, text, ha='center', va='center', fontsize=8, color=color, weight=weight)


def _class_colors(conflict: Conflict) -> list[tuple[object, int]]:
  """(color, class) from the largest class to the smallest, dark to light."""
  from matplotlib import colormaps

  order = conflict.by_frequency
  # yellow, the end of the scale, cannot be seen on white
  return [(colormaps['viridis'](0.92 * i / max(1, len(order) - 1)), c) for i, c in enumerate(order)]


def _label(conflict: Conflict, c: int) -> str:
  return _labels(conflict.class_names, conflict.class_counts, [c])[0]


def _labels(names: Sequence[Any], counts: np.ndarray | None, order: Iterable[int]) -> list[str]:
  """'name (images)', or 'name', of classes in an order; long names are cut and stay distinct."""
  cut = text_table.fit([str(name) for name in names], LONGEST_NAME)
  return [_plain(cut[c] if counts is None else f'{cut[c]} ({counts[c]})') for c in order]


def _plain(text: str) -> str:
  """A name as matplotlib draws it letter by letter: two $ would begin and end a formula."""
  return text.replace('$', r'\$')


def _legend(axes: 'Axes', classes: int) -> None:
  if classes <= LARGEST_ANNOTATED:
    axes.legend(
      fontsize=6, ncols=2 if classes > 6 else 1, loc='center left', bbox_to_anchor=(1, 0.5)
    )


def _when(conflict: Conflict) -> str:
  return f', step {conflict.about["step"]}' if 'step' in conflict.about else ''


def _percent(rate: float) -> str:
  return 'none' if np.isnan(rate) else f'{100 * rate:.0f} %'
