"""The run's folder: locks, whole files, errors of one line."""

import json
import os

import numpy as np
import pytest

from csba_jax import config as config_lib
from csba_jax import workdir as workdir_lib
from csba_jax.errors import UserError
from csba_jax.workdir import Workdir

CONFIG = {'seed': 0, 'train': {'epochs': 3}}


def test_config_is_written_on_begin_and_compared_ever_after(tmp_path):
  path = tmp_path / 'deep' / 'run'
  with Workdir(path, CONFIG) as folder:
    assert not (path / 'config.json').exists()  # a mistake found later must not claim the folder
    folder.begin()
    written = (path / 'config.json').read_bytes()
    folder.begin()
  assert workdir_lib.read_config(path) == CONFIG
  record = json.loads(written)
  assert record['versions']['numpy'] == np.__version__
  assert record['commit'] is None or len(record['commit'].removesuffix('+changes')) == 40
  with Workdir(path, CONFIG) as folder:
    folder.begin()
  assert (path / 'config.json').read_bytes() == written
  other = {'seed': 1, 'train': {'epochs': 3}, 'new': True}
  with pytest.raises(UserError, match="new: 'absent' there, True here; seed: 0 there, 1 here"):
    Workdir(path, other).__enter__()


def test_the_environment_is_kept_and_other_packages_are_named(tmp_path, monkeypatch):
  monkeypatch.setenv('NCCL_ALGO', 'Ring')
  monkeypatch.setenv('SECRET_TOKEN', 'x')
  with Workdir(tmp_path, CONFIG) as folder:
    assert folder.begin() == []
    assert folder.begin() == []
  environment = json.loads((tmp_path / 'config.json').read_text())['environment']
  assert environment['variables']['NCCL_ALGO'] == 'Ring'
  assert 'SECRET_TOKEN' not in environment['variables']
  assert environment['packages']['numpy'] == np.__version__
  assert environment['system']
  monkeypatch.setattr(workdir_lib, 'versions', lambda: {'jax': '9.9'})
  with Workdir(tmp_path, CONFIG) as folder:
    assert "'9.9' here" in '; '.join(folder.begin())


def test_a_second_holder_is_turned_away_until_the_first_leaves(tmp_path):
  with Workdir(tmp_path, CONFIG), pytest.raises(UserError, match='another process at work'):
    Workdir(tmp_path, CONFIG).__enter__()
  with Workdir(tmp_path, CONFIG):
    pass


def test_a_file_in_place_of_a_folder(tmp_path):
  file = tmp_path / 'file'
  file.write_text('')
  with pytest.raises(UserError, match='a folder as --workdir; found the file'):
    Workdir(file, CONFIG).__enter__()
  with pytest.raises(UserError, match='can be written'):
    Workdir(file / 'below', CONFIG).__enter__()


def test_metrics_rewind_to_a_length(tmp_path):
  with Workdir(tmp_path, CONFIG) as folder:
    assert folder.metrics_length() == 0
    folder.append_metrics({'step': 1, 'loss': float('nan')})
    length = folder.metrics_length()
    folder.append_metrics({'step': 2})
    folder.rewind_metrics(length)
    folder.append_metrics({'step': 3})
    with pytest.raises(UserError, match='9999 bytes in .*metrics.jsonl'):
      folder.rewind_metrics(9999)  # never filled up with zeros
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in lines] == [{'step': 1, 'loss': None}, {'step': 3}]


def test_result_is_strict_json(tmp_path):
  with Workdir(tmp_path, CONFIG) as folder:
    assert folder.result() is None
    nan, infinity = float('nan'), float('inf')
    folder.write_result({'f1': [nan, 0.5], 'deep': {'x': infinity}, 'splits_sha256': '0'})
    assert folder.result() == {'f1': [None, 0.5], 'deep': {'x': None}, 'splits_sha256': '0'}
  assert 'NaN' not in (tmp_path / 'result.json').read_text()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
  with Workdir(tmp_path, CONFIG) as folder:
    folder.write('note', lambda file: file.write(b'old'))

    def fail(file):
      file.write(b'ne')
      raise OSError(28, 'No space left on device')

    with pytest.raises(UserError, match='No space left on device'):
      folder.write('note', fail)
  assert (tmp_path / 'note').read_bytes() == b'old'
  assert sorted(os.listdir(tmp_path)) == ['.lock', 'note']


@pytest.mark.parametrize(
  ('read', 'name', 'expected'),
  [
    (workdir_lib.read_config, 'config.json', 'a workdir made by csba-train'),
    (workdir_lib.read_result, 'result.json', 'a finished run'),
  ],
)
def test_reading_what_is_not_there_or_damaged(tmp_path, read, name, expected):
  with pytest.raises(UserError, match=f'{expected}.*no {name} there'):
    read(tmp_path)
  for damage in (b'{"config": ', b'{}', b'[]', b'\xff'):
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(UserError, match=f'a whole .*{name}; found a damaged one'):
      read(tmp_path)
  (tmp_path / name).unlink()
  (tmp_path / name).mkdir()
  with pytest.raises(UserError, match='Is a directory'):
    read(tmp_path)


def test_config_survives_json_with_its_types(tmp_path):
  config = config_lib.default()
  with Workdir(tmp_path, config.to_dict()) as folder:
    folder.begin()
  assert config_lib.differences(workdir_lib.read_config(tmp_path), config.to_dict()) == []
