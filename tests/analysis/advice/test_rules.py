"""Advice on made-up runs where the right answer is known."""

import dataclasses

import numpy as np
import pytest

from csba_jax.analysis.advice import rules
from csba_jax.analysis.advice.evidence import Evidence
from csba_jax.gradients.conflict import Conflict
from csba_jax.gradients.gram import ClassGrams
from csba_jax.measure.calibration import Validation

NAMES = ('oak', 'ash', 'elm', 'yew', 'fir', 'box')
COUNTS = np.array([600, 300, 150, 60, 30, 15])
PER_CLASS = np.array([300, 200, 100, 60, 50, 40])  # validation images
PRIOR = COUNTS / COUNTS.sum()


def bayes(distance, per_class=PER_CLASS, seed=0, prior=PRIOR):
  """Logits of the best net for unit Gaussians around points at a distance, trained on a prior."""
  rng = np.random.default_rng(seed)
  labels = np.repeat(np.arange(len(per_class)), per_class)
  x = distance * np.eye(len(per_class))[labels] + rng.normal(size=(len(labels), len(per_class)))
  logits = distance * x + np.log(prior)
  return Validation(logits.astype(np.float32), labels.astype(np.int32))


def gradients(opposed=0.0, error=0.0):
  """A Conflict of three layers. In two of them the rare classes are pulled back by the others.

  Args:
    opposed: 0 for gradients that are at right angles; 1 for an interference near 1.
    error: relative standard error of the Grams.
  """
  c = len(NAMES)
  own = np.diag([1.0, 1.0, 1.0, 4.0, 8.0, 16.0])
  against = own.copy()
  for rare in (3, 4, 5):
    against[0, rare] = against[rare, 0] = -opposed * PRIOR[rare] * own[rare, rare] / PRIOR[0]
  grams = {'stem': own, 'stage1': against, 'stage2': against}
  shared = sum(grams.values())
  found = ClassGrams(
    grams | {'head': 9 * against}, shared + own, shared, np.full(c, 64), np.ones(c)
  )
  made = Conflict.of(found, NAMES, COUNTS, {'layers': ''})
  if not error:
    return made
  values = made.class_measures()
  width = 1.96 * error * np.maximum(np.abs(values), 0.1)
  return dataclasses.replace(
    made,
    errors=error * np.abs(made.grams) + 1e-9,
    class_intervals=np.stack([values - width, values + width], axis=1),
  )


def evidence(validation, conflict=None, **more):
  return Evidence(NAMES, COUNTS, validation, conflict=conflict or gradients(), **more)


def verdicts(found):
  return {finding.rule: finding.verdict for finding in rules.advise(found)}


def problems(found):
  """The rules that say yes: what is not known for chance of the few images is no problem."""
  return {rule for rule, verdict in verdicts(found).items() if verdict == 'yes'}


def text_of(found, rule):
  return next(finding.text for finding in rules.advise(found) if finding.rule == rule)


CLEAN = {
  'hardly trained': 'no',
  'doubtful labels': 'no',
  'too few images': 'no',
  'class sizes': 'no',
  'interference': 'no',
  'confused classes': 'no',
}


@pytest.mark.parametrize('seed', range(5))
def test_no_problem_at_all(seed):
  """A net that corrects for class sizes, and errs as often as overlapping classes make it."""
  found = evidence(bayes(3.6, seed=seed, prior=np.full(6, 1 / 6)), corrects=True)
  assert verdicts(found) == CLEAN
  assert rules.next_fields(rules.advise(found)) == {}


@pytest.mark.parametrize('seed', range(5))
def test_only_the_prior(seed):
  found = evidence(bayes(2.4, seed=seed))
  assert problems(found) == {'class sizes'}
  assert rules.next_fields(rules.advise(found)) == {'loss.name': 'balanced_softmax'}
  gained = (found.adjusted == found.validation.labels).astype(float)
  gained -= found.predicted == found.validation.labels
  by_hand = np.mean([gained[found.validation.labels == c].mean() for c in range(6)])
  assert f'by {by_hand:+.2f}' in text_of(found, 'class sizes')


def test_a_run_that_corrects_already_is_not_told_to_train_again():
  found = evidence(bayes(2.4), corrects=True, post_hoc_tau=0.5)
  assert 'csba-evaluate --split=val --post_hoc_tau=1.5 ' in text_of(found, 'class sizes')
  assert rules.next_fields(rules.advise(found)) == {}


def test_two_classes_are_not_held_to_twice_of_guessing():
  """Mean recall 0.93 of two classes is well trained, though twice what guessing gives is 1."""
  validation = bayes(2.1, np.asarray([200, 200]), prior=np.full(2, 0.5))
  found = Evidence(NAMES[:2], COUNTS[:2], validation)
  assert 0.9 < found.mean_recall.value < 0.96
  assert verdicts(found)['hardly trained'] == 'no'
  one = Validation(validation.logits[:200], validation.labels[:200])
  assert verdicts(Evidence(NAMES[:2], COUNTS[:2], one))['hardly trained'] == 'not known'


def test_classes_of_one_size_have_no_rare_ones():
  found = Evidence(NAMES, np.full(6, 100), bayes(2.4, np.full(6, 10), prior=np.full(6, 1 / 6)))
  assert verdicts(found)['class sizes'] == 'no'
  assert 'about as many' in text_of(found, 'class sizes')


def test_a_model_without_branches_is_not_told_to_take_csba():
  found = evidence(bayes(3.6, prior=np.full(6, 1 / 6)), gradients(1.0), can_have_csba=False)
  assert verdicts(found)['interference'] == 'yes'
  assert rules.next_fields(rules.advise(found)) == {}


def test_a_thousand_classes_take_no_time():
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(1000), 3)
  logits = rng.normal(size=(3000, 1000)).astype(np.float32)
  logits[np.arange(3000), labels] += 6
  many = Evidence(tuple(map(str, range(1000))), np.arange(1000, 0, -1), Validation(logits, labels))
  assert verdicts(many)['confused classes'] == 'not known'


@pytest.mark.parametrize('seed', range(5))
def test_only_label_noise(seed):
  """One label in ten is another class's; the net is nearly perfect on the right ones."""
  rng = np.random.default_rng(seed)
  clean = bayes(6.0, np.full(6, 120), seed)
  flipped = rng.random(720) < 0.1
  labels = np.where(flipped, (clean.labels + rng.integers(1, 6, 720)) % 6, clean.labels)
  found = evidence(Validation(clean.logits, labels.astype(np.int32)))
  assert verdicts(found) == CLEAN | {'doubtful labels': 'yes'}
  assert rules.next_fields(rules.advise(found)) == {}  # data first


def test_copies_in_two_classes_are_doubtful_labels():
  found = evidence(bayes(6.0), contradictions=2)
  assert verdicts(found)['doubtful labels'] == 'yes'
  assert text_of(found, 'doubtful labels').startswith('2 sets of copies lie in')


def test_too_little_data():
  found = evidence(bayes(3.6, np.array([40, 20, 10, 4, 2, 0]), prior=np.full(6, 1 / 6)))
  said = verdicts(found)
  assert said['too few images'] == 'yes'
  assert said['doubtful labels'] == said['confused classes'] == 'not known'
  assert 'yes' not in {said['class sizes'], said['hardly trained']}
  assert 'box (0 images, recall unknown), fir (2 images, ' in text_of(found, 'too few images')
  assert rules.next_fields(rules.advise(found)) == {}


@pytest.mark.parametrize('error', [0.0, 0.05])
def test_only_interference(error):
  found = evidence(bayes(3.6, prior=np.full(6, 1 / 6)), gradients(1.0, error))
  assert verdicts(found) == CLEAN | {'interference': 'yes'}
  assert rules.next_fields(rules.advise(found)) == {'model.attention': 'csba'}
  text = text_of(found, 'interference')
  assert 'yew 67 %' in text  # in two of the three layers, all of it
  assert 'oak against box' in text
  assert 'Layers: stage1, stage2. ' in text
  assert 'stem' not in text


def test_interference_that_cannot_be_told_from_none():
  found = evidence(bayes(3.6), gradients(0.4, 0.8))
  assert verdicts(found)['interference'] == 'not known'
  assert text_of(found, 'interference').endswith('yew, fir, box.')


def test_a_measurement_of_an_earlier_version_has_no_intervals():
  old = dataclasses.replace(gradients(1.0, 0.05), class_intervals=None)
  assert verdicts(evidence(bayes(3.6), old))['interference'] == 'not known'


@pytest.mark.parametrize('seed', range(5))
def test_only_two_classes_that_look_alike(seed):
  """Ash and elm have one common centre: half of them are taken for the other one."""
  rng = np.random.default_rng(seed)
  labels = np.repeat(np.arange(6), 80)
  centres = 5.0 * np.eye(6)
  centres[1] = centres[2] = 5.0 * (np.eye(6)[1] + np.eye(6)[2]) / 2
  x = centres[labels] + rng.normal(size=(480, 6))
  square = ((x[:, None] - centres[None]) ** 2).sum(2)
  square[:, 1:3] += rng.normal(0, 0.5, (480, 2))  # what the net has learned by heart
  found = evidence(Validation((-square / 2).astype(np.float32), labels.astype(np.int32)))
  assert problems(found) == {'confused classes'}
  assert 'ash and elm' in text_of(found, 'confused classes')
  assert rules.next_fields(rules.advise(found)) == {}


def test_a_net_that_guesses_is_told_nothing_else():
  rng = np.random.default_rng(0)
  noise = Validation(rng.normal(size=(600, 6)).astype(np.float32), np.arange(600) % 6)
  (only,) = rules.advise(evidence(noise, gradients(1.0)))
  assert only[:2] == ('hardly trained', 'yes')
  assert 'guessing gives 0.17' in only.text


def test_a_net_that_is_often_wrong_says_nothing_of_labels():
  found = evidence(bayes(1.2, prior=np.full(6, 1 / 6)))
  assert verdicts(found)['doubtful labels'] == 'not known'
  assert 'wrong too often' in text_of(found, 'doubtful labels')


def test_without_validation_images_only_conflict_speaks():
  said = verdicts(evidence(None, gradients(1.0)))
  assert said == dict.fromkeys(CLEAN, 'not known') | {'interference': 'yes'}
  assert verdicts(Evidence(NAMES, COUNTS, None)) == dict.fromkeys(CLEAN, 'not known')


def test_what_is_first_is_solved_first():
  found = evidence(bayes(2.4), gradients(1.0))
  assert problems(found) == {'class sizes', 'interference'}
  assert rules.next_fields(rules.advise(found)) == {'loss.name': 'balanced_softmax'}


def test_no_verdict_depends_on_the_order_of_images():
  some = bayes(2.4)
  order = np.random.default_rng(1).permutation(len(some.labels))
  other = Validation(some.logits[order], some.labels[order])
  assert rules.advise(evidence(some)) == rules.advise(evidence(other))
