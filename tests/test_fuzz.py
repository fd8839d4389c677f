"""A few of the damaged files of fuzz.py, which reads many."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from csba_jax.data.sources import Unreadable
from csba_jax.errors import UserError


@pytest.fixture
def fuzz(monkeypatch):
  monkeypatch.syspath_prepend(Path(__file__).parent)
  return importlib.import_module('fuzz')


@pytest.mark.seconds
def test_damaged_files_are_read_or_refused_in_one_line(fuzz):
  # in a process of its own: that of the tests may be large already
  command = [sys.executable, fuzz.__file__, '--inputs=300', '--seed=5']
  done = subprocess.run(command, capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, '')
  assert 'Problems: none.' in done.stdout
  rows = re.findall(r'^\| ([a-zA-Z ]+) \| (\d+) \| (\d+) \| 0 \|$', done.stdout, re.MULTILINE)
  assert {name for name, _, _ in rows} == fuzz.kinds().keys()
  assert all(int(read) + int(refused) > 0 for _, read, refused in rows)


def test_good_files_are_read(fuzz, tmp_path):
  for name in ('a', 'b'):
    (tmp_path / 'photos' / name).mkdir(parents=True)
    (tmp_path / 'photos' / name / 'good.png').write_bytes(fuzz.photos()[0])
  read, refused = set(), set()
  for kind in fuzz.kinds().values():
    for content in kind.seeds:
      path = tmp_path / 'photos/a' / kind.name
      path.write_bytes(content)
      try:
        kind.read(path)
        read.add(kind.name)
      except UserError:  # the weights are too few for a net; without PyTorch there is no file of it
        refused.add(kind.name)
  assert refused <= {'w.safetensors', 'w.pth'}
  assert {'photo.png', 'm.csv', 'validation.npz', 'net.json'} <= read


def test_problems_are_told_apart(fuzz, tmp_path, monkeypatch):
  path = tmp_path / 'x'
  assert fuzz.attempt(lambda path: None, path) == ('read', '')

  def refuse(path):
    raise UserError('one', 'another', 'correct it')

  def refuse_at_length(path):
    raise Unreadable('two\nlines')

  assert fuzz.attempt(refuse, path) == ('refused', '')
  assert fuzz.attempt(refuse_at_length, path)[0].startswith('a message of several lines')
  said, trace = fuzz.attempt(lambda path: 1 / 0, path)
  assert said == 'ZeroDivisionError: division by zero'
  assert 'Traceback' in trace
  for before, after, said in (
    (100, 2049, '2049 MiB'),
    (100, 2048, 'read'),
    (3000, 3000, 'read'),  # it was as large before
    (3000, 3001, '3001 MiB'),
  ):
    peaks = iter((before, after))
    monkeypatch.setattr(fuzz, 'peak_mebibytes', lambda peaks=peaks: next(peaks))
    assert fuzz.attempt(lambda path: None, path) == (said, '')


@pytest.mark.seconds
def test_the_peak_of_a_process_grows_and_stays():
  # in a process of its own: that of the tests may have been larger
  code = """
import numpy as np
import fuzz
before = fuzz.peak_mebibytes()
kept = np.ones(2**24)  # of 8 bytes: 128 MiB
grown = fuzz.peak_mebibytes()
del kept
print(before, grown, fuzz.peak_mebibytes())
"""
  place = Path(__file__).parent
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=place)
  assert done.returncode == 0, done.stderr
  before, grown, after = map(float, done.stdout.split())
  assert min(grown, after) > before + 100
