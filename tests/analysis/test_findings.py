"""Findings of simulated studies: effects that are there are found, those that are not are not."""

import copy
import dataclasses
import itertools
import json
import math
import random
import runpy
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from csba_jax.analysis import comparisons, findings, stats, verdicts, wording
from csba_jax.analysis import conflict as conflict_analysis
from csba_jax.analysis.stats import Estimate
from csba_jax.analysis.types import REFUTED, SUPPORTED, UNDECIDED, UNTESTED
from csba_jax.errors import UserError
from csba_jax.gradients import conflict as conflict_lib
from csba_jax.gradients import flow as flow_lib
from csba_jax.gradients.conflict import Conflict
from csba_jax.report.study import markdown, page, readme, write
from csba_jax.study import protocol, results

simulated = types.SimpleNamespace(**runpy.run_path(Path(__file__).parents[1] / 'simulated.py'))
TWO = ('none', 'csba')
CELL = {
  'model': 'multibranch',
  'method': 'cross_entropy',
  'imbalance_factor': 33.0,
  'width': 0.25,
  'depth': 1,
  'learning_rate': 0.05,
  'split': 'grouped',
}

BESIDE = [pair for pair in protocol.SECONDARY if pair[0] in simulated.VARIANTS]


def written(folder, about, records):
  return results.read(simulated.write(folder, about, records))


def analysed(folder, about, records):
  return findings.analyse(written(folder, about, records), resamples=499)


@pytest.fixture(scope='module')
def full(tmp_path_factory):
  """Findings of all variants, eight seeds, with an effect on F1 and on conflict."""
  return analysed(tmp_path_factory.mktemp('full'), *simulated.make())


@pytest.fixture(scope='module')
def null(tmp_path_factory):
  """Findings of ten seeds without any effect."""
  made = simulated.make(
    seeds=10, effect=0, conflict_effect=0, variants=('none', 'none_wide', 'csba')
  )
  return analysed(tmp_path_factory.mktemp('null'), *made)


@pytest.fixture(scope='module')
def folded(tmp_path_factory):
  """Findings of two repeats of a five-fold cross-validation, grouped and naive."""
  made = simulated.make(seeds=2, folds=5, leak=0.08, variants=('none', 'none_wide', 'csba'))
  return analysed(tmp_path_factory.mktemp('folded'), *made)


def claim(found, words):
  (one,) = (c for c in found.claims if words in c.title)
  return one


def pick(group, treatment, control, **cell):
  """The comparisons of a pair whose cell has these entries."""
  return [
    c
    for c in group
    if (c.treatment, c.control) == (treatment, control) and cell.items() <= c.cell.items()
  ]


def estimate(value=0.0, low=math.nan, high=math.nan, level=0.95, n=8, p=math.nan):
  return Estimate(value, low, high, level, n, p, '')


@pytest.mark.parametrize(
  ('difference', 'adjusted', 'wanted'),
  [
    (estimate(0.05, 0.01, 0.09), 0.04, SUPPORTED),
    (estimate(0.05, 0.01, 0.09), 0.06, UNDECIDED),
    (estimate(0.05, 0.01, 0.09), math.nan, UNDECIDED),
    (estimate(-0.05, -0.09, -0.01), 0.04, REFUTED),
    (estimate(0.0, -0.005, 0.005), 1.0, REFUTED),
    (estimate(0.004, 0.002, 0.006), 0.04, SUPPORTED),  # small, but there
    (estimate(0.0, -0.02, 0.02), 1.0, UNDECIDED),
    (estimate(0.05), 0.01, UNDECIDED),  # no interval
  ],
)
def test_gain_verdict(difference, adjusted, wanted):
  assert comparisons.gain_verdict(difference, adjusted, 0.01) == wanted


@pytest.mark.parametrize(
  ('difference', 'control', 'wanted'),
  [
    (estimate(-0.2, -0.3, -0.1), 0.5, SUPPORTED),
    (estimate(0.2, 0.1, 0.3), 0.5, REFUTED),
    (estimate(0.0, -0.04, 0.1), 0.5, REFUTED),  # not even a tenth of 0.5
    (estimate(0.0, -0.06, 0.1), 0.5, UNDECIDED),
    (estimate(0.0, 0.0, 0.0), 0.0, REFUTED),  # nothing to reduce
    (estimate(-0.2), 0.5, UNDECIDED),
  ],
)
def test_reduction_verdict(difference, control, wanted):
  assert conflict_analysis.reduction_verdict(difference, control) == wanted


@pytest.mark.parametrize(
  ('difference', 'wanted'),
  [
    (estimate(0.0, -0.019, 0.03, level=0.9), SUPPORTED),
    (estimate(0.0, -0.021, 0.03, level=0.9), UNDECIDED),
    (estimate(-0.015, -0.021, -0.01, level=0.9), UNDECIDED),  # worse, perhaps not by much
    (estimate(-0.05, -0.07, -0.021, level=0.9), REFUTED),
    (estimate(0.0, level=0.9), UNDECIDED),
  ],
)
def test_offset_verdict(difference, wanted):
  assert comparisons.offset_verdict(difference, 0.02) == wanted


@pytest.mark.parametrize(
  ('within', 'wanted'),
  [
    (estimate(0.6, 0.2, 0.9, p=0.01), SUPPORTED),
    (estimate(-0.6, -0.9, 0.2, p=0.01), REFUTED),
    (estimate(0.0, -0.2, 0.2, p=0.9), REFUTED),
    (estimate(0.1, -0.2, 0.4, p=0.3), UNDECIDED),
    (estimate(0.9), UNDECIDED),
  ],
)
def test_link_verdict(within, wanted):
  assert conflict_analysis.link_verdict(within) == wanted


def test_verdicts_of_several():
  s, r, u = SUPPORTED, REFUTED, UNDECIDED
  several = ([s, s], [s, u], [s, r], [r, u], [r, r], [s, s, r], [r, r, s], [u], [])
  assert [verdicts.agreed(v) for v in several] == [s, u, u, u, r, u, u, u, u]
  n = UNTESTED
  assert [verdicts.chain(v) for v in ([s, s], [s, u], [s, r], [r, u], [r, n], [s, n], [u], [])] == [
    s, u, r, r, r, u, u, u,
  ]  # fmt: skip


def test_no_verdict_is_easier_to_have_than_its_opposite():
  """The rule for several verdicts says of the opposite of each the opposite."""
  opposite = {SUPPORTED: REFUTED, REFUTED: SUPPORTED, UNDECIDED: UNDECIDED}
  for several in itertools.product(opposite, repeat=4):
    mirrored = verdicts.agreed([opposite[v] for v in several])
    assert mirrored == opposite[verdicts.agreed(several)]


def test_an_effect_is_found(full):
  for words in ('improves macro-F1', 'not by capacity alone', 'reduces gradient', 'offsetting'):
    assert claim(full, words).verdict == SUPPORTED, words
  (found,) = pick(full.comparisons, 'csba', 'none')
  assert found.difference.value == pytest.approx(0.06, abs=0.015)
  assert found.difference.value == pytest.approx(found.treatment_mean - found.control_mean)
  assert found.difference.low > 0.03
  assert (found.cell, found.outcome, found.difference.n) == (CELL, 'macro-F1', 8)


def test_sentences_have_the_numbers(full):
  (found,) = pick(full.comparisons, 'csba', 'none')
  d = found.difference
  first, second = claim(full, 'improves macro-F1').sentences
  assert first == (
    f'csba against none, cross entropy: macro-F1 {found.treatment_mean:.3f} against '
    f'{found.control_mean:.3f}, difference {d.value:+.3f} (95 % interval {d.low:+.3f} to '
    f'{d.high:+.3f}, Holm-adjusted p {found.adjusted_p:.3f}, 8 pairs of seeds): supported.'
  )
  assert second.startswith('csba_class against none, cross entropy: macro-F1 ')


@pytest.mark.seconds
def test_nothing_is_made_of_nothing(null):
  assert claim(null, 'improves macro-F1').verdict in (REFUTED, UNDECIDED)
  assert claim(null, 'capacity').verdict != SUPPORTED
  assert claim(null, 'reduces').verdict != SUPPORTED
  assert claim(null, 'Overall').verdict != SUPPORTED
  assert all(c.verdict != SUPPORTED for c in null.comparisons)


@pytest.mark.seconds
def test_a_gain_that_is_excluded_is_not_supported(tmp_path):
  made = simulated.make(seeds=10, effect=-0.05, conflict_effect=-0.2, variants=TWO)
  found = analysed(tmp_path, *made)
  assert claim(found, 'improves').verdict == REFUTED
  overall = claim(found, 'Overall: CSBA makes a better tail by less conflict')
  assert overall.verdict == REFUTED


def test_what_rests_on_a_link_that_failed_is_untested(tmp_path):
  """There is no gain to be explained or paid for, and no reduction to go with it."""
  about, records = with_tested(
    *simulated.make(seeds=8, effect=-0.05, variants=('none', 'none_wide', 'csba')),
    lambda record, entry: entry,
  )
  rng = np.random.default_rng(0)
  for record in records:
    for entry in record['conflict']:
      if entry['at'] != 'tested':  # more conflict with csba, by every measure
        level = 0.4 + 0.2 * (record['axes']['variant'] == 'csba') + rng.normal(0, 0.02)
        measures = dict.fromkeys(conflict_analysis.LESS_IS_BETTER, float(level))
        entry |= {'grams': {}, 'scopes': {'common': measures}}
  found = analysed(tmp_path, about, records)
  gain, less = claim(found, 'improves'), claim(found, 'reduces')
  assert (gain.verdict, less.verdict) == (REFUTED, REFUTED)
  rests = {'capacity': gain, 'offsetting': gain, 'Less conflict goes': less}
  for words, other in rests.items():
    one = claim(found, words)
    assert one.verdict == UNTESTED
    assert one.sentences[-1] == f'Untested: it rests on "{other.title}": not supported.'
    assert one.plain.startswith('It was not tested whether ')
    assert one.plain.endswith(f': "{other.title}" is not supported.')
    assert f'{one.title}: untested.' in claim(found, 'Overall').sentences
  assert (
    claim(found, 'Overall')
    .sentences[0]
    .startswith('Supported in 0 of 5 links, not supported in 2, undecided in 0, untested in 3: ')
  )
  assert claim(found, 'Overall').plain.endswith(
    'of 5 links 0 supported, 2 not supported, 0 undecided, 3 untested.'
  )
  # what was measured for it stays in view, with its own verdict
  assert claim(found, 'offsetting').sentences[0].endswith(': not supported.')
  text, drawn, terminal = markdown.render(found), page.render(found), write.summary(found)
  assert '- **UNTESTED** It was not tested whether CSBA costs more than 0.02' in text
  assert '- **Without offsetting problems**: **UNTESTED**' in text
  assert drawn.count('<span class="badge idle"><span aria-hidden="true">–</span> untested') == 6
  assert 'Without offsetting problems: untested' in terminal.splitlines()
  assert '| Without offsetting problems | **untested** |' in readme.of_study(found, 'folder')


@pytest.mark.seconds
def test_an_undecided_link_leaves_the_others_to_their_numbers(redrawn):
  found = findings.analyse(redrawn, resamples=499)
  assert claim(found, 'improves').verdict == claim(found, 'Overall').verdict == UNDECIDED
  assert claim(found, 'offsetting').verdict != UNTESTED


def test_capacity_is_told_from_attention(tmp_path):
  made = simulated.make(capacity=0.06, variants=('none', 'none_wide', 'csba'))
  found = analysed(tmp_path, *made)
  assert claim(found, 'improves').verdict == SUPPORTED
  assert claim(found, 'capacity').verdict != SUPPORTED


@pytest.mark.seconds
def test_a_gain_at_the_cost_of_the_head_is_an_offset(tmp_path):
  # the others gain what the head loses
  found = analysed(tmp_path, *simulated.make(seeds=10, effect=0.15, accuracy=-0.25, variants=TWO))
  assert claim(found, 'improves').verdict == SUPPORTED
  # the accuracy and the head itself do not say the same
  assert claim(found, 'offsetting').verdict == UNDECIDED
  assert [c.verdict for c in found.offsets] == [UNDECIDED, REFUTED]
  assert {c.outcome for c in found.offsets} == {'accuracy', 'head F1'}
  assert all(c.difference.level == 0.9 for c in found.offsets)


@pytest.mark.seconds
def test_holm_is_over_the_family_and_no_more(tmp_path):
  made = simulated.make(seeds=6, effect=0.01, methods=('cross_entropy', 'balanced_softmax'))
  found = analysed(tmp_path, *made)
  family = [c for c in found.comparisons if c.verdict]
  pairs = {(c.treatment, c.control, c.cell['method']) for c in family}
  assert pairs == {
    (t, c, m)
    for t in ('csba', 'csba_class')
    for c in ('none', 'none_wide')
    for m in ('cross_entropy', 'balanced_softmax')
  }
  assert len(family) == 8
  np.testing.assert_array_equal(
    [c.adjusted_p for c in family], stats.holm([c.difference.p for c in family])
  )
  others = [c for c in found.comparisons if not c.verdict]
  assert {(c.treatment, c.control) for c in others} == set(BESIDE)
  assert all(math.isnan(c.adjusted_p) and not math.isnan(c.difference.p) for c in others)


def test_too_few_seeds_for_the_family_are_noted(tmp_path, full):
  found = analysed(tmp_path, *simulated.make(seeds=5, variants=('none', 'none_wide', 'csba')))
  assert claim(found, 'improves').verdict == UNDECIDED
  assert (
    '5 seeds cannot support any comparison: the smallest p of 2 tests is 0.125 after Holm; '
    'use 7 seeds'
  ) in found.notes
  assert not any('cannot support' in note for note in full.notes)
  # the promise: 2 tests of 7 seeds, and not of 6
  assert 2 * 2.0**-6 < 0.05 < 2 * 2.0**-5


def test_one_seed_has_no_interval_and_says_so(tmp_path):
  found = analysed(tmp_path, *simulated.make(seeds=1, variants=TWO))
  (one,) = found.comparisons
  assert math.isnan(one.difference.low)
  assert not math.isnan(one.difference.value)
  assert 'no interval' in claim(found, 'improves').sentences[0]
  assert '1 pair of seeds' in claim(found, 'improves').sentences[0]
  assert {c.verdict for c in found.claims} == {UNDECIDED, UNTESTED}
  assert [c.title for c in found.claims if c.verdict == UNTESTED] == [
    'The gain in macro-F1 is not by capacity alone',  # no none_wide
  ]
  assert (
    'csba against none, cross entropy: 1 pair of runs; with fewer than two seeds there is no '
    'interval'
  ) in found.notes
  assert found.noise == ()


def test_a_missing_unit_is_named(tmp_path):
  about, records = simulated.make(seeds=4, variants=TWO)
  records = [r for r in records if r['run'] != 'csba-cross_entropy-grouped-s2-f0']
  found = analysed(tmp_path, about, records)
  (one,) = found.comparisons
  assert one.missing == ('csba without seed 2',)
  assert one.difference.n == 3
  assert 'csba against none, cross entropy: csba without seed 2' in found.notes
  # what is left is paired with its own partners
  both = [r for r in records if r['axes']['seed'] != 2]
  by = {(r['axes']['variant'], r['axes']['seed']): r['result']['macro_f1'] for r in both}
  wanted = np.mean([by['csba', s] - by['none', s] for s in (0, 1, 3)])
  assert one.difference.value == pytest.approx(wanted)


def test_a_missing_variant_is_named(tmp_path):
  about, records = simulated.make(seeds=4, variants=('none', 'none_wide', 'csba'))
  records = [r for r in records if r['axes']['variant'] != 'none_wide']
  found = analysed(tmp_path, about, records)
  (one,) = pick(found.comparisons, 'csba', 'none_wide')
  assert one.missing == ('none_wide without any run',)
  assert (one.difference.n, one.verdict) == (0, UNDECIDED)
  assert 'none_wide was planned, and has no finished run' in found.notes
  assert 'csba against none_wide, cross entropy: none_wide without any run' in found.notes
  assert claim(found, 'capacity').verdict == UNDECIDED
  assert found.variants == ('none', 'csba')


def test_a_variant_that_was_not_planned_is_no_comparison(tmp_path):
  found = analysed(tmp_path, *simulated.make(seeds=2, variants=TWO))
  assert [(c.treatment, c.control) for c in found.comparisons] == [('csba', 'none')]
  assert claim(found, 'capacity').sentences == (
    'csba against none_wide: nothing was run or measured that could tell: untested.',
  )


def test_csba_class_leads_where_csba_is_not_run(tmp_path):
  found = analysed(tmp_path, *simulated.make(variants=('none', 'csba_class')))
  assert claim(found, 'csba_class improves').verdict == SUPPORTED


def nearly(result, record):
  """The same result but for a thousandth of macro-F1, up or down by the record's seed."""
  change = 0.001 * (-1) ** record['axes']['seed']
  return copy.deepcopy(result) | {'macro_f1': result['macro_f1'] + change}


def test_identical_results_decide_nothing(tmp_path):
  about, records = simulated.make(variants=TWO)
  for record in records:  # neither ever finds the rarest class
    record['result']['per_class']['f1'][3] = 0.0
  found = analysed(
    tmp_path, about | {'config': about['config'] | {'outcome': 'f1:broken'}}, records
  )
  (one,) = found.comparisons
  assert (one.difference.value, one.difference.known, one.verdict) == (0, False, UNDECIDED)
  assert 'no interval: identical differences' in claim(found, 'improves').sentences[0]
  assert not found.scores[0].metrics['f1:broken'].known
  for text in (markdown.render(found), page.render(found)):
    assert '0.000 [–]' in text
    assert 'no interval: identical differences over 8 seeds' in ' '.join(text.split())
    assert 'no interval: identical values over 8 seeds' in ' '.join(text.split())  # of scores


def test_csba_class_has_sentences_but_no_vote(tmp_path):
  about, records = simulated.make(variants=('none', 'csba', 'csba_class'))
  results_of = {r['axes']['seed']: r['result'] for r in records if r['axes']['variant'] == 'none'}
  for record in records:
    if record['axes']['variant'] == 'csba_class':
      record['result'] = nearly(results_of[record['axes']['seed']], record)
  found = claim(analysed(tmp_path, about, records), 'improves')
  assert found.verdict == SUPPORTED
  assert [s.rsplit(': ', 1)[1] for s in found.sentences] == ['supported.', 'not supported.']


def test_cells_are_counted(tmp_path):
  made = simulated.make(seeds=8, methods=('cross_entropy', 'drw'), variants=TWO)
  for record in made[1]:
    if record['axes']['method'] == 'drw' and record['axes']['variant'] == 'csba':
      twin = record['axes'] | {'variant': 'none'}
      record['result'] = nearly(next(r['result'] for r in made[1] if r['axes'] == twin), record)
  found = claim(analysed(tmp_path, *made), 'improves')
  assert found.verdict == UNDECIDED
  assert found.sentences[-1] == (
    'csba: supported in 1 of 2 conditions, not supported in 1, undecided in 0, so undecided over '
    'all conditions.'
  )


def test_the_outcome_of_a_class(tmp_path):
  about, records = simulated.make(outcome='f1:broken', variants=TWO)
  found = analysed(tmp_path, about, records)
  assert found.outcome == 'F1 of broken'
  assert next(iter(found.scores[0].metrics)) == 'f1:broken'
  f1 = [r['result']['per_class']['f1'][3] for r in records if r['axes']['variant'] == 'csba']
  assert found.comparisons[0].treatment_mean == pytest.approx(np.mean(f1))


def test_scores(full):
  assert [score.variant for score in full.scores] == list(simulated.VARIANTS)
  csba = full.scores[4]
  assert list(csba.metrics) == list(comparisons.METRICS)
  assert csba.parameters == 340_634
  assert csba.confusion.shape == (4, 4)
  assert csba.confusion.sum() == 8 * 1000
  assert all(e.known and e.n == 8 and math.isnan(e.p) for e in csba.metrics.values())
  assert np.mean([e.value for e in csba.per_class_f1]) == pytest.approx(
    csba.metrics['macro_f1'].value
  )


@pytest.mark.seconds
def test_folds_take_the_corrected_interval(folded):
  (one,) = pick(folded.comparisons, 'csba', 'none')
  assert one.difference.method == 'corrected resampled t over 10 folds'
  assert one.difference.n == 10
  assert '10 pairs of folds' in claim(folded, 'improves').sentences[0]
  assert all('corrected' in c.difference.method for c in folded.offsets)
  assert 'corrected' in folded.scores[0].metrics['accuracy'].method
  assert any('folds share training images' in note for note in folded.notes)


def estimates_of(found):
  """{(low, high): {where: estimates}} by what they can be."""
  compared = (*found.comparisons, *found.offsets)
  cosines, rates = (
    [c.difference for c in found.conflict if (c.outcome == 'mean_cosine') == cosine]
    for cosine in (True, False)
  )
  return {
    (0, 1): {'means': [e for s in found.scores for e in (*s.metrics.values(), *s.per_class_f1)]},
    (-1, 1): {
      'differences': [c.difference for c in compared],
      'uncorrected': [c.uncorrected for c in compared if c.uncorrected],
      'conflict': rates,
      'noise': [c.difference for c in found.noise],
      'leak': [c.difference for c in found.leak],
    },
    (-2, 2): {'cosines': cosines},
  }


def wild(**options):
  """A study of few units, which rarely agree; of conflict, the summaries alone."""
  about, records = simulated.make(variants=TWO, **options)
  rng = np.random.default_rng(6)
  for record in records:
    result = record['result'] | dict.fromkeys(comparisons.METRICS[:3], float(rng.integers(0, 2)))
    result['per_class']['f1'] = rng.integers(0, 2, 4).astype(float).tolist()
    record['result'] = result
    for entry in record['conflict']:
      entry['grams'] = {}
      shares = dict.fromkeys(conflict_analysis.LESS_IS_BETTER, float(rng.integers(0, 2)))
      cosine = float(2 * rng.integers(0, 2) - 1)
      entry['scopes'] = {'common': {**shares, 'mean_cosine': cosine}}
  return about, records


@pytest.mark.parametrize('options', [{'folds': 4, 'seeds': 1, 'leak': 0.1}, {'redrawn': True}])
def test_no_interval_ends_where_its_number_cannot_be(tmp_path, monkeypatch, options):
  read = written(tmp_path, *wild(**{'seeds': 4, **options}))
  found = findings.analyse(read, resamples=499)
  absent = 'uncorrected' if 'folds' in options else 'leak'
  for (low, high), groups in estimates_of(found).items():
    for where, estimates in groups.items():
      ends = [end for e in estimates if e.known for end in (e.low, e.high)]
      assert all(low <= end <= high for end in ends), where
      assert {low, high} & set(ends) or where == absent, where  # some were cut
  monkeypatch.setattr(Estimate, 'cut', lambda self, low, high: self)
  uncut = findings.analyse(read, resamples=499)
  assert [c.verdict for c in uncut.claims] == [c.verdict for c in found.claims]
  for group in ('comparisons', 'offsets', 'conflict', 'noise', 'leak'):
    for a, b in zip(getattr(uncut, group), getattr(found, group), strict=True):
      assert a.verdict == b.verdict
      assert a.difference.excludes(0) == b.difference.excludes(0)


def test_the_ratio_is_of_test_images_to_the_rest_of_the_set(tmp_path):
  made = simulated.make(seeds=2, folds=3, variants=TWO)
  study = comparisons.Study(written(tmp_path, *made), 499)
  comparison = comparisons.compare_outcome(study, study.cells[0], ('csba', 'none'), 'macro_f1')
  by = {
    (r['axes']['variant'], r['axes']['repeat'], r['axes']['fold']): r['result']['macro_f1']
    for r in made[1]
  }
  differences = [by['csba', r, f] - by['none', r, f] for r in range(2) for f in range(3)]
  # 200 images are tested and 632 train: how many train says nothing of what a cut tail left out
  assert comparison.difference == stats.corrected_resampled_t(differences, 1 / 2)


def test_folds_are_those_asked_for_else_those_that_were_run(tmp_path):
  about, records = simulated.make(seeds=1, folds=5, variants=TWO)
  some = [r for r in records if r['axes']['fold'] < 4]
  study = comparisons.Study(written(tmp_path / 'a', about, some), 499)
  assert (study.folds, study.test_to_rest) == (5, 1 / 4)
  about['config']['base']['data']['folds'] = 0
  study = comparisons.Study(written(tmp_path / 'b', about, some), 499)
  assert (study.folds, study.test_to_rest) == (4, 1 / 3)


@pytest.fixture(scope='module')
def redrawn(tmp_path_factory):
  """Records of ten seeds that redraw one set, with a loss that plain intervals are sure of."""
  about, records = simulated.make(seeds=10, effect=0, variants=TWO, redrawn=True)
  for record in records:
    if record['axes']['variant'] == 'csba':
      twin = record['axes'] | {'variant': 'none'}
      of_none = next(r['result']['macro_f1'] for r in records if r['axes'] == twin)
      record['result']['macro_f1'] = of_none + 0.02 * (-1) ** record['axes']['seed'] - 0.008
  return written(tmp_path_factory.mktemp('redrawn'), about, records)


@pytest.mark.seconds
def test_seeds_that_redraw_one_set_are_judged_by_the_corrected_interval(redrawn):
  found = findings.analyse(redrawn, resamples=499)
  (one,) = found.comparisons
  differences = 0.02 * (-1.0) ** np.arange(10) - 0.008
  expected = stats.corrected_resampled_t(differences, 0.3 / 0.7)
  assert (one.difference.low, one.difference.high, one.difference.p) == pytest.approx(
    (expected.low, expected.high, expected.p)
  )
  assert one.difference.method == 'corrected resampled t over 10 seeds'
  assert one.uncorrected.method == 'exact bootstrap-t over 10 seeds'
  assert one.difference.low < one.uncorrected.low
  assert one.uncorrected.high < 0.01 < one.difference.high
  assert (one.verdict, one.adjusted_p) == (UNDECIDED, pytest.approx(expected.p))
  assert claim(found, 'improves').verdict == UNDECIDED
  ends = wording.within(one.uncorrected, (0, 0.01))
  words_of_it = f': undecided (as if seeds shared no images: {ends}).'
  assert claim(found, 'improves').sentences[0].endswith(words_of_it)
  assert all(c.difference.level == c.uncorrected.level == 0.9 for c in found.offsets)
  for every in (found.offsets, found.conflict, found.similarity_differences):
    known = [c.difference for c in every if c.difference.known]
    assert {e.method.partition(' over')[0] for e in known} == {'corrected resampled t'}
  assert 'corrected resampled t' in found.scores[0].metrics['macro_f1'].method
  links = [link for link in found.links if link.verdict]
  assert all('corrected for the overlap' in link.within.method for link in links)
  for link in links:
    expected = stats.association(link.reduction, link.gain, 3 / 7)
    assert (link.within.low, link.within.p) == pytest.approx((expected.low, expected.p))
    assert link.uncorrected == stats.association(link.reduction, link.gain)


def test_independent_seeds_are_not_corrected(full):
  every = (*full.comparisons, *full.offsets, *full.conflict, *full.similarity_differences)
  assert not [c for c in every if 'corrected' in c.difference.method or c.uncorrected]
  assert not [x for x in full.links if 'corrected' in x.within.method or x.uncorrected]


@pytest.mark.seconds
def test_seeds_that_redraw_one_set_are_cautioned_about(redrawn, full, folded):
  found = findings.analyse(redrawn, resamples=499)
  (caution,) = found.cautions
  assert caution in found.notes
  assert claim(found, 'Overall').sentences[-1] == f'Caution: {caution}.'
  assert caution.endswith(
    'verdicts are those of the corrected resampled t, which knows the overlap; they speak of this '
    'set, not of new data'
  )
  for other in (full, folded):  # a separate test set, and folds, which have a note of their own
    assert other.cautions == ()
    assert all(c.uncorrected is None for c in (*other.comparisons, *other.offsets))
    text = markdown.render(other).partition('## Paired differences')[2].partition('\n## ')[0]
    assert 'uncorrected interval' not in text
  text = ' '.join(markdown.render(found).split())
  assert '| uncorrected interval |' in text
  ends = wording.ends(found.comparisons[0].uncorrected, signed=True, limits=(0, 0.01))
  assert f'| undecided | {ends} |' in text
  assert caution in text


def test_one_rate_for_all_variants_is_exploratory():
  def cautions(tuned_by, variants=TWO):
    about, records = simulated.make(seeds=2, variants=variants)
    about['config'] |= {} if tuned_by is None else {'tuned_by': tuned_by}
    return findings.analyse(results.Results(about, tuple(records), (), ()), resamples=99).cautions

  (one,) = cautions('')
  assert one.startswith('exploratory: all variants were trained with the same learning rate, tuned')
  assert cautions('results/tuning') == cautions(None) == cautions('', ('none',)) == ()


def test_a_condition_that_the_protocol_does_not_have_is_exploratory():
  def cautions(method, own):
    about, records = simulated.make(seeds=2, variants=TWO)
    about['config'] |= {'own_methods': {name: {} for name in own}}
    records = [r | {'axes': r['axes'] | {'method': method}} for r in records]
    return findings.analyse(results.Results(about, tuple(records), (), ()), resamples=99).cautions

  (one,) = cautions('group_norm', ('group_norm', 'never_run'))
  assert one == (
    'exploratory: the protocol (docs/study.md) plans no verdict with group norm, which is of this '
    'study alone'
  )
  assert cautions('cross_entropy', ('never_run',)) == cautions('cross_entropy', ()) == ()


def test_one_split_for_all_seeds_is_not_redrawn(redrawn):
  same = [r | {'result': r['result'] | {'splits_sha256': 'one'}} for r in redrawn.done]
  study = comparisons.Study(dataclasses.replace(redrawn, done=tuple(same)), 499)
  assert not study.redrawn
  assert comparisons.Study(redrawn, 499).redrawn
  assert comparisons.Study(redrawn, 499).test_to_rest == pytest.approx(3 / 7)


@pytest.mark.seconds
def test_naive_splits_are_for_the_leak_alone(folded):
  everything = (*folded.comparisons, *folded.offsets, *folded.conflict, *folded.noise)
  assert {c.cell['split'] for c in everything} == {'grouped'}
  assert {score.cell['split'] for score in folded.scores} == {'grouped', 'naive'}
  assert {m.cell['split'] for m in folded.matrices} == {'grouped'}


@pytest.mark.seconds
def test_a_leak_is_measured(folded, full):
  assert [c.treatment for c in folded.leak] == ['none', 'none_wide', 'csba']
  for one in folded.leak:
    assert one.difference.value == pytest.approx(0.08, abs=0.03)
    assert one.difference.low > 0
    assert one.treatment_mean > one.control_mean
    assert 'split' not in one.cell
    words = 'corrected for the overlap, 10 against 10 runs, not paired'
    assert one.difference.method == f'Welch t {words}'
    assert one.uncorrected.method == 'Welch t, 10 against 10 runs, not paired'
    assert one.difference.low < one.uncorrected.low
    assert one.uncorrected.high < one.difference.high
  assert full.leak == ()


def test_welch():
  a, b = np.array([1.0, 2.0, 3.0, np.nan]), np.array([0.0, 1.0])
  found = comparisons.welch(a, b)
  # by hand: variances 1 / 3 and 0.5 / 2, 2.88 degrees of freedom (Welch-Satterthwaite)
  freedom = (1 / 3 + 1 / 4) ** 2 / ((1 / 3) ** 2 / 2 + (1 / 4) ** 2 / 1)
  half = scipy.stats.t.ppf(0.975, freedom) * math.sqrt(1 / 3 + 1 / 4)
  assert (found.value, found.n) == (1.5, 5)
  assert (found.low, found.high) == pytest.approx((1.5 - half, 1.5 + half))
  known, rest = a[:3], np.array([0.0, 1.0, 0.5, 0.7])
  scipys = scipy.stats.ttest_ind(known, rest, equal_var=False)
  ends = scipys.confidence_interval(0.95)
  found = comparisons.welch(known, rest)
  assert (found.low, found.high, found.p) == pytest.approx((ends.low, ends.high, scipys.pvalue))
  # by hand, as if either mean were of fewer units: 1 / n + ratio = 1 / m
  variances = [(1 / 3 + 0.25) * known.var(ddof=1), (1 / 4 + 0.25) * rest.var(ddof=1)]
  freedom = sum(variances) ** 2 / (variances[0] ** 2 / 2 + variances[1] ** 2 / 3)
  half = scipy.stats.t.ppf(0.975, freedom) * math.sqrt(sum(variances))
  found = comparisons.welch(known, rest, 0.25)
  assert (found.low, found.high) == pytest.approx((1.45 - half, 1.45 + half))
  assert comparisons.welch(np.array([1.0, 1.0]), rest).known  # one side may do without spread
  assert not comparisons.welch(a[:1], b).known
  flat = comparisons.welch(np.ones(2), np.zeros(2))
  assert (flat.value, flat.known) == (1, False)
  assert math.isnan(comparisons.welch(np.array([]), b).value)


def test_a_conflict_effect_is_recovered(full):
  end = {'at': '1', 'part': 'train', 'scope': 'common'}
  by = {c.outcome: c for c in pick(full.conflict, 'csba', 'none', **end)}
  assert by.keys() == set(conflict_analysis.MEASURES)
  assert by['mean_cosine'].difference.value == pytest.approx(0.2, abs=0.06)
  assert by['mean_cosine'].verdict == ''
  for measure in conflict_analysis.LESS_IS_BETTER:
    assert by[measure].verdict == SUPPORTED
    assert by[measure].difference.high < 0
  start = pick(full.conflict, 'csba', 'none', **(end | {'at': '0'}))
  assert all(c.verdict != SUPPORTED for c in start)
  for other in ('se', 'cbam', 'none_wide'):
    (found,) = [
      c for c in pick(full.conflict, other, 'none', **end) if c.outcome == 'head_tail_conflict'
    ]
    assert found.verdict != SUPPORTED


def test_the_claim_on_conflict_is_of_the_end_and_the_lowest_matched_loss(full):
  sentences = claim(full, 'reduces').sentences
  assert len(sentences) == 2 * 2 * 2  # measures, snapshots, treatments
  assert all('(common parameters, train part)' in sentence for sentence in sentences)
  assert sum('at the end of the run: ' in sentence for sentence in sentences) == 4
  assert sum('at training loss ≤ 0.3: ' in sentence for sentence in sentences) == 4


def test_conflict_has_every_snapshot_part_and_scope(full):
  found = {(c.cell['at'], c.cell['part'], c.cell['scope']) for c in full.conflict}
  assert found == {
    (at, part, scope)
    for at in simulated.SNAPSHOTS
    for part in ('train', 'val')
    for scope in ('common', 'shared')
  }
  pairs = {(c.treatment, c.control) for c in full.conflict}
  assert pairs == {*protocol.FAMILY, *BESIDE}


def test_a_loss_that_one_side_did_not_reach_is_no_comparison(tmp_path):
  about, records = simulated.make(seeds=4, variants=TWO)
  for record in records:
    gone = {'loss 0.3'} if record['axes']['variant'] == 'csba' else set()
    gone |= {'loss 1'} if record['axes']['seed'] == 2 else set()
    record['conflict'] = [e for e in record['conflict'] if e['at'] not in gone]
  found = analysed(tmp_path, about, records)
  assert not pick(found.conflict, 'csba', 'none', at='loss 0.3')
  one = pick(found.conflict, 'csba', 'none', at='loss 1', part='train')[0]
  assert one.difference.n == 3
  assert one.missing == ()  # both sides lack it
  sentences = ' '.join(claim(found, 'reduces').sentences)
  assert 'at training loss ≤ 1: ' in sentences


def test_a_snapshot_that_one_run_lacks_is_named(tmp_path):
  about, records = simulated.make(seeds=3, variants=TWO)
  records[1]['conflict'] = [e for e in records[1]['conflict'] if e['at'] != 'loss 0.3']
  found = analysed(tmp_path, about, records)
  lacking = f"csba without the snapshot 'loss 0.3' (train) of seed {records[1]['axes']['seed']}"
  assert pick(found.conflict, 'csba', 'none', at='loss 0.3', part='train')[0].missing == (lacking,)
  assert f'csba against none, cross entropy: {lacking}' in found.notes


def test_losses_that_are_too_far_apart_are_not_matched(tmp_path, full):
  """The level was reached by both, but not at the same loss: no verdict on conflict there."""
  about, records = simulated.make(variants=TWO)
  for record in records:
    for entry in record['conflict']:
      if entry['at'] == 'loss 0.3' and record['axes']['variant'] == 'csba':
        entry['loss'] /= 1.3
  found = analysed(tmp_path, about, records)
  at = {'at': 'loss 0.3', 'part': 'train', 'scope': 'common'}
  far, near = (
    next(c for c in pick(x.conflict, 'csba', 'none', **at) if c.outcome == 'head_tail_conflict')
    for x in (found, full)
  )
  assert near.verdict == SUPPORTED
  assert far.verdict == UNDECIDED
  assert far.difference.high < 0
  both = [
    [
      results.conflict_entry(r, 'loss 0.3', 'train')['loss']
      for r in records
      if r['axes']['variant'] == variant
    ]
    for variant in ('csba', 'none')
  ]
  assert far.losses == pytest.approx([np.exp(np.mean(np.log(x))) for x in both])
  assert conflict_analysis.are_matched(near.losses)
  sentences = claim(found, 'reduces').sentences
  (words,) = [x for x in sentences if 'at training loss ≤ 0.3' in x and 'head-tail' in x]
  assert words.endswith(': undecided (the losses are too far apart to compare).')
  assert ' against '.join(wording.number(x) for x in far.losses) in words


@pytest.mark.parametrize(
  ('losses', 'wanted'),
  [((1.0, 1.25), True), ((1.25, 1.0), True), ((1.0, 1.26), False), ((math.nan, 1.0), False)],
)
def test_losses_are_matched_within_a_factor(losses, wanted):
  assert conflict_analysis.are_matched(losses) is wanted


def test_a_wider_net_has_no_verdict_on_conflict(full):
  """Its parameters of the scope common are not those of the others, though their names are."""
  found = [c for c in full.conflict if 'none_wide' in (c.treatment, c.control)]
  assert found
  assert not any(c.verdict for c in found)
  assert any(c.verdict for c in full.conflict)


def test_without_a_matched_loss_the_claim_is_undecided(tmp_path):
  about, records = simulated.make(variants=TWO)
  for record in records:
    record['conflict'] = [e for e in record['conflict'] if not e['at'].startswith('loss')]
  found = claim(analysed(tmp_path, about, records), 'reduces')
  assert found.verdict == UNDECIDED
  assert any('no conflict at matched loss' in sentence for sentence in found.sentences)


def test_summaries_serve_where_grams_were_not_kept(tmp_path, full):
  about, records = simulated.make()
  for record in records:
    for entry in record['conflict']:
      entry['grams'] = {}
      entry['scopes']['shared']['head_tail_conflict'] = None
  found = analysed(tmp_path, about, records)
  end = {'at': '1', 'part': 'train', 'scope': 'common'}
  for a, b in zip(
    pick(found.conflict, 'csba', 'none', **end),
    pick(full.conflict, 'csba', 'none', **end),
    strict=True,
  ):
    assert a.difference.value == pytest.approx(b.difference.value)
  assert not [
    c for c in found.conflict if (c.outcome, c.cell['scope']) == ('head_tail_conflict', 'shared')
  ]
  assert (found.links, found.matrices, found.mantel) == ((), (), ())


def test_without_measurements_there_is_still_a_report(tmp_path):
  about, records = simulated.make(seeds=2, variants=TWO)
  for record in records:
    del record['conflict'], record['branches']
  found = analysed(tmp_path, about, records)
  assert (found.conflict, found.links, found.flows, found.branch_similarity) == ((), (), (), ())
  for words in ('reduces', 'Less conflict goes'):
    one = claim(found, words)
    assert one.verdict == UNTESTED
    assert one.plain.startswith('It was not tested whether ')
    assert one.plain.endswith(': nothing was run or measured that could tell.')
  assert len(found.scores) == 2


def test_a_link_is_recovered(tmp_path):
  found = analysed(tmp_path, *simulated.make(seeds=24, link=0.95, variants=TWO))
  by = {link.measure.split()[0]: link for link in found.links if link.verdict}
  for link in by.values():
    assert link.within.value > 0.3
    assert link.verdict == SUPPORTED
    assert link.reduction.shape == link.gain.shape == (24, 4)
  assert claim(found, 'Less conflict goes').verdict == SUPPORTED
  assert claim(found, 'Overall').verdict == UNDECIDED  # no none_wide


def test_no_link_is_made_up(tmp_path):
  found = analysed(tmp_path, *simulated.make(seeds=24, link=0, variants=TWO))
  assert all(abs(link.within.value) < 0.3 for link in found.links if link.verdict)
  assert claim(found, 'Less conflict goes').verdict != SUPPORTED


def with_tested(about, records, change):
  """The same records with a snapshot of the tested net, `change` of that of the end."""
  for record in records:
    for entry in [e for e in record['conflict'] if e['at'] == '1']:
      record['conflict'].append(change(record, entry | {'at': 'tested'}))
  return about, records


@pytest.mark.seconds
def test_the_tested_net_decides_the_link(tmp_path):
  """What was measured at the end, of another net, is shown beside it."""

  def shuffled(record, entry):
    others = np.random.default_rng(record['axes']['seed'])
    gram = results.gram(entry, 'common')
    noise = others.normal(0, 1, gram.shape) * 0.3 * np.sqrt(np.outer(*[np.diag(gram)] * 2))
    np.fill_diagonal(noise, 0)
    gram = gram + (noise + noise.T) * (record['axes']['variant'] == 'csba')
    packed = gram[np.triu_indices(len(gram))].tolist()
    return entry | {'grams': {'shared': packed, 'common': packed}}

  found = analysed(
    tmp_path, *with_tested(*simulated.make(seeds=30, link=0.9, variants=TWO), shuffled)
  )
  judged = [link for link in found.links if link.verdict]
  assert all('tested net' in link.measure for link in judged)
  end = [link for link in found.links if 'images, end)' in link.measure]
  assert (len(judged), len(end)) == (2, 2)
  for of_end, of_tested in zip(end, judged, strict=True):
    assert of_end.within.value > of_tested.within.value + 0.1
  assert not any('images, end)' in s for s in claim(found, 'Less conflict').sentences)


def test_measurements_of_an_earlier_version_are_noted(tmp_path, full):
  """They lack the tested net: the end decides, and what is different is said."""
  note = next(n for n in full.notes if 'earlier version' in n)
  assert 'the end of the run stands in for it' in note
  assert 'estimated anew' not in markdown.render(full)
  same = with_tested(*simulated.make(seeds=4, variants=TWO), lambda record, entry: entry)
  found = analysed(tmp_path, *same)
  assert not any('earlier version' in n for n in found.notes)
  assert 'estimated anew' in ' '.join(markdown.render(found).split())


def test_the_tested_net_is_no_snapshot_of_the_curves(tmp_path):
  """It lies somewhere before the end: in the numbers, but on no line."""
  same = with_tested(*simulated.make(seeds=2, variants=TWO), lambda record, entry: entry)
  found = analysed(tmp_path, *same)
  section = page.render(found).partition('id="snapshots"')[2].partition('id="flow"')[0]
  curves, differences = section.partition('Numbers of this figure')[::2]
  assert '>end</text>' in curves
  assert 'tested' not in curves
  assert '>tested net<' in differences


def test_beside_the_link_stand_controls_and_every_variant_alone(full):
  pairs = [(link.treatment, link.control) for link in full.links if not link.verdict]
  beside = [*BESIDE, *((v, v) for v in simulated.VARIANTS)]
  assert pairs == [pair for pair in beside for _ in conflict_analysis.LINKS]


def test_a_variant_alone_is_its_conflict_against_its_f1(tmp_path):
  about, records = simulated.make(seeds=6, variants=('none',))
  found = analysed(tmp_path, about, records)
  alone = next(link for link in found.links if 'cosine' in link.measure)
  assert (alone.treatment, alone.control, alone.verdict) == ('none', 'none', '')
  for s, record in enumerate(records):
    gram = results.gram(results.conflict_entry(record, '1', 'train'), 'common')
    norms = np.sqrt(np.diag(gram))
    for c in range(4):
      cosines = [gram[c, d] / (norms[c] * norms[d]) for d in range(4) if d != c]
      assert alone.reduction[s, c] == pytest.approx(-np.mean([max(0, -x) for x in cosines]))
    assert alone.gain[s].tolist() == record['result']['per_class']['f1']


def test_matrices_of_branches_are_of_what_was_kept(tmp_path):
  about, records = simulated.make(seeds=2, variants=TWO)
  for record in records:
    for entry in record['conflict']:
      if (entry['at'], entry['part']) == ('1', 'train'):
        entry['grams']['branch3x3'] = entry['grams']['common']
  found = analysed(tmp_path, about, records)
  own = [m for m in found.matrices if m.scope == 'branch3x3']
  assert [(m.variant, m.at, m.part) for m in own] == [(v, '1', 'train') for v in TWO]
  of_common = next(m for m in found.matrices if (m.at, m.part, m.scope) == ('1', 'train', 'common'))
  np.testing.assert_array_equal(own[0].cosine, of_common.cosine)


def test_link_points_are_the_differences_of_one_unit(tmp_path):
  about, records = simulated.make(seeds=3, variants=TWO)
  found = analysed(tmp_path, about, records)
  by = {(r['axes']['variant'], r['axes']['seed']): r for r in records}
  interfering, cosine = (link for link in found.links if link.verdict)
  for seed in range(3):
    treated, control = by['csba', seed], by['none', seed]
    f1 = [np.array(r['result']['per_class']['f1']) for r in (treated, control)]
    np.testing.assert_allclose(interfering.gain[seed], f1[0] - f1[1])
    grams = [
      results.gram(results.conflict_entry(r, '1', 'train'), 'common') for r in (treated, control)
    ]
    own = [conflict_lib.interference(g, simulated.PRIOR) for g in grams]
    np.testing.assert_allclose(interfering.reduction[seed], own[1] - own[0])
    negative = []
    for g in grams:
      cos = g / np.sqrt(np.outer(np.diag(g), np.diag(g)))
      negative.append([np.mean([max(0, -cos[c, d]) for d in range(4) if d != c]) for c in range(4)])
    np.testing.assert_allclose(cosine.reduction[seed], np.subtract(negative[1], negative[0]))


def conflicts_of(records, variant, at, scope):
  """Conflict objects of single runs, to be averaged by hand."""
  found = []
  for record in (r for r in records if r['axes']['variant'] == variant):
    gram = results.gram(results.conflict_entry(record, at, 'train'), scope)
    found.append(
      Conflict(
        scopes=('shared',),
        grams=gram[None],
        errors=0 * gram[None],
        low=gram[None],
        high=gram[None],
        losses=np.zeros(4),
        counts=np.ones(4),
        class_names=simulated.CLASSES,
        class_counts=simulated.COUNTS,
        prior=simulated.PRIOR,
        about={},
      )
    )
  return found


def test_matrices_and_flows_are_means_of_runs(tmp_path):
  about, records = simulated.make(seeds=3, variants=TWO)
  broken = results.conflict_entry(records[0], '1', 'train')
  broken['grams']['shared'] = [
    None if i in (3, 6, 8, 9) else v for i, v in enumerate(broken['grams']['shared'])
  ]
  found = analysed(tmp_path, about, records)
  assert records[0]['axes']['variant'] == 'none'
  alone = conflicts_of(records, 'none', '1', 'shared')
  (matrix,) = [
    m
    for m in found.matrices
    if (m.variant, m.at, m.part, m.scope) == ('none', '1', 'train', 'shared')
  ]
  cosines = np.stack([c.cosine() for c in alone])
  np.testing.assert_allclose(matrix.cosine, np.nanmean(cosines, 0))
  assert (matrix.units, matrix.cell) == (3, CELL)
  (flow,) = [f for f in found.flows if (f.variant, f.at, f.part) == ('none', '1', 'train')]
  flows = [flow_lib.flow(c) for c in alone]
  np.testing.assert_allclose(flow.norms, np.nanmean([f.norms[0] for f in flows], 0))
  np.testing.assert_allclose(flow.shares, np.nanmean([f.shares[0] for f in flows], 0))
  entries = [
    results.conflict_entry(r, '1', 'train') for r in records if r['axes']['variant'] == 'none'
  ]
  assert flow.loss == pytest.approx(np.mean([e['loss'] for e in entries]))
  rate = np.mean([e['scopes']['stage2']['conflict_rate'] for e in entries])
  assert flow.scopes['stage2']['conflict_rate'] == pytest.approx(rate)


def test_similarity_of_branches(full):
  by = {(d.variant, d.at): d for d in full.branch_similarity}
  assert set(by) == {(v, at) for v in simulated.VARIANTS for at in ('0', '1')}
  csba, none = by['csba', '1'], by['none', '1']
  assert csba.cka.keys() == {'stage1/block1', 'stage2/block1', 'stage3/block1'}
  assert csba.cka['stage1/block1'] == pytest.approx(0.45, abs=0.03)
  assert none.cka['stage1/block1'] == pytest.approx(0.6, abs=0.03)
  assert csba.gate_spread['stage1/block1'] == pytest.approx(0.04)
  assert none.gate_spread == none.gates == {}
  np.testing.assert_allclose(csba.gates['stage1/block1'][0], [0.4, 0.5, 0.5, 0.6])


def test_similarity_of_the_branches_is_compared_with_none(tmp_path):
  about, records = simulated.make(seeds=3, variants=('none', 'se', 'csba'))
  lacking = next(r for r in records if r['axes'] | {'variant': 'se', 'seed': 1} == r['axes'])
  lacking['branches'] = [e for e in lacking['branches'] if e['at'] != '1']
  found = analysed(tmp_path, about, records)
  blocks = ('stage1/block1', 'stage2/block1', 'stage3/block1')
  pairs = [(c.treatment, c.control, c.outcome) for c in found.similarity_differences]
  assert pairs == [(t, 'none', f'CKA of {b}') for t in ('csba', 'se') for b in blocks]
  by = {(r['axes']['variant'], r['axes']['seed']): r['branches'][-1] for r in records}
  last = found.similarity_differences[2]
  values = [[by[v, s]['cka'][blocks[2]][0][1] for s in range(3)] for v in ('csba', 'none')]
  assert last.difference.value == pytest.approx(np.mean(np.subtract(*values)))
  assert (last.treatment_mean, last.control_mean) == pytest.approx(np.mean(values, 1))
  assert (last.verdict, last.difference.n) == ('', 3)
  assert found.similarity_differences[-1].difference.n == 2
  assert 'CKA of stage3/block1' in markdown.render(found).partition('## Conflict reduction')[0]


def test_mantel(full):
  titles = [title for title, _, _ in full.mantel]
  assert titles == [
    'conflict matrices of none and csba, cross entropy',
    'conflict matrices of none and csba_class, cross entropy',
    'conflict against confusion of none, cross entropy',
  ]
  mean = {(m.variant, m.at, m.part, m.scope): m.cosine for m in full.matrices}
  a, b = (mean[v, '1', 'train', 'common'] for v in TWO)
  # as text: an interval of NaN is not equal to itself
  assert str(full.mantel[0][1]) == str(stats.mantel(a, b, resamples=499))
  counts = full.scores[0].confusion
  rates = counts / counts.sum(1, keepdims=True)
  shared = mean['none', '1', 'train', 'shared']
  expected = stats.mantel(-shared, (rates + rates.T) / 2, resamples=499)
  assert str(full.mantel[2][1]) == str(expected)
  # two tests of one question, one of the other
  ps = [test.p for _, test, _ in full.mantel]
  adjusted = [p for _, _, p in full.mantel]
  assert adjusted == pytest.approx([*stats.holm(ps[:2]), ps[2]])
  assert '| p (Holm) |' in ' '.join(markdown.render(full).partition('Mantel tests')[2].split())


def test_confusion_is_set_beside_the_conflict_of_the_tested_net(tmp_path):
  about, records = simulated.make(seeds=4, variants=('none', 'csba'))
  for record in records:
    record['conflict'] += [e | {'at': 'tested'} for e in record['conflict'] if e['at'] == '0']
  found = analysed(tmp_path, about, records)
  grams = [
    results.gram(results.conflict_entry(record, 'tested', 'train'), 'shared')
    for record in records
    if record['axes']['variant'] == 'none'
  ]
  cosines = [gram / np.sqrt(np.outer(np.diag(gram), np.diag(gram))) for gram in grams]
  counts = found.scores[0].confusion
  rates = counts / counts.sum(1, keepdims=True)
  expected = stats.mantel(-np.mean(cosines, 0), (rates + rates.T) / 2, resamples=499)
  title, test, _ = found.mantel[-1]
  assert title.startswith('conflict against confusion of none')
  assert test.value == pytest.approx(expected.value)
  end = {(m.variant, m.at, m.part, m.scope): m.cosine for m in found.matrices}
  other = stats.mantel(-end['none', '1', 'train', 'shared'], (rates + rates.T) / 2, resamples=499)
  assert test.value != pytest.approx(other.value)


def test_the_noise_floor_is_null(full):
  assert [(c.treatment, c.control) for c in full.noise] == [
    (variant, variant) for variant in simulated.VARIANTS for _ in range(2)
  ]
  assert full.noise[0].outcome == full.noise[2].outcome == 'macro-F1'
  assert not any(c.difference.excludes(0) for c in full.noise)
  assert not any('noise floor' in note for note in full.notes)


def test_a_noise_floor_that_is_not_null_is_noted(tmp_path):
  about, records = simulated.make(seeds=12, variants=('none',))
  for record in records:
    # a difference that only a broken split of seeds can make
    record['result']['macro_f1'] = 0.5
  study = comparisons.Study(written(tmp_path, about, records), 499)
  values = np.array([0.5] * 12)
  shuffled = np.random.default_rng(0).permutation(12)
  values[shuffled[:6]] += 0.1 + 0.001 * np.arange(6)
  one = comparisons.noise(study, study.cells[0], 'none', 'macro-F1', values)
  assert one.difference.excludes(0)
  notes = findings._notes(study, (), (), [one])
  assert notes[-1] == (
    'noise floor: of two sets of runs of none the interval of the difference in macro-F1 leaves '
    'out 0 (cross entropy); 1 in 20 does by chance'
  )


def test_findings_do_not_depend_on_the_order_of_lines_or_the_time(tmp_path):
  about, records = simulated.make(seeds=5, variants=('none', 'none_wide', 'csba'))
  shuffled = random.Random(1).sample(records, len(records))
  a = analysed(tmp_path / 'a', about, records)
  b = analysed(tmp_path / 'b', about, shuffled)
  for field in dataclasses.fields(findings.Findings):
    assert plain(getattr(a, field.name)) == plain(getattr(b, field.name)), field.name


def plain(value):
  """Findings as text in which NaN equals NaN."""
  if dataclasses.is_dataclass(value):
    return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
  if isinstance(value, dict):
    return {k: plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [plain(v) for v in value]
  return value.tolist().__repr__() if isinstance(value, np.ndarray) else repr(value)


def test_about(tmp_path):
  about, records = simulated.make(seeds=2, variants=TWO)
  records[0]['commit'] = 'c' * 40
  records[3] = {k: v for k, v in records[3].items() if k not in ('result', 'conflict', 'branches')}
  records[3] |= {'status': 'failed', 'error': 'out of memory'}
  found = analysed(tmp_path, about, records)
  assert found.about['commands'] == (about['command'],)
  assert found.about['versions'] == simulated.VERSIONS
  assert set(found.about['commits']) == {'a' * 40, 'c' * 40}
  assert found.about['devices'] == ('simulated CPU',)
  assert (found.about['runs'], found.about['failed']) == (3, 1)
  assert found.about['seconds'] == pytest.approx(sum(r['seconds'] for r in records[:3]))
  assert found.about['config'] == about['config']
  assert f'run {records[3]["run"]} failed: out of memory' in found.notes
  assert (found.name, found.class_names) == ('simulated', simulated.CLASSES)
  assert [counts.tolist() for counts in found.class_counts] == [simulated.COUNTS.tolist()]
  json.dumps(found.about)


def test_majority_and_minority_are_those_of_the_runs(tmp_path):
  about, records = simulated.make(seeds=4, variants=TWO)
  records[0]['result']['class_counts'] = [400, 100, 60, 12]
  found = analysed(tmp_path, about, records)
  (shares,) = found.groups
  np.testing.assert_allclose(shares, [[1, 7 / 8, 0, 0], [0, 1 / 8, 1, 1]])


def test_unequal_capacity_is_noted(tmp_path, full):
  about, records = simulated.make(seeds=2, variants=('none', 'none_wide', 'csba'))
  for record in records:
    if record['axes']['variant'] == 'none_wide':
      record['result']['parameters'] = 400_000
  note = 'none_wide has 400000 parameters and csba 340634 (cross entropy): no control of equal'
  assert any(n.startswith(note) for n in analysed(tmp_path, about, records).notes)
  assert not any('parameters' in n for n in full.notes)


def test_cells_are_told_apart_in_words(tmp_path):
  about, records = simulated.make(seeds=2, variants=TWO)
  more = copy.deepcopy(records)
  for record in more:
    record['axes'] |= {'depth': 2}
    record['run'] += '-d2'
  study = comparisons.Study(written(tmp_path, about, records + more), 499)
  words = [study.condition(dict(cell)) for cell in study.cells]
  assert words == ['cross entropy, depth 1', 'cross entropy, depth 2']


def test_only_failures_are_an_error(tmp_path):
  about, records = simulated.make(seeds=2, variants=('none',))
  records = [
    {k: v for k, v in r.items() if k != 'result'} | {'status': 'failed', 'error': 'no data'}
    for r in records
  ]
  with pytest.raises(UserError, match='one finished run; found 2 failed ones.*with: no data'):
    analysed(tmp_path, about, records)


def test_a_tuning_study_is_an_error(tmp_path):
  about, records = simulated.make(seeds=2, variants=('none',))
  for record in records:
    record['result'] = {'validation_macro_f1': 0.5, 'parameters': 3}
  with pytest.raises(UserError, match='found one that only tunes'):
    analysed(tmp_path, about, records)


def test_other_classes_are_an_error(tmp_path):
  about, records = simulated.make(seeds=2, variants=('none',))
  records[0]['result']['class_names'] = list('abcd')
  with pytest.raises(UserError, match='the same classes in every run; found .*a, b, c, d'):
    analysed(tmp_path, about, records)


def test_an_unknown_outcome_is_an_error(tmp_path):
  with pytest.raises(UserError, match="found 'f1:rust'"):
    analysed(tmp_path, *simulated.make(seeds=2, variants=('none',), outcome='f1:rust'))


def test_words():
  assert wording.within(estimate(0.1, 0.0, 0.2, level=0.9)) == '90 % interval 0.000 to +0.200'
  assert wording.within(estimate(0.1)) == 'no interval'
  snapshots = ('0', '0.1', '1', 'loss 0.3')
  assert [wording.when(at) for at in snapshots] == [
    'at the start',
    'after 10 % of the run',
    'at the end of the run',
    'at training loss ≤ 0.3',
  ]
  assert [wording.snapshot(at) for at in snapshots] == ['start', '10 %', 'end', 'loss ≤ 0.3']
  assert [wording.pairs(n, 'seeds') for n in (1, 2)] == ['1 pair of seeds', '2 pairs of seeds']


@pytest.mark.parametrize(
  ('low', 'high', 'limits', 'wanted'),
  [
    (-0.025, 0.00966, (0, 0.01), '−0.025 to +0.0097'),  # a gain of 0.01 is excluded
    (-0.025, 0.01034, (0, 0.01), '−0.025 to +0.0103'),
    (-0.025, 0.0096, (), '−0.025 to +0.010'),
    (-0.0199, 0.02, (-0.02,), '−0.0199 to +0.020'),
    (-0.0004, 0.0004, (0, 0.01), '−0.0004 to +0.0004'),
    (-0.0201, 0.3, (-0.02,), '−0.0201 to +0.300'),
    (0.01, 0.0100000000000001, (0.01,), '+0.010 to +0.010'),  # rounding errors
  ],
)
def test_ends_are_seen_on_their_side_of_what_decides(low, high, limits, wanted):
  one = estimate(0.0, low, high)
  assert wording.within(one, limits) == f'95 % interval {wanted}'
  ends = wording.ends(one, signed=True, limits=limits)
  assert ends == f'[{wanted.replace(" to ", ", ")}]'


def test_correlations_and_probabilities_are_seen_on_their_side():
  one = estimate(0.1, -0.2, 0.2996)
  assert wording.interval(one, 2) == '0.10 [−0.20, 0.30]'
  assert wording.interval(one, 2, limits=(0.3,)) == '0.10 [−0.20, 0.2996]'
  assert [wording.probability(p) for p in (0.04996, 0.05, 0.0504, 0.3)] == [
    *('0.04996', '0.050', '0.0504', '0.300')
  ]


def test_a_verdict_and_the_interval_beside_it_agree(tmp_path):
  about, records = simulated.make(seeds=8, effect=0, variants=TWO)
  spread = np.array([0.01, -0.02, 0.015, -0.03, 0.0, 0.02, -0.01, -0.025])
  high = stats.paired_difference(spread, resamples=499).high
  control = {r['axes']['seed']: r['result'] for r in records if r['axes']['variant'] == 'none'}
  for record in records:
    if record['axes']['variant'] == 'csba':
      of_none, seed = control[record['axes']['seed']]['macro_f1'], record['axes']['seed']
      record['result']['macro_f1'] = of_none + spread[seed] - high + 0.0098
  found = analysed(tmp_path, about, records)
  assert found.comparisons[0].difference.high == pytest.approx(0.0098)
  assert claim(found, 'improves').verdict == REFUTED
  assert ' to +0.0098, ' in claim(found, 'improves').sentences[0]
  table = markdown.render(found).partition('## Paired differences')[2]
  assert ', +0.0098] |' in table


def test_sentences_and_tables_name_a_condition_alike(tmp_path):
  about, records = simulated.make(seeds=2, variants=TWO, methods=('balanced_softmax',))
  more = copy.deepcopy(records)
  for record in more:
    record['axes'] |= {'imbalance_factor': 1.0}
    record['run'] += '-if1'
  study = comparisons.Study(written(tmp_path, about, records + more), 499)
  cells = [dict(cell) for cell in study.cells]
  assert [study.condition(cell) for cell in cells] == [
    'balanced softmax, imbalance factor 1',
    'balanced softmax, imbalance factor 33',
  ]
  assert [wording.cell(cell, cells) for cell in cells] == [
    'imbalance factor 1',
    'imbalance factor 33',
  ]
  assert wording.condition(cells[0] | {'at': '1', 'part': 'train'}, cells[:1]) == (
    'balanced softmax'
  )


def test_every_metric_and_measure_has_one_name(full):
  assert {c.outcome for c in full.offsets} == {'accuracy', 'head F1'}
  sentences = ' '.join(claim(full, 'reduces').sentences)
  for name in ('head-tail conflict', 'minority interference'):
    assert f'{name} (common parameters, train part) at the end of the run: ' in sentences
  assert full.noise[1].outcome.startswith('head-tail conflict (common parameters, train part) at')
