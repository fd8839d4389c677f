"""Losses per example against NumPy in float64, finite differences and what they are for."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from csba_jax import config as config_lib
from csba_jax.data import mixing
from csba_jax.errors import UserError
from csba_jax.methods import losses
from csba_jax.models import classifiers

COUNTS = np.array([500, 80, 7, 1])
STEPS = 1000  # of the run


def config_of(name, scale=30.0, **options):
  """The default config with this loss, the classifier that it takes, and these fields of loss."""
  config = config_lib.default()
  config.loss.update(name=name, **options)
  if name in losses.LOSSES:
    config.model.update(head=losses.LOSSES[name].classifiers[0], scale=scale)
  return config


def loss_of(name, counts=COUNTS, **options):
  """(logits, labels) -> losses [N] under config.loss with these fields."""
  built = losses.build(config_of(name, **options), counts, STEPS)
  compiled = jax.jit(lambda logits, labels: built(logits, labels, STEPS - 1))  # not op by op
  return lambda logits, labels: compiled(jnp.asarray(logits), jnp.asarray(labels))


def random_batch(seed, n=40):
  rng = np.random.default_rng(seed)
  return 3 * rng.normal(size=(n, len(COUNTS))), rng.integers(0, len(COUNTS), n)


def by_example(formula):
  """formula(row, label, p) of one example, for all: losses [N] float64."""

  def reference(logits, labels):
    values = []
    for row, label in zip(np.asarray(logits, np.float64), labels, strict=True):
      largest = row.max()
      p = [math.exp(x - largest) for x in row]
      values.append(formula(row, label, [x / sum(p) for x in p]))
    return np.array(values)

  return reference


def adjusted(row, label, tau):
  """-log of e^{s_y} n_y^tau / sum_c e^{s_c} n_c^tau."""
  weighted = [n**tau * math.exp(x) for n, x in zip(COUNTS / COUNTS.sum(), row, strict=True)]
  return -math.log(weighted[label] / sum(weighted))


def smoothed(row, label, p, eps):
  """Cross-entropy with the target 1 - eps at the label and eps / (C - 1) elsewhere."""
  target = [1 - eps if c == label else eps / (len(p) - 1) for c in range(len(p))]
  return -sum(t * math.log(x) for t, x in zip(target, p, strict=True))


def second(p, label):
  return max([x for x in p if x < p[label]], default=0.0)


def label_aware(row, label, p):
  angle = math.pi / 2 * (COUNTS[label] - 1) / (500 - 1)
  return smoothed(row, label, p, 0.02 + (0.3 - 0.02) * math.sin(angle))


def scaled_and_adjusted(row, label, p):
  return adjusted([(n / 500) ** 0.3 * x for n, x in zip(COUNTS, row, strict=True)], label, 1.2)


def ldam(row, label, p):
  margins = [0.4 * (1 / n) ** 0.25 for n in COUNTS]
  scaled = [x - 5 * margins[c] * (c == label) for c, x in enumerate(row)]
  return math.log(sum(math.exp(x) for x in scaled)) - scaled[label]


# name: (options, reference); label_smoothing spreads eps over all classes, its own included
REFERENCES = {
  'cross_entropy': ({}, lambda row, y, p: -math.log(p[y])),
  'balanced_softmax': ({}, lambda row, y, p: adjusted(row, y, 1)),
  'logit_adjustment': ({'tau': 1.7}, lambda row, y, p: adjusted(row, y, 1.7)),
  'vector_scaling': ({'gamma': 0.3, 'tau': 1.2}, scaled_and_adjusted),
  'label_smoothing': ({'smoothing': 0.2}, lambda row, y, p: smoothed(row, y, p, 0.2 * 3 / 4)),
  'label_aware_smoothing': ({'smoothing': 0.3, 'smoothing_tail': 0.02}, label_aware),
  'focal': ({'gamma': 1.5}, lambda row, y, p: -((1 - p[y]) ** 1.5) * math.log(p[y])),
  'dual_focal': (
    {'gamma': 3.0},
    lambda row, y, p: -((1 - p[y] + second(p, y)) ** 3) * math.log(p[y]),
  ),
  'ldam': ({'max_margin': 0.4, 'scale': 5.0}, ldam),
}
OPTIONS = {name: options for name, (options, _) in REFERENCES.items()}
EXPECTED = {name: by_example(formula) for name, (_, formula) in REFERENCES.items()}


def test_every_loss_has_a_reference_here():
  assert REFERENCES.keys() == losses.LOSSES.keys()
  for name, row in losses.LOSSES.items():
    assert set(row.options) == OPTIONS[name].keys()


@pytest.mark.parametrize('name', REFERENCES)
def test_loss_equals_its_formula(name):
  logits, labels = random_batch(0)
  loss_fn = loss_of(name, **OPTIONS[name])
  found = loss_fn(logits.astype(np.float32), labels)
  assert found.shape == (len(labels),)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, EXPECTED[name](logits, labels), rtol=5e-5, atol=5e-6)
  with jax.enable_x64(True):
    found = loss_fn(logits, labels)
    assert found.dtype == jnp.float64
  np.testing.assert_allclose(found, EXPECTED[name](logits, labels), rtol=1e-11)


def test_hand_worked_numbers():
  logits = jnp.array([[0.0, math.log(3.0)]] * 2)  # p = 1/4, 3/4
  labels = jnp.array([0, 1])

  def check(name, expected, counts=(3, 1), **options):
    found = loss_of(name, np.array(counts), **options)(logits, labels)
    np.testing.assert_allclose(found, expected, rtol=1e-6)

  check('cross_entropy', [math.log(4), math.log(4 / 3)])
  check('balanced_softmax', [math.log(2), math.log(2)])  # e^s n = 3, 3
  check('logit_adjustment', [math.log(2), math.log(2)], tau=1.0)
  check('logit_adjustment', [math.log(4), math.log(4 / 3)], tau=0.0)
  check('logit_adjustment', [math.log(4 / 3), math.log(4)], tau=2.0)  # e^s n^2 = 9, 3
  check('focal', [9 / 16 * math.log(4), math.log(4 / 3) / 16], gamma=2.0)
  check('dual_focal', [9 / 16 * math.log(4), math.log(4 / 3) / 4], gamma=2.0)
  half = 0.5 * (math.log(4) + math.log(4 / 3))
  check('label_smoothing', [half, half], smoothing=0.999999)
  # the smallest class is not smoothed, the largest by a half
  check('label_aware_smoothing', [half, math.log(4 / 3)], smoothing=0.5, smoothing_tail=0.0)
  # margins 0.5 * (1/16)^(1/4) = 0.25 and 0.5; e^{s(z - m)}
  expected = [math.log(1 + 3 * math.exp(0.25)), math.log(1 + math.exp(0.5) / 3)]
  check('ldam', expected, counts=(16, 1), max_margin=0.5, scale=1.0)
  weights = np.array([0.25, 0.75]) / (0.75 * 0.25 + 0.25 * 0.75)  # mean over images: 1
  plain = np.array([math.log(4), math.log(4 / 3)])
  check('cross_entropy', weights * plain, weights='inverse')


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('balanced_softmax', {}),
    ('logit_adjustment', {'tau': 2.0}),
    ('vector_scaling', {'gamma': 0.5}),
    ('focal', {'gamma': 0.0}),
    ('dual_focal', {'gamma': 0.0}),
    ('label_smoothing', {'smoothing': 0.0}),
    ('label_aware_smoothing', {'smoothing': 0.0, 'smoothing_tail': 0.0}),
    ('cross_entropy', {'weights': 'inverse'}),
    ('cross_entropy', {'weights': 'effective'}),
    ('ldam', {'max_margin': 0.0, 'scale': 1.0}),
  ],
)
def test_of_equal_counts_or_without_its_option_it_is_cross_entropy(name, options):
  logits, labels = random_batch(1)
  logits = logits.astype(np.float32)
  found = loss_of(name, np.full(4, 60), **options)(logits, labels)
  np.testing.assert_allclose(found, loss_of('cross_entropy')(logits, labels), rtol=1e-5, atol=1e-6)


def test_counts_and_prior_give_the_same():
  logits, labels = random_batch(2)
  logits = logits.astype(np.float32)
  for name in ('balanced_softmax', 'logit_adjustment'):
    counts = loss_of(name)(logits, labels)
    prior = loss_of(name, COUNTS / COUNTS.sum())(logits, labels)
    np.testing.assert_allclose(counts, prior, rtol=1e-5, atol=1e-5)


# vector_scaling multiplies the logits of each class by another number
@pytest.mark.parametrize('name', [name for name in REFERENCES if name != 'vector_scaling'])
def test_a_constant_added_to_all_logits_changes_nothing(name):
  logits, labels = random_batch(3)
  loss_fn = loss_of(name, **OPTIONS[name])
  shifted = loss_fn((logits + 5.0).astype(np.float32), labels)
  expected = loss_fn(logits.astype(np.float32), labels)
  np.testing.assert_allclose(shifted, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.seconds
@pytest.mark.parametrize('gamma', [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize('name', REFERENCES)
def test_large_logits_stay_finite(name, gamma):
  loss_fn = loss_of(name, gamma=gamma)
  logits = jnp.array([[1e4, -1e4, 0.0, 0.0]] * 2)
  value, grad = jax.value_and_grad(lambda x: loss_fn(x, jnp.array([0, 1])).sum())(logits)
  assert np.isfinite(value)
  assert np.isfinite(grad).all()


@pytest.mark.parametrize('name', REFERENCES)
def test_gradient_equals_finite_differences(name):
  logits, labels = random_batch(4, n=5)
  with jax.enable_x64(True):
    loss_fn = loss_of(name, **OPTIONS[name])
    found = jax.grad(lambda x: loss_fn(x, labels).sum())(jnp.asarray(logits))
  step = 1e-5
  expected = np.zeros_like(logits)
  for i, j in np.ndindex(*logits.shape):
    up, down = logits.copy(), logits.copy()
    up[i, j] += step
    down[i, j] -= step
    difference = EXPECTED[name](up, labels) - EXPECTED[name](down, labels)
    expected[i, j] = difference.sum() / (2 * step)
  np.testing.assert_allclose(found, expected, atol=1e-8)


@pytest.mark.parametrize(
  ('name', 'optimum'),
  [
    ('balanced_softmax', np.zeros(4)),
    ('logit_adjustment', -np.log(COUNTS / COUNTS[0])),  # tau 2: twice the prior is taken off
    ('cross_entropy', np.log(COUNTS / COUNTS[0])),
  ],
)
def test_features_that_say_nothing_lead_to_the_right_posterior(name, optimum):
  # With one logit vector for all images, balanced softmax ends at equal logits: no class is
  # preferred. Plain cross-entropy ends at the log of the training prior.
  labels = np.repeat(np.arange(4), COUNTS)
  with jax.enable_x64(True):
    loss_fn = loss_of(name, tau=2.0)

    def mean_loss(vector):
      return loss_fn(jnp.broadcast_to(vector, (len(labels), 4)), jnp.asarray(labels)).mean()

    value_and_grad = jax.jit(jax.value_and_grad(mean_loss))
    found = scipy.optimize.minimize(
      lambda v: [np.asarray(x) for x in value_and_grad(jnp.asarray(v))],
      np.array([1.0, -2.0, 0.5, 3.0]),
      jac=True,
      method='BFGS',
      options={'gtol': 1e-9},
    ).x
    at_optimum = value_and_grad(jnp.asarray(optimum))[1]
  np.testing.assert_allclose(found - found[0], optimum, atol=1e-3)
  np.testing.assert_allclose(at_optimum, np.zeros(4), atol=1e-12)


@pytest.mark.seconds
@pytest.mark.parametrize('weights', ['inverse', 'effective'])
def test_weights_multiply_the_plain_loss_and_keep_the_mean_of_the_training_set(weights):
  labels = np.repeat(np.arange(4), COUNTS)
  logits = np.zeros((len(labels), 4), np.float32)  # every loss is log 4
  found = loss_of('cross_entropy', weights=weights, beta=0.99)(logits, labels) / math.log(4)
  assert float(found.mean()) == pytest.approx(1, rel=1e-5)
  of_class = np.array([found[labels == c][0] for c in range(4)])
  if weights == 'inverse':
    np.testing.assert_allclose(of_class * COUNTS, of_class[0] * COUNTS[0], rtol=1e-5)
  else:
    effective = (1 - 0.99**COUNTS) / (1 - 0.99)
    np.testing.assert_allclose(of_class * effective, of_class[0] * effective[0], rtol=1e-5)


def test_focal_modulates_by_the_unweighted_probability():
  logits, labels = random_batch(6)
  logits = logits.astype(np.float32)
  weighted = loss_of('focal', weights='inverse')(logits, labels)
  ratio = weighted / loss_of('focal')(logits, labels)
  for c in range(4):  # one factor a class, whatever the probability
    np.testing.assert_allclose(ratio[labels == c], ratio[labels == c][0], rtol=1e-5)


@pytest.mark.parametrize('name', REFERENCES)
def test_deferred_weights_come_into_force_at_their_start(name):
  logits, labels = random_batch(7)
  logits, labels = jnp.asarray(logits / 10, jnp.float32), jnp.asarray(labels)
  config = config_of(name, weights='inverse', weights_start=0.8)
  loss_fn = jax.jit(losses.build(config, COUNTS, STEPS))
  plain, always = loss_of(name)(logits, labels), loss_of(name, weights='inverse')(logits, labels)
  for step, expected in ((0, plain), (799, plain), (800, always), (999, always)):
    np.testing.assert_allclose(loss_fn(logits, labels, step), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', [name for name, row in losses.LOSSES.items() if row.linear])
def test_a_mixed_batch_has_the_loss_of_the_mixed_target(name):
  """What `linear` means: a loss is sum_c t_c l_c, so mixed targets mix losses."""
  logits, labels = random_batch(8)
  other, share = np.roll(labels, 1), np.random.default_rng(0).uniform(size=len(labels))
  loss_fn = losses.build(config_of(name, **OPTIONS[name]), COUNTS, STEPS)
  batch = {'label': labels, 'partner_label': other, 'share': share.astype(np.float32)}
  found = losses.mixed(loss_fn, jnp.asarray(logits, jnp.float32), batch, 0)
  expected = share * EXPECTED[name](logits, labels)
  expected += (1 - share) * EXPECTED[name](logits, other)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  del batch['share']
  found = losses.mixed(loss_fn, jnp.asarray(logits, jnp.float32), batch, 0)
  np.testing.assert_allclose(found, EXPECTED[name](logits, labels), rtol=1e-4, atol=1e-5)


def test_post_hoc_adjustment_takes_off_the_log_prior():
  shift = losses.post_hoc_shift(0.5, np.array([6, 3, 1]))
  np.testing.assert_allclose(shift, [-0.5 * math.log(x) for x in (0.6, 0.3, 0.1)], rtol=1e-6)
  assert not losses.post_hoc_shift(0.0, COUNTS).any()


def test_unknown_name_lists_the_known_ones():
  with pytest.raises(UserError) as error:
    loss_of('hinge')
  assert str(error.value) == (
    f"expected loss.name among {', '.join(losses.LOSSES)}; found 'hinge'; "
    'to fix it: set --config.loss.name'
  )
  with pytest.raises(UserError, match=r'loss\.weights among none, inverse, effective; found .sqrt'):
    loss_of('focal', weights='sqrt')


@pytest.mark.parametrize('name', REFERENCES)
def test_a_class_without_images_is_named(name):
  with pytest.raises(UserError, match='at least 1 training image in every class; found none of cl'):
    loss_of(name, np.array([5, 0, 3, 0]))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'loss.name': 'ldam'}, r"model\.head cosine for loss\.name ldam; found 'linear'"),
    (
      {'loss.name': 'focal', 'model.head': 'cosine'},
      r"model\.head linear or scaled for loss\.name focal; found 'cosine'",
    ),
    (
      {'loss.name': 'focal', 'mixing.name': 'mixup'},
      'takes mixed labels with mixing.name mixup: cross_entropy, .*; found focal; .*name=none',
    ),
    (
      {'loss.name': 'ldam', 'model.head': 'cosine', 'mixing.name': 'cmo'},
      'takes mixed labels with mixing.name cmo: .*; found ldam',
    ),
    (
      {'loss.weights_start': 0.8},
      'class weights to defer with loss.weights_start; found weights_start 0.8 and no weights',
    ),
    (
      {'loss.weights': 'inverse', 'sampler.name': 'class'},
      'they correct the prior twice; found weights inverse, sampler class',
    ),
  ],
)
def test_what_does_not_go_together(fields, message):
  config = config_lib.default()
  config.update_from_flattened_dict(fields)
  with pytest.raises(UserError, match=message):
    losses.build(config, COUNTS, STEPS)


def test_a_tau_shifts_the_log_odds_of_every_classifier_by_the_log_prior():
  """Also of LDAM's: its scale is part of the logits, so that they are log-odds."""
  z = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 6)), jnp.float32)
  for kind in classifiers.KINDS:
    layer = classifiers.ClassifierLayer(4, classifiers.Classifier(kind))
    logits = layer.apply(layer.init(jax.random.key(1), z), z)
    p, q = (
      np.asarray(jax.nn.softmax(x))
      for x in (logits, logits + losses.post_hoc_shift(1.0, COUNTS)[None])
    )
    odds = np.log(q[:, 0] / q[:, 3]) - np.log(p[:, 0] / p[:, 3])
    np.testing.assert_allclose(odds, -np.log(COUNTS[0] / COUNTS[3]), rtol=1e-3)


@pytest.mark.seconds
@pytest.mark.parametrize('name', sorted(losses.LOSSES))
def test_only_a_loss_that_says_so_depends_on_the_counts(name):
  rng = np.random.default_rng(0)
  logits, labels = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32), np.arange(8) % 4
  found = [losses.unweighted(config_of(name), n)(logits, labels) for n in ([9, 5, 3, 1], [1] * 4)]
  assert np.array_equal(*found) != losses.LOSSES[name].reads_counts


@pytest.mark.parametrize(
  ('field', 'value', 'known'),
  [
    ('loss.name', 'cross_entropy', False),
    ('loss.name', 'balanced_softmax', True),
    ('loss.weights', 'effective', True),
    ('mixing.name', 'remix', True),
    ('mixing.name', 'cutmix', False),
  ],
)
def test_counts_that_matter(field, value, known):
  c = config_lib.default()
  section, name = field.split('.')
  c[section][name] = value
  expected = (9, 5, 3) if known else (1, 1, 1)
  assert losses.counts_that_matter(c, np.array([9, 5, 3])) == expected


def test_a_new_loss_that_reads_counts_gets_the_true_ones(monkeypatch):
  row = losses.Loss(lambda logits, labels, *, class_counts: class_counts[labels], reads_counts=True)
  monkeypatch.setitem(losses.LOSSES, 'by_count', row)
  c, counts = config_lib.default(), np.array([9, 5, 3])
  c.loss.name = 'by_count'
  known = np.array(losses.counts_that_matter(c, counts))
  found = losses.build(c, known, STEPS)(np.zeros((3, 3)), np.array([2, 0, 1]), 0)
  assert found.tolist() == [3, 9, 5]


def test_a_new_mixing_that_reads_counts_gets_the_true_ones(monkeypatch):
  def by_count(key, batch, *, class_counts):
    return {'image': batch['image'], 'share': class_counts[batch['label']]}

  monkeypatch.setitem(mixing.MIXINGS, 'by_count', mixing.Mixing(by_count, reads_counts=True))
  c, counts = config_lib.default(), np.array([9, 5, 3])
  c.mixing.name = 'by_count'
  known = np.array(losses.counts_that_matter(c, counts))
  batch = {'image': np.zeros((3, 2, 2, 1)), 'label': np.array([2, 0, 1])}
  mixed = mixing.build(c.mixing, known, STEPS)(jax.random.key(0), batch, 0)
  assert mixed['share'].tolist() == [3, 9, 5]


@pytest.mark.parametrize('table', [losses.LOSSES, mixing.MIXINGS])
def test_only_a_row_that_says_so_takes_counts(table):
  """So one that forgets to say so fails, and does not compute with ones."""
  for name, row in table.items():
    if row.function is not None:
      takes = 'class_counts' in inspect.signature(row.function).parameters
      assert takes == row.reads_counts, name
