"""launch/: scripts and the Dockerfile pass their linters and say what they need and cost."""

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / 'launch'
SCRIPTS = sorted([*LAUNCH.glob('*.sh'), *LAUNCH.glob('*.sbatch'), ROOT / '.ci/run'])
FILES = [path for path in sorted(LAUNCH.iterdir()) if path.suffix != '.ipynb']


def tool(name):
  """The path of a linter that the extra `test` installs; else a skip that says so."""
  path = shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)
  if not path:
    pytest.skip(f'no {name}: pip install -e .[test]')
  return path


def run(*command):
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_scripts_are_found():
  names = {path.name for path in SCRIPTS}
  assert {'demo.sh', 'study_cpu.sh', 'slurm.sbatch', 'tpu_vm.sh', 'run'} <= names


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(path):
  done = run(tool('shellcheck'), '--shell=bash', str(path))
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(path):
  assert path.read_text().startswith('#!/usr/bin/env bash\n')
  assert path.stat().st_mode & 0o100, 'not executable'
  done = run('bash', '-n', str(path))
  assert done.returncode == 0, done.stderr


def test_hadolint():
  done = run(tool('hadolint'), '--no-color', str(LAUNCH / 'Dockerfile'))
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.name)
def test_the_header_says_what_it_needs_and_costs(path):
  header = re.match(r'(#.*\n)+', path.read_text()).group()
  assert 'Needs: ' in header
  assert 'Costs: ' in header


def instructions(name):
  """Arguments of each instruction of the Dockerfile with this name, continued lines joined."""
  text = re.sub(r'\\\n', '', (LAUNCH / 'Dockerfile').read_text())
  return re.findall(rf'^{name} (.*)$', text, re.MULTILINE)


def test_the_image_is_pinned_and_nobody_is_root():
  (base,) = instructions('FROM')
  assert re.fullmatch(r'python:3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}', base)
  assert instructions('USER') == ['1000']


def test_the_image_knows_every_extra():
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg')
  extras = set(parser['options.extras_require']) - {'test', 'bench', 'docs', 'pretrained'}
  (install,) = [line for line in instructions('RUN') if 'pip install' in line]
  assert extras == {'cuda', 'tpu'}
  assert re.search(r'cuda \| tpu\) package="\.\[\$EXTRA\]"', install)


def test_the_image_holds_what_it_copies_and_nothing_else():
  """.dockerignore lets through what the Dockerfile copies, and what it copies exists."""
  lines = (ROOT / '.dockerignore').read_text().splitlines()
  patterns = [line for line in lines if not line.startswith('#')]
  assert patterns[0] == '*'
  let_through = {pattern[1:] for pattern in patterns if pattern.startswith('!')}
  copied = {source for line in instructions('COPY') for source in line.split()[:-1]}
  assert {pattern.split('/')[0] for pattern in let_through} == copied
  for pattern in let_through:
    assert list(ROOT.glob(pattern)), pattern


@pytest.mark.slow
def test_the_package_installs_from_what_the_image_copies(tmp_path):
  """The RUN of the Dockerfile without its downloads, in a folder with the copied files alone."""
  for line in instructions('COPY'):
    for source in line.split()[:-1]:
      if (ROOT / source).is_dir():
        shutil.copytree(ROOT / source, tmp_path / source, ignore=shutil.ignore_patterns('*.pyc'))
      else:
        shutil.copy(ROOT / source, tmp_path)
  done = subprocess.run(
    [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--wheel-dir=wheels', '.'],
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  if 'Could not find a version that satisfies the requirement setuptools' in done.stderr:
    pytest.skip('no package index: setuptools cannot be fetched')
  assert done.returncode == 0, done.stderr
  assert len(list((tmp_path / 'wheels').glob('csba_jax-*.whl'))) == 1


@pytest.mark.parametrize(('extra', 'code'), [('cpu', 0), ('cuda', 0), ('rocm', 1)])
def test_another_extra_is_refused(extra, code):
  (install,) = [line for line in instructions('RUN') if 'pip install' in line]
  script = f'pip() {{ echo pip "$@"; }}; EXTRA={extra}; {install}'
  done = run('sh', '-c', script)
  assert done.returncode == code
  assert ('.[cuda]' in done.stdout) == (extra == 'cuda')
  assert ('expected cpu, cuda or tpu as EXTRA, got rocm' in done.stderr) == (extra == 'rocm')
