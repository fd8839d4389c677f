"""The flow against class gradients held in full."""

import dataclasses

import numpy as np
import pytest

from csba_jax.errors import UserError
from csba_jax.gradients import flow as lib
from csba_jax.gradients.conflict import Conflict
from csba_jax.gradients.gram import ClassGrams

COUNTS = np.array([300, 120, 40, 8])
PRIOR = COUNTS / COUNTS.sum()


def layers(seed=0):
  rng = np.random.default_rng(seed)
  return {'stem': rng.normal(size=(4, 9)), 'head': rng.normal(size=(4, 5))}


def conflict_of(vectors, step=0):
  grams = {name: g @ g.T for name, g in vectors.items()}
  found = ClassGrams(grams, sum(grams.values()), grams['stem'], np.full(4, 6), np.ones(4))
  return Conflict.of(found, class_counts=COUNTS, about={'step': step})


@pytest.mark.parametrize('scope', ['shared', 'total', 'stem', 'head'])
def test_flow_against_whole_gradients(scope):
  vectors = layers()
  found = lib.flow(conflict_of(vectors))
  at = found.scopes.index(scope)
  g = {'shared': vectors['stem'], 'total': np.concatenate([*vectors.values()], axis=1)} | vectors
  g = g[scope]
  batch = PRIOR @ g
  norms = np.linalg.norm(g, axis=1)
  np.testing.assert_allclose(found.norms[at], norms)
  np.testing.assert_allclose(found.shares[at], PRIOR * (g @ batch) / (batch @ batch))
  np.testing.assert_allclose(found.shares[at].sum(), 1)
  np.testing.assert_allclose(found.cosines[at], g @ batch / norms / np.linalg.norm(batch))
  np.testing.assert_allclose(found.norm_ratio[at], norms[:2].mean() / norms[2:].mean())
  pulls = [np.linalg.norm(PRIOR[part] @ g[part]) for part in (slice(0, 2), slice(2, 4))]
  np.testing.assert_allclose(found.pull_ratio[at], pulls[0] / pulls[1])


def test_an_absent_class_is_nan_and_left_out():
  vectors = layers()
  for g in vectors.values():
    g[3] = 0
  found = lib.flow(conflict_of(vectors))
  assert np.isnan(found.norms[:, 3]).all()
  assert np.isnan(found.cosines[:, 3]).all()
  assert not np.isnan(found.norms[:, :3]).any()
  assert (found.shares[:, 3] == 0).all()
  np.testing.assert_allclose(found.norm_ratio, found.norms[:, :2].mean(1) / found.norms[:, 2])


def test_no_gradient_at_all():
  found = lib.flow(conflict_of({name: 0 * g for name, g in layers().items()}))
  for field in ('norms', 'shares', 'cosines', 'norm_ratio', 'pull_ratio'):
    assert np.isnan(getattr(found, field)).all()


def test_snapshots_are_put_in_order():
  snapshots = [conflict_of(layers(s), step) for s, step in enumerate((30, 10, 20))]
  steps, flows = lib.over_training(snapshots)
  assert steps.tolist() == [10, 20, 30]
  np.testing.assert_array_equal(flows[0].norms, lib.flow(snapshots[1]).norms)


def test_snapshots_of_different_runs_are_refused():
  other = dataclasses.replace(conflict_of(layers(), 5), class_names=('a', 'b', 'c', 'd'))
  with pytest.raises(UserError, match='snapshots of one run; found other layers .* at step 5'):
    lib.over_training([conflict_of(layers(), 1), other])
  with pytest.raises(UserError, match="about.'step'.; found one without"):
    lib.over_training([dataclasses.replace(conflict_of(layers()), about={})])
  with pytest.raises(UserError, match='at least one snapshot'):
    lib.over_training([])
