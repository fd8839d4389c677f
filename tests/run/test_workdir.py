"""The run's folder: locks, whole files, errors of one line."""

import contextlib
import errno
import json
import os
import threading
import time

import numpy as np
import pytest
import scipy

from csba_jax import config as config_lib
from csba_jax.errors import UserError
from csba_jax.run import workdir as workdir_lib
from csba_jax.run.workdir import InUse, Workdir, lock_file

CONFIG = {'seed': 0, 'train': {'epochs': 3}}


def test_config_is_written_on_begin_and_compared_ever_after(tmp_path):
  path = tmp_path / 'deep' / 'run'
  with Workdir(path, CONFIG) as folder:
    assert not (path / 'config.json').exists()  # a mistake found later must not claim the folder
    folder.begin()
    written = (path / 'config.json').read_bytes()
    folder.begin()
  assert json.loads(written)['config'] == CONFIG
  record = json.loads(written)
  assert record['versions']['numpy'] == np.__version__
  assert record['commit'] is None or len(record['commit'].removesuffix('+changes')) == 40
  with Workdir(path, CONFIG) as folder:
    folder.begin()
  assert (path / 'config.json').read_bytes() == written
  other = {'seed': 1, 'train': {'epochs': 3}, 'new': True}
  with pytest.raises(UserError, match="new: 'absent' there, True here; seed: 0 there, 1 here"):
    Workdir(path, other).__enter__()


def test_a_run_goes_on_after_a_field_was_added(tmp_path):
  """It counts as its default; read, the config is one of now."""
  config = config_lib.default()
  with Workdir(tmp_path, config.to_dict()) as folder:
    folder.begin()
  record = json.loads((tmp_path / 'config.json').read_text())
  del record['config']['data']['class_order'], record['config']['mixing']
  (tmp_path / 'config.json').write_text(json.dumps(record))
  assert workdir_lib.read_config(tmp_path) == config.to_dict()
  with Workdir(tmp_path, config.to_dict()) as folder:
    folder.begin()
  config.mixing.name = 'mixup'
  with pytest.raises(UserError, match="found mixing.name: 'none' there, 'mixup' here; "):
    Workdir(tmp_path, config.to_dict()).__enter__()


def test_a_package_that_was_not_recorded_then_is_no_difference(tmp_path):
  with Workdir(tmp_path, CONFIG) as folder:
    folder.begin()
  record = json.loads((tmp_path / 'config.json').read_text())
  assert record['versions'].pop('scipy') == scipy.__version__
  (tmp_path / 'config.json').write_text(json.dumps(record))
  with Workdir(tmp_path, CONFIG) as folder:
    assert folder.begin() == []


def test_what_decides_the_bits_is_kept_and_compared(tmp_path, monkeypatch):
  monkeypatch.setenv('PJRT_NPROC', '11')
  assert workdir_lib.threads_of(tmp_path) is None
  with Workdir(tmp_path, CONFIG) as folder:
    assert folder.begin(devices=2) == []
    assert folder.begin(devices=2) == []
    monkeypatch.setenv('PJRT_NPROC', '9')
    assert folder.begin(devices=4) == [
      'devices: 2 there, 4 here',
      'threads: 11 there, 9 here (set PJRT_NPROC to the old number before the start)',
    ]
  assert workdir_lib.threads_of(tmp_path) == 11
  record = json.loads((tmp_path / 'config.json').read_text())
  del record['numerics']  # a run from before it was kept
  (tmp_path / 'config.json').write_text(json.dumps(record))
  assert workdir_lib.threads_of(tmp_path) is None
  with Workdir(tmp_path, CONFIG) as folder:
    assert folder.begin() == []


@pytest.mark.parametrize(
  ('change', 'found'),
  [
    (lambda r: r | {'config': 3}, 'config is no section'),
    (lambda r: r | {'config': r['config'] | {'data': [1]}}, 'config.data is no section'),
    (lambda r: r | {'config': r['config'] | {'seed': {'a': 1}}}, 'config.seed is a section'),
    (lambda r: r | {'versions': 'new'}, 'versions is no section'),
    (lambda r: r | {'numerics': None}, 'numerics is no section'),
    (lambda r: [r], "no 'config' in it"),
  ],
)
def test_a_config_json_of_other_types(tmp_path, change, found):
  with Workdir(tmp_path, config_lib.default().to_dict()) as folder:
    folder.begin()
  record = json.loads((tmp_path / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(change(record)))
  with pytest.raises(UserError, match=f'a damaged one .{found}'):
    workdir_lib.read_config(tmp_path)


def test_a_lock_can_be_waited_for(tmp_path):
  began = time.monotonic()
  with (
    lock_file(tmp_path, '.lock'),
    pytest.raises(InUse, match=f'another process at work in {tmp_path}'),
    lock_file(tmp_path, '.lock', seconds=0.4),
  ):
    pass
  assert time.monotonic() - began > 0.4
  with contextlib.ExitStack() as stack:
    stack.enter_context(lock_file(tmp_path, '.lock'))
    threading.Timer(0.3, stack.pop_all().close).start()
    with lock_file(tmp_path, '.lock', seconds=60):
      pass
  assert time.monotonic() - began < 30


@pytest.mark.parametrize('number', [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_said_to_be_one(tmp_path, monkeypatch, capsys, number):
  def flock(*_):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(workdir_lib.fcntl, 'flock', flock)
  with Workdir(tmp_path, CONFIG) as folder:
    folder.begin()
  said = capsys.readouterr().err
  assert said.count('\n') == 1
  assert (
    f'{tmp_path} is on a file system without locks ({os.strerror(number)}): make sure that' in said
  )
  assert (tmp_path / 'config.json').exists()


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
  written = (tmp_path / 'result.json').read_text()
  assert json.loads(written) == {'f1': [None, 0.5], 'deep': {'x': None}, 'splits_sha256': '0'}
  assert 'NaN' not in written


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
