"""The argument, link by link, in plain words written from the numbers.

One rule for every claim. Each comparison has its own verdict (see `gain_verdict`, `offset_verdict`,
`reduction_verdict`, `link_verdict`); what several of them say together (measures and snapshots of a
condition, then conditions) is what all of them say: supported if each is, not supported if each is
not, else undecided. Neither verdict is easier to have than the other, and more comparisons make
neither likelier by chance. The verdict of a claim is that of the first pair of the family whose
treatment was run: csba, and csba_class where csba was not run. Sentences on the other pairs stand
beside it and do not enter.

A link is untested where it was not put to a test: nothing was run or measured for it, or a link
that it rests on is not supported. Capacity and offsets are questions about a gain, and rest on the
link that there is one; that less conflict goes with more F1 is shown by a reduction of conflict,
and rests on the link that there is one (`RESTS_ON`).

The argument is as good as its weakest link: supported if every link is, not supported if one is not
supported, else undecided.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from csba_jax.analysis import plain, wording
from csba_jax.analysis.comparisons import Study
from csba_jax.analysis.conflict import END, SMALLEST_CORRELATION, are_matched
from csba_jax.analysis.stats import Estimate
from csba_jax.analysis.types import (
  REFUTED,
  SUPPORTED,
  UNDECIDED,
  UNTESTED,
  VERDICTS,
  Claim,
  Comparison,
  Link,
)

CONFLICT_MEASURES = ('head_tail_conflict', 'minority_interference')  # that the claim rests on

GAIN, CAPACITY, REDUCTION, ASSOCIATION, OFFSETS = range(5)  # the links
RESTS_ON = {CAPACITY: GAIN, ASSOCIATION: REDUCTION, OFFSETS: GAIN}

Judged = Sequence[tuple[str, Sequence[tuple[str, str]]]]  # (cell, [(sentence, verdict)])


def agreed(verdicts: Sequence[str]) -> str:
  """One verdict of several: that of all of them, else undecided."""
  return verdicts[0] if verdicts and len(set(verdicts)) == 1 else UNDECIDED


def chain(verdicts: Sequence[str]) -> str:
  """Verdict of an argument that is as good as its weakest link."""
  if REFUTED in verdicts:
    return REFUTED
  return SUPPORTED if verdicts and all(v == SUPPORTED for v in verdicts) else UNDECIDED


def claims(
  study: Study,
  comparisons: Sequence[Comparison],
  conflict: Sequence[Comparison],
  links: Sequence[Link],
  offsets: Sequence[Comparison],
) -> tuple[Claim, ...]:
  """The links of the argument, then the argument.

  Five of the protocol; a study of its own pairs has no link on capacity unless one of them is
  against the control of equal capacity.
  """
  pairs, wide = ([p for p in of if p[0] in study.variants] for of in _pairs_by_link(study))
  pairs, wide = pairs or [study.of_attention[0]], wide or [*study.of_capacity[:1]]
  name = {'csba': 'CSBA'}.get(pairs[0][0], pairs[0][0])
  outcome = wording.metric(study.outcome)
  control = 'the same net without attention' if pairs[0][1] == 'none' else pairs[0][1]
  parts = (  # link, title, what speaks for it by pair, findings, statement in plain words
    (
      GAIN,
      f'{name} improves {outcome} over {control}',
      {pair: _gains(study, comparisons, pair) for pair in pairs},
      comparisons,
      plain.gain(study, name, control),
    ),
    (
      CAPACITY,
      f'The gain in {outcome} is not by capacity alone',
      {pair: _gains(study, comparisons, pair) for pair in wide},
      comparisons,
      plain.gain(study, name, 'a net without attention that has as many parameters'),
    ),
    (
      REDUCTION,
      f'{name} reduces gradient conflict',
      {pair: _reductions(study, conflict, pair) for pair in pairs},
      conflict,
      plain.reduction(study, name, control),
    ),
    (
      ASSOCIATION,
      'Less conflict goes with more F1',
      {pair: _links(study, links, pair) for pair in pairs},
      links,
      plain.association(study, name),
    ),
    (
      OFFSETS,
      'Without offsetting problems',
      {pair: _offsets(study, offsets, pair) for pair in pairs},
      offsets,
      plain.offset(study, name, control),
    ),
  )
  found: dict[int, Claim] = {}
  for link, title, judged, numbers, statement in parts:
    if judged:
      # links stand after those that they rest on
      found[link] = _claim(title, judged, statement, numbers, found.get(RESTS_ON.get(link, -1)))
  return (*found.values(), _overall(name, tuple(found.values())))


def _overall(name: str, links: Sequence[Claim]) -> Claim:
  """The argument, of its links."""
  verdicts = [claim.verdict for claim in links]
  verdict = chain(verdicts)
  sentences = (
    f'{_counts(verdicts, "links").capitalize()}: the argument is supported if every link is, and '
    'not supported if one is not.',
    *(f'{claim.title}: {claim.verdict}.' for claim in links),
    'Links are associations over runs and classes; they do not show that one causes the next.',
  )
  words = plain.overall(name, verdict, verdicts)
  return Claim(f'Overall: {name} makes a better tail by less conflict', verdict, sentences, words)


def _pairs_by_link(study: Study) -> tuple[tuple[tuple[str, str], ...], ...]:
  return study.of_attention, study.of_capacity


def _claim(
  title: str,
  judged: Mapping[tuple[str, str], Judged],
  statement: plain.Statement,
  numbers: Sequence[Comparison | Link],
  rests_on: Claim | None,
) -> Claim:
  """A claim about the first pair, with what the same numbers say of the others."""
  main, *_ = judged
  one_control = len({control for _, control in judged}) == 1
  sentences, verdict = [], UNTESTED
  for pair, cells in judged.items():
    treatment, control = pair
    name = treatment if one_control else f'{treatment} against {control}'
    verdicts = [agreed([v for _, v in lines]) for _, lines in cells]
    sentences += [sentence for _, lines in cells for sentence, _ in lines]
    if len(cells) > 1:
      sentences.append(
        f'{name}: {_counts(verdicts, "conditions")}, so {agreed(verdicts)} over all conditions.'
      )
    elif not cells:
      words = f'{treatment} against {control}: nothing was run or measured that could tell'
      sentences.append(f'{words}: {UNTESTED}.')
    if pair == main and cells:
      verdict = agreed(verdicts)
  if rests_on is not None and rests_on.verdict == REFUTED and judged[main]:
    verdict = UNTESTED
    sentences.append(f'{UNTESTED.capitalize()}: it rests on "{rests_on.title}": {REFUTED}.')
  failed = rests_on.title if rests_on is not None and rests_on.verdict == REFUTED else ''
  words = statement.of(verdict, numbers, main, len(judged[main]), failed)
  return Claim(title, verdict, tuple(sentences), words)


def _gains(study: Study, comparisons: Iterable[Comparison], pair: tuple[str, str]) -> Judged:
  found = _by_cell(study, comparisons, pair)
  judged = []
  for cell, those in found:
    lines = []
    for c in those:
      extra = (
        '' if math.isnan(c.adjusted_p) else f'Holm-adjusted p {wording.probability(c.adjusted_p)}'
      )
      ending = ''
      if c.verdict == SUPPORTED and c.difference.high < study.smallest_effect:
        ending = f' (yet below {study.smallest_effect:g}, the smallest effect that would matter)'
      lines.append((_sentence(study, cell, c, extra, ending), c.verdict))
    judged.append((cell, lines))
  return judged


def _reductions(study: Study, conflict: Iterable[Comparison], pair: tuple[str, str]) -> Judged:
  """Common parameters, training images; at the end and at the lowest matched loss."""
  chosen = [
    c
    for c in conflict
    if (c.cell['scope'], c.cell['part']) == ('common', 'train')
    and c.outcome in CONFLICT_MEASURES
    and c.verdict  # of nets with other shapes there is none
  ]
  judged = []
  for cell, those in _by_cell(study, chosen, pair):
    lines = []
    for measure in CONFLICT_MEASURES:
      here = {c.cell['at']: c for c in those if c.outcome == measure}
      levels = [at for at, c in here.items() if at.startswith('loss ') and c.difference.n > 1]
      if END in here:
        lines.append((_sentence(study, cell, here[END]), here[END].verdict))
      if levels:
        matched = here[min(levels, key=lambda at: float(at[5:]))]
        lines.append((_at_loss(study, cell, matched), matched.verdict))
      else:
        words = f'{" against ".join(pair)}, {cell}: no loss that two pairs of runs came down to'
        lines.append((f'{words}, so no conflict at matched loss: {UNDECIDED}.', UNDECIDED))
    judged.append((cell, lines))
  return judged


def _at_loss(study: Study, cell: str, comparison: Comparison) -> str:
  assert comparison.losses is not None  # of conflict
  losses = ' against '.join(map(wording.number, comparison.losses))
  far = '' if are_matched(comparison.losses) else ' (the losses are too far apart to compare)'
  return _sentence(study, cell, comparison, f'losses {losses}', far)


def _links(study: Study, links: Sequence[Link], pair: tuple[str, str]) -> Judged:
  judged, runs = [], 'subsets' if study.subset_of else 'runs'
  for at in study.main_cells:
    cell = study.condition(dict(at))
    lines = []
    for link in links:
      same = (link.treatment, link.control) == pair and link.cell == dict(at)
      if not (same and link.verdict):  # else shown beside the claim
        continue
      within, across = (wording.number(e.value, signed=True) for e in (link.within, link.across))
      words = (
        f'{" against ".join(pair)}, {cell}, {link.measure}: rank correlation over runs of its '
        f'reduction with the gain in F1, mean over classes, {within} '
        f'({_interval_and_p(link.within)}, {wording.pairs(link.within.n, runs)}); '
        f'over classes {across} (p {wording.probability(link.across.p)}, '
        f'{link.across.n} classes)'
      )
      beside = ''
      if link.uncorrected is not None and link.uncorrected.known:
        beside = f' (as if {study.units} shared no images: {_interval_and_p(link.uncorrected)})'
      lines.append((f'{words}: {link.verdict}{beside}.', link.verdict))
    if lines:
      judged.append((cell, lines))
  return judged


def _interval_and_p(correlation: Estimate) -> str:
  """'95 % interval -0.1 to +0.5, p 0.200'"""
  interval = wording.within(correlation, (SMALLEST_CORRELATION,))
  return f'{interval}, p {wording.probability(correlation.p)}'


def _offsets(study: Study, offsets: Iterable[Comparison], pair: tuple[str, str]) -> Judged:
  return [
    (
      cell,
      [
        (_sentence(study, cell, c, f'non-inferiority margin {study.margin:g}'), c.verdict)
        for c in those
      ],
    )
    for cell, those in _by_cell(study, offsets, pair)
  ]


def _by_cell(
  study: Study, comparisons: Iterable[Comparison], pair: tuple[str, str]
) -> list[tuple[str, list[Comparison]]]:
  """(cell in words, its comparisons of this pair), cells without any left out."""
  those = [c for c in comparisons if (c.treatment, c.control) == pair]
  cells = [
    (dict(at), [c for c in those if dict(at).items() <= c.cell.items()]) for at in study.main_cells
  ]
  return [(study.condition(at), found) for at, found in cells if found]


def _sentence(
  study: Study, cell: str, comparison: Comparison, extra: str = '', ending: str = ''
) -> str:
  """'csba against none, cross entropy: macro-F1 0.7 against 0.6, difference +0.1 (...): ...'"""
  c = comparison
  units = wording.pairs(c.difference.n, study.units)
  numbers = [wording.within(c.difference, c.limits), extra, units]
  if c.uncorrected is not None and c.uncorrected.known:
    beside = wording.within(c.uncorrected, c.limits)
    ending += f' (as if {study.units} shared no images: {beside})'
  means = f'{wording.number(c.treatment_mean)} against {wording.number(c.control_mean)}'
  return (
    f'{c.treatment} against {c.control}, {cell}: {_outcome_words(c)} {means}, '
    f'difference {wording.number(c.difference.value, signed=True)} '
    f'({", ".join(filter(None, numbers))}): {c.verdict}{ending}.'
  )


def _counts(verdicts: Sequence[str], what: str) -> str:
  """'supported in 2 of 3 conditions, not supported in 1, undecided in 0'"""
  counts = [(v, list(verdicts).count(v)) for v in VERDICTS]
  words = [f'{v} in {n}' for v, n in counts if n or v != UNTESTED]
  words[0] += f' of {len(verdicts)} {what}'
  return ', '.join(words)


def _outcome_words(comparison: Comparison) -> str:
  """'share of head-tail pairs in conflict (...) at the end of the run:'; a metric as it is."""
  cell = comparison.cell
  if 'at' not in cell:
    return comparison.outcome
  where = f'{cell["scope"]} parameters, {cell["part"]} part'
  return f'{wording.metric(comparison.outcome)} ({where}) {wording.when(cell["at"])}:'
