"""What runs of one seed, or of a few, tell about two kinds of net and what not, in words."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from csba_jax.analysis import stats
from csba_jax.errors import UserError
from csba_jax.methods import metrics

Results = Sequence[Mapping[str, Any]]  # content of result.json by seed
RESAMPLES = 500


@dataclasses.dataclass(frozen=True)
class Overlap:
  """How runs share images.

  Attributes:
    test_to_rest: see `csba_jax.study.protocol.test_to_rest`, where the parts of all runs are drawn
      from one set; None where only runs with the same splits share images.
    units: what tells one drawing from another: 'seeds', 'folds' or 'subsets'.
    splits: digest of the splits of each run.
  """

  test_to_rest: float | None
  units: str
  splits: tuple[str, ...]

  def means(self, differences: np.ndarray) -> np.ndarray:
    """The mean of each drawing: runs of one drawing that differ in initial weights are one unit."""
    _, drawing = np.unique(self.splits, return_inverse=True)
    return np.bincount(drawing, differences) / np.bincount(drawing)


def describe(
  treated: Results, control: Results, names: tuple[str, str], overlap: Overlap | None = None
) -> str:
  """Lines on macro-F1 of the test part, every number computed from the results.

  Args:
    treated: of one kind of net.
    control: of the other, the same seeds in the same order.
    names: what to call the two.
    overlap: of runs that share images; None where they do not.
  """
  if not 0 < len(treated) == len(control):
    raise UserError(
      'results of the same seeds, at least one', f'{len(treated)} and {len(control)}', 'pair them'
    )
  lines = _one(treated[0], control[0], names)
  if len(treated) > 1:
    differences = [t['macro_f1'] - c['macro_f1'] for t, c in zip(treated, control, strict=True)]
    lines = _several(np.array(differences), names, overlap)
  return '\n'.join([*lines, _smallest_class(treated[0])])


def _one(
  treated: Mapping[str, Any], control: Mapping[str, Any], names: tuple[str, str]
) -> list[str]:
  first, second = treated['macro_f1'], control['macro_f1']
  error = float(np.hypot(macro_f1_error(treated), macro_f1_error(control)))
  beyond = abs(first - second) > error
  return [
    f'Macro-F1: {first:.3f} with {names[0]}, {second:.3f} with {names[1]}, one seed each: a '
    f'difference of {first - second:+.3f}.',
    f'Other test images of the same kind would move it by up to ±{error:.3f} (95 %): it is '
    + ('larger, so these two trained nets differ.' if beyond else 'no larger than that.'),
    'How much another seed would move it, one seed cannot tell: initial weights, batches and the '
    'choice of images all change with it.',
    f'So this says nothing yet about {names[0]} and {names[1]} in general.',
  ]


def _several(differences: np.ndarray, names: tuple[str, str], overlap: Overlap | None) -> list[str]:
  units = 'seeds'
  if overlap is not None:
    differences, units = overlap.means(differences), overlap.units
  n = len(differences)
  if overlap is None or overlap.test_to_rest is None:
    found = stats.paired_difference(differences, units=units)
    test = f'With {n} {units} a sign-flip test gives p = {2 ** (1 - n):.2g} at best; here '
  else:
    found = stats.corrected_resampled_t(differences, overlap.test_to_rest, units=units)
    test = (
      f'All {units} draw their images from one set, and the interval allows for that (Nadeau and '
      'Bengio 2003); '
    )
  found = found.cut(-1, 1)
  mean = f'{names[0]} - {names[1]}, mean of {len(differences)} {units}: macro-F1 {found.value:+.3f}'
  if not found.known:
    return [f'{mean}; {found.method}.']
  better = names[0] if found.value > 0 else names[1]
  return [
    f'{mean}, 95 % interval {found.low:+.3f} to {found.high:+.3f}.',
    f'The interval leaves out 0: {better} does better with this recipe on this data.'
    if found.excludes(0)
    else f'The interval contains 0, so these {units} do not show which is better.',
    f'{test}p = {found.p:.2g}.',
  ]


def _smallest_class(result: Mapping[str, Any]) -> str:
  c = int(np.argmin(result['class_counts']))
  images, tested = result['class_counts'][c], result['per_class']['support'][c]
  return f'The smallest class, {result["class_names"][c]}, has {images} training images and ' + (
    f'{tested} test images: a single one of these moves its recall by {1 / tested:.3f}.'
    if tested
    else 'no test image.'
  )


def macro_f1_error(result: Mapping[str, Any]) -> float:
  """1.96 standard deviations of macro-F1 over test parts with as many images of each class.

  Bootstrap of the test images within classes: the rows of the confusion matrix are drawn anew.
  """
  counts = np.asarray(result['confusion_matrix'])
  tested = counts[counts.sum(1) > 0]
  support = tested.sum(1)
  rng = np.random.default_rng(0)
  drawn = np.zeros((RESAMPLES, *counts.shape))
  drawn[:, counts.sum(1) > 0] = rng.multinomial(
    support, tested / support[:, None], size=(RESAMPLES, len(support))
  )
  return float(1.96 * np.std([metrics.macro_f1_at(one, one.sum(1)) for one in drawn]))
