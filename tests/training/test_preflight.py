"""Errors in a config come before data is decoded and before a folder is made: one order for all."""

import functools
import subprocess
import sys

import numpy as np
import pytest

from csba_jax import config as config_lib
from csba_jax.data import cache, pipeline
from csba_jax.errors import UserError
from csba_jax.run.schedule import Plan
from csba_jax.runtime.signals import StopRequest
from csba_jax.study import grid, runner
from csba_jax.training import loop, preflight

# one wrong value, or two that do not go together, of each section: (fields, part of the message)
BAD = {
  'seed': ({'seed': -1}, 'seed: a whole number'),
  'data': ({'data.source': 'disk'}, 'data.source: digits'),
  'augment': ({'augment.policy': 'best'}, "augment.policy among .*; found 'best'"),
  'model': ({'model.name': 'vgg'}, "model.name among .*; found 'vgg'"),
  'model.attention': ({'model.attention': 'cbma'}, "model.attention .*; found 'cbma'"),
  'model.head': ({'model.head': 'round'}, "model.head among .*; found 'round'"),
  'model.norm': ({'model.name': 'vit', 'model.norm': 'group'}, 'model.norm at its default'),
  'loss': ({'loss.name': 'hinge'}, "loss.name among .*; found 'hinge'"),
  'loss.weights': ({'loss.weights': 'few'}, "loss.weights among .*; found 'few'"),
  'loss.weights_start': ({'loss.weights_start': 0.5}, 'class weights to defer'),
  'sampler': ({'sampler.name': 'rare'}, "sampler.name among .*; found 'rare'"),
  'sampler.start': ({'sampler.start': 0.5}, 'a sampler to defer'),
  'mixing': ({'mixing.name': 'blend'}, "mixing.name among .*; found 'blend'"),
  'mixing and loss': ({'mixing.name': 'mixup', 'loss.name': 'focal'}, 'takes mixed labels'),
  'surgery': ({'surgery.name': 'upgrd'}, "surgery.name among .*; found 'upgrd'"),
  'stage': ({'stage.method': 'third', 'stage.source': 'x'}, "stage.method among .*; found 'third'"),
  'stage.source': ({'stage.method': 'crt'}, 'stage.method and stage.source together'),
  'train': ({'train.optimizer': 'lion'}, "train.optimizer among .*; found 'lion'"),
  'train.schedule': ({'train.schedule': 'flat'}, "train.schedule among .*; found 'flat'"),
  'diagnostics': ({'diagnostics.images': 3}, 'diagnostics.images: at least 4'),
}
DEVICES = {
  'parallel': ({'parallel.devices': 4000}, 'parallel.devices of at most'),
  'parallel.fsdp': ({'parallel.fsdp': 3}, 'parallel.fsdp that divides'),
  'batch': ({'train.batch_size': 33, 'parallel.devices': 2}, 'train.batch_size that 2 devices'),
}
# what only the data can tell, before they are decoded
DATA = {
  'batch': ({'train.batch_size': 5000}, 'a batch larger than the data'),
  'imbalance': ({'data.imbalance_factor': 900.0}, 'set data.imbalance_factor to 1'),
  'classes': ({'data.num_classes': 9}, r'data.num_classes as in the data \(10\); found 9'),
  'size': ({'data.image_size': 16}, 'set --config.data.image_size=8'),
  'folds': ({'data.folds': 1000}, 'as data.folds = 1000'),
  'steps': ({'train.epochs': 2**31 - 1}, r'train.epochs of at most \d+, so that steps are below'),
  'folder': ({'data.source': 'image_folder', 'data.dir': '/nix'}, '/nix'),
}


def config_with(fields):
  config = config_lib.default()
  config.parallel.devices = 1
  for field, value in fields.items():
    *section, name = field.split('.')
    (config[section[0]] if section else config)[name] = value
  return config


@pytest.fixture
def no_decoding(monkeypatch):
  """Any image that is decoded is a failure of the test."""

  def fail(*_, **__):
    raise AssertionError('images were decoded')

  monkeypatch.setattr(cache, 'decode_all', fail)
  monkeypatch.setattr(cache, '_decode_to_disk', fail)


def train(config, workdir):
  with StopRequest() as stop:
    return loop.train_and_evaluate(config, str(workdir), stop)


@pytest.mark.parametrize('table', ['BAD', 'DEVICES', 'DATA'])
def test_training_leaves_nothing_behind(tmp_path, monkeypatch, no_decoding, table):
  monkeypatch.setenv('CSBA_CACHE_DIR', str(tmp_path / 'cache'))
  for fields, message in globals()[table].values():
    with pytest.raises(UserError, match=message):
      train(config_with(fields), tmp_path / 'runs/deep/run')
    assert list(tmp_path.iterdir()) == [], fields


def test_every_section_has_a_bad_field_here():
  sections = {field.split('.')[0] for field in config_lib.flatten(config_lib.default())}
  tried = {field.split('.')[0] for fields, _ in (BAD | DEVICES | DATA).values() for field in fields}
  assert sections - tried == {'deterministic'}  # a switch


def test_a_folder_that_was_there_stays_and_so_do_others(tmp_path, no_decoding):
  (tmp_path / 'mine').mkdir()
  with pytest.raises(UserError, match='larger than the data'):
    train(config_with(DATA['batch'][0]), tmp_path / 'mine')
  assert [path.name for path in (tmp_path / 'mine').iterdir()] == ['.lock']
  (tmp_path / 'runs').mkdir()
  with pytest.raises(UserError, match='larger than the data'):
    train(config_with(DATA['batch'][0]), tmp_path / 'runs/new')
  assert list((tmp_path / 'runs').iterdir()) == []


def test_a_study_checks_every_kind_of_run_before_it_makes_its_folder(tmp_path, no_decoding):
  for name, (fields, message) in BAD.items():
    study = grid.default()
    for field, value in fields.items():
      *section, leaf = field.split('.')
      (study.base[section[0]] if section else study.base)[leaf] = value
    with pytest.raises(UserError) as error, StopRequest() as stop:
      runner.run_study(study, str(tmp_path / 'study'), stop)
    assert list(tmp_path.iterdir()) == [], name
    assert message  # a study words some of them by its axes
    assert 'to fix it' in str(error.value)


def test_a_study_names_the_run_that_cannot_begin(tmp_path):
  study = grid.default()
  study.models, study.variants = ('multibranch', 'vit'), ('none', 'cbam')
  with pytest.raises(UserError) as error, StopRequest() as stop:
    runner.run_study(study, str(tmp_path / 'study'), stop)
  assert "found 'cbam' in run vit-cbam-s9" in str(error.value)
  assert '--config.base.model.attention=none' in str(error.value)
  assert list(tmp_path.iterdir()) == []


def test_every_recipe_passes():
  for path in sorted(config_lib.RECIPES.glob('*.py')):
    if path.stem.startswith('study_'):
      continue
    config = config_lib.load(path.stem)
    if config.stage.method != 'none':
      config.stage.source = 'runs/first'
    preflight.check(config)


def test_no_device_is_started_for_it():
  script = (
    'from csba_jax import config; from csba_jax.training import preflight; import jax\n'
    'preflight.check(config.default())\n'
    'assert not jax._src.xla_bridge.backends_are_initialized()\n'
  )
  subprocess.run([sys.executable, '-c', script], check=True, timeout=120)


def test_counts_are_checked_where_all_images_are_in_the_cache_too(tmp_path):
  config = config_with({'data.cache_dir': str(tmp_path)})
  seen = []
  pipeline.load(config, lambda _: None, lambda splits: seen.append(splits.class_counts))
  assert len(seen) == 1
  data = pipeline.load(config, lambda _: None, seen.append)  # nothing is left to decode
  assert len(seen) == 1
  np.testing.assert_array_equal(seen[0], data.class_counts)


def test_steps_are_fewer_than_an_int32_can_count():
  plan = functools.partial(Plan.of, images=3200)
  config = config_with({'train.batch_size': 32, 'train.epochs': (2**31 - 1) // 100})
  assert plan(config).total < 2**31
  config.train.epochs += 1
  with pytest.raises(UserError, match=f'at most {(2**31 - 1) // 100}, so'):
    plan(config)
