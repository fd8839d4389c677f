"""What the runs of a study say: every number and every verdict of its report, computed once."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from csba_jax.analysis import comparisons as comparisons_lib
from csba_jax.analysis import conflict as conflict_analysis
from csba_jax.analysis import imbalance, size_guide, verdicts, wording
from csba_jax.analysis import method_pairs as method_pairs_lib
from csba_jax.analysis.comparisons import NOISE_SEEDS, Study
from csba_jax.analysis.measured import Measured
from csba_jax.analysis.measured import snapshots as snapshots_of
from csba_jax.analysis.stats import Estimate
from csba_jax.analysis.types import (
  BranchSimilarity,
  Claim,
  Comparison,
  Link,
  Matrix,
  MeanFlow,
  Score,
  SizeGuide,
)
from csba_jax.errors import UserError
from csba_jax.gradients.conflict import majority_minority
from csba_jax.run.records import TESTED
from csba_jax.runtime import plain
from csba_jax.study import protocol
from csba_jax.study import results as results_lib
from csba_jax.study.results import Results

CAPACITY = 0.01  # how far none_wide's parameters may be from csba's


@dataclasses.dataclass(frozen=True, eq=False)
class Findings:
  """A study's report before it is written."""

  name: str
  outcome: str  # primary, in words: 'macro-F1' or 'F1 of Physical-Damage'
  class_names: tuple[str, ...]
  class_counts: tuple[np.ndarray, ...]  # of each cell: [C] training images, means over its runs
  groups: tuple[np.ndarray, ...]  # of each cell: [2, C] shares of its runs with a class in the
  # majority and in the minority: 0 or 1 but where runs differ
  variants: tuple[str, ...]
  cells: tuple[Mapping[str, Any], ...]
  about: Mapping[str, Any]  # commands, versions, commits, devices, runs, failed, seconds, config,
  # statistics: of BatchNorm, of all measurements of conflict
  notes: tuple[str, ...]  # torn lines, missing runs, fewer than two seeds, ...
  claims: tuple[Claim, ...]  # none where methods of one variant are all that is compared
  scores: tuple[Score, ...]
  comparisons: tuple[Comparison, ...]  # the primary outcome; adjusted_p in the family
  offsets: tuple[Comparison, ...]  # non-inferiority
  conflict: tuple[Comparison, ...]  # measures of conflict, treatment - control
  links: tuple[Link, ...]
  matrices: tuple[Matrix, ...]
  flows: tuple[MeanFlow, ...]
  branch_similarity: tuple[BranchSimilarity, ...]
  similarity_differences: tuple[Comparison, ...]  # of the branches' features, treatment - control
  mantel: tuple[tuple[str, Estimate, float], ...]  # (matrices, test, its p by Holm)
  noise: tuple[Comparison, ...]  # a variant against itself
  leak: tuple[Comparison, ...]  # naive split against grouped folds
  size_guides: tuple[SizeGuide, ...] = ()  # conflict against outcome over widths and depths
  trends: tuple[Comparison, ...] = ()  # change of a difference while the imbalance grows tenfold
  cautions: tuple[str, ...] = ()  # those of the notes that belong beside every verdict
  pairs: tuple[tuple[str, str], ...] = ()  # (treatment, control) of the family, as far as they ran
  methods: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)  # own ones:
  # the fields that each sets
  method_pairs: tuple[Comparison, ...] = ()  # methods against methods, the family first

  def counts_in(self, cell: Mapping[str, Any]) -> np.ndarray:
    """Training images of each class in a cell, or in the cell that something was measured in."""
    bases = [wording.base(one) for one in self.cells]
    return self.class_counts[bases.index(wording.base(cell))]


def analyse(results: Results, resamples: int = 9999) -> Findings:
  """Every number and verdict of a study's report, by the protocol of its parts.

  `comparisons` has the primary family, intervals, non-inferiority and the leak, `conflict` what
  class gradients did, `verdicts` how numbers become words. Results that are equal up to the order
  of their lines give equal findings.

  Args:
    resamples: of every bootstrap and permutation; leave it for what you publish.

  Raises:
    UserError: no finished run, one without test metrics, runs of different classes, an unknown
      outcome.
  """
  if not results.done:
    first = results.failed[0] if results.failed else {}
    raise UserError(
      'at least one finished run',
      f'{len(results.failed)} failed ones, the first with: {first.get("error", "no message")}',
      'remove the cause and start csba-study again: it does what failed once more',
    )
  if any('macro_f1' not in record['result'] for record in results.done):
    raise UserError(
      'a study whose runs were tested',
      'one that only tunes (test=False)',
      'report the study that it tunes for',
    )
  study = Study(results, resamples)
  _check_classes(results)
  results_lib.outcome(results.done[0], study.outcome)  # an unknown one ends here
  counts = _class_counts(study)
  measured = Measured(study)
  primary = comparisons_lib.primary(study)
  offsets = comparisons_lib.offsets(study)
  conflict = conflict_analysis.conflict(measured)
  links = conflict_analysis.links(study)
  matrices = conflict_analysis.matrices(study)
  noise = _noise(measured)
  of_methods = method_pairs_lib.method_pairs(measured)
  cautions = (*_untuned(study), *_own_methods(study), *_redrawn(study))
  claims: list[Claim] = []
  variants = tuple(v for v in study.variants if any(study.results.runs(c, v) for c in study.cells))
  if len(variants) > 1 or not of_methods:  # else nothing about attention is asked
    *claims, overall = verdicts.claims(study, primary, conflict, links, offsets)
    sentences = (*overall.sentences, *(f'Caution: {caution}.' for caution in cautions))
    claims.append(dataclasses.replace(overall, sentences=sentences))
  return Findings(
    name=results.study['name'],
    outcome=wording.metric(study.outcome),
    class_names=tuple(results.done[0]['result']['class_names']),
    class_counts=tuple(of_runs.mean(0) for of_runs in counts),
    groups=tuple(np.mean([majority_minority(run) for run in of_runs], 0) for of_runs in counts),
    variants=variants,
    cells=tuple(dict(cell) for cell in study.cells),
    about=_about(results),
    notes=_notes(study, primary, (*offsets, *conflict, *of_methods), noise, cautions),
    cautions=cautions,
    claims=tuple(claims),
    scores=comparisons_lib.scores(study),
    comparisons=primary,
    offsets=offsets,
    conflict=conflict,
    links=links,
    matrices=matrices,
    flows=conflict_analysis.flows(study),
    branch_similarity=conflict_analysis.branch_similarity(study),
    similarity_differences=conflict_analysis.similarity_differences(study),
    mantel=conflict_analysis.mantel(study, matrices),
    noise=noise,
    leak=comparisons_lib.leak(study),
    size_guides=size_guide.size_guides(measured),
    trends=imbalance.trends(study),
    pairs=tuple(p for p in study.family if set(p) <= set(study.variants)),
    methods=study.config.get('own_methods') or {},
    method_pairs=of_methods,
  )


def _class_counts(study: Study) -> list[np.ndarray]:
  """Of each cell, [runs, C] training images: folds differ by an image."""
  counts: dict[tuple, list] = {}
  for record in study.results.done:
    key = results_lib.cell(record)
    counts.setdefault(key, []).append(record['result']['class_counts'])
  return [np.array(counts[cell]) for cell in study.cells]


def _check_classes(results: Results) -> None:
  """All runs tell the same classes apart."""
  names = dict.fromkeys(tuple(record['result']['class_names']) for record in results.done)
  if len(names) > 1:
    raise UserError(
      'the same classes in every run',
      ' and '.join(', '.join(n) for n in names),
      'analyse these studies apart, in a folder each',
    )


def _about(results: Results) -> dict[str, Any]:
  """Where the numbers come from."""
  done, study = results.done, results.study

  def several(values: Iterable[object]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(value) for value in values if value is not None))

  packages = sorted({name for record in done for name in record['versions']})
  return {
    'commands': several(results.commands),
    'versions': {p: ', '.join(several(r['versions'].get(p) for r in done)) for p in packages},
    'commits': several(record.get('commit') for record in done),
    'devices': several(record.get('device') for record in done),
    'runs': len(done),
    'failed': len(results.failed),
    'seconds': float(sum(record.get('seconds') or 0 for record in done)),
    'config': study['config'],
    'statistics': several(
      entry.get('statistics', 'frozen')  # the only ones before they were recorded
      for record in done
      for entry in record.get('conflict') or ()
    ),
  }


def _noise(measured: Measured) -> tuple[Comparison, ...]:
  """Two sets of runs of the same variant, each by the primary outcome and by conflict."""
  study, found = measured.study, []
  measure = wording.metric('head_tail_conflict')
  words = f'{measure} (common parameters, train part) {wording.when(conflict_analysis.END)}'
  for cell in study.main_cells:
    for variant in study.variants:
      by_unit = study.results.runs(cell, variant)
      units, runs = list(by_unit), list(by_unit.values())
      scores = np.array([results_lib.outcome(run, study.outcome) for run in runs])
      conflict = conflict_analysis.noise_values(measured, runs)
      for outcome, of_runs in (
        (wording.metric(study.outcome), scores),
        (words, conflict),
      ):
        values = study.by_subset(of_runs, units)
        if np.isfinite(values).sum() >= NOISE_SEEDS:
          found.append(comparisons_lib.noise(study, cell, variant, outcome, values))
  return tuple(found)


def _notes(
  study: Study,
  primary: Sequence[Comparison],
  others: Sequence[Comparison],
  noise: Sequence[Comparison],
  cautions: Sequence[str] = (),
) -> tuple[str, ...]:
  """What a reader of the numbers should know before believing them; none twice."""
  results = study.results
  of_methods = [c for c in others if c.seconds is not None and c.verdict]
  notes = list(results.notes)
  notes += [f'run {r["run"]} failed: {r.get("error") or "no message"}' for r in results.failed]
  if number := len({*study.subset_of.values()}):
    notes.append(
      f'the seeds share {number} subsets of the training images: intervals and tests count '
      'subsets, each by the mean of its runs'
    )
  elif study.one_subset:
    notes.append(
      'all seeds have one subset of the training images: intervals and tests speak of other '
      'initial weights and batches, not of other images'
    )
  notes += _unrun(study)
  notes += _uncompared(study)
  for c in (*primary, *others):
    pair = _pair(study, c)
    notes += [f'{pair}: {missing}' for missing in c.missing]
  for c in (*primary, *of_methods):
    if c.difference.n < 2:
      pair = _pair(study, c)
      pairs = wording.pairs(c.difference.n, 'subsets' if study.subset_of else 'runs')
      units = study.units if study.subset_of else 'seeds'
      notes.append(f'{pair}: {pairs}; with fewer than two {units} there is no interval')
  notes += _power(study, [c for c in primary if (c.treatment, c.control) in study.family])
  notes += _power(study, of_methods)
  notes += _capacity(study)
  notes += size_guide.left_out(study)
  notes += imbalance.left_out(study)
  snapshots = snapshots_of(results.done)
  if snapshots and TESTED not in snapshots:
    notes.append(
      'conflict was measured by an earlier version: with running statistics, which lag behind '
      "early in a run, at levels of the batches' loss, and not of the tested net; the end of the "
      'run stands in for it'
    )
  if study.folds:
    notes.append(
      'folds share training images: intervals and p-values know it (corrected resampled t), but '
      'for those of permuted classes'
    )
  notes += cautions
  wrong = [c for c in noise if c.difference.excludes(0)]
  notes += [
    f'noise floor: of two sets of runs of {c.treatment} the interval of the difference in '
    f'{c.outcome} leaves out 0 ({study.condition(c.cell)}); 1 in 20 does by chance'
    for c in wrong
  ]
  return tuple(dict.fromkeys(notes))


def _pair(study: Study, c: Comparison) -> str:
  """'csba against none, cross entropy'; of methods with the variant, 'drw against ..., csba'."""
  words = study.condition(c.cell)
  if 'variant' in c.cell:
    words = ', '.join(filter(None, [plain.clean(c.cell['variant']), words]))
  return f'{c.treatment} against {c.control}, {words}'


def _unrun(study: Study) -> list[str]:
  """Variants and methods that the study plans, and that have no finished run."""
  has_run = {
    record['axes'][axis] for record in study.results.done for axis in ('variant', 'method')
  }
  methods = study.config.get('methods', ())
  notes = [
    f'{name} was planned, and has no finished run'
    for name in (*study.variants, *methods)
    if name not in has_run
  ]
  return notes + [
    f'the method {name} is defined in own_methods, and not among the methods that are run'
    for name in study.config.get('own_methods') or {}
    if name not in methods and name not in has_run
  ]


def _uncompared(study: Study) -> list[str]:
  """Variants and conditions that ran, and that no pair compares."""
  pairs = [p for p in study.family + study.secondary if set(p) <= set(study.variants)]
  of_methods = study.config.get('method_pairs') or ()  # within every variant
  named = set(study.variants) if of_methods else {variant for pair in pairs for variant in pair}
  whose = 'of this study' if study.config.get('pairs') else 'of the protocol'
  notes = [
    f'{variant} has scores and no comparison: no pair {whose} names it'
    for variant in study.variants
    if variant not in named and any(study.results.runs(cell, variant) for cell in study.cells)
  ]
  return notes + [
    f'{study.condition(dict(cell))} has scores and no comparison: no pair {whose} has a variant '
    f'that was run there{" or this method" * bool(of_methods)}'
    for cell in study.main_cells
    if not study.pairs_of(cell, pairs)
    and not any(dict(cell).get('method') in pair for pair in of_methods)
  ]


def _untuned(study: Study) -> list[str]:
  """Of what was trained with the rate of the recipe, which the protocol lets decide nothing."""
  config = study.results.study['config']
  configs = (record.get('config') or {} for record in study.results.done)
  rates = {config.get('train', {}).get('learning_rate') for config in configs}
  compared = bool(config.get('method_pairs')) and len(rates) == 1  # an own method may set its rate
  what = ['variants'] * (len(study.variants) > 1) + ['methods'] * compared
  if not what or config.get('tuned_by') != '':
    return []
  return [
    f'exploratory: all {" and ".join(what)} were trained with the same learning rate, tuned for '
    'none of them, so that differences may be due to the rate'
  ]


def _own_methods(study: Study) -> list[str]:
  """Of conditions that the protocol does not have, and that are not compared as methods."""
  compared = {method for pair in study.config.get('method_pairs') or () for method in pair}
  own = (study.config.get('own_methods') or {}).keys() - compared
  ran = dict.fromkeys(r['axes']['method'] for r in study.results.done if r['axes']['method'] in own)
  if not ran:
    return []
  return [
    'exploratory: the protocol (docs/study.md) plans no verdict with '
    f'{" and ".join(map(wording.axis, ran))}, which {"is" if len(ran) == 1 else "are"} of this '
    'study alone'
  ]


def _redrawn(study: Study) -> list[str]:
  """Of seeds that redraw one set of images: what their intervals are, and what they speak of."""
  if not study.redrawn:
    return []
  return [
    'every seed redraws training and test images from one set of images: intervals, p-values and '
    'verdicts are those of the corrected resampled t, which knows the overlap; they speak of this '
    'set, not of new data'
  ]


def _power(study: Study, family: Sequence[Comparison]) -> list[str]:
  """Whether any result could have been significant."""
  tested = [c for c in family if not math.isnan(c.difference.p)]
  if study.test_to_rest is not None or not tested:
    return []  # another test, which knows no such bound
  number, unit = max(c.difference.n for c in tested), study.units.removesuffix('s')
  found = protocol.too_few_seeds(len(tested), number, unit)
  return [found] if found else []


def _capacity(study: Study) -> list[str]:
  """The control of equal capacity must have equal capacity."""
  found = []
  for cell in study.main_cells:
    for treatment, control in study.pairs_of(cell, study.of_capacity):
      sizes = [
        {r['result']['parameters'] for r in study.results.runs(cell, variant).values()}
        for variant in (treatment, control)
      ]
      if all(len(s) == 1 for s in sizes):
        treated, wide = (s.pop() for s in sizes)
        if abs(wide - treated) > CAPACITY * treated:
          found.append(
            f'{control} has {wide} parameters and {treatment} {treated} '
            f'({study.condition(dict(cell))}): no control of equal capacity'
          )
  return found
