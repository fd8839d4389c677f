"""A net without its data: what it predicts, what net.json keeps, and what earlier versions lack."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csba_jax.data import pipeline
from csba_jax.errors import UserError
from csba_jax.measure.evaluate import evaluate
from csba_jax.methods import metrics, optimizers
from csba_jax.models import registry
from csba_jax.run import net as net_lib
from csba_jax.run import restore
from csba_jax.run import state as state_lib
from csba_jax.run.net import Metadata, Net, Preprocessing
from csba_jax.run.workdir import Workdir
from csba_jax.runtime.signals import StopRequest
from csba_jax.training import loop

TAU = 1.5


@pytest.fixture(scope='module')
def workdir(driver, tmp_path_factory):
  """A finished run of one epoch, with moving averages and a post-hoc logit adjustment."""
  workdir = tmp_path_factory.mktemp('net') / 'run'
  config = driver.tiny_config(train__epochs=1, train__ema_decay=0.9, loss__post_hoc_tau=TAU)
  with StopRequest() as stop:
    loop.train_and_evaluate(config, str(workdir), stop)
  return workdir


@pytest.fixture(scope='module')
def run(workdir):
  """The same run with its data."""
  return restore.load_run(str(workdir))


@pytest.fixture
def no_data(monkeypatch):
  """Every way to read data ends the test."""

  def fail(*_):
    raise AssertionError('the data were read')

  monkeypatch.setattr(pipeline, 'load', fail)
  monkeypatch.setattr(pipeline, 'open_sources', fail)


@pytest.fixture
def moved(workdir, tmp_path, no_data):
  """A copy of the run in another place, without splits.npz, where no data can be read."""
  shutil.copytree(workdir, tmp_path / 'moved')
  (tmp_path / 'moved/splits.npz').unlink()
  return tmp_path / 'moved'


@pytest.mark.seconds
def test_a_net_predicts_without_data_what_the_evaluation_counts_to_the_bit(moved, run):
  test = run.data.test
  net = restore.load_net(str(moved))
  logits = np.asarray(net.logits(test.images))
  assert logits.tobytes() == np.asarray(run.net.logits(test.images)).tobytes()
  counts = np.zeros((10, 10), int)
  np.add.at(counts, (test.labels, logits.argmax(1)), 1)
  sums, expected = (evaluate(x, test, 100) for x in (net, run.net))
  np.testing.assert_array_equal(sums.counts, counts)
  for ours, theirs in zip(jax.tree.leaves(sums), jax.tree.leaves(expected), strict=True):
    assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
  found = metrics.summarise(sums, net.metadata.class_counts)
  result = json.loads((moved / 'result.json').read_text())
  assert found['macro_f1'] == result['macro_f1']
  assert found['confusion_matrix'] == result['confusion_matrix']
  assert net.step == result['checkpoint_step']


def test_logits_are_those_of_the_averages_shifted_by_the_prior(workdir, run):
  """By hand, from the checkpoint: (x / 127.5 - 1) through the model, - tau log pi_c."""
  averages = restore.load_state(str(workdir)).averages
  images = run.data.test.images[:20]
  logits = run.net.model.apply(averages, images / np.float32(127.5) - 1)
  prior = run.data.class_counts / run.data.class_counts.sum()
  expected = np.asarray(logits, float) - TAU * np.log(prior)
  np.testing.assert_allclose(run.net.logits(images), expected, rtol=1e-5, atol=1e-5)


def test_a_net_has_averages_where_a_state_keeps_them(driver):
  config = driver.tiny_config()
  model = registry.build(config.model, 3, (8, 8, 1))
  tx, _ = optimizers.build(config, 1)
  state = state_lib.create(model, tx, (8, 8, 1), 0, averages=True)
  state = state.replace(params=jax.tree.map(jnp.zeros_like, state.params), step=jnp.int32(7))
  metadata = Metadata(tuple('abc'), np.array([5, 3, 1]), (8, 8, 1))
  net = Net.of(model, state, metadata)
  assert net.params is state.averages['params']
  assert net.batch_stats is state.averages['batch_stats']
  assert Net.of(model, state.replace(averages={}), metadata).params is state.params
  assert (net.step, net.num_classes) == (7, 3)
  np.testing.assert_array_equal(net.shift, 0)
  other = net.replace(batch_stats={})
  assert (other.batch_stats, other.params) == ({}, net.params)
  shapes = Net.of_shapes(model, metadata)
  assert jax.tree.all(
    jax.tree.map(lambda a, b: a.shape == b.shape, shapes.variables, net.variables)
  )
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(shapes.variables))


@pytest.mark.parametrize(
  ('images', 'found'),
  [
    (np.zeros((2, 8, 8, 1), np.float32), r'float32 of shape \[2, 8, 8, 1\]'),
    (np.zeros((2, 9, 8, 1), np.uint8), r'uint8 of shape \[2, 9, 8, 1\]'),
    (np.zeros((8, 8, 1), np.uint8), r'uint8 of shape \[8, 8, 1\]'),
    ([[1]], r'list of shape \[1, 1\]'),
  ],
)
def test_other_images_are_refused(run, images, found):
  with pytest.raises(UserError, match=rf'uint8 images \[N, 8, 8, 1\]; found {found}; .*: resize'):
    run.net.logits(images)


# ---- net.json


def test_net_json_is_all_that_the_data_would_tell(workdir, run):
  record = json.loads((workdir / 'net.json').read_text())
  assert record == {
    'class_names': list(run.data.class_names),
    'class_counts': run.data.class_counts.tolist(),
    'image_shape': [8, 8, 1],
    'preprocessing': {'divisor': 127.5, 'offset': 1.0},
  }
  again = net_lib.read(workdir)
  assert again.record() == record
  assert again.preprocessing == Preprocessing()


def test_the_numbers_of_the_preprocessing_are_read_from_the_file(moved, run):
  record = json.loads((moved / 'net.json').read_text())
  record['preprocessing'] = {'divisor': 255.0, 'offset': 0.5}
  (moved / 'net.json').write_text(json.dumps(record))
  net, images = restore.load_net(str(moved)), run.data.test.images[:5]
  logits = net.model.apply(net.variables, images / np.float32(255) - np.float32(0.5))
  expected = np.asarray(logits) + net.shift
  np.testing.assert_allclose(net.logits(images), expected, rtol=1e-5, atol=1e-5)


def test_from_bytes_to_the_input_of_a_net():
  found = Preprocessing()(jnp.array([0, 51, 255], jnp.uint8))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, [-1, -0.6, 1], rtol=1e-6)
  np.testing.assert_array_equal(Preprocessing(2.0, 3.0)(jnp.array([8], jnp.uint8)), [1])


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    ({'class_counts': [1, 2]}, r'ValueError: 10 class names, class counts of shape \[2\]'),
    ({'image_shape': [8, 8]}, 'ValueError'),
    ({'preprocessing': {'mean': 1.0}}, 'TypeError'),
    ({'preprocessing': None}, 'AttributeError'),
  ],
)
def test_a_damaged_net_json(moved, damage, message):
  record = json.loads((moved / 'net.json').read_text()) | damage
  (moved / 'net.json').write_text(json.dumps(record))
  with pytest.raises(UserError, match=f'metadata of a net in .*; found a damaged .*{message}'):
    restore.load_net(str(moved))


def test_half_a_net_json(moved):
  (moved / 'net.json').write_text('{"class_na')
  with pytest.raises(UserError, match=r'a whole .*net\.json; found a damaged one'):
    restore.load_net(str(moved))


def test_a_run_that_goes_on_keeps_its_metadata(driver, tmp_path):
  metadata = Metadata(('a', 'b'), np.array([7, 2]), (8, 8, 1))
  with Workdir(tmp_path, driver.tiny_config().to_dict()) as folder:
    net_lib.keep(folder, metadata)
    before = (tmp_path / 'net.json').stat().st_mtime_ns
    net_lib.keep(folder, metadata)
    assert (tmp_path / 'net.json').stat().st_mtime_ns == before
    other = Metadata(('a', 'b'), np.array([7, 2]), (8, 8, 1), Preprocessing(255.0, 0.0))
    with pytest.raises(UserError) as error:
      net_lib.keep(folder, other)
  assert str(error.value) == (
    f"expected the preprocessing that {tmp_path} was started with: {{'divisor': 127.5, 'offset': "
    "1.0}; found {'divisor': 255.0, 'offset': 0.0}; to fix it: use the data and the version of "
    'csba_jax of that run, or name another --workdir'
  )


# ---- runs of earlier versions


def test_an_earlier_run_has_its_classes_in_result_json(moved, run):
  (moved / 'net.json').unlink()
  net = restore.load_net(str(moved))
  assert net.metadata.record() == run.net.metadata.record()


def test_an_earlier_run_that_is_not_finished_names_no_classes(moved):
  (moved / 'net.json').unlink()
  (moved / 'result.json').unlink()
  with pytest.raises(UserError, match=r'net\.json or result\.json in .*; to fix it: start csba-t'):
    restore.load_net(str(moved))


def test_an_earlier_result_without_classes(moved):
  (moved / 'net.json').unlink()
  result = json.loads((moved / 'result.json').read_text())
  del result['class_names']
  (moved / 'result.json').write_text(json.dumps(result))
  with pytest.raises(UserError, match=r"a whole .*/result\.json; .*no 'class_names' in it"):
    restore.load_net(str(moved))


def test_an_earlier_run_with_its_data_needs_neither_file(workdir, run, tmp_path):
  shutil.copytree(workdir, tmp_path / 'run')
  (tmp_path / 'run/net.json').unlink()
  (tmp_path / 'run/result.json').unlink()
  found = restore.load_run(str(tmp_path / 'run'), 'latest', data=run.data)
  assert found.net.metadata.record() == run.net.metadata.record()


def test_the_untrained_net_needs_data(moved):
  with pytest.raises(UserError, match='best, latest or a step; found init, .*: use load_run'):
    restore.load_net(str(moved), 'init')
