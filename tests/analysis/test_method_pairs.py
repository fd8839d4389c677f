"""Methods against methods: against plain NumPy, from the records to the reports."""

import copy
import runpy
import types
from pathlib import Path

import numpy as np
import pytest

from csba_jax.analysis import findings, wording
from csba_jax.analysis.types import REFUTED, SUPPORTED, UNDECIDED
from csba_jax.gradients.conflict import summary
from csba_jax.report.study import content, markdown, page, readme, write
from csba_jax.study import results

simulated = types.SimpleNamespace(**runpy.run_path(Path(__file__).parents[1] / 'simulated.py'))
METHODS = ('cross_entropy', 'balanced_softmax', 'drw')
PAIRS = (('balanced_softmax', 'cross_entropy'), ('drw', 'balanced_softmax'))
VARIANTS = ('none', 'csba')


def made(pairs=PAIRS, **options):
  """(study.json, records); methods but cross-entropy have a recall that is 0.1 higher."""
  options = {'seeds': 8, 'variants': VARIANTS, 'methods': METHODS, **options}
  about, records = simulated.make(**options)
  about['config'] |= {'method_pairs': [list(pair) for pair in pairs]}
  return about, records


def analysed(about, records):
  return findings.analyse(results.Results(about, tuple(records), (), ()), resamples=99)


@pytest.fixture(scope='module')
def study():
  return made()


@pytest.fixture(scope='module')
def found(study):
  return analysed(*study)


def values(records, variant, method, of):
  chosen = [r for r in records if (r['axes']['variant'], r['axes']['method']) == (variant, method)]
  return np.array([of(r) for r in sorted(chosen, key=lambda r: r['axes']['seed'])])


def at_the_end(record, measure):
  """Of the Gram in the record, its lower triangle put together by a loop."""
  (entry,) = [e for e in record['conflict'] if (e['at'], e['part']) == ('1', 'train')]
  packed, gram, k = entry['grams']['shared'], np.empty((4, 4)), 0
  for c in range(4):
    for d in range(c, 4):
      gram[c, d] = gram[d, c] = packed[k]
      k += 1
  return summary(gram, np.array(record['result']['class_counts']), np.array(entry['prior']))[
    measure
  ]


def loss_at_the_end(record):
  (entry,) = [e for e in record['conflict'] if (e['at'], e['part']) == ('1', 'train')]
  return entry['loss']


OF = {
  'macro-F1': lambda r: r['result']['macro_f1'],
  'few-shot accuracy': lambda r: r['result']['group_accuracy']['few'],
  'accuracy': lambda r: r['result']['accuracy'],
  'head_tail_conflict': lambda r: at_the_end(r, 'head_tail_conflict'),
  'minority_interference': lambda r: at_the_end(r, 'minority_interference'),
}


def test_every_pair_in_every_variant_by_every_outcome(study, found):
  _, records = study
  where = [(c.outcome, c.cell['variant'], c.treatment, c.control) for c in found.method_pairs]
  assert where == [(o, v, *pair) for o in OF for v in VARIANTS for pair in PAIRS]
  for c in found.method_pairs:
    treated, control = (
      values(records, c.cell['variant'], m, OF[c.outcome]) for m in (c.treatment, c.control)
    )
    np.testing.assert_allclose(c.difference.value, (treated - control).mean(), atol=1e-12)
    np.testing.assert_allclose(c.treatment_mean, treated.mean())
    np.testing.assert_allclose(c.control_mean, control.mean())
    assert c.difference.n == 8
    assert 'method' not in c.cell


def test_one_family_with_holm_and_the_rule_for_a_gain(found):
  family = [c for c in found.method_pairs if c.outcome == 'macro-F1']
  ordered = sorted(family, key=lambda c: c.difference.p)
  adjusted = np.maximum.accumulate([(4 - i) * c.difference.p for i, c in enumerate(ordered)])
  np.testing.assert_allclose([c.adjusted_p for c in ordered], np.minimum(adjusted, 1))
  for c in family:  # the first pair has an effect, the other has none
    assert (c.verdict == SUPPORTED) == (c.treatment == 'balanced_softmax')
    assert c.verdict == SUPPORTED or c.difference.low < 0.01
  assert all(c.verdict == '' and np.isnan(c.adjusted_p) for c in found.method_pairs[4:])


def test_a_loss_is_no_gain():
  found = analysed(*made(pairs=(('cross_entropy', 'drw'),)))
  assert [c.verdict for c in found.method_pairs if c.verdict] == [REFUTED] * 2
  text = ' '.join(markdown.render(found).split())
  words = 'cross entropy does not give a higher macro-F1, by 0.01 or more, than drw (variant none)'
  assert f'There is evidence that {words}' in text


def test_time_is_the_median_run(study, found):
  _, records = study
  for c in found.method_pairs[:4]:
    expected = tuple(
      np.median(values(records, c.cell['variant'], m, lambda r: r['seconds']))
      for m in (c.treatment, c.control)
    )
    assert c.seconds == pytest.approx(expected)


def test_runs_that_one_side_lacks_are_left_out_and_named():
  about, records = made(pairs=PAIRS[:1])
  lost = ('none', 'balanced_softmax', 3)
  kept = [
    r for r in records if (r['axes']['variant'], r['axes']['method'], r['axes']['seed']) != lost
  ]
  found = analysed(about, kept)
  assert [c.difference.n for c in found.method_pairs[:2]] == [7, 8]
  note = 'balanced_softmax against cross_entropy, none: balanced_softmax without seed 3'
  assert found.notes.count(note) == 1


def test_a_measurement_that_one_side_lacks_is_left_out_and_named():
  about, records = made(pairs=PAIRS[:1], variants=('none',))
  lost = [r for r in records if r['axes']['method'] == 'balanced_softmax' and r['axes']['seed'] < 2]
  for record in lost:
    record['conflict'] = [e for e in record['conflict'] if e['at'] != '1']
  found = analysed(about, records)
  conflict = [c for c in found.method_pairs if c.losses]
  assert [c.difference.n for c in conflict] == [6, 6]
  assert [c.difference.n for c in found.method_pairs[:3]] == [8, 8, 8]
  words = "balanced_softmax without the snapshot '1' (train) of seed 0, seed 1"
  assert f'balanced_softmax against cross_entropy, none: {words}' in found.notes


def test_losses_beside_conflict_are_geometric_means(study, found):
  _, records = study
  for c in found.method_pairs:
    assert (c.losses is None) == ('conflict' not in c.outcome and 'interference' not in c.outcome)
    if c.losses:
      expected = [
        np.exp(np.log(values(records, c.cell['variant'], m, loss_at_the_end)).mean())
        for m in (c.treatment, c.control)
      ]
      np.testing.assert_allclose(c.losses, expected)


def test_conditions_are_compared_apart_and_named():
  about, records = made(pairs=PAIRS[:1], variants=('none',), seeds=4)
  other = copy.deepcopy(records)
  for record in other:
    record['axes']['imbalance_factor'] = 100.0
    record['run'] += '-if100'
  kept = [r for r in records + other if (r['axes']['method'], r['axes']['seed']) != ('drw', 9)]
  lost = [r for r in kept if (r['axes']['method'], r['axes']['seed']) != ('balanced_softmax', 1)]
  found = analysed(about, lost)
  assert [c.cell['imbalance_factor'] for c in found.method_pairs if c.verdict] == [33.0, 100.0]
  for factor in (33, 100):
    note = f'none, imbalance factor {factor}: balanced_softmax without seed 1'
    assert any(note in line for line in found.notes)


def test_an_axis_that_only_some_runs_have_makes_a_condition_of_its_own():
  about, records = made(pairs=PAIRS[:1], variants=('none',), seeds=4)
  for record in records:
    if record['axes']['seed'] < 2:
      del record['axes']['learning_rate']
  found = analysed(about, records)
  family = [c for c in found.method_pairs if c.verdict]
  assert [c.difference.n for c in family] == [2, 2]
  assert ['learning_rate' in c.cell for c in family] == [False, True]


def test_methods_alone_are_a_study():
  """Of one variant: no claim on attention, and neither variant nor condition is uncompared."""
  about, records = made(variants=('none',))
  found = analysed(about, records)
  assert found.comparisons == found.claims == ()
  text = readme.of_study(found, 'folder')
  assert 'link of the argument' not in text
  verdicts = [c.verdict for c in found.method_pairs if c.verdict]
  lines = write.summary(found).splitlines()
  assert lines[:2] == [
    f'balanced_softmax − cross_entropy: {verdicts[0]}',
    f'drw − balanced_softmax: {verdicts[1]}',
  ]
  assert all(line.startswith('note: ') for line in lines[2:])
  assert len(found.method_pairs) == 2 * len(OF)
  assert not any('no comparison' in note for note in found.notes)
  about['config']['method_pairs'] = about['config']['method_pairs'][:1]
  (note,) = [n for n in analysed(about, records).notes if 'no comparison' in n]
  assert note == (
    'drw has scores and no comparison: no pair of the protocol has a variant that was run there or '
    'this method'
  )


def test_one_rate_for_all_methods_is_exploratory():
  about, records = made(variants=('none',))
  about['config'] |= {'tuned_by': ''}
  (caution,) = analysed(about, records).cautions
  assert caution.startswith('exploratory: all methods were trained with the same learning rate')
  about, records = made()
  about['config'] |= {'tuned_by': ''}
  (caution,) = analysed(about, records).cautions
  assert caution.startswith('exploratory: all variants and methods were trained with the same')


def test_methods_with_rates_of_their_own_are_not():
  about, records = made(variants=('none',))
  about['config'] |= {'tuned_by': ''}
  for record in records:
    rate = 0.1 if record['axes']['method'] == 'drw' else 0.2
    record['config'] = {**record['config'], 'train': {'learning_rate': rate}}
  assert analysed(about, records).cautions == ()


def test_own_methods_that_are_compared_are_what_the_study_is_about():
  own = {'own_methods': {'drw_late': {'loss.weights_start': 0.9}}}
  about, records = made(methods=('cross_entropy', 'drw_late'), pairs=(), **own)
  (caution,) = analysed(about, records).cautions
  assert caution == (
    'exploratory: the protocol (docs/study.md) plans no verdict with drw late, which is of this '
    'study alone'
  )
  about['config']['method_pairs'] = [['drw_late', 'cross_entropy']]
  assert analysed(about, records).cautions == ()


def test_a_study_without_method_pairs_has_no_such_section():
  about, records = simulated.make(seeds=2, variants=VARIANTS, methods=METHODS[:2])
  found = analysed(about, records)  # a study.json from before the field
  assert found.method_pairs == ()
  assert 'methods' not in [section.anchor for section in content.sections(found)]
  assert 'Methods compared' not in markdown.render(found)


def test_the_reports_show_them(found):
  text = markdown.render(found)
  part = text.partition('## Methods compared')[2].partition('\n## ')[0]
  family = [c for c in found.method_pairs if c.verdict]
  for c in found.method_pairs:
    assert wording.interval(c.difference, signed=True, limits=c.limits) in part
  for c in family:
    assert wording.ratio(c.seconds) in part
    start = {SUPPORTED: 'There is evidence that', UNDECIDED: 'It is open whether'}[c.verdict]
    said = f'{start} {wording.axis(c.treatment)} gives a higher macro-F1 than'
    assert said in ' '.join(text.split())
  assert 'Methods are compared within each variant: balanced_softmax − cross_entropy; drw −' in (
    ' '.join(text.split())
  )
  html = page.render(found)
  assert 'Methods compared' in html
  assert 'Paired differences of macro-F1 between methods' in html
  lines = readme.of_study(found, 'folder').splitlines()
  rows = [line for line in lines if line.startswith('| variant ')]
  assert len(rows) == len(family)
  for c, row in zip(family, rows, strict=True):
    assert wording.versus(c) in row
    assert f'variant {c.cell["variant"]}' in row
    assert f'**{c.verdict}**' in row


def test_a_study_of_methods_alone_asks_about_them():
  found = analysed(*made(variants=('none',), pairs=PAIRS[:1]))
  text = ' '.join(markdown.render(found).split())
  question, _, summary = text.partition('## Summary')
  assert 'CSBA' not in question
  assert 'Two methods are compared in runs of the same split' in question
  assert 'There is evidence that balanced softmax gives a higher macro-F1 than' in summary
  assert 'CSBA' not in summary


def test_the_cautions_of_methods_alone_stand_beside_their_verdicts():
  about, records = made(variants=('none',), pairs=PAIRS[:1], seeds=2)
  about['config'] |= {'tuned_by': ''}
  text = ' '.join(markdown.render(analysed(about, records)).split())
  summary = text.partition('## Summary')[2].partition('## Notes')[0]
  assert 'Caution: exploratory: all methods were trained with the same learning rate' in summary


def test_a_variant_that_was_planned_and_not_run_asks_nothing():
  about, records = made(pairs=PAIRS[:1], seeds=2)
  found = analysed(about, [r for r in records if r['axes']['variant'] == 'none'])
  assert found.variants == ('none',)
  assert found.claims == ()
  assert 'CSBA' not in content.question(found)


def test_a_ratio_in_words():
  assert wording.ratio((3.0, 2.0)) == '1.50 ×'
  assert wording.ratio(None) == wording.ratio((np.nan, 1.0)) == wording.ratio((1.0, np.nan)) == '–'
