"""Measures against loops in NumPy, the NaN policy, and files."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csba_jax.errors import UserError
from csba_jax.gradients import conflict as lib
from csba_jax.gradients.conflict import Conflict
from csba_jax.gradients.gram import ClassGrams

CLASSES = 5


def rows(seed=0, classes=CLASSES, width=12):
  return np.random.default_rng(seed).normal(size=(classes, width))


def prior(classes=CLASSES):
  weights = np.arange(classes, 0, -1.0)
  return weights / weights.sum()


def conflict_of(vectors, head=None, counts=None):
  """A Conflict of two layers, the second the head, from [C, P] class gradients."""
  first, second = vectors[:, :8], vectors[:, 8:]
  grams = {'body': first @ first.T, 'head': second @ second.T}
  found = ClassGrams(
    grams, sum(grams.values()), grams['body'], np.full(len(vectors), 4), np.ones(len(vectors))
  )
  return Conflict.of(found, class_counts=counts, about={'step': 7})


@pytest.mark.parametrize('where', ['numpy', 'jax', 'jit'])
def test_measures_against_loops(where):
  g, pi = rows(), prior()
  gram = g @ g.T
  convert = np.asarray if where == 'numpy' else lambda x: jnp.asarray(x, jnp.float32)
  wrap = jax.jit if where == 'jit' else lambda f: f
  tolerance = 1e-12 if where == 'numpy' else 2e-6
  norm = np.linalg.norm
  for name, args, entry in (
    ('conflict_matrix', (gram,), lambda a, b, d: a @ b / norm(a) / norm(b)),
    (
      'magnitude_similarity',
      (gram,),
      lambda a, b, d: 2 * norm(a) * norm(b) / (norm(a) ** 2 + norm(b) ** 2),
    ),
    ('progress', (gram, pi), lambda a, b, d: pi[d] * (a @ b)),
  ):
    found = wrap(getattr(lib, name))(*map(convert, args))
    expected = [[entry(g[c], g[d], d) for d in range(CLASSES)] for c in range(CLASSES)]
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(gram).max())
  found = wrap(lib.interference)(convert(gram), convert(pi))
  expected = [
    max(0, -sum(pi[d] * g[c] @ g[d] for d in range(CLASSES) if d != c)) / (pi[c] * g[c] @ g[c])
    for c in range(CLASSES)
  ]
  assert max(expected) > 0
  np.testing.assert_allclose(found, expected, rtol=20 * tolerance)


def test_interference_of_one_means_that_nothing_is_left():
  a = np.array([1.0, 0.0])
  g = np.stack([a, -a])
  half = np.array([0.5, 0.5])
  np.testing.assert_allclose(lib.interference(g @ g.T, half), [1, 1])
  assert np.abs(lib.progress(g @ g.T, half).sum(1)).max() == 0


def test_progress_is_what_a_step_gains_to_first_order():
  """Quadratic losses |theta - t_c|^2 / 2, whose change by a step is known in closed form."""
  targets, pi, lr = rows(1), prior(), 1e-6
  g = -targets  # gradients at theta = 0
  step = -lr * pi @ g
  change = [np.sum((step - t) ** 2) / 2 - np.sum(t**2) / 2 for t in targets]
  np.testing.assert_allclose(change, -lr * lib.progress(g @ g.T, pi).sum(1), rtol=1e-4)


@pytest.mark.parametrize('diagonal', [0.0, -0.3])
def test_what_is_not_resolvable_is_nan_and_left_out(diagonal):
  g = rows()
  gram = g @ g.T
  gram[2, 2] = diagonal
  for found in (lib.conflict_matrix(gram), lib.magnitude_similarity(gram)):
    assert np.isnan(found[2]).all()
    assert np.isnan(found[:, 2]).all()
    assert not np.isnan(np.delete(np.delete(found, 2, 0), 2, 1)).any()
  assert np.isnan(lib.interference(gram, prior())).tolist() == [False, False, True, False, False]
  cosines = lib.conflict_matrix(gram)
  pairs = [p for p in itertools.combinations(range(CLASSES), 2) if 2 not in p]
  assert lib.conflict_rate(cosines) == np.mean([cosines[p] < 0 for p in pairs])


def test_cosines_stay_in_range_and_are_one_with_themselves():
  gram = np.array([[1.0, 5.0], [5.0, 1.0]])  # an unbiased estimate need not be semidefinite
  np.testing.assert_array_equal(lib.conflict_matrix(gram), np.ones((2, 2)))
  g = 1e-12 * rows()
  assert (np.diagonal(lib.conflict_matrix(g @ g.T)) == 1).all()


def test_measures_take_stacks_of_grams():
  grams = np.stack([rows(s) @ rows(s).T for s in range(3)])
  for name, args in (
    ('conflict_matrix', ()),
    ('progress', (prior(),)),
    ('interference', (prior(),)),
  ):
    function = getattr(lib, name)
    np.testing.assert_allclose(function(grams, *args), [function(g, *args) for g in grams])


def test_conflict_rate_of_nothing_is_nan():
  assert np.isnan(lib.conflict_rate(np.full((3, 3), np.nan)))
  assert np.isnan(lib.conflict_rate(np.ones((1, 1))))


def test_conflict_rate_counts_unordered_pairs():
  cosines = np.array([[1, -0.1, 0.2], [-0.1, 1, -0.3], [0.2, -0.3, 1]])
  assert lib.conflict_rate(cosines) == 2 / 3
  pairs = np.zeros((3, 3), bool)
  pairs[2, 0] = pairs[1, 2] = True
  assert lib.conflict_rate(cosines, pairs) == 1 / 2


@pytest.mark.parametrize(
  ('counts', 'majority', 'minority'),
  [
    ([500, 101, 100, 3], [0, 1], [2, 3]),
    ([3, 500, 20], [1], [0, 2]),
    ([500, 400, 300], [0], [2]),  # all many-shot: thirds
    ([9, 8, 7, 6, 5, 4, 3], [0, 1], [5, 6]),
    ([5, 5, 5], [0], [2]),
    ([5, 9], [1], [0]),
    ([5], [], []),
  ],
)
def test_majority_and_minority(counts, majority, minority):
  found = lib.majority_minority(np.array(counts))
  assert [np.flatnonzero(mask).tolist() for mask in found] == [majority, minority]


def test_head_tail_conflict_looks_at_mixed_pairs_alone():
  counts = np.array([500, 200, 50, 5])
  cosines = np.eye(4)
  cosines[0, 1] = cosines[1, 0] = cosines[2, 3] = cosines[3, 2] = -1  # within the groups
  assert lib.head_tail_conflict(cosines, counts) == 0
  cosines[0, 3] = cosines[3, 0] = -0.5
  assert lib.head_tail_conflict(cosines, counts) == 1 / 4


def test_a_batch_as_a_conflict():
  vectors = rows()
  found = conflict_of(vectors)
  assert found.scopes == ('shared', 'total', 'body', 'head')
  assert found.layers == ('body', 'head')
  np.testing.assert_allclose(found.gram('total'), vectors @ vectors.T)
  np.testing.assert_array_equal(found.gram(), found.gram('body'))
  np.testing.assert_array_equal(found.cosine(), lib.conflict_matrix(found.gram('body')))
  assert found.resolvable().all()
  off = ~np.eye(CLASSES, dtype=bool)
  assert found.distinguishable()[off].all()  # what is exact is known
  assert found.class_names[4] == 'class 4'
  assert found.about == {'target': 'batch', 'step': 7}
  np.testing.assert_allclose(found.prior, 0.2)


def test_what_is_no_known_class_grams_is_refused():
  vectors = rows()
  gram = vectors @ vectors.T
  found = ClassGrams({'a': gram}, gram, gram, np.full(CLASSES, 4), np.ones(CLASSES))
  with pytest.raises(UserError, match='call Conflict.of outside'):
    jax.jit(lambda found: Conflict.of(found).grams)(found)
  with pytest.raises(UserError, match='found ndarray; to fix it: pass what class_grams returns'):
    Conflict.of(gram)


@pytest.mark.parametrize(
  ('given', 'words'),
  [
    ({'class_counts': [5, 4]}, r'class_counts, 5 numbers .*; found .5, 4.'),
    ({'class_counts': [-1, 1, 1, 1, 1]}, 'at least 0'),
    ({'class_counts': [0] * 5}, 'not all 0'),
    ({'class_counts': list('abcde')}, 'one for each class'),
    ({'prior': [0.5, 0.5]}, 'prior, 5 numbers'),
    ({'prior': [np.nan] * 5}, 'prior, 5 numbers'),
    ({'class_names': ['a']}, '5 class names; found 1'),
    ({'class_names': 5}, '5 class names; found int'),
    ({'class_names': {'a': 0}}, '5 class names; found dict'),
  ],
)
def test_what_describes_the_classes_is_checked(given, words):
  vectors = rows()
  gram = vectors @ vectors.T
  found = ClassGrams({'a': gram}, gram, gram, np.full(CLASSES, 4), np.ones(CLASSES))
  with pytest.raises(UserError, match=words):
    Conflict.of(found, **given)


def test_about_that_is_no_json_is_refused_before_anything_is_written(tmp_path):
  found = dataclasses.replace(conflict_of(rows()), about={'rate': np.ones(2)})
  with pytest.raises(UserError, match='about as JSON; found .*ndarray'):
    found.save(tmp_path / 'x.npz')
  assert not list(tmp_path.iterdir())


def test_order_by_frequency_keeps_ties():
  assert conflict_of(rows(), counts=np.array([3, 9, 3, 50, 9])).by_frequency.tolist() == [
    3,
    1,
    4,
    0,
    2,
  ]


def test_taking_scopes():
  found = conflict_of(rows())
  taken = found.take(['head', 'body'])
  assert taken.scopes == ('shared', 'total', 'head', 'body')
  np.testing.assert_array_equal(taken.gram('head'), found.gram('head'))
  assert found.take(['head']).layers == ('head',)
  with pytest.raises(UserError, match='a scope among shared, total, body, head; found .tail.'):
    found.take(['tail'])


def test_summary_against_its_parts():
  counts = np.array([500, 200, 50, 20, 5])
  found = dataclasses.replace(
    conflict_of(rows(3)), class_counts=counts, prior=counts / counts.sum()
  )
  cosines = found.cosine()
  off = cosines[np.triu_indices(CLASSES, 1)]
  summary = found.summary()
  pi = counts / counts.sum()
  undone = lib.interference(found.gram(), pi)[2:]
  assert max(undone) > 1  # and counts as 1
  assert summary == pytest.approx(
    {
      'conflict_rate': (off < 0).mean(),
      'head_tail_conflict': (cosines[:2, 2:] < 0).mean(),
      'mean_cosine': off.mean(),
      'minority_interference': np.mean([min(1, x) for x in undone]),
      'pairs_in_conflict': (off < 0).sum(),
      'pairs_in_agreement': (off > 0).sum(),
      'pairs_not_resolvable': 0,
    }
  )


def test_summary_of_what_is_not_known():
  found = conflict_of(rows())
  wide = dataclasses.replace(found, errors=found.errors + 1e3)  # no norm exceeds two errors
  assert wide.summary()['pairs_not_resolvable'] == 10
  assert wide.summary()['pairs_in_conflict'] == wide.summary()['pairs_in_agreement'] == 0
  nothing = dataclasses.replace(found, grams=0 * found.grams)
  summary = nothing.summary()
  assert np.isnan([summary['conflict_rate'], summary['mean_cosine']]).all()
  assert np.isnan(summary['minority_interference'])


def test_saved_and_loaded_is_the_same(tmp_path):
  found = conflict_of(rows())
  found.save(tmp_path / 'x.npz')
  again = Conflict.load(tmp_path / 'x.npz')
  for field in dataclasses.fields(Conflict):
    np.testing.assert_array_equal(getattr(again, field.name), getattr(found, field.name))
  with np.load(tmp_path / 'x.npz', allow_pickle=False) as file:  # plain arrays for others to read
    assert file['grams'].shape == (4, CLASSES, CLASSES)
  assert [path.name for path in tmp_path.iterdir()] == ['x.npz']


def test_other_files_are_not_loaded(tmp_path):
  found = conflict_of(rows())
  found.save(tmp_path / 'x.npz')
  whole = (tmp_path / 'x.npz').read_bytes()
  np.savez(tmp_path / 'other.npz', grams=np.zeros(3))
  np.save(tmp_path / 'array.npy', np.zeros(3))
  dataclasses.replace(found, scopes=('shared',)).save(tmp_path / 'torn.npz')
  (tmp_path / 'half.npz').write_bytes(whole[: len(whole) // 2])
  (tmp_path / 'empty.npz').write_bytes(b'')
  (tmp_path / 'text.npz').write_text('hello')
  for name in (
    'other.npz',
    'array.npy',
    'torn.npz',
    'half.npz',
    'empty.npz',
    'text.npz',
    'none.npz',
  ):
    with pytest.raises(UserError, match='expected a conflict file of csba_jax at .*; found'):
      Conflict.load(tmp_path / name)
