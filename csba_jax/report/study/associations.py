"""The sections of a report on what goes with what: conflict, F1, confusion; noise and leaks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from csba_jax.analysis import wording
from csba_jax.analysis.conflict import SMALLEST_CORRELATION
from csba_jax.analysis.findings import Findings
from csba_jax.analysis.imbalance import AXIS as FACTOR
from csba_jax.analysis.imbalance import ratio
from csba_jax.analysis.types import Comparison, Link, SizeGuide
from csba_jax.report.html.blocks import Block, Figure, Fold, Section, Table, Text
from csba_jax.report.study import figures, tables
from csba_jax.runtime import plain


def sections(findings: Findings) -> list[Section | None]:
  """Links, sizes, imbalance, Mantel tests, noise floor and leak; None for what has no numbers."""
  parts = (_links, _size_guide, _imbalance, _mantel, _noise, _leak)
  return [part(findings) for part in parts]


def _links(findings: Findings) -> Section | None:
  if not findings.links:
    return None
  blocks: list[Block] = []
  drawn = [link for link in findings.links if link.verdict] or findings.links
  for i, link in enumerate(drawn):
    where = wording.cell(link.cell, findings.cells)
    pair = f'{plain.clean(link.treatment)} against {plain.clean(link.control)}'
    name = f'{pair}, {where}' if where else pair
    figure = _link(findings, link, name)
    blocks.append(figure if i == 0 else Fold(f'{plain.clean(link.measure)}: {name}', [figure]))
  several = len({wording.cell(link.cell, findings.cells) for link in findings.links}) > 1
  beside = any(link.uncorrected is not None for link in findings.links)
  head = [
    *(['condition'] * several),
    'comparison',
    'reduction of',
    'n',
    'within class',
    'p',
    'across classes',
    'p (across)',
    'verdict',
    *(['uncorrected', 'p (uncorrected)'] * beside),
  ]
  rows = [
    [
      *([wording.cell(link.cell, findings.cells)] * several),
      _pair(link),
      plain.clean(link.measure),
      str(link.within.n),
      wording.interval(link.within, 2, signed=True, limits=(SMALLEST_CORRELATION,)),
      wording.probability(link.within.p),
      wording.interval(link.across, 2, signed=True),
      wording.probability(link.across.p),
      link.verdict or wording.NONE,
      *(_uncorrected(link) * beside),
    ]
    for link in findings.links
  ]
  estimates = [e for link in findings.links for e in (link.within, link.across)]
  caption = (
    'Does less conflict go with more F1? Within class: correlation over units, mean over classes;'
    ' the size of a class cannot explain it. Across classes: correlation of the means over units.'
    ' Only rows with a verdict enter a claim. Rows within a variant: less conflict against more F1'
    ' among runs of one net, where no treatment is involved. p is not corrected for the number of'
    ' rows.'
    f' Method: {wording.methods(estimates)}.'
  )
  if beside:
    caption += (
      ' Uncorrected: within class, as if units shared no images, p from permuted units; it decides'
      ' nothing.'
    )
  table = Table(caption, head, rows, 2 + several)
  blocks = [blocks[0], table, *tables.reasons(estimates), *blocks[1:]]
  return Section('Conflict reduction and F1 gain', 'links', blocks)


def _uncorrected(link: Link) -> list[str]:
  """Interval and p of a link as if units were independent."""
  if link.uncorrected is None:
    return [wording.NONE] * 2
  ends = wording.ends(link.uncorrected, 2, signed=True, limits=(SMALLEST_CORRELATION,))
  return [ends, wording.probability(link.uncorrected.p)]


def _pair(link: Link) -> str:
  if link.treatment == link.control:
    return f'within {plain.clean(link.treatment)}'
  return f'{plain.clean(link.treatment)} − {plain.clean(link.control)}'


def _link(findings: Findings, link: Link, name: str) -> Figure:
  counts = np.asarray(link.reduction).shape
  caption = (
    f'Reduction of {plain.clean(link.measure)} against gain of F1, {name}: a point for each unit'
    f' and class ({counts[0]} units, {counts[1]} classes), colours from the largest class to the'
    f' smallest. Correlation within class {wording.interval(link.within, 2, signed=True)},'
    f' p {wording.probability(link.within.p)}, {100 * link.within.level:g} % interval,'
    f' {wording.sample([link.within.n])}.'
  )
  return Figure(caption, lambda: figures.link(findings, link))


def _size_guide(findings: Findings) -> Section | None:
  if not findings.size_guides:
    return None
  text = Text(
    f'Conflict (common parameters, training images) of nets that differ in width and depth alone,'
    f' against {plain.clean(findings.outcome)}: does the net with less conflict do better, and'
    ' can this be seen early in training?'
  )
  head = ['variant', 'measure', 'snapshot', 'sizes', 'correlation', 'p']
  rows = [
    [
      plain.clean(d.variant),
      wording.metric(d.measure),
      wording.snapshot(d.at),
      str(d.correlation.n),
      wording.number(d.correlation.value, 2, signed=True),
      wording.probability(d.correlation.p),
    ]
    for d in findings.size_guides
  ]
  caption = (
    'Rank correlation over sizes; p from permuted sizes, not corrected for their number.'
    f' Method: {wording.methods([d.correlation for d in findings.size_guides])}.'
  )
  blocks: list[Block] = [text, Table(caption, head, rows, 3)]
  for variant in dict.fromkeys(d.variant for d in findings.size_guides):
    blocks.append(_sizes(findings, [d for d in findings.size_guides if d.variant == variant]))
  return Section('Conflict as a guide to depth and width', 'size-guide', blocks)


def _sizes(findings: Findings, guides: Sequence[SizeGuide]) -> Table:
  """Conflict by snapshot and the outcome of each size of one variant."""
  shown = [d for d in guides if d.measure == 'head_tail_conflict']
  head = [
    'size',
    *(f'conflict, {wording.snapshot(d.at)}' for d in shown),
    plain.clean(findings.outcome),
  ]
  rows = [
    [
      wording.cell(cell, findings.cells),
      *(wording.number(d.conflict[i]) for d in shown),
      wording.number(shown[0].outcome[i]),
    ]
    for i, cell in enumerate(shown[0].cells)
  ]
  return Table(
    f'{plain.clean(shown[0].variant)}: head-tail conflict; means over units.', head, rows
  )


def _imbalance(findings: Findings) -> Section | None:
  """Differences at each imbalance factor, and how they change with it."""
  found = findings.trends
  if not found:
    return None
  text = Text(
    'Does an effect grow or shrink with the imbalance? Differences of'
    f' {plain.clean(findings.outcome)}, treatment − control, at each imbalance factor. The ratio is'
    ' that of the training images of the largest class to those of the smallest: a factor of 1'
    ' leaves the images as they are.'
  )
  figures_of = [
    _by_factor(findings, dict(cell)) for cell in dict.fromkeys(tuple(c.cell.items()) for c in found)
  ]
  return Section('Effect against imbalance', 'imbalance', [text, *figures_of, *_slopes(findings)])


def _by_factor(findings: Findings, cell: Mapping[str, Any]) -> Figure:
  """The differences of one condition, a row for each imbalance factor."""
  cells = [c.cell for c in findings.trends]
  pairs = {(c.treatment, c.control) for c in findings.trends if c.cell == cell}
  here = [
    c
    for c in findings.comparisons
    if (c.treatment, c.control) in pairs and cell.items() <= c.cell.items()
  ]
  here.sort(key=lambda c: c.cell[FACTOR])
  where = wording.cell(cell, cells)
  outcome = plain.clean(findings.outcome)
  title = f'Differences of {outcome} by imbalance{f", {where}" * bool(where)}'
  caption = f'{title}; {wording.level(c.difference for c in here)}.'
  rows = [
    [
      wording.value(c.cell[FACTOR]),
      f'{ratio(findings.counts_in(c.cell)):.3g}',
      wording.versus(c),
      wording.interval(c.difference, signed=True, limits=c.limits),
    ]
    for c in here
  ]
  table = Table(caption, ['imbalance factor', 'ratio', 'comparison', 'difference'], rows, 3)
  return Figure(
    caption,
    lambda: figures.over_factors(findings, here, title=title, axis=f'difference of {outcome}'),
    [table],
  )


def _slopes(findings: Findings) -> list[Block]:
  """The change of each difference while the imbalance grows tenfold."""
  found = findings.trends
  cells = [c.cell for c in found]
  estimates = [c.difference for c in found]
  several = len({wording.cell(cell, cells) for cell in cells}) > 1
  beside = [c.uncorrected for c in found if c.uncorrected is not None]
  caption = (
    f'Change of the difference of {plain.clean(findings.outcome)} while the ratio grows tenfold:'
    ' the slope of a line over its logarithm, fitted by least squares to each unit, in the mean'
    ' over units that have every factor. p is not corrected for the number of rows. Where each'
    ' factor has a learning rate of its own, that is a part of the change.'
    f' {wording.level(estimates)}.'
  )
  head = [
    *(['condition'] * several),
    'comparison',
    'n',
    'change',
    'p',
    *(['uncorrected interval'] * bool(beside)),
  ]
  rows = [
    [
      *([wording.cell(c.cell, cells)] * several),
      wording.versus(c),
      str(c.difference.n),
      wording.interval(c.difference, signed=True),
      wording.probability(c.difference.p),
      *([wording.ends(c.uncorrected, signed=True)] * bool(beside)),
    ]
    for c in found
  ]
  how = Text(f'Intervals and tests: {wording.methods(estimates)}.', 'small')
  return [Table(caption, head, rows, 1 + several), *tables.reasons(estimates), how]


def _mantel(findings: Findings) -> Section | None:
  if not findings.mantel:
    return None
  rows = [
    [
      plain.clean(name),
      str(e.n),
      wording.number(e.value, 2, signed=True),
      wording.probability(e.p),
      wording.probability(adjusted),
    ]
    for name, e, adjusted in findings.mantel
  ]
  estimates = [e for _, e, _ in findings.mantel]
  caption = (
    'Mantel tests: correlation of two class-by-class matrices over the pairs of classes; p from'
    ' permuted classes, no intervals; n counts classes. p (Holm) is adjusted over the tests of the'
    ' same question. Confusion is set beside the conflict of the net that was tested, where that'
    f' was measured. Method: {wording.methods(estimates)}.'
  )
  table = Table(caption, ['matrices', 'n', 'correlation', 'p', 'p (Holm)'], rows)
  return Section('Are the matrices alike?', 'mantel', [table])


def _noise(findings: Findings) -> Section | None:
  text = (
    'A variant against itself: one half of its units is compared with the other half. Chance alone'
    ' makes differences of this size.'
  )
  return _contrast(findings, findings.noise, 'Noise floor', 'noise', text)


def _leak(findings: Findings) -> Section | None:
  text = (
    'Leak between training and test images: the naive split against folds that keep the images of'
    ' one group together (treatment: naive, control: grouped). A difference whose interval lies'
    ' above 0 shows that the naive split makes a net look better than it is.'
  )
  title = 'Naive split against grouped folds'
  return _contrast(findings, findings.leak, title, 'leak', text)


def _contrast(
  findings: Findings, found: Sequence[Comparison], title: str, anchor: str, text: str
) -> Section | None:
  if not found:
    return None
  estimates = [c.difference for c in found]
  names = ' and of '.join(dict.fromkeys(map(wording.outcome, found)))
  figure = Figure(
    f'Difference of {names}; {wording.level(estimates)}.',
    lambda: figures.by_outcome(found, findings.cells, title=title),
  )
  table = tables.comparison_table(findings, found, f'{title}.', outcome=True)
  how = Text(f'Intervals and tests: {wording.methods(estimates)}.', 'small')
  return Section(title, anchor, [Text(text), figure, table, *tables.reasons(estimates), how])
