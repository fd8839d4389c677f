"""A few of the damaged files of fuzz.py, which reads many."""

import importlib
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
  counts, problems = fuzz.run(300, 5)
  assert problems == []
  assert counts.keys() == fuzz.kinds().keys()
  assert all(count['read'] + count['refused'] > 0 for count in counts.values())


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
  monkeypatch.setattr(fuzz, 'MEBIBYTES', 1)
  assert fuzz.attempt(lambda path: None, path)[0].endswith('MiB')
