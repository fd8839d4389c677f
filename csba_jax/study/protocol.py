"""What a study compares unless its config says otherwise: variants, methods and significance.

A study config may declare pairs of variants (`pairs`) and methods (`own_methods`) of its own.
docs/study.md has the protocol in words.
"""

import math
from collections.abc import Mapping
from typing import Any

SIGNIFICANCE = 0.05
TREATMENTS, CONTROLS = ('csba', 'csba_class'), ('none', 'none_wide')
FAMILY = tuple((treatment, control) for treatment in TREATMENTS for control in CONTROLS)
SECONDARY = (('se', 'none'), ('cbam', 'none'), ('none_wide', 'none'), ('half', 'none'))

# What a method sets in the base's config. Each method sets every field that any of them changes, so
# that nothing of the base's own method stays. Everything else is the same in every run.
PLAIN: dict[str, Any] = {
  'loss.name': 'cross_entropy',
  'loss.weights': 'none',
  'loss.weights_start': 0.0,
  'sampler.name': 'instance',
  'sampler.start': 0.0,
}
METHODS: dict[str, dict[str, Any]] = {
  'cross_entropy': PLAIN,
  'balanced_softmax': PLAIN | {'loss.name': 'balanced_softmax'},
  'class_balanced': PLAIN | {'sampler.name': 'class'},
  # deferred re-weighting (Cao et al. 2019) of the cross-entropy
  'drw': PLAIN | {'loss.weights': 'effective', 'loss.weights_start': 0.8},
}


def family(config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
  """The (treatment, control) pairs of a study that are tested as one family.

  Args:
    config: of the study; `pairs` are its own, FAMILY stands in for none (or for no such field).
  """
  own = config.get('pairs') or ()
  return tuple((treatment, control) for treatment, control in own) or FAMILY


def secondary(config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
  """The pairs that are shown beside the family; none for a study that declares its own pairs."""
  return () if config.get('pairs') else SECONDARY


def seeds_needed(tests: int) -> int:
  """The fewest seeds with which the smallest p of a family of so many tests is significant."""
  return 1 + math.floor(math.log2(tests / SIGNIFICANCE)) + 1


def redraws(data: Mapping[str, Any]) -> bool:
  """Whether seeds draw test and training images from one set; not of sources with a test set.

  Disjoint subsets need one.
  """
  own = data.get('disjoint_subsets') or (data.get('source') == 'tfds' and data.get('test_split'))
  return bool(data.get('test_fraction')) and not own


def test_to_rest(data: Mapping[str, Any]) -> float:
  """Test images / all other images of the set, also those that a cut tail leaves out.

  Of folds, and of seeds that redraw one set; see `csba_jax.analysis.stats.corrected_resampled_t`.

  Args:
    data: the section of a config.
  """
  share = 1 / data['folds'] if data.get('folds') else float(data['test_fraction'])
  return share / (1 - share)


def too_few_seeds(tests: int, seeds: int, unit: str = 'seed') -> str:
  """That nothing can be supported by a family of so many tests over so many seeds; '' if it can.

  Of independent seeds: those that redraw one set of images (`redraws`) have another test.

  Sign flips of n seeds have p >= 2^(1 - n), and Holm multiplies the smallest p by the number of
  tests. Seeds that share a subset count once: then `unit` is 'subset'.
  """
  smallest, needed = tests * 2.0 ** (1 - seeds), seeds_needed(tests)
  if smallest < SIGNIFICANCE:
    return ''
  return (
    f'{seeds} {unit}{"s" * (seeds != 1)} cannot support any comparison: the smallest p of {tests} '
    f'test{"s" * (tests != 1)} is {min(smallest, 1):.3f} after Holm; use {needed} {unit}s'
  )
