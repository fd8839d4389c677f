"""Figures of conflict and gradient flow, as PNG, PDF or SVG, each written whole or not at all."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from csba_jax.data.class_counts import by_frequency
from csba_jax.errors import UserError
from csba_jax.gradients import blocks, drawing
from csba_jax.gradients.conflict import Conflict, conflict_matrix
from csba_jax.gradients.flow import Flow

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

WIDEST = 24.0  # inches of a picture with one group of bars for each class
SMALLEST_LABEL = 4.0  # points


def heat_map(conflict: Conflict, path: str | os.PathLike, scope: str = 'shared') -> None:
  """The conflict matrix of one scope, classes by frequency, with their training images on the axes.

  Where there is a sampling error, bold numbers are distinguishable from 0. Grey: not resolvable.
  """
  drawing.check(conflict)
  cosines = np.where(conflict.resolvable(scope), conflict.cosine(scope), np.nan)
  known = conflict.distinguishable(scope) & conflict.errors.any()
  figure, axes = drawing.square_figure(conflict, cosines, known, 'cosine of class gradients')
  bold = ', bold: 95 % interval without 0' if conflict.errors.any() else ''
  title = f'Conflict matrix, {drawing.shown(scope)}{drawing.when(conflict)}'
  target = drawing.shown(str(conflict.about.get('target', 'not stated')))
  axes.set_title(f'{title}\ntarget {target}{bold}')
  drawing.save(figure, path)


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
  drawing.check(treated, control)
  if treated.class_names != control.class_names:
    raise UserError('two nets for the same classes', 'other classes', 'compare runs on one set')
  cosines, reference = (
    conflict_matrix(np.sum([found.gram(layer) for layer in layers], axis=0))
    for found in (treated, control)
  )
  change = cosines - reference
  bold = np.zeros_like(change, bool)
  figure, axes = drawing.square_figure(control, change, bold, 'difference of cosines')
  nets = drawing.plain(
    ' - '.join(str(found.about.get('attention', '?')) for found in (treated, control))
  )
  axes.set_title(f'Conflict matrix, {nets}\nlayers that both have')
  drawing.save(figure, path)


def class_f1(results: Mapping[str, Mapping[str, Any]], path: str | os.PathLike) -> None:
  """F1 on the test part by class, with one bar for each run; classes by training images.

  Args:
    results: {title: content of result.json}, all of the same classes.
    path: of the PNG.
  """
  first = next(iter(results.values()))
  counts = np.asarray(first['class_counts'])
  order = by_frequency(counts)
  crowded = 0.7 * len(order) + 2 > WIDEST
  figure = drawing.new_figure(min(max(6, 0.7 * len(order) + 2), WIDEST), 4)
  axes = figure.subplots()
  wide = 0.8 / len(results)
  for i, (title, result) in enumerate(results.items()):
    f1 = np.array(result['per_class']['f1'], np.float64)[order]  # null, undefined: no bar
    axes.bar(np.arange(len(order)) - 0.4 + (i + 0.5) * wide, f1, wide, label=drawing.plain(title))
  labels = drawing.class_labels(first['class_names'], counts, order)
  room = 0.7 * 72 * WIDEST / len(order)  # points for the label of each class
  every = math.ceil(SMALLEST_LABEL / room)  # of many classes some are named
  slanted: dict[str, Any] = {'rotation': 45, 'ha': 'right', 'rotation_mode': 'anchor'}
  upright: dict[str, Any] = {'rotation': 90, 'fontsize': min(8.0, every * room)}
  axes.set_xticks(range(0, len(order), every), labels[::every], **(upright if crowded else slanted))
  axes.set_xlim(-0.6, len(order) - 0.4)
  axes.set_ylim(0, 1)
  axes.set_ylabel('F1 on the test part')
  axes.set_xlabel('class (training images)')
  axes.grid(axis='y', alpha=0.3)
  axes.legend(loc='center left', bbox_to_anchor=(1, 0.5))
  drawing.save(figure, path)


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
  figure, axes = drawing.square_axes(len(order))
  axes.set_facecolor(drawing.UNDEFINED)
  image = axes.imshow(np.ma.masked_invalid(shares), cmap='Blues', vmin=0, vmax=1)
  tested = drawing.class_labels(result['class_names'], total[np.argsort(order), 0], order)
  drawing.name_both(axes, tested, drawing.class_labels(result['class_names'], None, order))
  axes.set_ylabel('true class (images)')
  axes.set_xlabel('predicted class')
  if len(order) <= drawing.LARGEST_ANNOTATED:
    for (i, j), n in np.ndenumerate(counts):
      if n:
        color = 'white' if shares[i, j] > 0.6 else 'black'
        axes.text(j, i, f'{n}', ha='center', va='center', fontsize=8, color=color)
  figure.colorbar(image, ax=axes, shrink=0.8, label='share of the true class')
  axes.set_title(f'Confusion matrix, {part} part, {counts.sum()} images')
  drawing.save(figure, path)


def layers(conflict: Conflict, path: str | os.PathLike) -> None:
  """One small conflict matrix for each layer, all with the same scale of colours.

  Classes are named at the left and at the bottom, by frequency; of many classes, a few.
  """
  drawing.check(conflict)
  names = conflict.layers
  wide = min(8, math.ceil(math.sqrt(1.6 * len(names))))
  columns = min((wide, wide - 1), key=lambda number: -len(names) % max(1, number))
  columns = max(1, columns)
  rows = math.ceil(len(names) / columns)
  side = 2.2 if len(names) <= 8 else 1.5  # inches
  figure = drawing.new_figure((side + 0.1) * columns + 2.2, (side + 0.45) * rows + 1.6)
  grid = figure.subplots(rows, columns, squeeze=False)
  limit = drawing.color_limit(conflict.cosine(name) for name in names)
  named = _named_ranks(len(conflict.class_names), 12 if side < 2 else drawing.LARGEST_ANNOTATED)
  labels = [drawing.class_label(conflict, conflict.by_frequency[rank]) for rank in named]
  for axes in grid.flat[len(names) :]:
    axes.set_axis_off()
  for i, (axes, name) in enumerate(zip(grid.flat, names, strict=False)):
    image = drawing.draw_matrix(axes, conflict, conflict.cosine(name), limit)
    axes.set_xticks(named, labels if i // columns == rows - 1 else [], rotation=90, fontsize=5.5)
    axes.set_yticks(named, labels if i % columns == 0 else [], fontsize=5.5)
    axes.tick_params(length=2, width=0.5)
    rate = conflict.summary(name)['conflict_rate']
    title = [drawing.shown(line) for line in blocks.wrap(name, int(15 * side))]
    axes.set_title('\n'.join([*title, f'{drawing.percent(rate)} in conflict']), fontsize=6.5)
  bar = figure.colorbar(image, ax=grid, shrink=min(1, 3 / rows), label='cosine of class gradients')
  bar.ax.tick_params(labelsize=7)
  figure.suptitle(
    f'Conflict by layer{drawing.when(conflict)}: share of pairs in conflict', fontsize=10
  )
  drawing.save(figure, path)


def gradient_flow(conflict: Conflict, flow: Flow, path: str | os.PathLike) -> None:
  """How each class moves each layer: norm, share of the batch gradient and cosine with it.

  A line is a layer, a group of lines a block of the net. In each line the classes stand from the
  largest at the top to the smallest at the bottom.
  """
  drawing.check(conflict)
  if not isinstance(flow, Flow) or flow.scopes != conflict.scopes:
    found = 'one of other scopes' if isinstance(flow, Flow) else type(flow).__name__
    raise UserError('the flow of this conflict', found, 'pass flow(conflict)')
  groups = blocks.blocks(conflict.layers)
  each = min(0.5, max(0.17, 9 / len(conflict.layers)))  # inches of a layer
  figure = drawing.new_figure(11, each * len(conflict.layers) + 0.3 * len(groups) + 1.9)
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
      [drawing.shown(blocks.within(conflict.layers[i], block), 36) for i in members],
      fontsize=7,
    )
    row[0].set_title(drawing.shown(block, 60), loc='left', fontsize=8, weight='bold', pad=3)
  for axes, label in zip(grid[-1], _FLOW_LABELS, strict=True):
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(axis='x', labelsize=7)
  of_layers = slice(first, None)
  for column, values in ((0, flow.norms), (3, np.stack([flow.norm_ratio, flow.pull_ratio], 1))):
    if np.nanmax(values[of_layers], initial=0) > 0:
      _set_log([*grid[:, column]], values[of_layers])
  _flow_legends(figure, grid, conflict)
  figure.suptitle(f'Gradient flow by layer{drawing.when(conflict)}', fontsize=11)
  drawing.save(figure, path)


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
  colors, order = zip(*drawing.class_colors(conflict), strict=True)
  classes = len(order)
  rise = np.linspace(-0.34, 0.34, classes) if classes > 1 else np.zeros(1)
  size = 3.5 if classes <= drawing.LARGEST_ANNOTATED else 1.3
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

  colors = drawing.class_colors(conflict)
  marks = [
    Line2D([], [], marker=marker, ls='', ms=4, mew=0, color=color, label=label)
    for label, marker, color in _RATIOS
  ]
  ratios = {'handles': marks, 'title': _FLOW_LABELS[3], 'fontsize': 7, 'title_fontsize': 7}
  if len(colors) <= drawing.LARGEST_ANNOTATED:
    dots = [
      Line2D(
        [], [], marker='o', ls='', ms=4, mew=0, color=color, label=drawing.class_label(conflict, c)
      )
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
    bar.set_ticks(
      named, labels=[drawing.class_label(conflict, colors[rank][1]) for rank in named], fontsize=6
    )
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
  drawing.check(*snapshots)
  figure = drawing.new_figure(8, 9)
  top, middle, bottom = figure.subplots(3, 1, sharex=True)
  summaries = [snapshot.summary() for snapshot in snapshots]
  for name, label in (('conflict_rate', 'all pairs'), ('head_tail_conflict', 'majority-minority')):
    top.plot(steps, [summary[name] for summary in summaries], 'o-', ms=3, label=label)
  top.set_ylabel('conflict rate, shared')
  top.set_ylim(-0.02, 1.02)
  top.legend(fontsize=7)
  conflict, shared = snapshots[-1], snapshots[-1].at('shared')
  for color, c in drawing.class_colors(conflict):
    norms = [flow.norms[shared, c] for flow in flows]
    middle.plot(steps, norms, 'o-', ms=3, lw=1, color=color, label=drawing.class_label(conflict, c))
  middle.set_ylabel(r'$|g_c|$, shared')
  middle.set_yscale('log')
  drawing.legend(middle, len(conflict.class_names))
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
  drawing.save(figure, path)
