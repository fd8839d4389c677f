"""A few of the damaged files of fuzz.py, which reads many."""

import importlib
from pathlib import Path

import pytest

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
  (tmp_path / 'photos/a').mkdir(parents=True)
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

  def refuse(path, words='one line'):
    raise UserError(words, 'another', 'correct it')

  assert fuzz.attempt(refuse, path) == ('refused', '')
  assert fuzz.attempt(lambda path: refuse(path, 'two\nlines'), path)[0].startswith('a message of')
  said, trace = fuzz.attempt(lambda path: 1 / 0, path)
  assert said == 'ZeroDivisionError: division by zero'
  assert 'Traceback' in trace
  monkeypatch.setattr(fuzz, 'MEBIBYTES', 1)
  assert fuzz.attempt(lambda path: None, path)[0].endswith('MiB')
