"""csba-train --data: the folder is audited once, and a run keeps its settings."""

import json

import numpy as np
import pytest
from PIL import Image

from csba_jax import config as config_lib
from csba_jax.errors import UserError
from csba_jax.planning import choices, photos


@pytest.fixture
def folder(tmp_path):
  for c, n in (('a', 6), ('b', 3)):
    (tmp_path / 'photos' / c).mkdir(parents=True)
    for i in range(n):
      noise = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
      Image.fromarray(noise).save(tmp_path / 'photos' / c / f'{i}.png')
  return str(tmp_path / 'photos')


def configure(folder, workdir, given=None):
  config = config_lib.load('image_folder')
  config.update_from_flattened_dict(given or {})
  return photos.configure(config, given or {}, folder, workdir, 8.0)


def test_the_folder_is_audited_and_the_settings_are_kept(folder, tmp_path, monkeypatch):
  config, text = configure(folder, tmp_path / 'run')
  assert config.data.dir == folder
  assert config.data.manifest == str(tmp_path / 'run/copies.csv')
  assert config.data.num_classes == 2
  assert config.loss.name == 'balanced_softmax'
  assert config.is_locked
  lines = text.splitlines()
  assert lines[0] == 'photos: 9 photos of 2 classes'
  assert '  data.image_size=32: the median shorter side is 40 pixels' in lines
  written = {path.name for path in (tmp_path / 'run').iterdir()}
  assert written == {'audit.json', 'audit.html', 'copies.csv', 'choices.json'}
  monkeypatch.setattr(photos, 'hardware', pytest.fail)  # another machine: nothing is chosen anew
  again, text = configure(folder, tmp_path / 'run')
  assert again.to_dict() == config.to_dict()
  assert text == f'settings: those of {tmp_path}/run/choices.json'


def test_what_is_given_wins_over_what_was_kept(folder, tmp_path):
  configure(folder, tmp_path / 'run')
  config, _ = configure(folder, tmp_path / 'run', {'train.epochs': 7})
  assert config.train.epochs == 7
  assert config.data.image_size == 32


def test_without_a_workdir_nothing_is_written(folder, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config, text = configure(folder, None)
  assert config.data.manifest == str(tmp_path / 'copies.csv')
  assert 'written' not in text
  assert [path.name for path in tmp_path.iterdir()] == ['photos']


def test_the_workdir_of_another_folder(folder, tmp_path):
  configure(folder, tmp_path / 'run')
  with pytest.raises(UserError, match=r'started with: .*photos; found /other; .*another --workdir'):
    configure('/other', tmp_path / 'run')


@pytest.mark.parametrize('content', ['', '[]', '{"choices": {}}', '{"folder": "x", "choices": 1}'])
def test_damaged_settings(folder, tmp_path, content):
  (tmp_path / 'choices.json').write_text(content)
  with pytest.raises(UserError, match=r'wrote to .*choices.json; found .*delete the file'):
    configure(folder, tmp_path)


def test_a_stop_during_the_audit_writes_nothing(folder, tmp_path):
  def stop(done, total):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    photos.configure(config_lib.load('image_folder'), {}, folder, tmp_path / 'run', 8.0, stop)
  assert not (tmp_path / 'run').exists()


def test_settings_are_written_last(folder, tmp_path, monkeypatch):
  """A start that is killed before has looked at nothing that the next one would trust."""

  def full(*_):
    raise UserError('room', 'none', 'make some')

  monkeypatch.setattr(photos.page, 'write', full)
  with pytest.raises(UserError, match='make some'):
    configure(folder, tmp_path / 'run')
  assert not (tmp_path / 'run/choices.json').exists()


def test_hardware_without_starting_jax(monkeypatch):
  monkeypatch.setattr(photos.os, 'sched_getaffinity', lambda _: {0, 1, 2})
  assert photos.hardware() == choices.Hardware(3, 0)
  monkeypatch.setattr(photos.importlib.util, 'find_spec', lambda name: name)
  monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '2,5')
  assert photos.hardware() == choices.Hardware(3, 2)
  assert photos.hardware().words == '2 GPUs'
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
  assert photos.hardware().words == '3 CPU cores'
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '2,5')
  assert photos.hardware().gpus == 0


def test_what_was_kept_is_json(folder, tmp_path):
  configure(folder, tmp_path / 'run')
  kept = json.loads((tmp_path / 'run/choices.json').read_text())
  assert kept['folder'] == folder
  assert kept['choices']['data.group_column'] == 'group'
