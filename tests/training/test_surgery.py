"""Gradient surgery in training: its gradients against loops, its controls, its records."""

import functools
import json
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csba_jax.errors import UserError
from csba_jax.gradients import surgery as library
from csba_jax.gradients.conflict import Conflict
from csba_jax.methods import surgery as methods
from csba_jax.run import schedule
from csba_jax.run.restore import load_state
from csba_jax.runtime.signals import StopRequest
from csba_jax.training import loop, preflight, surgery
from csba_jax.training.gradient import gradient_of_the_mean

C, N = 4, 12
LABELS = np.array([0, 1, 0, 2, 0, 1, 0, 0, 2, 1, 0, 0])  # none of class 3
KEY = jax.random.key(0)
# one of them is enough for make test: each takes seconds to compile
AGGREGATORS = [
  pytest.param(name, marks=() if name == 'upgrad' else pytest.mark.seconds)
  for name in sorted(library.AGGREGATORS)
]


@functools.cache
def net():
  """(params, images) of a perceptron, whose class 1 and class 0 are in conflict."""
  rng = np.random.default_rng(2)
  params = {
    'stem': {'bias': rng.normal(size=5)},
    'body': {'kernel': rng.normal(size=(5, 3))},
    'head': {'kernel': rng.normal(size=(3, C)), 'bias': rng.normal(size=C)},
  }
  return jax.tree.map(jnp.float32, params), jnp.float32(rng.normal(size=(N, 5)))


def forward(params, batch):
  """Losses, and nothing that couples them."""
  x = jnp.sin(batch['image'] + params['stem']['bias'][None])
  x = jnp.tanh(x @ params['body']['kernel'])
  logits = x @ params['head']['kernel'] + params['head']['bias'][None]
  return -jax.nn.log_softmax(logits)[jnp.arange(len(logits)), batch['label']], {}


def forward_coupled(params, batch):
  """The same after batch normalisation, with its mean as the auxiliary output."""
  mean = batch['image'].mean(0)
  losses, _ = forward(params, {**batch, 'image': (batch['image'] - mean[None]) * 2})
  return losses + 0.1 * (losses.mean() - losses) ** 2, {'mean': mean}


def class_sums(forward, batch):
  """a_c = (1/N) sum_{i: y_i = c} grad l_i, one class after the other, as trees of float64."""
  params, found = net()[0], []
  for c in range(C):

    def total(params, c=c):
      return jnp.where(batch['label'] == c, forward(params, batch)[0], 0).sum() / N

    found.append(jax.tree.map(lambda g: np.asarray(g, np.float64), jax.grad(total)(params)))
  return found


def combined(rows, weights):
  """sum_c w_c a_c in stem and body, and sum_c a_c in the head."""

  def total(weights, part):
    return jax.tree.map(
      lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)),
      *(row[part] for row in rows),
    )

  ones = np.ones(len(rows))
  return {part: total(ones if part == 'head' else weights, part) for part in rows[0]}


def shared(row):
  """A row of the layers outside of the head, flat."""
  return np.concatenate([row['stem']['bias'], row['body']['kernel'].ravel()])


def kept_by(name, **others):
  kept = {
    'weights': jnp.ones(C),
    'images': jnp.zeros(C),
    'total': jnp.zeros(C),
    'skipped': jnp.zeros((), jnp.int32),
    'aggregator': library.initial(name, C),
  }
  return kept | others


def assert_close(found, expected, rtol=2e-4):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5), found, expected)


@pytest.mark.parametrize('form', [forward, forward_coupled])
def test_weights_multiply_classes_in_the_body_alone(form):
  params, images = net()
  batch, weights = {'image': images, 'label': LABELS}, jnp.array([0.5, 2.0, 1.0, 3.0])
  kept = kept_by('upgrad', weights=weights, total=jnp.full(C, 7.0))
  found = jax.jit(
    lambda params, batch: surgery.weighted_gradient(form, params, batch, kept, KEY, head='^head/')
  )(params, batch)
  assert_close(found.direction, combined(class_sums(form, batch), weights))
  losses, auxiliary = form(params, batch)
  np.testing.assert_allclose(found.loss, losses.mean(), rtol=1e-6)
  assert_close(found.auxiliary, auxiliary)
  images = np.bincount(LABELS, minlength=C)
  np.testing.assert_array_equal(found.kept['images'], images)
  np.testing.assert_array_equal(found.kept['total'], weights * images + 7)
  np.testing.assert_array_equal(found.shown['surgery_weights'], weights)


def test_weights_of_one_give_the_plain_gradient():
  params, images = net()
  batch = {'image': images, 'label': LABELS}
  plain = gradient_of_the_mean(forward, params, batch, {}, KEY)
  found = surgery.weighted_gradient(forward, params, batch, kept_by('upgrad'), KEY, head='^head/')
  assert_close(found.direction, plain.direction, 1e-6)


def exact(name, form, batch, keeps_length=False, devices=1):
  """The gradient of an aggregator from the batch's own Gram."""
  cut = methods.Surgery(1, library.build(name), keeps_length, False, '')
  return jax.jit(
    functools.partial(
      surgery.exact_gradient, form, surgery=cut, head='^head/', num_classes=C, devices=devices
    )
  )(net()[0], batch, kept_by(name), KEY)


@pytest.mark.parametrize('name', AGGREGATORS)
@pytest.mark.parametrize(
  'form', [forward, pytest.param(forward_coupled, marks=pytest.mark.seconds)]
)
def test_the_exact_gradient_is_that_of_its_own_gram(name, form):
  batch = {'image': net()[1], 'label': LABELS}
  rows = class_sums(form, batch)
  body = np.stack([shared(row) for row in rows])
  found = exact(name, form, batch)
  counts = np.bincount(LABELS, minlength=C)
  losses = np.array([np.where(c == LABELS, form(net()[0], batch)[0], 0).sum() for c in range(C)])
  weights, _ = library.build(name)(
    jnp.float32(body @ body.T),
    jnp.ones(C),
    library.initial(name, C),
    KEY,
    losses=jnp.float32(losses / np.maximum(counts, 1)),
  )
  assert float(found.kept['weights'][3]) == 1  # absent
  np.testing.assert_allclose(found.kept['weights'], weights, rtol=1e-3)
  assert_close(found.direction, combined(rows, found.kept['weights']))
  np.testing.assert_allclose(found.loss, form(net()[0], batch)[0].mean(), rtol=1e-5)
  assert_close(found.auxiliary, form(net()[0], batch)[1])


@pytest.mark.seconds
def test_several_devices_take_the_form_that_any_net_can_take():
  batch = {'image': net()[1], 'label': LABELS}
  one, two = (exact('upgrad', forward, batch, devices=devices) for devices in (1, 2))
  assert_close(one.direction, two.direction, 1e-5)


@pytest.mark.seconds
def test_the_step_keeps_its_length_in_the_body():
  batch = {'image': net()[1], 'label': LABELS}
  rows = class_sums(forward, batch)
  plain = np.linalg.norm(shared(combined(rows, np.ones(C))))
  found = exact('mgda', forward, batch, keeps_length=True)
  length = np.linalg.norm(shared(jax.tree.map(np.asarray, found.direction)))
  np.testing.assert_allclose(length, plain, rtol=1e-4)
  assert float(found.kept['weights'][3]) == 1  # absent
  np.testing.assert_allclose(found.shown['surgery_length'], 1, rtol=1e-4)
  free = exact('mgda', forward, batch)
  length = np.linalg.norm(shared(jax.tree.map(np.asarray, free.direction)))
  np.testing.assert_allclose(free.shown['surgery_length'], length / plain, rtol=1e-4)


@pytest.mark.seconds
def test_only_the_layers_that_are_named_have_a_part_in_the_gram():
  batch = {'image': net()[1], 'label': LABELS}
  seen = []

  def look(gram, prior, state, key, *, losses):
    seen.append(gram)
    return jnp.full(C, 2.0), state

  cut = methods.Surgery(1, look, False, False, '^stem/|^head/')
  options = {'head': '^head/', 'num_classes': C, 'devices': 1}
  kept, rows = kept_by('upgrad'), class_sums(forward, batch)
  found = surgery.exact_gradient(forward, net()[0], batch, kept, KEY, surgery=cut, **options)
  stem = np.stack([row['stem']['bias'] for row in rows])
  np.testing.assert_allclose(seen[0], stem @ stem.T, rtol=1e-4, atol=1e-7)
  weights = np.array([2, 2, 2, 1])  # the last class is absent
  assert_close(found.direction, combined(rows, weights))  # weights are for all shared layers


def test_effect_by_hand():
  """a = (1, 0) and (-3, 4): plain (-2, 4); with weights (3, 1) the sum is (0, 4)."""
  rows = np.array([[1.0, 0.0], [-3.0, 4.0]])
  found = methods.effect(jnp.array([3.0, 1.0]), jnp.float32(rows @ rows.T), jnp.ones(2))
  np.testing.assert_allclose(found['surgery_length'], 4 / np.sqrt(20), rtol=1e-6)
  np.testing.assert_allclose(found['surgery_cosine'], 16 / (4 * np.sqrt(20)), rtol=1e-6)
  assert (int(found['surgery_losing']), int(found['surgery_losing_plain'])) == (0, 1)
  indefinite = methods.effect(jnp.ones(2), jnp.array([[-1.0, 0], [0, -1.0]]), jnp.ones(2))
  assert np.isnan([indefinite['surgery_length'], indefinite['surgery_cosine']]).all()


def test_a_gram_that_is_not_finite_leaves_the_weights_and_is_counted():
  cut = methods.Surgery(10, library.build('gradvac'), True, False, '')
  weights = jnp.array([0.5, 2.0, 1.0, 1.0])
  kept = kept_by('gradvac', weights=weights)
  found = cut.choose(kept, jnp.full((C, C), jnp.nan), jnp.ones(C) / C, jnp.ones(C), KEY)
  np.testing.assert_array_equal(found['weights'], weights)
  jax.tree.map(np.testing.assert_array_equal, found['aggregator'], kept['aggregator'])
  assert int(found['skipped']) == 1


def test_when_weights_are_measured(driver):
  def plan(**overrides):
    return schedule.Plan.of(driver.tiny_config(**overrides), 32 * 12)

  each = plan(surgery__name='upgrad', surgery__every=7)
  assert [step for step in range(40) if each.surgery_at(step)] == [0, 7, 14, 21, 28, 35]
  assert list(each.dispatches(5, 20, 50)) == [(5, 7), (7, 14), (14, 20)]
  for none in ({'surgery__name': 'none'}, {'surgery__name': 'fixed'}, {'surgery__every': 1}):
    overrides = {'surgery__name': 'upgrad', 'surgery__every': 7} | none
    assert not any(plan(**overrides).surgery_at(step) for step in range(40))
  frozen = plan(surgery__name='upgrad', surgery__every=7, train__frozen=0.25)
  assert [step for step in range(40) if frozen.surgery_at(step)] == [14, 21, 28, 35]


def run(driver, folder, **overrides):
  config = driver.tiny_config(**{'train__epochs': 2, **overrides})
  return loop.train_and_evaluate(config, str(folder), StopRequest())


def lines_of(folder):
  return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def finished(driver, tmp_path_factory):
  """The workdir of a run with surgery, of batches with the statistics of BatchNorm, and result."""
  folder = tmp_path_factory.mktemp('surgery') / 'run'
  overrides = {'surgery__name': 'upgrad', 'surgery__every': 8, 'surgery__batches': 3}
  return folder, run(driver, folder, diagnostics__statistics='batch', **overrides)


@pytest.mark.seconds
def test_a_run_records_its_weights(finished):
  folder, result = finished
  lines = lines_of(folder)
  measured = [line for line in lines if 'surgery_skipped' in line]
  assert [line['step'] for line in measured] == [0, 8, 16]
  assert all(len(line['surgery_weights']) == 10 for line in measured)
  assert all(
    {'surgery_losing', 'surgery_losing_plain', 'surgery_cosine'} <= line.keys() for line in measured
  )
  # every step has the weights of the last measurement; the mean of a class is over its images
  steps = np.concatenate([[line['surgery_weights']] * 8 for line in measured])
  state = load_state(str(folder), 'latest')
  assert state.surgery['images'].sum() == 24 * 32
  means = state.surgery['total'] / state.surgery['images']
  np.testing.assert_allclose(result['surgery']['mean_weights'], means, rtol=1e-6)
  assert (steps.min(0) * 0.9999 < means).all()
  assert (means < steps.max(0) * 1.0001).all()
  assert result['surgery']['skipped'] == 0
  means = {line['step']: line['surgery_weights'] for line in lines if 'train_loss' in line}
  np.testing.assert_allclose(means[5], steps[:5].mean(0), rtol=1e-5)
  np.testing.assert_allclose(means[10], steps[5:10].mean(0), rtol=1e-5)
  np.testing.assert_allclose(state.surgery['weights'], measured[-1]['surgery_weights'], rtol=1e-6)


def test_a_plain_run_keeps_nothing_of_surgery(driver, tmp_path):
  result = run(driver, tmp_path / 'run')
  assert 'surgery' not in result
  assert load_state(str(tmp_path / 'run')).surgery == {}


@pytest.mark.seconds
def test_fixed_and_random_take_the_mean_weights_of_another_run(driver, finished, tmp_path):
  folder, there = finished
  wanted = np.float32(there['surgery']['mean_weights'])
  fixed = run(driver, tmp_path / 'fixed', surgery__name='fixed', surgery__source=str(folder))
  np.testing.assert_allclose(fixed['surgery']['mean_weights'], wanted, rtol=1e-5)
  found = run(
    driver, tmp_path / 'random', surgery__name='random', surgery__source=str(folder), seed=4
  )
  permuted = np.float32(found['surgery']['mean_weights'])
  for classes in (2, 3, 10):
    for seed in range(12):
      order = surgery._derangement(seed, classes)
      assert sorted(order) == list(range(classes))
      assert 2 * (order == np.arange(classes)).sum() <= classes
  np.testing.assert_allclose(np.sort(permuted), np.sort(wanted), rtol=1e-5)
  assert not np.allclose(permuted, wanted)
  with pytest.raises(
    UserError, match='measures its weights; found .*=random, which takes those of'
  ):
    run(driver, tmp_path / 'b', surgery__name='fixed', surgery__source=str(tmp_path / 'random'))


@pytest.mark.seconds
def test_a_source_must_have_weights_of_the_same_classes(driver, finished, tmp_path):
  run(driver, tmp_path / 'plain', train__epochs=1)
  with pytest.raises(UserError, match='a run without; to fix it: set --config.surgery.source'):
    run(
      driver,
      tmp_path / 'a',
      surgery__name='fixed',
      surgery__source=str(tmp_path / 'plain'),
    )
  source = finished[0]
  record = json.loads((source / 'result.json').read_text())
  other = tmp_path / 'other'
  other.mkdir()
  for name in ('config.json', 'net.json', 'splits.npz'):
    (other / name).write_bytes((source / name).read_bytes())
  (other / 'result.json').write_text(json.dumps(record | {'class_names': list('abcdefghij')}))
  with pytest.raises(UserError, match='surgery.source with the classes of this run, 0, 1, 2'):
    run(driver, tmp_path / 'b', surgery__name='fixed', surgery__source=str(other))


@pytest.mark.seconds
def test_a_probe_that_is_not_finite_is_left_out(driver, tmp_path, monkeypatch, capsys):
  """The run goes on with the weights that it had."""
  real, calls = surgery.probe.BatchProbe.measure, []

  def measure(self, state):
    calls.append(1)
    if len(calls) == 2:
      raise surgery.NotFinite('finite losses', 'NaN', 'wait')
    return real(self, state)

  monkeypatch.setattr(surgery.probe.BatchProbe, 'measure', measure)
  overrides = {'surgery__name': 'upgrad', 'surgery__every': 8, 'surgery__batches': 3}
  result = run(driver, tmp_path / 'run', diagnostics__statistics='batch', **overrides)
  assert result['surgery']['skipped'] == 1
  measured = [line for line in lines_of(tmp_path / 'run') if 'surgery_skipped' in line]
  assert [line['surgery_skipped'] for line in measured] == [0, 1, 1]
  assert measured[0]['surgery_weights'] == measured[1]['surgery_weights']
  assert measured[1]['surgery_weights'] != measured[2]['surgery_weights']
  assert 'surgery keeps its weights' in capsys.readouterr().err


@pytest.mark.seconds
def test_a_measurement_has_new_images_each_time_and_none_of_the_diagnosis(driver, monkeypatch):
  """Of a probe of images, whose draw is a function of the step."""
  drawn = []
  real = surgery.probe.estimate.draw_folds

  def draw(*args):
    index, sizes = real(*args)
    drawn.append(index)
    return index, sizes

  monkeypatch.setattr(surgery.probe.estimate, 'draw_folds', draw)
  monkeypatch.setattr(surgery.probe.training_conflict, 'choose', lambda *_: 'frozen')
  config = driver.tiny_config(train__epochs=2)
  data = loop.pipeline.load(config, lambda *_: None)
  job = loop.Job.of(config, data)
  state, _ = job.begin()
  net = job.net(state)
  for step in (0, 8):
    cut = methods.Surgery(8, library.build('upgrad'), True, False, '')
    measurement = surgery.Measurement(cut, net, config, data, job.layout)
    kept = methods.initial(driver.tiny_config(surgery__name='upgrad'), 10)
    measurement.renew(state.replace(step=jnp.int32(step), surgery=kept))
  fixed = surgery.probe.of_config(net, config, data, job.layout)
  assert isinstance(fixed.measure(state), Conflict)
  assert len(drawn) == 3
  assert not any(np.array_equal(a, b) for a, b in [drawn[:2], drawn[1:], drawn[::2]])


@pytest.mark.seconds
@pytest.mark.parametrize('every', [1, 8])
def test_a_killed_run_ends_as_if_undisturbed(driver, tmp_path, every):
  """Weights and the aggregator's state are in the checkpoint; GradVac also draws an order."""
  flags = [
    '--config.surgery.name="gradvac"',
    f'--config.surgery.every={every}',
    '--config.surgery.batches=3',
    '--config.diagnostics.statistics="batch"',
  ]
  for name, end in (('whole', []), ('killed', ['--end=after-step:30'])):
    code, _, err = driver.finish(driver.start(tmp_path / name, *flags, *end))
    assert code == (-signal.SIGKILL if end else 0), err
  code, _, err = driver.finish(driver.start(tmp_path / 'killed', *flags))
  assert code == 0, err
  ends = []
  for name in ('whole', 'killed'):
    lines = lines_of(tmp_path / name)
    for line in lines:
      del line['timing']
    leaves = jax.tree.leaves(load_state(str(tmp_path / name), 'latest').saved())
    ends.append((lines, [np.asarray(leaf).tobytes() for leaf in leaves]))
  assert ends[0] == ends[1]


@pytest.mark.parametrize(
  ('overrides', 'expected'),
  [
    ({'surgery__name': 'pcgrd'}, "surgery.name among none, pcgrad, .*; found 'pcgrd'"),
    ({'surgery__name': 'fixed'}, 'surgery.source with surgery.name fixed or random alone'),
    (
      {'surgery__name': 'upgrad', 'surgery__source': 'x'},
      'surgery.source with surgery.name fixed or random alone',
    ),
    ({'surgery__name': 'upgrad', 'surgery__layers': '('}, 'surgery.layers, a regular expression'),
    (
      {'surgery__name': 'upgrad', 'mixing__name': 'mixup'},
      'images of one class each, for gradients of classes; found surgery.name upgrad with '
      'mixing.name mixup; to fix it: set --config.mixing.name=none',
    ),
    (
      {'surgery__name': 'upgrad', 'stage__method': 'crt', 'stage__source': 'x'},
      'a run that trains shared layers, for gradient surgery',
    ),
    (
      {
        'surgery__name': 'gradnorm',
        'surgery__every': 1,
        'loss__weights': 'effective',
        'loss__weights_start': 0.8,
      },
      'losses of one kind in the whole run, for surgery.name gradnorm with surgery.every 1',
    ),
    ({'surgery__name': 'upgrad', 'surgery__every': 0}, 'surgery.every: at least 1 step; found 0'),
  ],
)
def test_what_does_not_go_together_is_refused_before_the_data(driver, overrides, expected):
  with pytest.raises(UserError, match=expected):
    preflight.check(driver.tiny_config(**overrides))


def test_weights_that_never_move_have_no_surgery(driver):
  config = driver.tiny_config(surgery__name='upgrad', train__frozen=1.0, model__init='x')
  with pytest.raises(
    UserError, match='weights that move, for gradient surgery; found surgery.name'
  ):
    methods.check(config)


def test_settings_reach_the_aggregator(driver):
  """`share`, and whom to protect."""
  gram = jnp.array([[4.0, -3.0], [-3.0, 4.0]])
  for protect, counts in (('all', [200, 50]), ('minority', [200, 50])):
    config = driver.tiny_config(
      surgery__name='interference', surgery__share=0.1, surgery__protect=protect
    )
    cut = methods.build(config, np.array(counts))
    found, _ = cut.aggregate(gram, jnp.array([0.8, 0.2]), {}, KEY)
    mask = None if protect == 'all' else np.array([False, True])
    wanted, _ = library.build('interference', share=0.1, protect=mask)(
      gram, jnp.array([0.8, 0.2]), {}, KEY
    )
    np.testing.assert_array_equal(found, wanted)
    assert methods.reads_counts(config) == (protect == 'minority')


@pytest.mark.seconds
@pytest.mark.parametrize('every', [1, 8])
def test_devices_and_long_dispatches_change_nothing_but_the_last_bits(
  driver, tmp_path, monkeypatch, every
):
  """On four devices in one call for several steps, as on an accelerator, and on one by one."""
  overrides = {
    'surgery__name': 'upgrad',
    'surgery__every': every,
    'surgery__batches': 2,
    'train__epochs': 1,
    'train__log_every': 3,
    'diagnostics__statistics': 'batch',
  }
  run(driver, tmp_path / 'one', **overrides)
  monkeypatch.setattr(loop.backend, 'steps_per_dispatch', lambda longest: longest)
  run(driver, tmp_path / 'four', parallel__devices=4, parallel__fsdp=2, **overrides)
  one, four = (lines_of(tmp_path / name) for name in ('one', 'four'))
  assert [line['step'] for line in one] == [line['step'] for line in four]
  for here, there in zip(one, four, strict=True):
    # later, last bits decide which constraints hold, and grow
    for name in (here.keys() - {'timing'}) if here['step'] <= 3 else ():
      pair = (np.array(x[name], float) for x in (here, there))  # null is NaN
      np.testing.assert_allclose(*pair, rtol=2e-2, atol=2e-3, err_msg=name)


def test_layers_must_be_there_and_class_gradients_have_room(driver, monkeypatch):
  config = driver.tiny_config(surgery__name='upgrad')
  job = loop.Job.of(config, loop.pipeline.load(config, lambda *_: None))
  net = job.net(job.begin()[0])
  surgery.check_room(config, net, 1)
  for layers in ('^stage9', '^head/'):
    config.surgery.layers = layers
    with pytest.raises(UserError, match='surgery.layers that finds parameters outside'):
      surgery.check_room(config, net, 1)
  config.surgery.layers = ''
  monkeypatch.setattr(surgery.backend, 'device_bytes', lambda: 1000)
  with pytest.raises(UserError, match='to measure for surgery; .* set --config.surgery.batches or'):
    surgery.check_room(config, net, 1)
  config.surgery.every = 1
  with pytest.raises(UserError, match='for surgery.every 1; found 0.0 GB for 10 classes'):
    surgery.check_room(config, net, 1)
  config.surgery.name = 'none'
  surgery.check_room(config, net, 1)


@pytest.mark.seconds
def test_interference_leaves_alone_what_may_be_0_and_records_what_is_there(driver):
  """Diagnostics may be of the net with frozen statistics; the gradient of training is measured."""
  config = driver.tiny_config(surgery__name='interference', surgery__protect='all')
  data = loop.pipeline.load(config, lambda *_: None)
  job = loop.Job.of(config, data)
  state, _ = job.begin()
  cut = methods.build(config, data.class_counts)
  assert cut.uses_intervals
  assert not methods.build(
    driver.tiny_config(surgery__name='upgrad', surgery__certain=False), data.class_counts
  ).uses_intervals
  measurement = surgery.Measurement(cut, job.net(state), config, data, job.layout)
  assert isinstance(measurement._probe, surgery.probe.BatchProbe)
  grams = np.tile(np.eye(10), (2, 1, 1))
  grams[:, :2, :2] = [[1, -0.9], [-0.9, 1]]
  grams[:, 9, 9] = -0.1
  low, high = grams - 0.05, grams + 0.05
  high[:, 0, 1] = high[:, 1, 0] = 0.1
  prior = np.array([0.8] + [0.2 / 9] * 9)
  conflict = Conflict(
    ('shared', 'total'),
    grams,
    grams * 0,
    low,
    high,
    np.ones(10),
    np.ones(10),
    tuple('abcdefghij'),
    np.ones(10),
    prior,
    {},
  )
  assert measurement.certain(conflict)[0, 1] == 0
  measurement._probe.measure = lambda state: conflict
  _, record = measurement.renew(state)
  assert record['surgery_weights'] == [1.0] * 10
  assert record['surgery_losing'] == record['surgery_losing_plain'] == 2  # with the one below 0
  assert record['surgery_unresolved'] == 1
  high[:, 0, 1] = high[:, 1, 0] = -0.8
  _, record = measurement.renew(state)
  assert record['surgery_weights'][0] < 1 < record['surgery_weights'][1]


@pytest.mark.parametrize('name', sorted(methods.SETTINGS))
def test_every_setting_reaches_its_aggregator(driver, name):
  values = {'c': 0.25, 'beta': 0.5, 'alpha': 0.75, 'rate': 0.3, 'share': 0.9, 'protect': 'all'}
  config = driver.tiny_config(surgery__name=name, **{f'surgery__{k}': v for k, v in values.items()})
  wanted = {k: values[k] for k in methods.SETTINGS[name]}
  if 'protect' in wanted:
    wanted['protect'] = None
  assert methods.build(config, np.arange(10, 0, -1)).aggregate.keywords == wanted


def test_steps_without_surgery_do_not_count_in_the_mean(driver):
  """As those in which pretrained weights are frozen; a class that was never seen has 1."""
  kept = kept_by('upgrad', images=jnp.array([4.0, 0, 2, 1]), total=jnp.array([8.0, 0, 1, 1]))
  state = types.SimpleNamespace(surgery=kept, step=100)
  assert surgery.summary(state) == {'mean_weights': [2, 1, 0.5, 1], 'skipped': 0}
  assert surgery.summary(types.SimpleNamespace(surgery={})) == {}
