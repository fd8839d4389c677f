"""An exported net says what the run says, where neither the run nor this package is."""

import csv
import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import load_file
from scipy.special import softmax

from csba_jax import config as config_lib
from csba_jax.errors import UserError
from csba_jax.export import folder, program, weights
from csba_jax.measure.calibration import Calibration
from csba_jax.measure.predict import Predictor
from csba_jax.models import layers, multibranch, registry
from csba_jax.report.terminal import predictions
from csba_jax.run.net import Metadata, Net

NAMES = ('cat', 'dög', 'owl')
COUNTS = np.asarray([50, 30, 2])
SHAPE = (12, 12, 3)


class Small(nn.Module):
  """A convolution with a norm: what a program has to keep."""

  @nn.compact
  def __call__(self, x, train=False):
    x = layers.Conv(4, (3, 3), name='conv')(x)
    x = nn.relu(layers.BatchNorm(use_running_average=not train, name='norm')(x))
    return nn.Dense(3, name='head')(x.mean((1, 2)))


def net_of(model, shape=SHAPE, names=NAMES, counts=COUNTS):
  variables = model.init(jax.random.key(0), jnp.zeros((1, *shape)))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda x: np.abs(rng.normal(1, 0.3, x.shape)).astype('f'), variables)
  return Net(model, variables, Metadata(names, counts, shape), step=7, post_hoc_tau=0.5)


@pytest.fixture(scope='module')
def predictor():
  calibration = Calibration(1.7, np.asarray([0.3, 0.0, -np.inf]))
  return Predictor(net_of(Small()), None, calibration, np.asarray([1.0, 2.5, 1.0]))


def images(n, shape=SHAPE):
  return np.random.default_rng(n).integers(0, 256, (n, *shape), np.uint8)


def expected(predictor, pixels):
  """By the calibration's own float64 arithmetic."""
  return predictor.calibration.probabilities(np.asarray(predictor.net.logits(pixels)))


def test_the_program_is_the_predictor(predictor):
  found = jax.export.deserialize(bytearray(program.program_of(predictor)))
  assert found.platforms == ('cpu', 'cuda', 'tpu')
  for n in (1, 5):
    pixels = images(n)
    np.testing.assert_allclose(found.call(pixels), expected(predictor, pixels), atol=1e-5)
    logits = np.asarray(predictor.net.logits(pixels), np.float64)  # by hand
    by_hand = softmax(logits / 1.7 + np.asarray([0.3, 0.0, -np.inf]), axis=1)
    np.testing.assert_allclose(found.call(pixels), by_hand, atol=1e-5)


@pytest.mark.seconds
@pytest.mark.parametrize('name', [name for name in registry.MODELS if name != 'tiny'])
def test_every_model_can_be_lowered(predictor, name):
  """For any number of images; to compile all of them would take a minute."""
  config = config_lib.default().model
  config.update({'name': name, 'width': 0.1, 'attention': registry.attentions_of(name)[-1]})
  shape = (16, 16, 3)
  model = registry.build(config, 3, shape)
  image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  shapes = {'batch_stats': {}, **jax.eval_shape(model.init, jax.random.key(0), image)}
  variables = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
  net = Net(model, variables, Metadata(NAMES, COUNTS, shape))
  exported = program.program_of(Predictor(net, None, predictor.calibration, predictor.weights))
  found = jax.export.deserialize(bytearray(exported))
  assert str(found.in_avals[0]) == 'uint8[n,16,16,3]'


@pytest.mark.seconds
def test_the_program_of_the_multi_branch_net(predictor):
  shape = (16, 16, 1)
  model = multibranch.build(3, shape, 'csba_class', 0.05, jnp.float32)
  other = Predictor(net_of(model, shape), None, predictor.calibration, predictor.weights)
  found = jax.export.deserialize(bytearray(program.program_of(other)))
  pixels = images(3, shape)
  np.testing.assert_allclose(found.call(pixels), expected(other, pixels), atol=1e-5)


def test_the_weights_are_the_variables(predictor, tmp_path):
  (tmp_path / 'w').write_bytes(weights.weights_of(predictor.net))
  found = load_file(tmp_path / 'w')
  assert set(found) == {
    'params.conv.kernel',
    'params.norm.scale',
    'params.norm.bias',
    'params.head.kernel',
    'params.head.bias',
    'batch_stats.norm.mean',
    'batch_stats.norm.var',
  }
  params = predictor.net.params
  np.testing.assert_array_equal(found['params.conv.kernel'], params['conv']['kernel'])
  np.testing.assert_array_equal(found['params.head.bias'], params['head']['bias'])


def photos(where):
  """A photo that is large, one that is turned by its EXIF, one that is grey, one that is tall."""
  rng = np.random.default_rng(0)
  coarse = rng.integers(0, 256, (9, 13, 3), np.uint8)
  large = PIL.Image.fromarray(coarse).resize((650, 451), PIL.Image.Resampling.BICUBIC)
  exif = PIL.Image.Exif()
  exif[0x0112] = 6
  large.save(where / 'large.jpg', quality=90)
  large.save(where / 'turned.jpg', exif=exif)
  large.convert('L').save(where / 'grey.png')
  large.crop((0, 0, 31, 200)).save(where / 'tall.webp', lossless=True)
  return sorted(where.iterdir())


def test_the_script_is_csba_predict_without_csba_jax(predictor, tmp_path):
  (tmp_path / 'in').mkdir()
  files = photos(tmp_path / 'in')
  out = tmp_path / 'exported'
  found = folder.write(out, predictor, 0.4, '# card\n')
  assert [path.name for path in found] == [
    'README.md',
    'model.json',
    'model.jax',
    'weights.safetensors',
    'predict.py',
  ]
  assert sorted(os.listdir(tmp_path)) == ['exported', 'in']
  program = (
    'import runpy, sys\n'
    "sys.modules.update(dict.fromkeys(('csba_jax', 'flax', 'orbax', 'sklearn')))\n"
    f'sys.argv = {["predict.py", *map(str, files)]!r}\n'
    f"runpy.run_path({str(out / 'predict.py')!r}, run_name='__main__')\n"
  )
  done = subprocess.run(
    [sys.executable, '-c', program],
    capture_output=True,
    text=True,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )
  assert done.returncode == 0, done.stderr
  lines = [line.split('  ') for line in done.stdout.splitlines()]
  predictions.write(tmp_path / 'x.csv', NAMES, predictor.predict(files, 0.4))
  with (tmp_path / 'x.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  assert [line[2] for line in lines] == [row['file'] for row in rows]
  assert [line[1] for line in lines] == [row['class'] or '-' for row in rows]
  for line, row in zip(lines, rows, strict=True):
    assert float(line[0]) == pytest.approx(float(row['confidence']), abs=6e-4)  # three digits


def test_what_the_json_says(predictor):
  told = json.loads(json.dumps(folder.about(predictor, 0.25)))
  assert told['class_names'] == list(NAMES)
  assert told['class_counts'] == COUNTS.tolist()
  assert (told['image_size'], told['mode']) == (12, 'RGB')
  assert told['class_weights'] == [1.0, 2.5, 1.0]
  assert (told['temperature'], told['bias']) == (1.7, [0.3, 0.0, None])
  assert (told['min_confidence'], told['step']) == (0.25, 7)
  assert set(told['versions']) == {'csba_jax', 'jax', 'flax'}


def test_a_folder_that_is_there_stays_as_it_is(predictor, tmp_path):
  (tmp_path / 'mine').mkdir()
  with pytest.raises(UserError, match='a new folder for --out; found .*mine, which exists'):
    folder.write(tmp_path / 'mine', predictor, 0.0, '')
  assert not list((tmp_path / 'mine').iterdir())
  with pytest.raises(UserError, match='expected a folder for --out; found no '):
    folder.write(tmp_path / 'none/mine', predictor, 0.0, '')


def test_a_disk_that_fails_leaves_nothing(predictor, tmp_path, monkeypatch):
  def fail(handle):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(folder.os, 'fsync', fail)
  with pytest.raises(UserError, match='expected to write .*; found OSError: .*No space left'):
    folder.write(tmp_path / 'out', predictor, 0.0, '')
  assert not list(tmp_path.iterdir())
