"""Rules from evidence to advice, each with its threshold and the reason for it."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from csba_jax.analysis.advice.evidence import Evidence
from csba_jax.analysis.rates import share_ends

Verdict = Literal['yes', 'no', 'not known']
NAMED = 3  # classes, pairs or layers that a sentence names at most

# A class is too small to judge where the 95 % interval of its recall is wider than this: it then
# holds, say, both 0.3 and 0.8.
WIDE = 0.5
# The largest class over the smallest, up to which no class counts as rare.
EQUAL = 1.2
# Gain in mean recall, from the logit adjustment alone, that is worth another training.
USEFUL_GAIN = 0.02
# Share of what a class's own gradient gains that the gradients of the others undo. Below a quarter
# the class still goes down at three quarters of its speed.
UNDONE = 0.25
# Share of the images of two classes that are taken for the other one of the two.
CONFUSED = 0.15
# Wrong answers that the labels are judged by, at least; a margin that tells right answers from
# wrong ones with a probability below SURE. In made-up runs of the best possible net (as in
# test_rules.py, 20 seeds each) it is 0.74 to 0.99 on clean labels, at mean recalls of 0.70 to 0.98,
# and 0.40 to 0.61 where 5 to 30 % of the labels are wrong.
LEAST_ERRORS, SURE = 10, 0.7
# Mean recall below which errors are too common to say whose they are. A net counts as trained from
# this share of the way from what guessing gives to 1 on.
TRUSTED, LEARNED = 0.5, 0.1


class Finding(NamedTuple):
  """What a rule found.

  Attributes:
    rule: its name.
    verdict: whether there is the problem.
    text: sentences with the numbers that it follows from.
    fields: {config field: value} to try next; empty if no recipe follows.
  """

  rule: str
  verdict: Verdict
  text: str
  fields: dict[str, Any] = {}  # noqa: RUF012, a default that nothing changes


class Rule(NamedTuple):
  """One question to the evidence.

  Attributes:
    name: short, as it is printed.
    reads: 'validation' or 'conflict', without which it is not asked.
    check: Evidence -> (verdict, sentences, fields).
  """

  name: str
  reads: Literal['validation', 'conflict']
  check: Callable[[Evidence], tuple[Verdict, str, dict[str, Any]]]


def _names(names: Sequence[str]) -> str:
  """'a, b, c and 4 more'."""
  listed = ', '.join(names[:NAMED])
  return listed + (f' and {len(names) - NAMED} more' if len(names) > NAMED else '')


def _training(e: Evidence) -> tuple[Verdict, str, dict[str, Any]]:
  some = int((e.support > 0).sum())
  said = f'Mean recall on {e.images} validation images is {e.mean_recall}'
  if some < 2:
    return 'not known', f'{said}, all of one class.', {}
  guessing = 1 / some
  least = guessing + LEARNED * (1 - guessing)
  if e.mean_recall.high < least:
    text = (
      f'{said}; guessing gives {guessing:.2f}. Train for longer, or look for a bug in the data.'
    )
    return 'yes', text, {}
  if e.mean_recall.low < least:
    return 'not known', f'{said}; guessing gives {guessing:.2f}.', {}
  return 'no', f'{said}.', {}


def _labels(e: Evidence) -> tuple[Verdict, str, dict[str, Any]]:
  if e.contradictions:
    sets = f'{e.contradictions} set{"s" * (e.contradictions > 1)} of copies'
    return 'yes', f'{sets} lie in more than one class: csba-audit names them. Correct these.', {}
  errors = int((e.predicted != e.validation.labels).sum()) if e.validation else 0
  if errors < LEAST_ERRORS:
    return 'not known', f'{errors} wrong answers are too few to judge labels by.', {}
  if e.mean_recall.value < TRUSTED:
    text = f'The net is wrong too often (mean recall {e.mean_recall.value:.2f}) to judge labels by.'
    return 'not known', text, {}
  said = (
    f'The net is surer of a right answer than of a wrong one with a probability of {e.sureness} on '
    f'{errors} wrong answers'
  )
  if e.sureness.high < SURE:
    text = f'{said}: it contradicts many labels as surely as it agrees with others. Look at them.'
    return 'yes', text, {}
  return ('no' if e.sureness.low >= SURE else 'not known'), f'{said}.', {}


def _few(e: Evidence) -> tuple[Verdict, str, dict[str, Any]]:
  found = [(c, e.recall(c)) for c in np.argsort(e.class_counts, kind='stable')]
  wide = [(c, i) for c, i in found if np.isnan(i.value) or i.high - i.low > WIDE]
  if not wide:
    return 'no', f"The 95 % interval of every class's recall is at most {WIDE} wide.", {}
  told = [
    f'{e.class_names[c]} ({e.support[c]} images, recall '
    + ('unknown)' if np.isnan(i.value) else f'{i.low:.2f} to {i.high:.2f})')
    for c, i in wide
  ]
  text = (
    f'Too few validation images of {_names(told)}. Little can be said of these classes: add photos '
    'of them, or hold out more (data.val_fraction).'
  )
  return 'yes', text, {}


def _prior(e: Evidence) -> tuple[Verdict, str, dict[str, Any]]:
  if e.class_counts.max() <= EQUAL * e.class_counts.min():
    return 'no', 'The classes have about as many training images as each other.', {}
  rare = e.minority & (e.support > 0)
  said = ''
  if rare.any():
    claimed = int(rare[e.predicted].sum())
    said = f'Rare classes have {e.support[rare].sum()} images and are predicted {claimed} times. '
  gain = e.gain
  said += (
    f'Logits adjusted for class sizes change mean recall from {e.mean_recall.value:.2f} by '
    f'{gain.value:+.2f} (95 % interval {gain.low:+.2f} to {gain.high:+.2f})'
  )
  if gain.low > 0 and gain.value >= USEFUL_GAIN:
    if not e.corrects:
      return (
        'yes',
        f'{said}. Train with a loss that corrects for them.',
        {'loss.name': 'balanced_softmax'},
      )
    tau = e.post_hoc_tau + 1
    do = f'csba-evaluate --split=val --post_hoc_tau={tau:g} shows what a stronger correction gives.'
    return 'yes', f'{said}, more than the run corrects for. {do}', {}
  return ('no' if gain.high < USEFUL_GAIN else 'not known'), f'{said}.', {}


def _interference(e: Evidence) -> tuple[Verdict, str, dict[str, Any]]:
  conflict = e.conflict
  assert conflict is not None
  values = conflict.class_measures()[2]
  if not conflict.errors.any():
    low = high = values
  elif conflict.class_intervals is None:
    return 'not known', 'The file of this measurement has no intervals: measure again.', {}
  else:
    low, high = conflict.class_intervals[2]
  rare = np.flatnonzero(e.minority).tolist()
  affected = [c for c in rare if low[c] > UNDONE]
  if affected:
    told = [f'{e.class_names[c]} {_percent(values[c], low[c], high[c])}' for c in affected]
    text = (
      f'The gradients of other classes undo part of what a rare class gains: {_names(told)}. '
      f'{_where(e, affected)}No treatment in this project has been shown to help yet '
      '(docs/study.md)'
    )
    if not e.can_have_csba:
      return 'yes', f'{text}.', {}
    return 'yes', f'{text}; CSBA is one to test, with several seeds.', {'model.attention': 'csba'}
  unclear = [c for c in rare if not high[c] <= UNDONE]
  said = f'than {100 * UNDONE:.0f} % of the gain of a rare class'
  if unclear:
    names = _names([e.class_names[c] for c in unclear])
    return 'not known', f'It cannot be told whether others undo more {said}: {names}.', {}
  return 'no', f'The gradients of other classes undo no more {said}.', {}


def _percent(value: float, low: float, high: float) -> str:
  """'60 % (41 % to 80 %)'; at most 100 %, and without an interval where the value is exact."""
  value, low, high = (min(x, 1.0) for x in (value, low, high))
  told, *ends = (f'{100 * x:.0f} %' for x in (value, low, high))
  return told if low == high else f'{told} ({ends[0]} to {ends[1]})'


def _where(e: Evidence, affected: Sequence[int]) -> str:
  """Who undoes it, and in which layers: two sentences."""
  conflict = e.conflict
  assert conflict is not None
  gram, known = conflict.gram(), conflict.distinguishable()
  pairs = []
  for c in affected:
    for d in range(len(e.class_names)):
      if c != d and gram[c, d] < 0 and (known[c, d] or not conflict.errors.any()):
        lost = conflict.prior[c] * conflict.prior[d] * gram[c, d]
        pairs.append((lost, f'{e.class_names[d]} against {e.class_names[c]}'))
  text = f'Most of it: {_names([name for _, name in sorted(pairs)])}. ' if pairs else ''
  pulls = {}
  for layer in conflict.layers:
    if layer.split('/')[0] == 'head':  # there each class has weights of its own
      continue
    others = conflict.gram(layer) * (1 - np.eye(len(e.class_names)))
    pulls[layer] = float((conflict.prior[affected] * (others @ conflict.prior)[affected]).sum())
  worst = [layer for layer in sorted(pulls, key=pulls.__getitem__) if pulls[layer] < 0]
  return text + (f'Layers: {_names(worst)}. ' if worst else '')


def _confusion(e: Evidence) -> tuple[Verdict, str, dict[str, Any]]:
  assert e.validation is not None
  labels = e.validation.labels
  prior_matters = _prior(e)[0] == 'yes'
  predicted = e.adjusted if prior_matters else e.predicted
  n = len(e.class_names)
  level = 1 - 0.05 / max(n * (n - 1) / 2, 1)  # of all pairs together
  counts = np.zeros((n, n), int)
  np.add.at(counts, (labels, predicted), 1)
  one, two = np.triu_indices(n, 1)
  wrong, images = (counts + counts.T)[one, two], e.support[one] + e.support[two]
  low, high = share_ends(wrong, images, level)
  found = []
  for at in np.flatnonzero(low > CONFUSED):
    rate = wrong[at] / images[at]
    pair = f'{e.class_names[one[at]]} and {e.class_names[two[at]]}'
    found.append((-rate, f'{pair} {100 * rate:.0f} %'))
  unclear = int((~(high <= CONFUSED)).sum()) - len(found)
  after = ', after the adjustment for class sizes' if prior_matters else ''
  if found:
    names = _names([name for _, name in sorted(found)])
    text = (
      f'Images that are taken for the other class of a pair{after}: {names}. Compare their photos: '
      'the classes look alike at this image size, or labels are mixed up.'
    )
    return 'yes', text, {}
  pairs = f'pair{"s" * (unclear != 1)} of classes {"have" if unclear != 1 else "has"}'
  if unclear:
    return 'not known', f'{unclear} {pairs} too few images to tell.', {}
  return 'no', f'No two classes share more than {100 * CONFUSED:.0f} % of their images{after}.', {}


# In the order in which they are to be solved.
RULES: tuple[Rule, ...] = (
  Rule('hardly trained', 'validation', _training),
  Rule('doubtful labels', 'validation', _labels),
  Rule('too few images', 'validation', _few),
  Rule('class sizes', 'validation', _prior),
  Rule('interference', 'conflict', _interference),
  Rule('confused classes', 'validation', _confusion),
)


def advise(evidence: Evidence) -> list[Finding]:
  """What each rule finds, in the order of RULES.

  A rule without what it reads says 'not known'. Where the net is hardly trained, nothing else is
  said.
  """
  found: list[Finding] = []
  for rule in RULES:
    if rule.reads == 'validation' and not evidence.images:
      found.append(Finding(rule.name, 'not known', 'The run has kept no validation images.'))
    elif rule.reads == 'conflict' and evidence.conflict is None:
      found.append(Finding(rule.name, 'not known', 'Conflict was not measured.'))
    else:
      found.append(Finding(rule.name, *rule.check(evidence)))
    if rule.name == 'hardly trained' and found[-1].verdict == 'yes':
      break
  return found


def next_fields(findings: Sequence[Finding]) -> dict[str, Any]:
  """Config fields of the training to try next: those of the first problem that names some.

  Empty where data comes first: labels that are doubtful, or a net that is hardly trained.
  """
  for finding in findings:
    if finding.verdict == 'yes' and finding.fields:
      return finding.fields
    if finding.verdict == 'yes' and finding.rule in ('hardly trained', 'doubtful labels'):
      return {}
  return {}
