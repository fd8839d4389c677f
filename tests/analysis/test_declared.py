"""A study of its own pairs and methods, from its records to both reports; who is not compared."""

import copy
import html
import runpy
import types
from pathlib import Path

import numpy as np
import pytest

from csba_jax.analysis import findings
from csba_jax.analysis.types import SUPPORTED
from csba_jax.errors import UserError
from csba_jax.report.study import figures, markdown, page
from csba_jax.study import results

simulated = types.SimpleNamespace(**runpy.run_path(Path(__file__).parents[1] / 'simulated.py'))
LDAM = {'loss.name': 'ldam', 'model.head': 'cosine'}
OPTIONS = {
  'seeds': 8,
  'variants': ('none', 'se', 'csba', 'cbam'),
  'methods': ('cross_entropy', 'ldam_cosine'),
  'pairs': (('csba', 'se'), ('se', 'none')),
  'own_methods': {'ldam_cosine': LDAM, 'unused': {'train.weight_decay': 0.1}},
}


@pytest.fixture(scope='module')
def made():
  return simulated.make(**OPTIONS)


@pytest.fixture(scope='module')
def found(made, tmp_path_factory):
  folder = simulated.write(tmp_path_factory.mktemp('own'), *made)
  return findings.analyse(results.read(folder), resamples=299)


@pytest.mark.seconds
def test_the_family_is_the_pairs_of_the_study(found, made):
  pairs = [(c.treatment, c.control, c.cell['method']) for c in found.comparisons]
  assert sorted(pairs) == sorted(
    (*pair, method) for pair in OPTIONS['pairs'] for method in OPTIONS['methods']
  )
  # Holm over the four, and no others beside them
  ordered = sorted(found.comparisons, key=lambda c: c.difference.p)
  adjusted = np.maximum.accumulate([(4 - i) * c.difference.p for i, c in enumerate(ordered)])
  np.testing.assert_allclose([c.adjusted_p for c in ordered], np.minimum(adjusted, 1))
  for c in found.comparisons:
    sides = (
      [
        record['result']['macro_f1']
        for record in made[1]
        if (record['axes']['variant'], record['axes']['method']) == (name, c.cell['method'])
      ]
      for name in (c.treatment, c.control)
    )
    treated, control = map(np.array, sides)
    np.testing.assert_allclose(c.difference.value, (treated - control).mean())


def test_the_first_pair_decides_and_there_is_no_link_on_capacity(found):
  assert [claim.title for claim in found.claims] == [
    'CSBA improves macro-F1 over se',
    'CSBA reduces gradient conflict',
    'Less conflict goes with more F1',
    'Without offsetting problems',
    'Overall: CSBA makes a better tail by less conflict',
  ]
  gain = found.claims[0]
  assert gain.verdict == SUPPORTED  # csba has the effect, se has none
  beside = [sentence for sentence in gain.sentences if sentence.startswith('se against none: ')]
  assert len(beside) == 1
  assert 'supported in 0 of 2 conditions' in beside[0]
  assert {(c.treatment, c.control) for c in found.offsets} == {*OPTIONS['pairs']}
  assert found.pairs == OPTIONS['pairs']
  assert figures.before_and_after(found) == ('se', 'csba')


def test_with_the_wide_control_there_is_one(tmp_path):
  options = OPTIONS | {
    'variants': ('none', 'none_wide', 'se'),
    'pairs': (('se', 'none'), ('se', 'none_wide')),
    'methods': ('cross_entropy',),
    'seeds': 3,
  }
  made = findings.analyse(results.read(simulated.study(tmp_path, **options)), resamples=99)
  assert [claim.title for claim in made.claims[:2]] == [
    'se improves macro-F1 over the same net without attention',
    'The gain in macro-F1 is not by capacity alone',
  ]
  words = 'none_wide has 340100 parameters and se 262000 (cross entropy): no control of equal'
  assert any(note.startswith(words) for note in made.notes)


def test_who_is_not_compared_is_named(found):
  assert 'cbam has scores and no comparison: no pair of this study names it' in found.notes
  assert (
    'the method unused is defined in own_methods, and not among the methods that are run'
  ) in found.notes


def test_of_the_protocol_too(tmp_path):
  about, records = simulated.make(seeds=2, variants=('se', 'cbam'))
  about['config']['methods'].append('drw')
  made = findings.analyse(results.read(simulated.write(tmp_path, about, records)), resamples=99)
  assert {
    'se has scores and no comparison: no pair of the protocol names it',
    'cbam has scores and no comparison: no pair of the protocol names it',
    'cross entropy has scores and no comparison: no pair of the protocol has a variant '
    'that was run there',
    'drw was planned, and has no finished run',
  } <= {*made.notes}


def test_both_reports_say_what_is_compared(found):
  for text in (
    ' '.join(markdown.render(found).split()),
    html.unescape(page.render(found)),
  ):
    assert 'pairs of variants of its own: csba with se; se with none. The first pair' in text
    assert 'those of the pairs that the study declares' in text
    assert 'ldam cosine: loss.name = ldam, model.head = cosine' in text
    assert 'cbam has scores and no comparison' in text
    assert 'Does Class-Specific Branch Attention' not in text


def test_runs_of_a_method_must_have_its_fields(made, tmp_path):
  about, records = copy.deepcopy(made)
  wrong = next(r for r in records if r['axes']['method'] == 'ldam_cosine')
  del wrong['config']['loss']
  with pytest.raises(UserError, match='loss.name: ldam in 31 runs, cross_entropy in 1 '):
    results.read(simulated.write(tmp_path, about, records))


def test_plain_sentences_give_the_numbers_of_the_first_pair(found):
  def signed(value):
    return f'{value:+.3f}'.replace('-', '\N{MINUS SIGN}')

  first = {
    c.cell['method']: c.difference.value
    for c in found.comparisons
    if (c.treatment, c.control) == ('csba', 'se')
  }
  assert found.claims[0].plain == (
    'CSBA has a higher macro-F1 than se (difference of macro-F1: '
    f'{signed(first["cross_entropy"])} with cross entropy; '
    f'{signed(first["ldam_cosine"])} with ldam cosine).'
  )
  lowest = {
    method: min(
      c.difference.value
      for c in found.offsets
      if (c.treatment, c.control, c.cell['method']) == ('csba', 'se', method)
    )
    for method in OPTIONS['methods']
  }
  ending = '; '.join(f'{signed(v)} with {m.replace("_", " ")}' for m, v in lowest.items())
  assert found.claims[3].plain.endswith(f'(lower of the two differences: {ending}).')
  assert all(claim.plain.endswith('.') for claim in found.claims)
