"""The versions that are promised, installed and run: one list, in every place that names it."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def here(version=None):
  """'3.12' of this interpreter, or of (3, 12)."""
  return '.'.join(map(str, (version or sys.version_info)[:2]))


TRIED = re.search(r'^TRIED := (.*)$', (ROOT / 'Makefile').read_text(), re.MULTILINE)[1].split()


def pins(python):
  """{package: version} that requirements.txt asks for with a version of Python."""
  lines = (ROOT / 'requirements.txt').read_text().splitlines()
  wanted = [Requirement(line) for line in lines if line and not line.startswith('#')]
  environment = {'python_version': python, 'python_full_version': f'{python}.0'}
  return {
    r.name: str(r.specifier).removeprefix('==')
    for r in wanted
    if r.marker is None or r.marker.evaluate(environment)
  }


def test_this_suite_runs_with_one_of_the_promised_pairs():
  """CI runs two: whatever it passes with is what the tables below say."""
  assert here() in TRIED, f'the suite is not promised for Python {here()}'
  found = {name: importlib.metadata.version(name) for name in pins(here())}
  assert found == pins(here())


def pairs(text):
  """{Python: JAX} of a sentence such as 'Python 3.11 with JAX 0.10, Python 3.12 and 3.13 with …'"""
  found = {}
  for pythons, jax in re.findall(r'((?:3\.\d+[ ,and or]*)+)\(?with\s+JAX\s+(0\.\d+)', text):
    found |= dict.fromkeys(re.findall(r'3\.\d+', pythons), jax)
  return found


@pytest.mark.parametrize(('file', 'start'), [('README.md', '`make demo` and `make test` do'), ('requirements.txt', '# The')])  # fmt: skip  # noqa: E501
def test_the_promise_is_what_is_installed(file, start):
  text = (ROOT / file).read_text()
  promised = pairs(text[text.index(start) :][:400])
  installed = {python: '.'.join(pins(python)['jax'].split('.')[:2]) for python in TRIED}
  assert promised == installed


def test_the_package_names_the_same_versions():
  text = (ROOT / 'setup.cfg').read_text()
  named = re.findall(r'Programming Language :: Python :: (3\.\d+)', text)
  assert sorted(named) == sorted(TRIED)
  oldest = min(TRIED, key=lambda v: int(v.split('.')[1]))
  assert f'python_requires = >={oldest}\n' in text


def test_ci_runs_the_newest_and_the_oldest():
  text = (ROOT / '.ci' / 'run').read_text()
  assert sorted(TRIED, key=lambda v: -int(v.split('.')[1])) == TRIED  # the newest first
  assert f'TRIED="{" ".join(reversed(TRIED))}"' in text
  newest, oldest = pins(TRIED[0]), pins(TRIED[-1])
  assert newest['jax'] != oldest['jax']  # so that these two have both


def fake_python(folder, name, version, works=True):
  """An interpreter that answers what make asks as one of that version would."""
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  code = 0 if works and here(version) in TRIED else 1
  words = '.'.join(map(str, version))
  path.write_text(
    f'#!/bin/sh\n[ "$1" = --version ] && echo "Python {words}" && exit\nexit {code}\n'
  )
  path.chmod(0o755)
  return path


def make(tmp_path, *arguments):
  """make with a home and a PATH of its own, which hold what the test put there."""
  programs = tmp_path / 'bin'
  programs.mkdir(exist_ok=True)
  for name in ('sh', 'echo'):
    if not (programs / name).exists():
      (programs / name).symlink_to(shutil.which(name))
  return subprocess.run(
    [shutil.which('make'), '-s', '-C', ROOT, f'VENV={tmp_path}/venv', *arguments],
    env={'PATH': str(programs), 'HOME': str(tmp_path)},
    capture_output=True,
    text=True,
  )


PYENV = '.pyenv/versions/{}.1/bin/python{}'


@pytest.mark.parametrize(
  ('there', 'expected'),
  [
    (['bin/python3.11', 'bin/python3.13', 'bin/python3.12'], 'python3.13'),
    (['bin/python3.11', PYENV.format('3.12', '3.12')], PYENV.format('3.12', '3.12')),
    (['.local/share/uv/python/cpython-3.12.9-linux/bin/python3.12'], 'bin/python3.12'),
    (['bin/python3'], 'python3'),
  ],
)
def test_make_takes_the_newest_that_is_found(tmp_path, there, expected):
  for name in there:
    number = re.search(r'(\d)\.?(\d+)?$', name)
    fake_python(tmp_path, name, (int(number[1]), int(number[2] or 12), 1))
  found = make(tmp_path, 'python')
  assert found.returncode == 0, found.stderr
  assert found.stdout.strip().endswith(expected)


def test_a_shim_that_runs_nothing_is_passed_over(tmp_path):
  fake_python(tmp_path, 'bin/python3.13', (3, 13, 0), works=False)
  fake_python(tmp_path, 'bin/python3.11', (3, 11, 7))
  assert make(tmp_path, 'python').stdout == 'python3.11\n'


@pytest.mark.parametrize(
  ('version', 'given', 'found'),
  [
    (None, [], 'found none'),
    ((3, 14, 0), ['PYTHON=python3.14'], 'found PYTHON=python3.14, which is Python 3.14.0'),
    (None, ['PYTHON=/no/such'], 'found PYTHON=/no/such, which is nothing that runs'),
  ],
)
def test_make_refuses_in_one_line_what_was_not_tried(tmp_path, version, given, found):
  if version:
    fake_python(tmp_path, 'bin/python3.14', version)
  run = make(tmp_path, 'test', *given)
  assert run.returncode != 0
  assert run.stdout == ''
  (line,) = run.stderr.splitlines()
  assert f'expected one of Python {", ".join(TRIED)}, with its venv module; {found}' in line
  assert 'to fix it: ' in line
  assert not os.path.exists(tmp_path / 'venv')
