"""Calibration against scikit-learn and brute force; decisions on made-up validation images."""

import itertools

import numpy as np
import pytest
import sklearn.metrics
from scipy import optimize
from scipy.special import log_softmax, softmax
from sklearn.metrics import accuracy_score, f1_score

from csba_jax.errors import UserError
from csba_jax.measure import calibration as lib
from csba_jax.measure.calibration import Calibration, Validation

NAMES = ('cat', 'dog', 'owl:1')


def made_up(seed, n=400, classes=3, scale=1.0, shares=None):
  """Labels drawn from softmax(z), and logits scale * z: the right temperature is `scale`."""
  rng = np.random.default_rng(seed)
  z = rng.normal(0, 2, (n, classes)) + (0 if shares is None else np.log(shares))
  labels = np.asarray([rng.choice(classes, p=row) for row in softmax(z, axis=1)])
  return Validation((scale * z).astype(np.float32), labels.astype(np.int32))


def loss(validation, temperature, bias=0.0):
  logp = log_softmax(validation.logits.astype(float) / temperature + bias, axis=1)
  return -logp[np.arange(len(validation.labels)), validation.labels].mean()


@pytest.mark.parametrize('scale', [0.5, 1.0, 3.0])
def test_the_temperature_is_the_one_with_the_least_cross_entropy(scale):
  validation = made_up(0, 3000, scale=scale)
  found = lib.fit(validation, 3, None)
  best = optimize.minimize_scalar(
    lambda t: loss(validation, t), bounds=(0.05, 20), method='bounded'
  )
  assert found.temperature == pytest.approx(best.x, rel=2e-3)  # it is drawn towards 1
  assert found.temperature == pytest.approx(scale, rel=0.15)
  assert not found.bias.any()


def test_images_that_are_all_right_do_not_make_a_net_surer_than_their_number_allows():
  temperatures = []
  for n in (30, 300, 3000):
    labels = np.arange(n) % 3
    found = lib.fit(Validation(3 * np.eye(3, dtype=np.float32)[labels], labels), 3, None)
    temperatures.append(found.temperature)
  assert 1 > temperatures[0] > temperatures[1] > temperatures[2] >= lib.TEMPERATURES[0]
  assert temperatures[0] > 0.4
  assert np.isfinite(found.probabilities(np.asarray([[800.0, 0, -800]]))).all()


def test_with_shares_the_bias_minimises_the_penalised_cross_entropy():
  validation = made_up(1, 500, scale=2.0)
  shares = np.asarray([0.5, 0.3, 0.2])
  found = lib.fit(validation, 3, shares)

  def penalised(x):
    pulled = x - [1, 0, 0, 0]
    return 500 * loss(validation, 1 / x[0], x[1:]) + lib.PULL / 2 * (pulled**2).sum()

  best = optimize.minimize(penalised, [1, 0, 0, 0], tol=1e-10)
  assert 1 / found.temperature == pytest.approx(best.x[0], rel=1e-2)
  bias = found.bias - np.log(shares) + np.log(validation.shares)
  np.testing.assert_allclose(bias, best.x[1:], atol=1e-3)


def test_other_shares_are_met_on_data_that_have_them():
  """A net trained at one prior, images at another: the mean probabilities are the new shares."""
  at_home = np.asarray([0.7, 0.25, 0.05])
  validation = made_up(2, 4000, scale=2.0, shares=at_home)
  found = lib.fit(validation, 3, validation.shares)
  np.testing.assert_allclose(
    found.probabilities(validation.logits).mean(0), validation.shares, atol=0.01
  )
  weights = (np.full(3, 1 / 3) / validation.shares)[validation.labels]  # images as if balanced
  uniform = lib.fit(validation, 3, np.full(3, 1 / 3))
  mean = np.average(uniform.probabilities(validation.logits), axis=0, weights=weights)
  np.testing.assert_allclose(mean, 1 / 3, atol=0.03)


@pytest.mark.parametrize('n', [0, lib.LEAST - 1])
def test_too_few_validation_images(n):
  few = made_up(0, n) if n else None
  found = lib.fit(few, 3, None)
  assert (found.temperature, found.bias.tolist()) == (1.0, [0, 0, 0])
  with pytest.raises(UserError, match=r'at least 20 .* for --field_prior; found (none|19); '):
    lib.fit(few, 3, np.full(3, 1 / 3))
  assert lib.class_weights(few, found, 'none', {}).tolist() == [1, 1, 1]
  for how in (('macro_f1', {}), ('none', {0: 0.5})):
    with pytest.raises(UserError, match=r'for --thresholds and --min_recall; found (none|19); '):
      lib.class_weights(few, found, *how)


@pytest.mark.parametrize('seed', range(4))
def test_macro_f1_is_that_of_scikit_learn(seed):
  rng = np.random.default_rng(seed)
  labels, predicted = rng.integers(0, 4, 50), rng.integers(0, 5, 50)
  expected = sklearn.metrics.f1_score(labels, predicted, labels=np.unique(labels), average='macro')
  assert lib.macro_f1(predicted, labels, 5) == pytest.approx(expected)


@pytest.mark.parametrize('seed', range(4))
def test_weightsare_no_worse_than_a_grid(seed):
  validation = made_up(seed, 200, shares=np.asarray([0.8, 0.15, 0.05]))
  plain = Calibration(1.0, np.zeros(3))
  found = lib.class_weights(validation, plain, 'macro_f1', {})
  probabilities = plain.probabilities(validation.logits)

  def score(weights):
    return lib.macro_f1((probabilities * weights).argmax(1), validation.labels, 3)

  grid = [score((1, a, b)) for a, b in itertools.product(np.geomspace(0.2, 5, 25), repeat=2)]
  assert score(found) >= max(grid) - 0.03  # class by class: a near best, not always the best
  assert score(found) >= score(np.ones(3))


def test_a_wanted_recall_is_met_with_the_smallest_weight():
  validation = made_up(5, 300, shares=np.asarray([0.8, 0.15, 0.05]))
  plain = Calibration(1.0, np.zeros(3))
  probabilities, labels = plain.probabilities(validation.logits), validation.labels
  for recall in (0.5, 0.8, 1.0):
    weights = lib.class_weights(validation, plain, 'none', {2: recall})
    of_class = labels == 2

    def found(weight, of_class=of_class):
      return ((probabilities * [1, 1, weight]).argmax(1) == 2)[of_class].mean()

    assert found(weights[2]) >= recall
    assert weights[2] == 1 or found(weights[2] * (1 - 1e-6)) < recall
    assert weights[:2].tolist() == [1, 1]


def test_a_recall_of_a_class_without_images():
  validation = Validation(np.zeros((30, 3), np.float32), np.zeros(30, np.int32))
  with pytest.raises(UserError, match='validation images of the class in --min_recall; found none'):
    lib.class_weights(validation, Calibration(1.0, np.zeros(3)), 'none', {1: 0.5})


def test_wanted_recalls_of_several_classes_are_met_together():
  validation = made_up(5, 300, shares=np.asarray([0.8, 0.15, 0.05]))
  plain = Calibration(1.0, np.zeros(3))
  weights = lib.class_weights(validation, plain, 'none', {1: 0.8, 2: 0.8})
  predicted = (plain.probabilities(validation.logits) * weights).argmax(1)
  for c in (1, 2):
    assert (predicted == c)[validation.labels == c].mean() >= 0.8


def test_recalls_that_no_weights_have_together():
  """Images of two classes look the same."""
  validation = Validation(np.zeros((40, 2), np.float32), np.arange(40, dtype=np.int32) % 2)
  with pytest.raises(UserError, match='can have together; found none after 50 rounds, .*lower one'):
    lib.class_weights(validation, Calibration(1.0, np.zeros(2)), 'none', {0: 0.9, 1: 0.9})


def test_calibration_error_against_a_loop():
  validation = made_up(3, 500, scale=3.0)
  plain = Calibration(1.0, np.zeros(3))
  total = 0.0
  probabilities = softmax(validation.logits.astype(float), axis=1)
  for b in range(15):
    inside = [
      (max(row), row.argmax() == label)
      for row, label in zip(probabilities, validation.labels, strict=True)
      if b / 15 < max(row) <= (b + 1) / 15
    ]
    total += abs(sum(right - confidence for confidence, right in inside))
  assert lib.calibration_error(validation, plain) == pytest.approx(total / 500, rel=1e-4)
  assert lib.calibration_error(validation, lib.fit(validation, 3, None)) < total / 500


def test_trust_of_other_images_against_a_loop():
  validation, test = made_up(0, 400, scale=3.0), made_up(1, 203, scale=3.0)
  found = lib.trust(test, validation, 0.8)
  fitted = lib.fit(validation, 3, None)
  assert found.temperature == fitted.temperature > 1
  assert found.error == (
    lib.calibration_error(test, Calibration(1.0, np.zeros(3))),
    lib.calibration_error(test, fitted),
  )
  assert found.error[1] < found.error[0]
  sure = softmax(test.logits.astype(float) / fitted.temperature, axis=1).max(1)
  ranked = sorted(range(203), key=lambda i: (-sure[i], i))[:163]  # 0.8 * 203 = 162.4
  for i, rows in enumerate((range(203), ranked)):
    labels, predicted = test.labels[list(rows)], test.logits[list(rows)].argmax(1)
    assert found.accuracy[i] == pytest.approx(accuracy_score(labels, predicted))
    assert found.macro_f1[i] == pytest.approx(f1_score(labels, predicted, average='macro'))
  assert found.accuracy[1] > found.accuracy[0]
  everything = lib.trust(test, validation, 1.0)
  assert everything.accuracy[0] == everything.accuracy[1] == found.accuracy[0]
  assert lib.trust(test, made_up(0, lib.LEAST - 1)) is lib.trust(test, None) is None


def test_what_is_kept_is_read_again(tmp_path):
  validation = made_up(0, 30)
  (tmp_path / lib.FILE).write_bytes(validation.to_bytes())
  assert validation.to_bytes() == validation.to_bytes()
  found = Validation.load(tmp_path, 3)
  np.testing.assert_array_equal(found.logits, validation.logits)
  np.testing.assert_array_equal(found.labels, validation.labels)
  assert Validation.load(tmp_path / 'elsewhere', 3) is None


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (lambda data: data[:60], r'\w+: '),
    (lambda _: Validation(np.zeros((4, 2)), np.zeros(4, int)).to_bytes(), r'logits \(4, 2\) of 4'),
    (lambda _: Validation(np.full((4, 3), np.nan), np.zeros(4, int)).to_bytes(), 'not finite'),
    (lambda _: Validation(np.zeros((4, 3)), np.full(4, 3)).to_bytes(), 'label 3 of 3 classes'),
    (lambda _: Validation(np.zeros((0, 3)), np.zeros(0, int)).to_bytes(), 'of 0 images'),
  ],
)
def test_a_damaged_file(tmp_path, change, words):
  (tmp_path / lib.FILE).write_bytes(change(made_up(0, 30).to_bytes()))
  with pytest.raises(UserError, match=rf'3 classes at .*; found .*{words}.*; to fix it: delete'):
    Validation.load(tmp_path, 3)


def test_recalls_and_their_names():
  assert lib.parse_recalls(['dog:0.8', 'owl:1:1'], NAMES) == {1: 0.8, 2: 1.0}


@pytest.mark.parametrize('text', ['dog', 'dog:', 'dog:0', 'dog:1.1', 'cow:0.5', 'dog:x', 'dog:nan'])
def test_a_wrong_recall(text):
  with pytest.raises(UserError, match=r'--min_recall=CLASS:RECALL .*; found .*write it as cat:0.8'):
    lib.parse_recalls([text], NAMES)


def test_shares_of_the_field(tmp_path):
  assert lib.parse_shares(None, NAMES) is None
  np.testing.assert_allclose(lib.parse_shares('uniform', NAMES), 1 / 3)
  path = tmp_path / 'prior.csv'
  path.write_text('class,share\nowl:1,1\n\ndog,2\ncat,5\n')
  np.testing.assert_allclose(lib.parse_shares(str(path), NAMES), [5 / 8, 2 / 8, 1 / 8])


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('cat,1\ndog,1\n', 'owl:1 in the net alone'),
    ('cat,1\ndog,1\nowl:1,1\ncow,1\n', 'cow in the file alone'),
    ('cat,1\ndog,0\nowl:1,1\n', 'line 2: dog,0'),
    ('cat,1\ncat,1\n', 'line 2: cat,1'),
    ('cat,1\ndog,inf\n', 'line 2: dog,inf'),
    ('cat,1\ndog\n', 'line 2 is not CLASS,SHARE'),
    ('', 'cat in the net alone'),
  ],
)
def test_wrong_shares(tmp_path, text, words):
  path = tmp_path / 'prior.csv'
  path.write_text(text)
  with pytest.raises(UserError, match=f'--field_prior=uniform, or a CSV file .*; found .*{words}'):
    lib.parse_shares(str(path), NAMES)
  with pytest.raises(UserError, match='No such file'):
    lib.parse_shares(str(tmp_path / 'nix'), NAMES)
