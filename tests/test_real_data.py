"""Real images, end to end: CIFAR-10 (JPEG copy) and folders of photos, where they are at hand."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from csba_jax import config as config_lib
from csba_jax.data import pipeline
from csba_jax.measure import evaluate
from csba_jax.runtime.signals import StopRequest
from csba_jax.training import loop

ROOT = Path(__file__).parents[1]
CIFAR10_LT_100 = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


@pytest.fixture(scope='module')
def cifar(data_root):
  config = config_lib.default()
  config.data.source, config.data.name, config.data.dir = 'tfds', 'cifar10', data_root
  config.data.image_size, config.data.channels = 32, 3
  config.data.imbalance_factor = 100.0
  return config


@pytest.mark.slow
def test_cifar10_lt_is_the_literatures(cifar):
  data = pipeline.load(cifar, print)
  assert data.image_shape == (32, 32, 3)
  assert data.class_names[:3] == ('airplane', 'automobile', 'bird')
  assert len(data.test) == 10_000
  together = np.bincount(np.concatenate([data.train.labels, data.val.labels]))
  assert together.tolist() == CIFAR10_LT_100
  assert np.bincount(data.val.labels).tolist() == [int(n / 10 + 0.5) for n in CIFAR10_LT_100]
  # the same images on every machine: a change here changes every result measured before
  assert data.splits.sha256 == 'ae9c59d88f2c041af0c2e00ce99d7661e6ca6e29d99ca459472f469567a7d84e'

  cifar.data.val_fraction = 0.0
  assert pipeline.load(cifar, print).class_counts.tolist() == CIFAR10_LT_100


@pytest.mark.slow
def test_cifar10_lt_trains_and_beats_chance(cifar, tmp_path):
  config = cifar.copy_and_resolve_references()
  config.data.imbalance_factor, config.data.val_fraction = 100.0, 0.1
  config.augment.crop_padding, config.augment.flip = 4, True
  config.model.width, config.train.epochs, config.train.learning_rate = 0.1, 1, 0.05
  with StopRequest() as stop:
    result = loop.train_and_evaluate(config, str(tmp_path / 'run'), stop)
  assert result['examples'] == 10_000
  assert result['balanced_accuracy'] > 0.15  # chance: 0.10
  again = evaluate.evaluate_run(str(tmp_path / 'run'))
  assert again['confusion_matrix'] == result['confusion_matrix']


@pytest.mark.slow
def test_photos_train_and_copies_stay_on_one_side(photo_folder, tmp_path):
  config = config_lib.default()
  config.data.source, config.data.dir = 'image_folder', photo_folder
  config.data.image_size, config.data.channels, config.data.num_classes = 32, 3, 0
  config.data.profile = 'natural'
  config.data.manifest = f'{photo_folder}/manifest.csv'
  config.data.group_column = 'dup_group'
  config.model.width, config.train.epochs, config.train.batch_size = 0.1, 2, 32
  with StopRequest() as stop:
    result = loop.train_and_evaluate(config, str(tmp_path / 'run'), stop)
  assert len(result['class_names']) == 6
  assert result['macro_f1'] > 0.05
  source, _ = pipeline.open_sources(config.data)
  split = pipeline.load(config, print).splits
  sides = [set(source.groups[part]) for part in (split.train, split.val, split.test)]
  for i, side in enumerate(sides):
    for other in sides[i + 1 :]:
      assert not side & other
  assert sum(len(part) for part in (split.train, split.val, split.test)) == len(source)


@pytest.mark.slow
def test_a_folder_of_another_kind_takes_the_same_commands(data_root, tmp_path):
  """Small pictures of ten classes, from an audit to an exported network."""

  def run(*command):
    environment = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
    done = subprocess.run(
      [sys.executable, '-m', *command],
      capture_output=True,
      text=True,
      cwd=tmp_path,
      env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  run('benchmarks.cifar10_photos', '--out=photos', '--head=60', '--imbalance=6')
  audit = run('csba_jax.bin.audit', 'photos', '--workdir=run')
  assert 'photos: 285 photos of 10 classes' in audit
  assert 'Imbalance factor 6: airplane has 60 photos, truck 10.' in audit
  trained = run(
    'csba_jax.bin.train', '--data=photos', '--workdir=run', '--config.train.epochs=2', '--minutes=1'
  )
  assert '  loss.name=balanced_softmax: ' in trained
  assert 'macro-F1' in trained
  assert 'calibration error' in run('csba_jax.bin.evaluate', '--workdir=run')
  run('csba_jax.bin.predict', 'photos/truck', '--workdir=run', '--out=trucks.csv')
  with open(tmp_path / 'trucks.csv', encoding='utf-8', newline='') as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 10
  names = sorted(path.name for path in (tmp_path / 'photos').iterdir())
  for row in rows:
    assert row['class'] in names
    assert sum(float(row[f'p:{name}']) for name in names) == pytest.approx(1, abs=1e-3)
  run('csba_jax.bin.report', '--workdir=run')
  assert 'truck' in (tmp_path / 'run/report.html').read_text()
  run('csba_jax.bin.export', '--workdir=run', '--out=net')
  assert (tmp_path / 'net/model.jax').stat().st_size > 1000
