"""Confusion sums and the metrics read off them, against scikit-learn and plain loops."""

import fractions
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics as sk

from csba_jax.methods import metrics
from csba_jax.methods.metrics import Confusion, macro_f1_at, summarise

CLASSES = 6
TRAIN_COUNTS = np.array([500, 101, 100, 20, 19, 1])  # both borders of every shot group
from_logits = jax.jit(Confusion.from_logits)


def long_tailed(seed, n=700, skill=1.5):
  """(logits [n, C] float32, labels [n] int32), classes about 3, 2, ... times rarer; all present."""
  rng = np.random.default_rng(seed)
  prior = 0.5 ** np.arange(CLASSES)
  labels = rng.choice(CLASSES, n, p=prior / prior.sum()).astype(np.int32)
  labels[:CLASSES] = np.arange(CLASSES)
  logits = rng.normal(size=(n, CLASSES)) + skill * np.eye(CLASSES)[labels]
  return logits.astype(np.float32), labels


def sums(logits, labels):
  """Confusion over everything, on the host."""
  return from_logits(logits, labels, np.ones(len(labels), bool)).to_host()


def probabilities(logits):
  z = np.asarray(logits, np.float64)
  z = np.exp(z - z.max(-1, keepdims=True))
  return z / z.sum(-1, keepdims=True)


def matrix(rows):
  """Confusion with these counts and nothing else."""
  return Confusion(np.array(rows), np.float64(0), *np.zeros((3, metrics.CALIBRATION_BINS)))


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_every_metric_equals_scikit_learn(seed):
  logits, labels = long_tailed(seed)
  predicted, classes = logits.argmax(-1), range(CLASSES)
  result = summarise(sums(logits, labels), TRAIN_COUNTS)
  precision, recall, f1, support = sk.precision_recall_fscore_support(
    labels, predicted, labels=classes, zero_division=0
  )
  assert result['confusion_matrix'] == sk.confusion_matrix(labels, predicted).tolist()
  np.testing.assert_allclose(result['per_class']['precision'], precision, rtol=1e-12)
  np.testing.assert_allclose(result['per_class']['recall'], recall, rtol=1e-12)
  np.testing.assert_allclose(result['per_class']['f1'], f1, rtol=1e-12)
  assert result['per_class']['support'] == support.tolist()
  assert result['accuracy'] == pytest.approx(sk.accuracy_score(labels, predicted), rel=1e-12)
  assert result['macro_f1'] == pytest.approx(f1.mean(), rel=1e-12)
  balanced = sk.balanced_accuracy_score(labels, predicted)
  assert result['balanced_accuracy'] == pytest.approx(balanced, rel=1e-12)
  loss = sk.log_loss(labels, probabilities(logits), labels=classes)
  assert result['loss'] == pytest.approx(loss, rel=1e-5)
  assert result['examples'] == len(labels)
  assert result['classes_without_examples'] == 0


@pytest.mark.parametrize('garbage', [0, -1, 3, 10**6])
@pytest.mark.parametrize('mask_type', [bool, np.int32, np.float32])
def test_padding_carries_no_weight(garbage, mask_type):
  logits, labels = long_tailed(3, n=50)
  padded = np.concatenate([logits, np.full((14, CLASSES), 7.0, np.float32)])
  padded_labels = np.concatenate([labels, np.full(14, garbage, np.int32)])
  mask = (np.arange(64) < 50).astype(mask_type)
  whole = from_logits(padded, padded_labels, mask).to_host()
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole, sums(logits, labels)
  )


def test_padding_in_the_middle_and_with_logits_that_are_not_finite():
  logits, labels = long_tailed(4, n=40)
  mask = np.arange(40) % 3 > 0
  spoilt = np.where(mask[:, None], logits, np.nan)
  whole = from_logits(spoilt, labels, mask).to_host()
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
    whole,
    sums(logits[mask], labels[mask]),
  )


@pytest.mark.parametrize('batch_size', [1, 7, 100, 1000])
def test_batches_of_any_size_merge_to_the_same(batch_size):
  logits, labels = long_tailed(5, n=100)
  batches = []
  for start in range(0, len(labels), batch_size):
    index = np.arange(start, start + batch_size)
    mask = index < len(labels)
    index = np.where(mask, index, 0)
    batches.append(from_logits(logits[index], labels[index], mask).to_host())
  merged = functools.reduce(Confusion.merge, batches)
  whole = sums(logits, labels)
  for name in ('counts', 'bin_counts', 'bin_correct'):
    np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name))
  np.testing.assert_allclose(merged.loss, whole.loss, rtol=1e-6)
  np.testing.assert_allclose(merged.bin_confidence, whole.bin_confidence, rtol=1e-5)
  a, b = summarise(merged, TRAIN_COUNTS), summarise(whole, TRAIN_COUNTS)
  assert a['per_class'] == b['per_class']
  assert a['macro_f1'] == b['macro_f1']


def test_merging_on_the_device_gives_the_same_sums():
  logits, labels = long_tailed(6, n=60)
  mask = np.ones(30, bool)
  a, b = (from_logits(logits[i : i + 30], labels[i : i + 30], mask) for i in (0, 30))
  merged = a.merge(b)
  assert isinstance(merged.counts, jax.Array)
  np.testing.assert_array_equal(merged.counts, sums(logits, labels).counts)


@pytest.mark.seconds
def test_jit_changes_nothing_and_types_are_as_documented():
  logits, labels = long_tailed(7, n=64)
  mask = np.arange(64) < 60
  eager = Confusion.from_logits(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(mask))
  jitted = from_logits(logits, labels, mask)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), eager, jitted)
  assert [x.dtype.name for x in jax.tree.leaves(jitted)] == [
    'int32',
    'float32',
    'int32',
    'int32',
    'float32',
  ]
  host = jitted.to_host()
  assert {x.dtype.name for x in jax.tree.leaves(host)} == {'int64', 'float64'}


def test_half_precision_logits_are_summed_in_float32():
  logits, labels = long_tailed(8, n=64)
  half = jnp.asarray(logits, jnp.bfloat16)
  found = from_logits(half, labels, np.ones(64, bool))
  exact = from_logits(half.astype(jnp.float32), labels, np.ones(64, bool))
  assert found.loss.dtype == jnp.float32
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, exact)


def test_host_sums_do_not_overflow():
  most = np.int32(2**31 - 1)
  full = Confusion(
    counts=jnp.full((2, 2), most),
    loss=jnp.float32(1.0),
    bin_counts=jnp.full(metrics.CALIBRATION_BINS, most),
    bin_correct=jnp.full(metrics.CALIBRATION_BINS, most),
    bin_confidence=jnp.ones(metrics.CALIBRATION_BINS),
  )
  twice = full.to_host().merge(full.to_host())
  assert twice.counts[0, 0] == 2 * int(most)
  result = summarise(twice, np.array([5, 5]))
  assert result['examples'] == 8 * int(most)
  assert result['confusion_matrix'] == [[2 * int(most)] * 2] * 2
  assert result['accuracy'] == 0.5


@pytest.mark.parametrize('host_first', [True, False])
def test_one_side_on_the_host_brings_the_sum_there(host_first):
  most = np.int32(2**31 - 1)
  bins = jnp.zeros(metrics.CALIBRATION_BINS, jnp.int32)
  device = Confusion(jnp.full((2, 2), most), jnp.float32(0.1), bins, bins, bins.astype(float))
  host = device.to_host()
  merged = host.merge(device) if host_first else device.merge(host)
  assert np.asarray(merged.counts).tolist() == [[2 * int(most)] * 2] * 2
  assert np.asarray(merged.loss).dtype == np.float64


def test_class_without_test_examples_is_nan_left_out_and_counted():
  result = summarise(matrix([[8, 2, 0], [1, 3, 0], [0, 0, 0]]), np.array([50, 50, 50]))
  f1 = result['per_class']['f1']
  assert f1[:2] == pytest.approx([16 / 19, 6 / 9])
  assert math.isnan(f1[2])
  assert math.isnan(result['per_class']['recall'][2])
  assert result['macro_f1'] == pytest.approx((16 / 19 + 6 / 9) / 2)
  assert result['balanced_accuracy'] == pytest.approx((0.8 + 0.75) / 2)
  assert result['classes_without_examples'] == 1
  assert result['per_class']['support'] == [10, 4, 0]


def test_class_without_test_examples_stays_nan_when_it_is_predicted():
  result = summarise(matrix([[8, 2, 1], [1, 3, 2], [0, 0, 0]]), np.array([50, 50, 50]))
  assert math.isnan(result['per_class']['f1'][2])
  assert result['per_class']['precision'][2] == 0
  expected = sk.f1_score(
    [0] * 11 + [1] * 6,
    [0] * 8 + [1] * 2 + [2] + [0] + [1] * 3 + [2] * 2,
    labels=[0, 1],
    average='macro',
  )
  assert result['macro_f1'] == pytest.approx(expected)


def test_class_never_predicted_has_f1_zero_and_counts():
  result = summarise(matrix([[9, 0], [4, 0]]), np.array([50, 50]))
  assert result['per_class']['f1'] == pytest.approx([18 / 22, 0.0])
  assert result['per_class']['precision'][1] == 0
  assert result['per_class']['recall'][1] == 0
  assert result['macro_f1'] == pytest.approx(9 / 22)
  assert result['classes_without_examples'] == 0


def test_group_accuracy_is_the_mean_recall_of_the_group():
  logits, labels = long_tailed(9)
  predicted = logits.argmax(-1)
  recall = [np.mean(predicted[labels == c] == c) for c in range(CLASSES)]
  found = summarise(sums(logits, labels), TRAIN_COUNTS)['group_accuracy']
  assert list(found) == ['many', 'medium', 'few']
  assert found['many'] == pytest.approx(np.mean(recall[:2]))
  assert found['medium'] == pytest.approx(np.mean(recall[2:4]))
  assert found['few'] == pytest.approx(np.mean(recall[4:]))


def test_empty_group_is_nan_and_so_is_one_without_test_examples():
  confusion = matrix([[8, 2, 0], [1, 3, 0], [0, 0, 0]])
  groups = summarise(confusion, np.array([500, 500, 5]))['group_accuracy']
  assert groups['many'] == pytest.approx((0.8 + 0.75) / 2)
  assert math.isnan(groups['medium'])  # no class is in it
  assert math.isnan(groups['few'])  # its one class has no test image


def calibration_reference(logits, labels, bins=15):
  """Guo et al. 2017, example by example in float64: sum_i |bin i| / n |accuracy - confidence|."""
  p = probabilities(logits)
  error = 0.0
  for i in range(bins):
    inside = [k for k in range(len(p)) if i / bins < p[k].max() <= (i + 1) / bins]
    if inside:
      accuracy = sum(p[k].argmax() == labels[k] for k in inside) / len(inside)
      confidence = sum(p[k].max() for k in inside) / len(inside)
      error += len(inside) / len(p) * abs(accuracy - confidence)
  return error


@pytest.mark.parametrize('skill', [0.0, 1.5, 6.0])
def test_calibration_error_equals_a_loop(skill):
  logits, labels = long_tailed(10, n=300, skill=skill)
  found = summarise(sums(2 * logits, labels), TRAIN_COUNTS)['expected_calibration_error']
  assert found == pytest.approx(calibration_reference(2 * logits, labels), abs=1e-5)


def test_confidence_on_a_bin_edge_belongs_to_the_bin_below():
  # k equal logits: confidence 1 / k, on an edge of fifteen bins for k = 1, 3, 5, 15
  ties = np.arange(1, 16)
  logits = np.where(np.arange(15)[None] < ties[:, None], 0.0, -1e4).astype(np.float32)
  labels = np.where(ties % 2 == 0, 0, 14).astype(np.int32)  # argmax is 0: right for even k
  found = sums(logits, labels)
  edges = [math.ceil(fractions.Fraction(15, int(k))) - 1 for k in ties]
  assert (edges[0], edges[2], edges[4], edges[14]) == (14, 4, 2, 0)
  assert found.bin_counts.tolist() == np.bincount(edges, minlength=15).tolist()
  right = np.bincount(edges, weights=ties % 2 == 0, minlength=15)
  assert found.bin_correct.tolist() == right.tolist()
  confidence = np.bincount(edges, weights=1 / ties, minlength=15)
  np.testing.assert_allclose(found.bin_confidence, confidence, rtol=1e-6)
  counts = np.bincount(edges, minlength=15)
  error = np.abs(right - confidence)[counts > 0].sum() / 15
  found_error = summarise(found, np.full(15, 50))['expected_calibration_error']
  assert found_error == pytest.approx(error, abs=1e-6)


def test_certain_and_right_has_no_calibration_error():
  labels = np.arange(CLASSES, dtype=np.int32)
  result = summarise(sums(1e4 * np.eye(CLASSES, dtype=np.float32), labels), TRAIN_COUNTS)
  assert result['expected_calibration_error'] == 0
  assert result['loss'] == 0
  assert result['macro_f1'] == 1


def test_nothing_but_padding_is_undefined_rather_than_zero():
  logits, labels = long_tailed(11, n=8)
  empty = from_logits(logits, labels, np.zeros(8, bool)).to_host()
  result = summarise(empty, TRAIN_COUNTS)
  assert result['examples'] == 0
  assert result['classes_without_examples'] == CLASSES
  for name in ('loss', 'accuracy', 'macro_f1', 'balanced_accuracy', 'expected_calibration_error'):
    assert math.isnan(result[name]), name
  assert all(math.isnan(value) for value in result['group_accuracy'].values())


@pytest.mark.parametrize('seed', range(8))
def test_no_other_nan_ever(seed):
  rng = np.random.default_rng(seed)
  counts = rng.integers(0, 4, (5, 5)) * (rng.random((5, 1)) < 0.6) * (rng.random((1, 5)) < 0.6)
  bins = np.bincount(rng.integers(0, 15, counts.sum()), minlength=15)
  confusion = Confusion(counts, np.float64(2.0), bins, bins // 2, bins * 0.3)
  train_counts = rng.choice([5, 50, 500], 5)
  result = summarise(confusion, train_counts)
  absent = counts.sum(1) == 0
  assert np.isnan(result['per_class']['f1']).tolist() == absent.tolist()
  assert np.isnan(result['per_class']['recall']).tolist() == absent.tolist()
  assert np.isfinite(result['per_class']['precision']).all()
  assert result['classes_without_examples'] == absent.sum()
  for name, few in (('many', 500), ('medium', 50), ('few', 5)):
    undefined = not ((train_counts == few) & ~absent).any()
    assert math.isnan(result['group_accuracy'][name]) == undefined
  for name in ('loss', 'accuracy', 'macro_f1', 'balanced_accuracy', 'expected_calibration_error'):
    assert math.isnan(result[name]) == (counts.sum() == 0), name


def test_summary_is_made_of_plain_values():
  logits, labels = long_tailed(12, n=30)
  plain = (int, float, list, dict)

  def walk(value):
    assert type(value) in plain, type(value)
    for item in value.values() if type(value) is dict else value if type(value) is list else ():
      walk(item)

  walk(summarise(from_logits(logits, labels, np.ones(30, bool)), TRAIN_COUNTS))


# ---- macro_f1_at


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('kind', ['equal', 'random', 'reversed'])
def test_macro_f1_at_is_that_of_weighted_examples(seed, kind):
  """scikit-learn's, where an example of class c weighs share_c / support_c."""
  logits, labels = long_tailed(seed)
  predicted, support = logits.argmax(-1), np.bincount(labels, minlength=CLASSES)
  shares = {
    'equal': np.full(CLASSES, 0.25),
    'random': np.random.default_rng(seed).uniform(0.01, 5, CLASSES),
    'reversed': support[::-1].astype(float),
  }[kind]
  weights = (shares / support)[labels]
  expected = sk.f1_score(labels, predicted, average='macro', sample_weight=weights)
  found = macro_f1_at(sums(logits, labels).counts, shares)
  assert found == pytest.approx(expected, rel=1e-12)
  assert type(found) is float


def test_macro_f1_at_the_parts_own_shares_is_macro_f1():
  logits, labels = long_tailed(5)
  confusion = sums(logits, labels)
  support, plain = confusion.counts.sum(1), summarise(confusion, TRAIN_COUNTS)['macro_f1']
  for scale in (1, 1e-9, 1e9):  # their sum does not matter
    assert macro_f1_at(confusion.counts, scale * support) == pytest.approx(plain, rel=1e-12)
  assert macro_f1_at(confusion.counts, np.ones(CLASSES)) != pytest.approx(plain, rel=1e-3)


def test_macro_f1_at_does_not_depend_on_the_support():
  counts = np.array([[8, 2, 0], [1, 3, 0], [1, 0, 1]])
  shares = np.array([0.5, 0.2, 0.3])
  more = counts * np.array([[1], [100], [7]])
  assert macro_f1_at(more, shares) == pytest.approx(macro_f1_at(counts, shares), rel=1e-12)


def test_macro_f1_at_by_hand():
  """[[9, 1], [1, 1]]: at equal shares rows .9 .1 and .5 .5, F1 1.8 / 2.4 and 1 / 1.6."""
  counts = np.array([[9, 1], [1, 1]])
  assert macro_f1_at(counts, np.ones(2)) == pytest.approx((1.8 / 2.4 + 1 / 1.6) / 2)
  plain = (18 / 20 + 2 / 4) / 2
  assert summarise(matrix(counts), np.ones(2))['macro_f1'] == pytest.approx(plain)


def test_macro_f1_at_leaves_absent_classes_out():
  counts = np.array([[4, 1, 0], [0, 0, 0], [2, 0, 3]])
  shares = np.array([1.0, 5.0, 2.0])
  labels, predicted = (np.repeat(axis.ravel(), counts.ravel()) for axis in np.indices((3, 3)))
  weights = np.array([1 / 5, 0, 2 / 5])[labels]
  expected = sk.f1_score(labels, predicted, labels=[0, 2], average='macro', sample_weight=weights)
  assert macro_f1_at(counts, shares) == pytest.approx(expected, rel=1e-12)


def test_macro_f1_at_of_a_class_never_predicted_or_of_no_share_is_zero_there():
  counts = np.array([[5, 0], [5, 0]])
  assert macro_f1_at(counts, np.array([0.5, 0.5])) == pytest.approx((2 / 3 + 0) / 2)
  assert macro_f1_at(np.array([[5, 0], [0, 5]]), np.array([1.0, 0.0])) == 0.5


def test_macro_f1_at_of_nothing_is_undefined():
  assert math.isnan(macro_f1_at(np.zeros((3, 3), int), np.ones(3)))
