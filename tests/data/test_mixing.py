"""Mixed batches against loops over images and pixels; how often and how much they are mixed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from csba_jax import config as config_lib
from csba_jax.data import mixing, sampling
from csba_jax.errors import UserError

N, H, W = 6, 8, 12
COUNTS = np.array([500, 100, 20, 4])
MIXED = [name for name in mixing.MIXINGS if name != 'none']
STEPS, STEP = 100, 50


def section(name, **fields):
  found = config_lib.default().mixing
  found.update(name=name, **fields)
  return found


def batch(seed=0, n=N, height=H, width=W):
  rng = np.random.default_rng(seed)
  return {
    'image': rng.normal(size=(n, height, width, 3)).astype(np.float32),
    'label': rng.integers(0, 4, n),
  }


def with_partners(seed=0, **shape):
  partner = batch(seed + 100, **shape)
  return batch(seed, **shape) | {f'partner_{name}': x for name, x in partner.items()}


@functools.cache  # the Beta distribution takes seconds to compile
def compiled(name, **fields):
  return jax.jit(mixing.build(section(name, **fields), COUNTS, STEPS))


def run(name, key, given, **fields):
  return jax.tree.map(np.asarray, compiled(name, **fields)(key, given, STEP))


def test_nothing_is_mixed_without_mixing():
  given = batch()
  found = mixing.build(section('none'), COUNTS, STEPS)(jax.random.key(0), given, STEP)
  assert found is given


@pytest.mark.seconds
@pytest.mark.parametrize('name', ['mixup', 'remix'])
@pytest.mark.parametrize('seed', range(5))
def test_mixup_is_the_weighted_mean_of_two_images(name, seed):
  given = batch(seed)
  found = run(name, jax.random.key(seed), given, alpha=0.4, kappa=1e9)
  lam = found['share'][0]
  assert (found['share'] == lam).all()
  for i in range(N):
    errors = []
    for j in range(N):  # the partner is not told: it is the image that explains the mixture
      expected = lam * given['image'][i] + (1 - lam) * given['image'][j]
      same = given['label'][j] == found['partner_label'][i]
      errors.append(abs(found['image'][i] - expected).max() if same else np.inf)
    assert min(errors) < 1e-5
  np.testing.assert_array_equal(found['label'], given['label'])
  assert sorted(found['partner_label']) == sorted(given['label'])  # everyone is a partner once


@pytest.mark.parametrize('seed', range(8))
def test_cutmix_pastes_one_box_and_shares_by_area(seed):
  given = with_partners(seed)
  found = run('cmo', jax.random.key(seed), given)
  np.testing.assert_array_equal(found['partner_label'], given['partner_label'])
  pasted = (found['image'] == given['partner_image']).all(-1)
  kept = (found['image'] == given['image']).all(-1)
  assert (pasted ^ kept).all()  # every pixel is whole, of one of the two
  assert (pasted == pasted[0]).all()  # one box a batch
  rows, columns = np.flatnonzero(pasted[0].any(1)), np.flatnonzero(pasted[0].any(0))
  assert pasted[0].sum() == len(rows) * len(columns)
  for lines in (rows, columns):  # without gaps
    assert len(lines) == 0 or lines[-1] - lines[0] + 1 == len(lines)
  np.testing.assert_allclose(found['share'], 1 - pasted[0].mean(), rtol=1e-6)


def test_cutmix_takes_its_partners_from_the_batch():
  given = batch()
  found = run('cutmix', jax.random.key(1), given)
  assert sorted(found['partner_label']) == sorted(given['label'])
  for i in range(N):
    foreign = ~(found['image'][i] == given['image'][i]).all(-1)
    matches = [
      (found['image'][i][foreign] == given['image'][j][foreign]).all()
      and given['label'][j] == found['partner_label'][i]
      for j in range(N)
    ]
    assert any(matches)


@pytest.mark.parametrize('lam', [0.2, 0.45, 0.55, 0.9])
def test_remix_gives_the_label_to_the_rarer_class(lam, monkeypatch):
  monkeypatch.setattr(jax.random, 'beta', lambda *_: jnp.float32(lam))
  labels = np.array([(i, j) for i in range(4) for j in range(4)])
  given = {'image': np.zeros((16, 2, 2, 1), np.float32), 'label': labels[:, 0]}
  given |= {'partner_image': given['image'], 'partner_label': labels[:, 1]}
  found = mixing.remix(jax.random.key(0), given, class_counts=COUNTS, alpha=1.0, kappa=3.0, tau=0.5)
  for (i, j), share in zip(labels, found['share'], strict=True):  # Chou et al. 2020, eq. 7
    expected = lam
    if COUNTS[i] / COUNTS[j] >= 3 and lam < 0.5:
      expected = 0.0
    elif COUNTS[i] / COUNTS[j] <= 1 / 3 and 1 - lam < 0.5:
      expected = 1.0
    assert share == pytest.approx(expected)


@pytest.mark.seconds
@pytest.mark.parametrize('alpha', [0.3, 1.0])
def test_shares_have_the_distribution_that_is_asked_for(alpha):
  given = with_partners(n=2, height=64, width=64)
  given = jax.tree.map(jnp.asarray, given)
  mix = mixing.build(section('mixup', alpha=alpha), COUNTS, STEPS)
  keys = jax.random.split(jax.random.key(0), 1500)
  shares = jax.jit(jax.vmap(lambda key: mix(key, given, STEP)['share'][0]))(keys)
  # of a Beta distribution, by Kolmogorov and Smirnov
  assert scipy.stats.kstest(np.asarray(shares), scipy.stats.beta(alpha, alpha).cdf).pvalue > 1e-3


@pytest.mark.seconds
def test_the_share_of_cutmix_by_the_expectation_of_its_box():
  """E[area] by a sum over lam and centres, the box cut off at the borders."""
  size = 16
  given = with_partners(n=2, height=size, width=size)
  given = jax.tree.map(jnp.asarray, given)
  mix = mixing.build(section('cutmix'), COUNTS, STEPS)
  keys = jax.random.split(jax.random.key(0), 4000)
  shares = np.asarray(jax.jit(jax.vmap(lambda key: mix(key, given, STEP)['share'][0]))(keys))
  areas = []
  for lam in (np.arange(2000) + 0.5) / 2000:  # Beta(1, 1)
    half = int(size * np.sqrt(1 - lam)) // 2
    lengths = [min(size, c + half) - max(0, c - half) for c in range(size)]
    areas.append(np.mean(lengths) ** 2)
  expected = 1 - np.mean(areas) / size**2
  assert abs(shares.mean() - expected) < 5 * shares.std() / np.sqrt(len(shares))


@pytest.mark.seconds
@pytest.mark.parametrize('name', MIXED)
def test_batches_are_mixed_with_the_probability_and_while_it_is_time(name):
  given = jax.tree.map(jnp.asarray, with_partners())
  mix = mixing.build(section(name, probability=0.3, start=0.2, stop=0.8), COUNTS, STEPS)
  keys = jax.random.split(jax.random.key(0), 600)

  @jax.jit
  def untouched(step):
    found = jax.vmap(lambda key: mix(key, given, step))(keys)
    same = (found['image'] == given['image'][None]).all((1, 2, 3, 4))
    return same & (found['share'] == 1).all(1)

  for step in (0, 19, 80, 99):
    assert untouched(step).all()
  for step in (20, 79):
    mixed = 1 - float(untouched(step).mean())
    assert 0.2 < mixed < 0.4  # a box of no pixels is not seen


@pytest.mark.parametrize('name', mixing.MIXINGS)
def test_partners_of_their_own_stream(name):
  labels = np.repeat(np.arange(4), COUNTS)
  sampler = config_lib.default().sampler
  own = sampling.Stream.of(sampler, labels, 50, 100, seed=0)
  found = mixing.partners(section(name), own)
  if name != 'cmo':
    assert found is None
    return
  drawn = np.concatenate([found.positions(step) for step in range(100)])
  share = np.bincount(labels[drawn]) / len(drawn)
  assert abs(share - 0.25).max() < 0.04  # every class as often as the others
  again = sampling.Stream('class', 0, labels, 50, 100, 0)
  assert (found.positions(0) != again.positions(0)).any()  # not the stream of a balanced sampler


@pytest.mark.seconds
def test_the_same_key_gives_the_same_batch():
  given = with_partners()
  for name in MIXED:
    first, again = (run(name, jax.random.key(3), given) for _ in range(2))
    other = run(name, jax.random.key(4), given)
    assert (first['image'] == again['image']).all()
    assert (first['image'] != other['image']).any()


def test_an_unknown_mixing_lists_the_known_ones():
  with pytest.raises(UserError, match=r"mixing\.name among none, mixup, .*; found 'puzzle'"):
    mixing.build(section('puzzle'), COUNTS, STEPS)
