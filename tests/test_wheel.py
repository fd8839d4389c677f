"""The wheel, installed in an empty folder, runs its binaries and finds its recipes."""

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_every_package_is_named():
  """setup.cfg lists packages, because the recipes lie outside of csba_jax/."""
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg')
  there = {
    '.'.join(path.parent.relative_to(ROOT).parts)
    for path in (ROOT / 'csba_jax').rglob('__init__.py')
  }
  named = parser['options']['packages'].split()
  assert sorted(named) == sorted([*there, 'csba_jax.configs'])
  assert parser['options']['package_dir'].split() == ['csba_jax.configs', '=', 'configs']
  assert 'py.typed' in parser['options.package_data']['csba_jax']
  assert (ROOT / 'csba_jax/py.typed').exists()


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
  """A folder with the package as a wheel installs it, and nothing of the source tree."""
  folder = tmp_path_factory.mktemp('wheel')
  source = folder / 'source'
  for name in ('csba_jax', 'configs'):
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
  for name in ('setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, source)
  pip = [sys.executable, '-m', 'pip']
  wheel = [*pip, 'wheel', '--no-deps', '--no-build-isolation', f'--wheel-dir={folder}', str(source)]
  subprocess.run(wheel, check=True, capture_output=True)
  (file,) = folder.glob('csba_jax-*.whl')
  install = [*pip, 'install', '--no-deps', f'--target={folder / "site"}', str(file)]
  subprocess.run(install, check=True, capture_output=True)
  return folder / 'site'


def train(installed, folder, *arguments):
  """csba-train of the wheel in an empty folder."""
  folder.mkdir()
  return subprocess.run(
    [sys.executable, '-m', 'csba_jax.bin.train', *arguments],
    cwd=folder,
    env=os.environ | {'PYTHONPATH': str(installed), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.slow
def test_a_recipe_by_name_away_from_the_checkout(installed, tmp_path):
  assert (installed / 'csba_jax/py.typed').exists()
  assert (installed / 'csba_jax/report/html/page.css').exists()
  narrow = '--config.model.width=0.05'
  run = train(installed, tmp_path / 'empty', '--config=digits_lt', narrow, '--dry_run')
  assert run.returncode == 0, run.stderr
  assert any(line.startswith('parameters: ') for line in run.stdout.splitlines())


@pytest.mark.slow
def test_an_unknown_recipe_away_from_the_checkout(installed, tmp_path):
  run = train(installed, tmp_path / 'empty', '--config=digits', '--dry_run')
  assert run.returncode == 1
  assert not run.stdout
  (line,) = run.stderr.splitlines()
  assert "found 'digits'; to fix it: use " in line
  assert 'digits_lt' in line


@pytest.mark.slow
def test_the_console_script_of_every_binary(installed):
  names = {path.name for path in (installed / 'bin').iterdir()}
  assert {
    f'csba-{name}' for name in ('audit', 'train', 'evaluate', 'diagnose', 'study', 'report')
  } <= names
