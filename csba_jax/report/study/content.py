"""The content of a study's report, section by section; measurements.py and associations.py help."""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from csba_jax.analysis import wording
from csba_jax.analysis.findings import Findings
from csba_jax.analysis.types import REFUTED, SUPPORTED, UNDECIDED, Comparison, Score
from csba_jax.report.html.blocks import (
  Block,
  Code,
  Figure,
  Finding,
  Fold,
  Items,
  Section,
  Table,
  Text,
  Verdict,
)
from csba_jax.report.study import associations, figures, measurements
from csba_jax.report.study import tables as tables_lib
from csba_jax.runtime import plain

FOREST = 'forest.svg'  # the picture of the summary, in a file of its own for Markdown
_KNOWN = (
  *('runs', 'failed', 'seconds', 'devices', 'commits', 'commands', 'versions', 'config'),
  'statistics',  # of BatchNorm: it stands beside the matrices
)


def title(findings: Findings) -> str:
  """The heading of the whole report, with the name of the study."""
  return f'Study {plain.clean(findings.name)}'


def question(findings: Findings) -> str:
  """What the study asks, its primary outcome, how variants are paired, what never varies."""
  outcome = wording.metric(findings.outcome)
  common = wording.constant(findings.cells)
  held = f' The same in all runs: {common}.' if common else ''
  asked = (
    'Does Class-Specific Branch Attention (CSBA) classify long-tailed data better than networks'
    ' without it, and does it do so because it reduces the conflict between the gradients of the'
    ' classes?'
  )
  if _own_pairs(findings):
    pairs = [f'{plain.clean(t)} with {plain.clean(c)}' for t, c in findings.pairs]
    asked = (
      f'This study compares pairs of variants of its own: {"; ".join(pairs)}. The first pair'
      ' decides every link of the argument below.'
    )
  what = 'variants'
  if findings.method_pairs:
    names = '; '.join(dict.fromkeys(map(wording.versus, findings.method_pairs)))
    compared = f'Methods are compared within each variant: {names}.'
    alone = not findings.claims  # nothing about CSBA is asked then
    asked = compared if alone else f'{asked} {compared}'
    what = 'methods' if alone else 'variants, or two methods,'
  return (
    f'{asked} Primary outcome: {outcome} on the test images. Two {what} are compared in runs of'
    f' the same split, repeat, fold and seed.{held}'
  )


def _own_pairs(findings: Findings) -> bool:
  return bool(findings.about.get('config', {}).get('pairs'))


def sections(findings: Findings) -> list[Section]:
  """Everything after the title and the question; what a study has no numbers for is left out."""
  made = [
    _summary(findings),
    _notes(findings),
    _scores(findings),
    _differences(findings),
    _method_pairs(findings),
    _offsets(findings),
    _classes(findings),
    *measurements.sections(findings),
    *associations.sections(findings),
    _confusions(findings),
    _making(findings),
  ]
  return [section for section in made if section is not None and section.blocks]


def _summary(findings: Findings) -> Section:
  """A sentence for each link and each pair of methods, a picture, and the rest folded away."""
  # overall first, the others in the order of the argument
  claims = sorted(findings.claims, key=lambda claim: 'overall' not in claim.title.lower())
  blocks: list[Block] = [Finding(c.verdict, plain.clean(c.plain)) for c in claims if c.plain]
  if forest := _forest(findings):
    blocks.append(forest)
  blocks += [Finding(c.verdict, _gain(findings, c)) for c in findings.method_pairs if c.verdict]
  if not claims:  # else they are among the sentences of the last one
    blocks += [Text(f'Caution: {plain.clean(caution)}.', 'small') for caution in findings.cautions]
  behind = [
    Verdict(plain.clean(c.title), c.verdict, [plain.clean(s) for s in c.sentences]) for c in claims
  ]
  if behind:
    blocks.append(Fold('Every comparison behind these verdicts', behind))
  return Section('Summary', 'summary', blocks)


def _gain(findings: Findings, c: Comparison) -> str:
  """A sentence on two methods, for a reader who knows no statistics."""
  cells = [one.cell for one in findings.method_pairs]
  where = wording.cell(c.cell, cells)
  start, gives = {
    SUPPORTED: ('There is evidence that', 'gives'),
    REFUTED: ('There is evidence that', 'does not give'),
    UNDECIDED: ('It is open whether', 'gives'),
  }[c.verdict]
  smallest = tables_lib.setting(findings, 'smallest_effect')
  by = f', by {smallest:g} or more,' if c.verdict == REFUTED and smallest else ''
  return (
    f'{start} {wording.axis(c.treatment)} {gives} a higher {wording.outcome(c)}{by} than '
    f'{wording.axis(c.control)}{f" ({where})" * bool(where)}: difference '
    f'{wording.number(c.difference.value, signed=True)}, {wording.within(c.difference, c.limits)}.'
  )


def _forest(findings: Findings) -> Figure | None:
  """The family of primary comparisons in one picture; None without any."""
  found = [c for c in findings.comparisons if c.verdict]
  if not found:
    return None
  outcome = wording.metric(findings.outcome)
  smallest = tables_lib.setting(findings, 'smallest_effect')
  shade = f' Shaded: differences smaller than {smallest:g}, too small to matter.'
  caption = (
    f'Primary differences of {outcome}, treatment − control, with their intervals;'
    f' {wording.level(c.difference for c in found)}. Right of the line at 0 the treatment is'
    f' better.{shade * bool(smallest)}'
  )
  title = f'Primary differences of {outcome}'
  return Figure(
    caption,
    lambda: figures.forest(found, title=title, axis=f'difference of {outcome}', band=smallest),
    file=FOREST,
  )


def _notes(findings: Findings) -> Section:
  notes = [plain.clean(note) for note in findings.notes]
  return Section('Notes', 'notes', [Items(notes, 'note')] if notes else [])


def _scores(findings: Findings) -> Section | None:
  if not findings.scores:
    return None
  names = list(dict.fromkeys(name for score in findings.scores for name in score.metrics))
  several = len(findings.cells) > 1
  head = [*(['condition'] * several), 'variant', 'parameters', 'n', *map(wording.metric, names)]
  rows, estimates = [], []
  for score in findings.scores:
    found = [score.metrics.get(name) for name in names]
    known = [estimate for estimate in found if estimate is not None]
    estimates += known
    rows.append(
      [
        *([wording.cell(score.cell, findings.cells)] * several),
        plain.clean(score.variant),
        wording.integer(score.parameters),
        str(max((e.n for e in known), default=0)),
        *(wording.NONE if e is None else wording.interval(e) for e in found),
      ]
    )
  caption = (
    f'Test metrics of each variant: mean over units [interval]; {wording.level(estimates)}.'
    ' n counts units, that is runs of different seeds or folds. Here and below, intervals are cut'
    ' to what the number can be: a metric from 0 to 1, a difference of two from −1 to 1.'
  )
  table = Table(caption, head, rows, 1 + several)
  groups = Text(
    'Head (tail) F1: mean F1 of the majority (minority) classes. Majority: the classes of more than'
    ' 100 training images; minority: the others. Where one of them would be empty: the largest and'
    ' the smallest third of the classes.',
    'small',
  )
  own = [
    f'{wording.axis(name)}: {", ".join(f"{field} = {value}" for field, value in changes.items())}'
    for name, changes in findings.methods.items()
  ]
  blocks = [table, *tables_lib.reasons(estimates), groups, *tables_lib.groups(findings)]
  if own:
    blocks.append(Text('Methods of this study alone, and what they set:', 'small'))
    blocks.append(Items(own, 'small'))
  return Section('Scores', 'scores', blocks)


def _differences(findings: Findings) -> Section | None:
  if not findings.comparisons:
    return None
  found = findings.comparisons
  estimates = [c.difference for c in found]
  smallest = tables_lib.setting(findings, 'smallest_effect')
  band = f'Shaded: effects smaller than {smallest:g}, too small to matter.' if smallest else ''
  outcome = wording.metric(findings.outcome)
  figure = Figure(
    f'Difference of {outcome}, treatment − control, paired by unit; {wording.level(estimates)}.'
    ' Right of the zero line the treatment is better.',
    lambda: figures.contrasts(
      found,
      findings.cells,
      title=f'Paired differences of {outcome} with intervals',
      axis=f'difference of {outcome}',
      band=smallest,
    ),
    key=band,
  )
  family = (
    'those of the pairs that the study declares'
    if _own_pairs(findings)
    else 'those of CSBA with the network without attention and with the wider one'
  )
  text = (
    f'p (Holm) is adjusted over the family of primary comparisons, {family};'
    f' {wording.NONE}: not of the family, or no test.'
  )
  caption = f'Paired differences of {outcome}. {text}'
  table = tables_lib.comparison_table(findings, found, caption, adjusted=True)
  how = Text(f'Intervals and tests: {wording.methods(estimates)}.', 'small')
  return Section(
    'Paired differences', 'differences', [figure, table, *tables_lib.reasons(estimates), how]
  )


def _method_pairs(findings: Findings) -> Section | None:
  """Methods against methods in one variant: the family, then what stands beside it."""
  found = findings.method_pairs
  if not found:
    return None
  family, others = [c for c in found if c.verdict], [c for c in found if not c.verdict]
  estimates, cells = [c.difference for c in family], [c.cell for c in family]
  smallest = tables_lib.setting(findings, 'smallest_effect')
  outcome = wording.metric(findings.outcome)
  figure = Figure(
    f'Difference of {outcome}, method − its control, in runs of one variant, paired by unit;'
    f' {wording.level(estimates)}. Right of the zero line the method is better.',
    lambda: figures.contrasts(
      family,
      cells,
      title=f'Paired differences of {outcome} between methods, with intervals',
      axis=f'difference of {outcome}',
      band=smallest,
    ),
    key=f'Shaded: effects smaller than {smallest:g}, too small to matter.' if smallest else '',
  )
  caption = (
    f'Paired differences of {outcome} between methods. p (Holm) is adjusted over the rows of this'
    ' table. Time: the median seconds of a run with the method by those with its control; runs also'
    ' measure and validate, and may have shared their cores with other work.'
  )
  table = tables_lib.comparison_table(findings, family, caption, adjusted=True, cells=cells)
  blocks: list[Block] = [figure, table, *tables_lib.reasons(estimates)]
  if others:
    caption = (
      'Other outcomes of the same pairs, without verdicts. Few-shot accuracy: the mean accuracy of'
      ' the classes of fewer than 20 training images. Conflict: at the end of the run, of the'
      ' shared parameters, on training images; losses: of method and control on the images that'
      ' are measured, geometric means. How far a run has come changes conflict: where the losses'
      ' differ much, so may conflict for that reason alone.'
    )
    beside = [dataclasses.replace(c, seconds=None) for c in others]
    blocks.append(tables_lib.comparison_table(findings, beside, caption, outcome=True, cells=cells))
  return Section('Methods compared', 'methods', blocks)


def _offsets(findings: Findings) -> Section | None:
  if not findings.offsets:
    return None
  estimates = [c.difference for c in findings.offsets]
  margin = tables_lib.setting(findings, 'margin')
  limit = f' by more than the margin of {margin:g}' if margin else ''
  text = Text(
    'Does the treatment cost anything elsewhere? Non-inferiority is supported where the whole'
    f' interval lies above {wording.number(-margin, 3) if margin else "the margin"}: then the'
    f' treatment is not worse{limit}. p is that of no difference at all.'
  )
  names = ' and of '.join(dict.fromkeys(map(wording.outcome, findings.offsets)))
  shaded = 'Shaded: the margin on both sides of zero.' if margin else ''
  figure = Figure(
    f'Difference of {names}, treatment − control; {wording.level(estimates)}.',
    lambda: figures.by_outcome(
      findings.offsets, findings.cells, title='Non-inferiority', band=margin
    ),
    key=shaded,
  )
  caption = f'Non-inferiority, margin {margin:g}.' if margin else 'Non-inferiority.'
  table = tables_lib.comparison_table(findings, findings.offsets, caption, outcome=True)
  return Section(
    'Non-inferiority', 'non-inferiority', [text, figure, table, *tables_lib.reasons(estimates)]
  )


def _classes(findings: Findings) -> Section | None:
  blocks: list[Block] = []
  for cell, scores in tables_lib.by_cell(findings.scores, findings):
    scores = [score for score in scores if len(score.per_class_f1) == len(findings.class_names)]
    if not scores:
      continue
    made = _class_f1(findings, cell, scores)
    blocks.append(made if not blocks else Fold(wording.cell(cell, findings.cells), [made]))
  return Section('F1 of each class', 'classes', blocks)


def _class_f1(findings: Findings, cell: Mapping[str, Any], scores: Sequence[Score]) -> Figure:
  estimates = [e for score in scores for e in score.per_class_f1]
  labels = figures.class_labels(findings, cell)
  rows = [
    [label, *(wording.interval(score.per_class_f1[c]) for score in scores)]
    for label, c in zip(labels, figures.order(findings, cell), strict=True)
  ]
  where = wording.cell(cell, findings.cells)
  caption = (
    f'F1 of each class{f" ({where})" if where else ""}, classes from the largest to the smallest'
    f' with their training images; mean over units, {wording.level(estimates)}.'
  )
  head = ['class (training images)', *(plain.clean(score.variant) for score in scores)]
  numbers = Table('F1 of each class: mean [interval].', head, rows)
  return Figure(caption, lambda: figures.per_class_f1(findings, scores), [numbers])


def _confusions(findings: Findings) -> Section | None:
  blocks: list[Block] = []
  control, treatment = figures.before_and_after(findings)
  for cell, scores in tables_lib.by_cell(findings.scores, findings):
    named = {score.variant: score for score in scores}
    shown = [named[v] for v in (control, treatment) if v in named]
    if not shown:
      continue
    where = wording.cell(cell, findings.cells)
    caption = (
      f'Confusion matrices{f" ({where})" if where else ""}: percent of the images of the true class'
      ' (row) that were predicted as each class (column), summed over units'
      f' ({wording.sample(tables_lib.unit_count(score) for score in shown)}).'
      ' Classes are numbered from the largest to the smallest.'
    )
    tables = [
      tables_lib.matrix_table(
        findings,
        cell,
        100 * figures.row_normalised(score.confusion),
        f'Confusion matrix of {plain.clean(score.variant)}, percent of the true class (row).',
        digits=0,
        diagonal=True,
      )
      for score in shown
    ]
    figure = Figure(
      caption,
      functools.partial(figures.confusions, findings, shown),
      [table for table in tables if table is not None],
      on_page=False,
    )
    blocks.append(Fold(where, [figure]) if blocks else figure)
  return Section('Confusion matrices', 'confusion', blocks)


def _making(findings: Findings) -> Section:
  about = findings.about
  facts = []
  if 'runs' in about:  # what failed is named in the notes
    facts.append(
      f'{wording.integer(about["runs"])} runs finished, {about.get("failed", 0)} failed.'
    )
  if about.get('seconds'):
    facts.append(f'Time of all runs together: {wording.duration(float(about["seconds"]))}.')
  for name, label in (('devices', 'Hardware'), ('commits', 'Code, git commit')):
    if about.get(name):
      facts.append(f'{label}: {"; ".join(_listed(about[name]))}.')
  if about.get('versions'):
    facts.append(f'Versions: {"; ".join(_listed(about["versions"]))}.')
  for name, value in about.items():
    if name not in _KNOWN and value not in (None, '', [], {}, ()):
      facts.append(f'{wording.axis(name).capitalize()}: {"; ".join(_listed(value))}.')
  blocks: list[Block] = []
  if about.get('commands'):
    blocks.append(Text('The exact commands:'))
    blocks.append(Code('\n'.join(_listed(about['commands'], whole=True))))
  if facts:
    blocks.append(Items(facts))
  if about.get('config'):
    text = json.dumps(_plain(about['config']), indent=2, ensure_ascii=False, default=str)
    blocks.append(Fold('Resolved configuration', [Code(text)]))
  return Section('How it was made', 'making', blocks)


def _listed(value: Any, whole: bool = False) -> list[str]:
  """Names and numbers of a mapping, a list or a single thing."""
  tidy = plain.clean_lines if whole else plain.clean
  if isinstance(value, Mapping):
    return [f'{tidy(k)} {", ".join(_listed(v))}' for k, v in value.items()]
  if isinstance(value, (list, tuple, set, frozenset)):
    return [', '.join(_listed(one)) if isinstance(one, Mapping) else tidy(one) for one in value]
  return [tidy(value)]


def _plain(value: Any) -> Any:
  """What JSON can hold, null for NaN and infinity."""
  if isinstance(value, Mapping):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
