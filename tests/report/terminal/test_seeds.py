"""What one seed tells, in words made from numbers."""

import numpy as np
import pytest
import scipy.stats

from csba_jax.analysis import stats
from csba_jax.errors import UserError
from csba_jax.methods import metrics
from csba_jax.report.terminal import seeds


def result(counts, train=(50, 20, 5)):
  """result.json of a confusion matrix."""
  zeros = np.zeros(metrics.CALIBRATION_BINS)
  found = metrics.summarise(metrics.Confusion(np.array(counts), 0.0, zeros, zeros, zeros), train)
  return found | {'class_names': ['a', 'b', 'c'], 'class_counts': list(train)}


GOOD = result([[90, 10, 0], [10, 80, 10], [0, 10, 30]])
SAME = result([[89, 11, 0], [10, 80, 10], [0, 11, 29]])
POOR = result([[90, 10, 0], [50, 50, 0], [20, 20, 0]])
NAMES = ('csba', 'none')


def test_the_error_by_test_images_is_that_of_images_drawn_anew():
  rng, labels = np.random.default_rng(1), np.repeat(np.arange(3), [100, 100, 40])
  drawn = []
  for _ in range(2000):  # the slow way, image by image
    counts = np.zeros((3, 3))
    shares = np.array(GOOD['confusion_matrix'])[labels] / [[100]] * 100
    shares = shares / shares.sum(1, keepdims=True)
    predicted = (rng.random((len(labels), 1)) > shares.cumsum(1)).sum(1)
    np.add.at(counts, (labels, predicted), 1)
    drawn.append(result(counts)['macro_f1'])
  assert seeds.macro_f1_error(GOOD) == pytest.approx(1.96 * np.std(drawn), rel=0.1)


def test_a_class_without_test_images_is_left_out():
  without = result([[90, 10, 0], [20, 80, 0], [0, 0, 0]])
  assert 0.03 < seeds.macro_f1_error(without) < 0.1
  assert seeds.describe([without], [without], NAMES).endswith(
    '5 training images and no test image.'
  )


def test_one_seed_with_a_large_difference():
  text = seeds.describe([POOR], [GOOD], NAMES)
  first, second = POOR['macro_f1'], GOOD['macro_f1']
  assert f'{first:.3f} with csba, {second:.3f} with none, one seed each' in text
  assert f'a difference of {first - second:+.3f}.' in text
  error = np.hypot(seeds.macro_f1_error(POOR), seeds.macro_f1_error(GOOD))
  assert f'±{error:.3f} (95 %): it is larger, so these two trained nets differ.' in text
  assert 'one seed cannot tell' in text
  assert 'nothing yet about csba and none in general' in text
  assert text.endswith(
    'c, has 5 training images and 40 test images: a single one of these moves its recall by 0.025.'
  )


def test_one_seed_with_a_small_difference():
  assert 'it is no larger than that.' in seeds.describe([SAME], [GOOD], NAMES)


def test_several_seeds():
  undecided = seeds.describe([SAME, POOR, GOOD], [GOOD, SAME, POOR], NAMES)
  assert 'csba - none, mean of 3 seeds: macro-F1' in undecided
  assert 'contains 0, so these seeds do not show which is better.' in undecided
  assert 'p = 0.25 at best' in undecided
  clear = seeds.describe([POOR, POOR, SAME, POOR], [GOOD, SAME, GOOD, GOOD], NAMES)
  shifted = [r | {'macro_f1': r['macro_f1'] - 0.3} for r in (GOOD, SAME, GOOD, SAME)]
  clear = seeds.describe(shifted, [SAME, GOOD, GOOD, SAME], NAMES)
  assert 'leaves out 0: none does better with this recipe on this data.' in clear
  assert 'no interval' in seeds.describe([GOOD, GOOD], [SAME, SAME], NAMES)


def test_seeds_that_share_images_have_the_interval_that_knows_it():
  differences, ratio = np.array([0.1, 0.1, 0.04, 0.12]), 0.3 / 0.7
  control = [GOOD, SAME, POOR, GOOD]
  treated = [r | {'macro_f1': r['macro_f1'] + d} for r, d in zip(control, differences, strict=True)]
  error = np.sqrt((1 / 4 + ratio) * differences.var(ddof=1))  # Nadeau and Bengio 2003
  t = scipy.stats.t(3)
  low, high = differences.mean() + np.array([-1, 1]) * t.ppf(0.975) * error
  overlap = seeds.Overlap(ratio, 'folds', ('d', 'b', 'c', 'a'))
  text = seeds.describe(treated, control, NAMES, overlap)
  assert f'95 % interval {low:+.3f} to {high:+.3f}.' in text
  p = 2 * t.sf(differences.mean() / error)
  assert 'All folds draw their images from one set, and the interval allows for that' in text
  assert f'(Nadeau and Bengio 2003); p = {p:.2g}.' in text
  assert 'mean of 4 folds: macro-F1' in text
  assert 'contains 0, so these folds do not show which is better.' in text
  alone = seeds.describe(treated, control, NAMES)
  assert 'leaves out 0' in alone
  assert 'sign-flip' in alone


def test_runs_of_one_drawing_are_one_unit():
  of_drawings = np.array([0.1, 0.04, 0.13])
  noise = np.array([0.02, -0.02, 0.01, -0.01, 0.03, -0.03])
  found = seeds.Overlap(0.4, 'seeds', tuple('aabbcc')).means(np.repeat(of_drawings, 2) + noise)
  np.testing.assert_allclose(found, of_drawings)
  control = [GOOD] * 6
  treated = [r | {'macro_f1': r['macro_f1'] + d} for r, d in zip(control, noise, strict=True)]
  text = seeds.describe(treated, control, NAMES, seeds.Overlap(0.4, 'seeds', tuple('aabbcc')))
  assert 'mean of 3 seeds: macro-F1' in text


def test_runs_of_one_subset_are_one_unit():
  noise = np.array([0.02, 0.0, 0.01, 0.03, 0.03, 0.05])
  control = [GOOD] * 6
  treated = [r | {'macro_f1': r['macro_f1'] + d} for r, d in zip(control, noise, strict=True)]
  text = seeds.describe(treated, control, NAMES, seeds.Overlap(None, 'subsets', tuple('aabbcc')))
  wanted = stats.paired_difference(np.array([0.01, 0.02, 0.04]))
  assert 'mean of 3 subsets: macro-F1 +0.023' in text
  assert f'95 % interval {wanted.low:+.3f} to {wanted.high:+.3f}.' in text
  assert 'With 3 subsets a sign-flip test gives p = 0.25 at best; here p = 0.25.' in text


def test_an_interval_of_two_seeds_ends_where_f1_can_be():
  text = seeds.describe([POOR, GOOD], [GOOD, POOR], NAMES)
  assert 'macro-F1 +0.000, 95 % interval -1.000 to +1.000.' in text


def test_seeds_come_in_pairs():
  for treated, control in (([], []), ([GOOD], [GOOD, GOOD])):
    with pytest.raises(UserError, match='results of the same seeds, at least one; found'):
      seeds.describe(treated, control, NAMES)
