"""What class gradients did: conflict compared, and whether less of it goes with more F1.

Computed from Grams where they were kept (scopes `common` and `shared`), else from the summaries of
the record. `common`, the parameters that a variant shares with `none`, is the scope for comparing
variants. NaN is undefined, and left out of every mean.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from csba_jax.analysis import stats, wording
from csba_jax.analysis.comparisons import CAPACITY_CONTROL, NAN, Study, mean_of
from csba_jax.analysis.measured import Measured, snapshots
from csba_jax.analysis.stats import Estimate
from csba_jax.analysis.types import (
  REFUTED,
  SUPPORTED,
  UNDECIDED,
  BranchSimilarity,
  Comparison,
  Link,
  Matrix,
  MeanFlow,
)
from csba_jax.gradients import conflict as conflict_lib
from csba_jax.gradients import flow as flow_lib
from csba_jax.gradients.conflict import Conflict
from csba_jax.gradients.gram import ClassGrams
from csba_jax.run.records import TESTED
from csba_jax.study import results as results_lib
from csba_jax.study.protocol import SIGNIFICANCE
from csba_jax.study.results import Cell, Record, Unit

MEASURES = tuple(wording.MEASURES)
LESS_IS_BETTER = ('head_tail_conflict', 'minority_interference', 'conflict_rate')
SCOPES, PARTS, END = ('common', 'shared'), ('train', 'val'), '1'
SMALLEST_REDUCTION = 0.1  # of the control's mean: less would not matter
SMALLEST_CORRELATION = 0.3  # less would not matter
FARTHEST_LOSS = 1.25  # ratio of two losses, from where on they are not matched
LINKS = {  # what is reduced, by class
  'interference': 'interference with the class',
  'cosine': 'mean negative cosine of the class',
}


def conflict(measured: Measured) -> tuple[Comparison, ...]:
  """Every measure at every snapshot that both sides have, treatment - control, paired by unit."""
  study, found = measured.study, []
  for cell in study.main_cells:
    for pair in study.pairs_of(cell, study.family + study.secondary):
      sides = [list(study.results.runs(cell, variant).values()) for variant in pair]
      for at in (at for at in snapshots(sides[0]) if at in snapshots(sides[1])):
        for part in PARTS:
          for scope in SCOPES:
            for measure in MEASURES:
              comparison = compare_conflict(measured, cell, pair, (at, part, scope, measure))
              if comparison.difference.n:
                found.append(comparison)
  return tuple(found)


def compare_conflict(
  measured: Measured, cell: Cell, pair: tuple[str, str], what: tuple[str, str, str, str]
) -> Comparison:
  """A measure (at, part, scope, measure) of two variants, with `reduction_verdict`.

  No verdict where none_wide takes part: its parameters of the scope common have the same names, and
  other shapes. Undecided at a level of loss where the losses came to lie too far apart.
  """
  at, _, _, measure = what
  runs = [measured.study.results.runs(cell, variant) for variant in pair]
  found = compare_runs(measured, dict(cell), pair, runs, what)
  if measure not in LESS_IS_BETTER or CAPACITY_CONTROL in pair:
    return found
  assert found.losses is not None  # of every comparison of conflict
  comparable = not wording.matched(at) or are_matched(found.losses)
  verdict = UNDECIDED
  if comparable:
    verdict = reduction_verdict(found.difference, found.control_mean)
  limits = (0.0, -SMALLEST_REDUCTION * found.control_mean)
  return dataclasses.replace(found, verdict=verdict, limits=limits)


def compare_runs(
  measured: Measured,
  cell: Mapping[str, Any],
  names: tuple[str, str],
  runs: Sequence[Mapping[Unit, Record]],
  what: tuple[str, str, str, str],
) -> Comparison:
  """A measure (at, part, scope, measure) of two sets of runs, treatment first; no verdict.

  Args:
    cell: what both have in common.
  """
  study, (at, part, scope, measure) = measured.study, what
  units, missing = results_lib.common_units(study.results, names, runs)
  sides = [[side[unit] for unit in units] for side in runs]
  treated, control = (np.array([measured.value(r, *what) for r in side]) for side in sides)
  there = [[results_lib.conflict_entry(r, at, part) is not None for r in side] for side in sides]
  for name, own, other in ((names[0], *there), (names[1], *there[::-1])):
    lacking = [
      results_lib.unit_words(study.results, unit)
      for unit, here, elsewhere in zip(units, own, other, strict=True)
      if elsewhere and not here
    ]
    if lacking:
      missing += (f"{name} without the snapshot '{at}' ({part}) of {', '.join(lacking)}",)
  treated, control = study.paired(treated, control, units)
  return Comparison(
    *names,
    cell={**cell, 'at': at, 'part': part, 'scope': scope},
    outcome=measure,
    treatment_mean=mean_of(treated, control),
    control_mean=mean_of(control, treated),
    difference=study.estimate(treated - control, 2 if measure == 'mean_cosine' else 1),
    missing=missing,
    losses=_losses(sides, at),
  )


def _losses(sides: Sequence[Sequence[Record]], at: str) -> tuple[float, float]:
  """Training losses of both sides at a snapshot: geometric means over units that both reached."""
  entries = [[results_lib.conflict_entry(r, at, 'train') for r in side] for side in sides]
  pairs = zip(*entries, strict=True)
  found = [(a['loss'], b['loss']) for a, b in pairs if a is not None and b is not None]
  known = np.array([pair for pair in found if None not in pair], np.float64).reshape(-1, 2)
  if not len(known):
    return NAN, NAN
  treated, control = np.exp(np.log(known).mean(0))
  return float(treated), float(control)


def are_matched(losses: tuple[float, float]) -> bool:
  """Whether two losses are within a factor of FARTHEST_LOSS."""
  treated, control = losses
  return 1 / FARTHEST_LOSS <= treated / control <= FARTHEST_LOSS  # False for NaN


def reduction_verdict(difference: Estimate, control_mean: float) -> str:
  """Supported: the 95 % interval of treatment - control lies below 0. Not supported: it leaves out
  a reduction by a tenth of the control's mean (also where the control has nothing to reduce).
  Undecided: anything else, also no interval.
  """
  if not difference.known:
    return UNDECIDED
  if difference.high < 0:
    return SUPPORTED
  return REFUTED if difference.low >= -SMALLEST_REDUCTION * control_mean else UNDECIDED


def links(study: Study) -> tuple[Link, ...]:
  """Does a class whose conflict fell gain F1?  csba and csba_class against none, by two measures.

    reduction[s, c] = conflict_c(control) - conflict_c(treatment),  gain[s, c] likewise of F1

  paired by unit s, where conflict_c is the interference with c, or the mean over d != c of
  max(0, -cos[c, d]), of the net that was tested, to which the F1 belongs. Rank statistics: a class
  that misses a value in a unit is left out, and a unit that misses all. Where units share images,
  interval and p know it, see `stats.association`, and `uncorrected` has those that do not.

  Beside it, without a verdict: the same at the end of the run; of the other variants against none;
  and of each variant against itself (-conflict_c against F1 of its own runs), which shows what runs
  of one net have in common with the claim.
  """
  decisive = TESTED if TESTED in snapshots(study.results.done) else END
  found = []
  for cell in study.main_cells:
    claimed = study.pairs_of(cell, study.of_attention)
    beside = study.pairs_of(cell, study.secondary)
    itself = [(variant, variant) for variant in study.variants]
    for at in dict.fromkeys((decisive, END)):
      found += [link for pair in claimed for link in _links(study, cell, pair, at, at == decisive)]
    for pair in (*beside, *itself):
      found += _links(study, cell, pair, decisive, False)
  return tuple(found)


def _links(study: Study, cell: Cell, pair: tuple[str, str], at: str, judged: bool) -> list[Link]:
  """By each measure; of a variant against itself, its own runs as they are."""
  units, _ = results_lib.pairs(study.results, cell, *pair)
  runs = [[study.results.runs(cell, variant)[unit] for unit in units] for variant in pair]
  if not units:
    return []
  f1 = [np.stack([results_lib.per_class_f1(r) for r in side]) for side in runs]
  alone, found = pair[0] == pair[1], []
  for measure, words in LINKS.items():
    level = [np.stack([conflict_by_class(r, measure, at) for r in side]) for side in runs]
    reduction, gain = (-level[0], f1[0]) if alone else (level[1] - level[0], f1[0] - f1[1])
    if np.isnan(reduction).all():
      continue
    reduction, gain = study.paired(reduction, gain, units)
    ratio, often = study.test_to_rest, study.resamples
    ratios = (ratio,) if ratio is None else (ratio, None)
    within, *others = stats.associations(reduction, gain, ratios, resamples=often)
    independent = others[0] if others else None
    across = stats.across_classes(reduction, gain, ratio, resamples=often)
    where = f'{words} (common parameters, training images, {wording.snapshot(at)})'
    verdict = link_verdict(within) if judged else ''
    treatment, control = pair
    found.append(
      Link(
        treatment=treatment,
        control=control,
        cell=dict(cell),
        measure=where,
        within=within,
        across=across,
        reduction=reduction,
        gain=gain,
        verdict=verdict,
        uncorrected=independent,
      )
    )
  return found


def conflict_by_class(record: Record, measure: str, at: str) -> np.ndarray:
  """Interference, or mean negative cosine, of each class at a snapshot, [C]; NaN: not measured."""
  entry = results_lib.conflict_entry(record, at, 'train')
  if entry is None or 'common' not in (entry.get('grams') or {}):
    return np.full(len(record['result']['class_counts']), NAN)
  gram = results_lib.gram(entry, 'common')
  if measure == 'interference':
    return conflict_lib.interference(gram, np.array(entry['prior'], np.float64))
  cosines = conflict_lib.conflict_matrix(gram)
  np.fill_diagonal(cosines, NAN)
  return mean_over(np.maximum(-cosines, 0))


def link_verdict(within: Estimate) -> str:
  """Supported: p < 0.05 and a positive correlation. Not supported: p < 0.05 and a negative one, or
  the 95 % interval ends below 0.3. Undecided: anything else, also no test.
  """
  if within.p < SIGNIFICANCE:  # False for NaN
    return SUPPORTED if within.value > 0 else REFUTED
  return REFUTED if within.known and within.high < SMALLEST_CORRELATION else UNDECIDED


def matrices(study: Study) -> tuple[Matrix, ...]:
  """Mean cosines of every variant at the start and at the end, there also of each branch."""
  found = []
  for cell, variant, runs in _by_variant(study):
    for at in ('0', END):
      for part in PARTS:
        entries = [results_lib.conflict_entry(run, at, part) or {} for run in runs]
        kept = dict.fromkeys(scope for entry in entries for scope in entry.get('grams') or {})
        for scope in dict.fromkeys((*SCOPES, *kept)):
          grams = _grams(runs, at, part, scope)
          if grams:
            cosines = mean_over(conflict_lib.conflict_matrix(np.stack(grams)), 0)
            found.append(Matrix(dict(cell), variant, at, part, scope, cosines, len(grams)))
  return tuple(found)


def mantel(study: Study, means: Sequence[Matrix]) -> tuple[tuple[str, Estimate, float], ...]:
  """Mantel tests of mean matrices on training images, in every main cell.

  Do a control (`none`) and its treatment have the same classes in conflict (scope common, at the
  end)? Are the classes that the control confuses (mean of both directions' rates) those in conflict
  (minus cosine, scope shared, of the net that was tested, to which the confusion belongs; at the
  end where that was not measured)? Each with its p by Holm over the tests of the same question.
  """
  decisive = TESTED if TESTED in snapshots(study.results.done) else END
  at = {(m.variant, m.scope, tuple(m.cell.items())): m.cosine for m in means if _at_end(m)}
  questions: list[tuple[str, str, Estimate]] = []  # (question, title, test)
  for cell in study.main_cells:
    words = study.condition(dict(cell))
    for treatment, control in study.of_attention:
      before, after = (at.get((variant, 'common', cell)) for variant in (control, treatment))
      if before is not None and after is not None:
        title = f'conflict matrices of {control} and {treatment}, {words}'
        questions.append(('alike', title, stats.mantel(before, after, resamples=study.resamples)))
    for control in dict.fromkeys(control for _, control in study.of_attention):
      runs = list(study.results.runs(cell, control).values())
      grams = _grams(runs, decisive, 'train', 'shared')
      if grams:
        cosine = mean_over(conflict_lib.conflict_matrix(np.stack(grams)), 0)
        title = f'conflict against confusion of {control}, {words}'
        rates = _confusion_rates(runs)
        test = stats.mantel(-cosine, rates, resamples=study.resamples)
        questions.append(('confused', title, test))
  adjusted: dict[str, float] = {}
  for question in dict.fromkeys(question for question, _, _ in questions):
    own = [(title, test.p) for asked, title, test in questions if asked == question]
    by_holm = stats.holm(np.array([p for _, p in own]))
    adjusted.update(zip((title for title, _ in own), by_holm.tolist(), strict=True))
  return tuple((title, test, adjusted[title]) for _, title, test in questions)


def _confusion_rates(runs: Sequence[Record]) -> np.ndarray:
  """How often two classes are taken for each other, mean of both directions' rates.   [C, C]"""
  counts = np.sum([run['result']['confusion_matrix'] for run in runs], axis=0, dtype=np.float64)
  support = counts.sum(1, keepdims=True)
  rates = counts / np.where(support > 0, support, np.nan)
  return (rates + rates.T) / 2


def flows(study: Study) -> tuple[MeanFlow, ...]:
  """Who moves the shared layers, see `csba_jax.gradients.flow`: means over units at each snapshot.

  norms = |g_c|, shares = pi_c <g_c, g> / |g|^2 of the scope shared.
  """
  found = []
  for cell, variant, runs in _by_variant(study):
    for at in snapshots(runs):
      for part in PARTS:
        measured = (results_lib.conflict_entry(run, at, part) for run in runs)
        entries = [entry for entry in measured if entry is not None]
        both = [_norms_and_shares(e) for e in entries if 'shared' in (e.get('grams') or {})]
        if both:
          norms, shares = mean_over(np.array(both), 0)
          losses = np.array([entry['loss'] for entry in entries], np.float64)
          scopes = _mean_scopes(entries)
          at_all = (norms, shares, scopes, _mean(losses))
          found.append(MeanFlow(dict(cell), variant, at, part, *at_all))
  return tuple(found)


def branch_similarity(study: Study) -> tuple[BranchSimilarity, ...]:
  """Similarity of the branches' features and spread of the gates; means over units."""
  found = []
  for cell, variant, runs in _by_variant(study):
    entries = [entry for run in runs for entry in run.get('branches') or ()]
    for at, part in dict.fromkeys((entry['at'], entry['part']) for entry in entries):
      here = [entry for entry in entries if (entry['at'], entry['part']) == (at, part)]
      alike: dict[str, list[float]] = {}
      spread: dict[str, list[float]] = {}
      gates: dict[str, list[np.ndarray]] = {}
      for entry in here:
        for block, value in _cka(entry).items():
          alike.setdefault(block, []).append(value)
        for block, value in (entry.get('gate_spread') or {}).items():
          spread.setdefault(block, []).append(NAN if value is None else value)
        for block, rows in (entry.get('gates') or {}).items():
          gates.setdefault(block, []).append(np.array(rows, np.float64))
      by_class = {block: mean_over(np.stack(values), 0) for block, values in gates.items()}
      cka, spreads = (
        {block: _mean(np.array(v)) for block, v in d.items()} for d in (alike, spread)
      )
      found.append(BranchSimilarity(dict(cell), variant, at, part, cka, spreads, by_class))
  return tuple(found)


def similarity_differences(study: Study) -> tuple[Comparison, ...]:
  """CKA of each block's branches at the end, on training images, against none; no verdict."""
  found = []
  pairs = [*study.of_attention, *study.secondary]
  for cell in study.main_cells:
    for pair in study.pairs_of(cell, pairs):
      units, missing = results_lib.pairs(study.results, cell, *pair)
      sides = [[_cka_at_end(study.results.runs(cell, v)[unit]) for unit in units] for v in pair]
      for block in dict.fromkeys(block for side in sides for cka in side for block in cka):
        treated, control = (np.array([cka.get(block, NAN) for cka in side]) for side in sides)
        treated, control = study.paired(treated, control, units)
        difference = study.estimate(treated - control, 2.0)
        if difference.n:
          means = (mean_of(treated, control), mean_of(control, treated))
          place = {**dict(cell), 'at': END, 'part': 'train'}
          words = f'CKA of {block}'
          found.append(Comparison(*pair, place, words, *means, difference, missing=missing))
  return tuple(found)


def _cka(entry: Record) -> dict[str, float]:
  """CKA of two branches by block, mean over pairs of branches."""
  matrices = {name: np.array(rows, np.float64) for name, rows in (entry.get('cka') or {}).items()}
  return {name: _mean(m[~np.eye(len(m), dtype=bool)]) for name, m in matrices.items()}


def _cka_at_end(record: Record) -> dict[str, float]:
  here = [e for e in record.get('branches') or () if (e['at'], e['part']) == (END, 'train')]
  return _cka(here[0]) if here else {}


def mean_over(values: np.ndarray, axis: int = -1) -> np.ndarray:
  """Mean of what is defined along an axis; NaN where nothing is."""
  known = ~np.isnan(values)
  count = known.sum(axis)
  return np.where(known, values, 0).sum(axis) / np.where(count > 0, count, np.nan)


def _mean(values: np.ndarray) -> float:
  return float(mean_over(values.ravel()))


def _by_variant(study: Study) -> Iterator[tuple[Cell, str, list[Record]]]:
  """(cell, variant, runs) of what there is, in order."""
  for cell in study.main_cells:
    for variant in study.variants:
      runs = list(study.results.runs(cell, variant).values())
      if runs:
        yield cell, variant, runs


def _grams(runs: Sequence[Record], at: str, part: str, scope: str) -> list[np.ndarray]:
  entries = (results_lib.conflict_entry(run, at, part) for run in runs)
  return [
    results_lib.gram(entry, scope)
    for entry in entries
    if entry is not None and scope in (entry.get('grams') or {})
  ]


def _at_end(matrix: Matrix) -> bool:
  return (matrix.at, matrix.part) == (END, 'train')


def _norms_and_shares(entry: Record) -> tuple[np.ndarray, np.ndarray]:
  """The norms and shares of `gradients.flow` in the scope shared, each [C]."""
  gram, counts = results_lib.gram(entry, 'shared'), np.array(entry['counts'])
  losses = np.array(entry['losses'], np.float64)
  grams = ClassGrams(grams={}, total=gram, shared=gram, counts=counts, losses=losses)
  flow = flow_lib.flow(Conflict.of(grams, prior=np.array(entry['prior'], np.float64)))
  return flow.norms[0], flow.shares[0]


def _mean_scopes(entries: Sequence[Record]) -> dict[str, dict[str, float]]:
  """{scope: {measure: mean over entries}} of the summaries that the runs kept."""
  names = dict.fromkeys(
    (scope, measure)
    for entry in entries
    for scope, summary in (entry.get('scopes') or {}).items()
    for measure in summary
  )
  means: dict[str, dict[str, float]] = {}
  for scope, measure in names:
    values = [((e.get('scopes') or {}).get(scope) or {}).get(measure) for e in entries]
    means.setdefault(scope, {})[measure] = _mean(np.array(values, np.float64))
  return means


def noise_values(measured: Measured, runs: Sequence[Record]) -> np.ndarray:
  """Head-tail conflict of runs in the scope common, at the end, on training images.   [n]"""
  what = (END, 'train', 'common', 'head_tail_conflict')
  return np.array([measured.value(run, *what) for run in runs])
