"""The sections of a report on what was measured: conflict, gradient flow, branches."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from csba_jax.analysis import wording
from csba_jax.analysis.conflict import FARTHEST_LOSS
from csba_jax.analysis.findings import Findings
from csba_jax.analysis.types import BranchSimilarity, Comparison, Matrix, MeanFlow
from csba_jax.report.html.blocks import Block, Figure, Fold, Section, Table, Text
from csba_jax.report.study import figures
from csba_jax.report.study import tables as tables_lib
from csba_jax.run.records import TESTED
from csba_jax.runtime import plain

_GLOSSARY = (
  'Conflict: a negative cosine between two class gradients. Head-tail conflict: the share of pairs'
  ' of a majority and a minority class in conflict. Minority interference: how much of the progress'
  ' that a minority class makes with its own gradient the other classes undo (1: all of it, and no'
  ' more is counted), mean over minority classes. Mean cosine: over all pairs of classes. Scope'
  ' shared: all parameters but the classifier head; common: those that a variant has in common with'
  ' the one without attention, the scope in which variants can be compared (of none_wide the same'
  ' layers, wider, so that its differences have no verdict). Part train or val: the images measured'
  ' on.'
)
_FROZEN = (
  ' Statistics of BatchNorm are estimated anew at every snapshot, but for the tested net (the'
  ' checkpoint whose test metrics are reported), which is measured as it was tested.'
)
_GRADIENT = {  # which gradient was measured, by the statistics of BatchNorm
  'frozen': ' The gradients are those of the net as it is used, with fixed statistics of BatchNorm,'
  ' and not those that training takes.',
  'batch': ' With BatchNorm the gradients are those that training takes, estimated from training'
  ' batches: Grams without bias, but cosines of weak gradients are noisy, and conflict rates then'
  ' near one half.',
  'none': ' Without BatchNorm the gradients are those of all images of the part, without'
  ' augmentation and without sampling error.',
}
_FIRST = ('common', 'train')  # scope and part that are shown open
_MOST_FOLDED = 24  # pairs of matrices in the details


def sections(findings: Findings) -> list[Section | None]:
  """Matrices, snapshots, flow and branches, in this order; None for what was not measured."""
  return [
    _matrices(findings),
    _snapshots(findings),
    _flow(findings),
    _branch_similarity(findings),
  ]


def _matrices(findings: Findings) -> Section | None:
  found = {(wording.base(m.cell), m.variant, m.at, m.part, m.scope): m for m in findings.matrices}
  control, treatment = figures.before_and_after(findings)
  # (rank, order, cell, before, after): the first is shown open
  pairs: list[tuple[int, int, Mapping[str, Any], Matrix | None, Matrix | None]] = []
  for cell, matrices in tables_lib.by_cell(findings.matrices, findings):
    last = wording.last([m.at for m in matrices])
    places = dict.fromkeys((m.at, m.part, m.scope) for m in matrices)
    for variant in (v for v in findings.variants if v != control) if treatment else ['']:
      for at, part, scope in places:
        before = found.get((wording.base(cell), control, at, part, scope))
        after = found.get((wording.base(cell), variant, at, part, scope))
        if (before is None and after is None) or (variant != treatment and after is None):
          continue
        # what differs in fewer ways from the open one comes first
        elsewhere = bool(pairs) and pairs[0][2] is not cell
        rank = (at != last) + (part != 'train') + (scope != 'common') + 2 * (variant != treatment)
        pairs.append((rank + elsewhere, len(pairs), cell, before, after))
  if not pairs:
    return None
  pairs.sort(key=lambda pair: pair[:2])
  anew = any(flow.at == TESTED for flow in findings.flows)  # else a note says how
  kinds = findings.about.get('statistics', ())
  glossary = _GLOSSARY + ''.join(_GRADIENT.get(kind, '') for kind in kinds)
  glossary += _FROZEN * (anew and 'frozen' in kinds)
  blocks: list[Block] = [Text(glossary, 'small'), *tables_lib.groups(findings)]
  most = _MOST_FOLDED if len(findings.class_names) <= 20 else 0
  folded = []
  for i, (_, _, _, before, after) in enumerate(pairs[: 1 + most]):
    figure = _pair_of_matrices(findings, before, after, tables=i == 0)
    if i == 0:
      blocks.append(figure)
    else:
      folded.append(Fold(tables_lib.place(findings, after or before, after or before), [figure]))
  if folded:
    shown = f'{len(folded)} of {len(pairs) - 1}' if len(pairs) - 1 > len(folded) else 'all'
    title = f'Other snapshots, parts, scopes, variants and methods ({shown})'
    blocks.append(Fold(title, folded, page_only=True))
  return Section('Conflict matrices, control and treatment', 'matrices', blocks)


def _pair_of_matrices(
  findings: Findings, before: Matrix | None, after: Matrix | None, *, tables: bool
) -> Figure:
  one = before if after is None else after
  assert one is not None
  names = [plain.clean(m.variant) for m in (before, after) if m is not None]
  units = wording.sample(m.units for m in (before, after) if m is not None)
  difference = f' and their difference {names[1]} − {names[0]}' if len(names) == 2 else ''
  caption = (
    f'Cosines of class gradients of {" and ".join(names)}{difference},'
    f' {tables_lib.place(findings, one, None)}; means over units, {units}, no intervals.'
    ' Classes are numbered from the largest to the smallest; the diagonal is 1 by definition.'
  )
  key = 'Red: negative, that is conflict; blue: positive; the difference has its own scale.'
  given = [(plain.clean(m.variant), m.cosine) for m in (before, after) if m is not None]
  if len(given) == 2:
    given.append((f'{given[1][0]} − {given[0][0]}', given[1][1] - given[0][1]))
  made = [tables_lib.matrix_table(findings, one.cell, m, f'Cosines, {name}.') for name, m in given]
  numbers = [table for table in made if table is not None] if tables else []
  return Figure(caption, lambda: figures.matrices(findings, before, after), numbers, False, key)


def _snapshots(findings: Findings) -> Section | None:
  blocks: list[Block] = []
  folded: list[Block] = []
  for cell, flows in tables_lib.by_cell(findings.flows, findings):
    for part in dict.fromkeys(flow.part for flow in flows):
      for scope in ('common', 'shared'):
        made = _curves(findings, cell, [f for f in flows if f.part == part], scope)
        main = (scope, part) == _FIRST or (scope == 'shared' and part == 'train')
        (folded if blocks or not main else blocks).extend(made)
  if findings.conflict:
    blocks += _conflict_tables(findings, folded)
  if folded:
    blocks.append(Fold('Other parts, scopes and methods', folded, page_only=True))
  return Section('Conflict over training', 'snapshots', blocks) if blocks else None


def _curves(
  findings: Findings, cell: Mapping[str, Any], flows: Sequence[MeanFlow], scope: str
) -> list[Block]:
  """The measures over the run, and at equal training loss."""
  flows = [flow for flow in flows if flow.scopes.get(scope)]
  blocks: list[Block] = []
  for matched in (False, True):
    snapshots = sorted(
      {f.at for f in flows if wording.matched(f.at) == matched}, key=wording.by_snapshot
    )
    drawn = [at for at in snapshots if at != TESTED]  # which lies somewhere before the end
    if not drawn:
      continue
    place = ', '.join(
      [*filter(None, [wording.cell(cell, findings.cells)]), f'scope {scope}, part {flows[0].part}']
    )
    over = (
      'at the first log line where the loss over the training images is at or below a level'
      if matched
      else 'over the run, from initialisation to its end'
    )
    caption = (
      f'Conflict {over}; {place}. Means over units; the intervals of the differences are below.'
    )
    rows = []
    for flow in flows:
      if flow.at in snapshots:
        values = [flow.scopes[scope].get(measure) for measure in figures.MEASURES]
        snapshot = wording.snapshot(flow.at)
        row = [
          plain.clean(flow.variant),
          snapshot,
          wording.number(flow.loss),
          *map(wording.number, values),
        ]
        rows.append(row)
    head = ['variant', 'snapshot', 'loss', *(wording.MEASURES[m] for m in figures.MEASURES)]
    caption_of_numbers = f'Conflict at each snapshot; {place}.{_losses_of(findings)}'
    numbers = Table(caption_of_numbers, head, rows, 2)
    blocks.append(
      Figure(
        caption,
        functools.partial(figures.over_snapshots, findings, flows, scope, drawn),
        [numbers],
      )
    )
  return blocks


def _losses_of(findings: Findings) -> str:
  """Whose mean a loss is; with batch statistics it is not the one that levels are read from."""
  if 'batch' not in findings.about.get('statistics', ()):
    return ''
  return (
    ' A loss is the mean over the images that are measured: with BatchNorm those of augmented'
    ' training batches, whose loss is mostly higher than that over all training images, which'
    ' decides when a level is reached.'
  )


def _conflict_tables(findings: Findings, folded: list[Block]) -> list[Block]:
  """Differences of the measures: by snapshot, scope `common` of the first condition, on train.

  What is not shown goes to `folded`.
  """
  groups: dict[tuple, list[Comparison]] = {}
  for one in findings.conflict:
    where = (one.cell.get('scope'), one.cell.get('part'), wording.base(one.cell))
    groups.setdefault(where, []).append(one)
  keys = sorted(groups, key=lambda key: (key[0] != 'common', key[1] != 'train'))
  blocks: list[Block] = []
  for i, key in enumerate(keys):
    group = groups[key]
    place = ', '.join(
      filter(
        None,
        [
          wording.cell(group[0].cell, findings.cells),
          f'scope {plain.clean(key[0])}, part {plain.clean(key[1])}',
        ],
      )
    )
    for matched in (False, True):
      rows = [c for c in group if wording.matched(wording.at(c)) == matched]
      if rows:
        (folded if i else blocks).extend(_conflict_differences(findings, rows, place, matched))
  return blocks


def _conflict_differences(
  findings: Findings, found: Sequence[Comparison], place: str, matched: bool
) -> list[Block]:
  """By measure, pair and snapshot; over the run as a figure, at equal loss as a table."""
  measures = list(dict.fromkeys(c.outcome for c in found))
  pairs = list(dict.fromkeys(map(wording.versus, found)))
  found = sorted(
    found,
    key=lambda c: (
      measures.index(c.outcome),
      pairs.index(wording.versus(c)),
      wording.by_snapshot(wording.at(c)),
    ),
  )
  estimates = [c.difference for c in found]
  where = f' ({place})' if place else ''
  caption = (
    f'Differences of conflict {"at matched training loss" if matched else "over the run"}{where},'
    f' treatment − control, paired by unit; {wording.level(estimates)}. Negative: less conflict;'
    ' of the mean cosine, positive is less.'
  )
  if matched:
    caption += (
      ' Losses: geometric means over units; undecided where they differ by more than a factor of'
      f' {FARTHEST_LOSS:g}.{_losses_of(findings)}'
    )
  table = _conflict_table(found, caption, matched)
  if matched:
    return [table, *tables_lib.reasons(estimates)]
  figure = Figure(caption, lambda: figures.differences_over_snapshots(findings, found), [table])
  return [figure, *tables_lib.reasons(estimates)]


def _conflict_table(found: Sequence[Comparison], caption: str, matched: bool) -> Table:
  judged = any(c.verdict for c in found)
  head = ['measure', 'comparison', 'snapshot', *(['losses'] * matched), 'n', 'treatment', 'control']
  head += ['difference', 'p', *(['verdict'] * judged)]
  rows = [
    [
      wording.outcome(c),
      wording.versus(c),
      wording.snapshot(wording.at(c)),
      *([' / '.join(map(wording.number, c.losses or (None, None)))] * matched),
      str(c.difference.n),
      wording.number(c.treatment_mean),
      wording.number(c.control_mean),
      wording.interval(c.difference, signed=True, limits=c.limits),
      wording.probability(c.difference.p),
      *([c.verdict or wording.NONE] * judged),
    ]
    for c in found
  ]
  return Table(caption, head, rows, 3 + matched)


def _flow(findings: Findings) -> Section | None:
  blocks: list[Block] = []
  folded: list[Block] = []
  for cell, flows in tables_lib.by_cell(findings.flows, findings):
    made = _flow_figures(findings, _at_the_end(flows))
    if blocks:
      folded.append(Fold(wording.cell(cell, findings.cells), made))
    else:
      blocks += made
  return Section('Gradient flow', 'flow', [*blocks, *folded]) if blocks else None


def _flow_figures(findings: Findings, flows: Sequence[MeanFlow]) -> list[Block]:
  place = tables_lib.place(findings, flows[0], None)
  labels = figures.class_labels(findings, flows[0].cell)
  variants = [plain.clean(flow.variant) for flow in flows]
  texts = {
    'norms': 'Norm of each class gradient in the scope shared',
    'shares': 'Share of each class in the batch gradient (prior times inner product with it, over'
    ' its squared norm; the shares of a run add up to 1 and have no bound, and runs whose estimate'
    ' of the squared norm is not above 0 are left out)',
  }
  blocks: list[Block] = []
  for what, text in texts.items():
    rows = [
      [label, *(wording.number(getattr(flow, what)[c]) for flow in flows)]
      for label, c in zip(labels, figures.order(findings, flows[0].cell), strict=True)
    ]
    caption = f'{text}; {place}. Means over units, without intervals.'
    numbers = Table(f'{text}; {place}.', ['class (training images)', *variants], rows)
    blocks.append(
      Figure(caption, functools.partial(figures.by_class, findings, flows, what), [numbers])
    )
  scopes = list(dict.fromkeys(scope for flow in flows for scope in flow.scopes))
  if scopes:
    text = f'Head-tail conflict in each stage and each branch; {place}'
    rows = [
      [
        plain.clean(scope),
        *(wording.number(flow.scopes.get(scope, {}).get('head_tail_conflict')) for flow in flows),
      ]
      for scope in scopes
    ]
    numbers = Table(f'{text}.', ['scope', *variants], rows)
    caption = f'{text}. Means over units, without intervals.'
    blocks.append(Figure(caption, lambda: figures.by_scope(findings, flows), [numbers]))
  return blocks


def _branch_similarity(findings: Findings) -> Section | None:
  blocks: list[Block] = []
  texts = {
    'cka': 'Similarity of the branches: debiased linear CKA of two branches’ pooled features (after'
    ' the gates, where there are any), mean over pairs of branches; 1: the same up to rotation and'
    ' scale, 0: unrelated',
    'gate_spread': 'Spread of the gates: standard deviation over classes of the mean gate, mean'
    ' over channels; 0: the gates do not depend on the class',
  }
  for cell, found in tables_lib.by_cell(findings.branch_similarity, findings):
    shown = _at_the_end(found)
    made: list[Block] = []
    for what, text in texts.items():
      given = [(one, one.cka if what == 'cka' else one.gate_spread) for one in shown]
      names = list(dict.fromkeys(name for _, values in given for name in values))
      given = [(one, values) for one, values in given if values]
      if not names:
        continue
      rows = [
        [plain.clean(name), *(wording.number(values.get(name)) for _, values in given)]
        for name in names
      ]
      place = tables_lib.place(findings, shown[0], None)
      head = ['block', *(plain.clean(one.variant) for one, _ in given)]
      made.append(
        Figure(
          f'{text}; {place}. Means over units, without intervals.',
          functools.partial(figures.by_block, findings, shown, what),
          [Table(f'{text}; {place}.', head, rows)],
        )
      )
    made += [
      Fold(f'Mean gates by class, {one.variant}', [_gates(findings, one)])
      for one in shown
      if one.gates
    ]
    if made and blocks:
      blocks.append(Fold(wording.cell(cell, findings.cells), made))
    else:
      blocks += made
  if findings.similarity_differences:
    caption = (
      'CKA of the branches, treatment − control, paired by unit; end of the run, training images.'
      ' Negative: the branches are less alike, to which gates may contribute by themselves.'
    )
    table = tables_lib.comparison_table(
      findings, findings.similarity_differences, caption, outcome=True
    )
    reasons = tables_lib.reasons([c.difference for c in findings.similarity_differences])
    blocks.append(Fold('Differences of the similarity', [table, *reasons]))
  return Section('Similarity of the branches', 'branches', blocks) if blocks else None


def _gates(findings: Findings, one: BranchSimilarity) -> Table:
  """A row for each branch of each block, a column for each class."""
  place = tables_lib.place(findings, one, None)
  caption = (
    f'Mean gate of each branch over the images of a class and all channels, {place}; means over'
    ' units. Of csba_class the block head: what logit c lets through of images of class c.'
  )
  order = figures.order(findings, one.cell)
  head = ['block, branch', *(plain.clean(findings.class_names[c]) for c in order)]
  rows = [
    [f'{plain.clean(block)}, {branch}', *(wording.number(values[c]) for c in order)]
    for block, gates in one.gates.items()
    for branch, values in enumerate(gates, 1)
  ]
  return Table(caption, head, rows)


def _at_the_end(found: Sequence[Any]) -> list:
  """Of what was measured at several snapshots: the last, on training images if there are any."""
  part = min({one.part for one in found}, key=lambda part: (part != 'train', part))
  at = wording.last([one.at for one in found if one.part == part])
  return [one for one in found if (one.at, one.part) == (at, part)]
