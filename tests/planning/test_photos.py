"""csba-train --data: the folder is audited, settings follow, and a run keeps them."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from csba_jax import config as config_lib
from csba_jax.data.audit import audit_folder
from csba_jax.errors import UserError
from csba_jax.planning import choices, photos


@pytest.fixture
def folder(tmp_path):
  for c, n in (('a', 8), ('b', 4)):
    (tmp_path / 'photos' / c).mkdir(parents=True)
    for i in range(n):
      noise = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
      Image.fromarray(noise).save(tmp_path / 'photos' / c / f'{i}.png')
  return str(tmp_path / 'photos')


def recipe(given=None):
  config = config_lib.load('image_folder')
  config.update_from_flattened_dict(given or {})
  return config


def configure(folder, workdir, given=None):
  return photos.configure(recipe(given), given or {}, audit_folder(folder), workdir, 8.0)


def test_settings_follow_and_the_audit_is_written(folder, tmp_path):
  config, text = configure(folder, tmp_path / 'run')
  assert config.data.dir == folder
  assert config.data.manifest == str(tmp_path / 'run/copies.csv')
  assert config.data.num_classes == 2
  assert config.loss.name == 'balanced_softmax'
  assert config.is_locked
  lines = text.splitlines()
  assert lines[0] == 'photos: 12 photos of 2 classes'
  assert '  data.image_size=32: the median shorter side is 40 pixels' in lines
  written = {path.name for path in (tmp_path / 'run').iterdir()}
  assert written == {'audit.json', 'audit.html', 'copies.csv'}


def test_what_is_given_stays(folder, tmp_path):
  config, text = configure(folder, tmp_path / 'run', {'train.epochs': 7, 'loss.name': 'focal'})
  assert (config.train.epochs, config.loss.name) == (7, 'focal')
  assert 'train.epochs=' not in text


def weights_of(path, *names):
  save_file({name: np.zeros(1, np.float32) for name in names}, path)
  return str(path)


def test_weights_choose_the_net_that_they_are_of(folder, tmp_path):
  weights = weights_of(tmp_path / 'w.safetensors', 'layer4.1.bn2.weight')
  config, text = configure(folder, tmp_path / 'run', {'model.init': weights})
  assert (config.model.name, config.model.width, config.train.frozen) == ('resnet18', 1.0, 0.2)
  assert '  model.name=resnet18: the net of the weights in model.init' in text
  given = {'model.init': weights, 'model.name': 'resnet18_branches'}
  config, _ = configure(folder, tmp_path / 'other', given)
  assert (config.model.name, config.train.learning_rate) == ('resnet18_branches', 0.01)
  assert config.train.pretrained_rate == 1


def test_weights_of_another_net_are_refused_before_a_photo_is_read(folder, tmp_path):
  given = {'model.init': weights_of(tmp_path / 'w.safetensors', 'layer4.2.bn2.weight')}
  with pytest.raises(UserError, match='weights of one of resnet18'):
    photos.check(recipe(given), given, folder, None)
  given = {'model.init': str(tmp_path / 'nix')}
  with pytest.raises(UserError, match='a file of weights at .*nix'):
    photos.check(recipe(given), given, folder, None)


def test_without_a_workdir_nothing_is_written_and_no_file_is_needed(folder, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config, text = configure(folder, None)
  assert (config.data.manifest, config.data.group_column) == ('', '')
  assert '  data.manifest=WORKDIR/copies.csv: 4 sets of copies stay' in text
  assert 'written' not in text
  assert [path.name for path in tmp_path.iterdir()] == ['photos']


def test_a_run_goes_on_with_its_settings(folder, tmp_path):
  assert photos.resume(recipe(), {}, folder, tmp_path / 'run') is None
  assert photos.resume(recipe(), {}, folder, None) is None
  config, _ = configure(folder, tmp_path / 'run')
  assert photos.resume(recipe(), {}, folder, tmp_path / 'run') is None  # no run has begun
  record = {'config': config.to_dict()}
  (tmp_path / 'run/config.json').write_text(json.dumps(record))
  found = photos.resume(recipe(), {}, folder, tmp_path / 'run')
  assert found.to_dict() == config.to_dict()
  assert found.is_locked
  given = {'train.epochs': 7}
  found = photos.resume(recipe(given), given, folder, tmp_path / 'run')
  assert found.train.epochs == 7
  assert found.data.image_size == 32
  with pytest.raises(UserError, match=r'started with: .*photos; found /other; .*another --workdir'):
    photos.resume(recipe(), {}, '/other', tmp_path / 'run')


@pytest.mark.parametrize(
  ('given', 'folder', 'workdir', 'words'),
  [
    ({}, '', 'run', '--data=FOLDER; found an empty name'),
    ({'data.dir': 'x'}, 'photos', 'run', 'data.dir set by --data; found it set twice'),
    ({'data.source': 'digits'}, 'photos', 'run', 'data.source set by --data; found it set twice'),
    ({'data.image_size': 2000}, 'photos', 'run', 'data.image_size: '),
    ({}, 'photos', 'photos/run', 'a --workdir outside the folder of photos'),
  ],
)
def test_what_is_wrong_before_a_photo_is_read(given, folder, workdir, words):
  with pytest.raises(UserError, match=words):
    photos.check(recipe(given), given, folder, workdir)


def test_what_is_right_before_a_photo_is_read():
  photos.check(recipe(), {}, 'photos', 'run')
  photos.check(recipe(), {}, 'photos', None)


def test_no_room_for_the_audit(folder, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='to write audit.json, copies.csv into'):
    configure(folder, tmp_path / 'file')


def test_hardware_without_starting_jax(monkeypatch):
  monkeypatch.setattr(photos.numerics, 'cores', lambda: 3)
  monkeypatch.setattr(photos.importlib.util, 'find_spec', lambda name: None)
  monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0,1')
  assert photos.hardware() == choices.Hardware(3, 0)  # JAX could not use them
  monkeypatch.setattr(photos.importlib.util, 'find_spec', lambda name: name)
  for visible, gpus in (('2,5', 2), ('', 0), ('-1', 0)):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    assert photos.hardware() == choices.Hardware(3, gpus)
    assert photos.hardware().words == (f'{gpus} GPUs' if gpus else '3 CPU cores')
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '2,5')
  assert photos.hardware().gpus == 0
