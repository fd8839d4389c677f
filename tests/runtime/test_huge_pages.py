"""Whether programs start again with huge pages, once, and with all that they were given."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from csba_jax.runtime import huge_pages
from csba_jax.study import runner

SETTING = 'glibc.malloc.hugetlb=1'
ROOT = Path(__file__).parents[2]


@pytest.fixture
def system(monkeypatch, tmp_path):
  """A function that sets what the system is: C library, the kernel's choice, the variable."""

  def choose(library='glibc 2.36', kernel='always [madvise] never', variable=None):
    monkeypatch.setattr(os, 'confstr', lambda name: library)
    file = tmp_path / 'enabled'
    if kernel is None:
      file.unlink(missing_ok=True)
    else:
      file.write_text(kernel)
    monkeypatch.setattr(huge_pages, 'KERNEL', file)
    monkeypatch.delenv(huge_pages.VARIABLE, raising=False)
    if variable is not None:
      monkeypatch.setenv(huge_pages.VARIABLE, variable)

  return choose


@pytest.mark.parametrize(
  ('known', 'expected'),
  [
    ({}, SETTING),
    ({'library': 'glibc 2.35'}, SETTING),
    ({'library': 'glibc 3.0'}, SETTING),
    ({'variable': ''}, SETTING),
    ({'variable': 'glibc.malloc.arena_max=1'}, f'glibc.malloc.arena_max=1:{SETTING}'),
    ({'variable': SETTING}, None),
    ({'variable': 'glibc.malloc.hugetlb=0'}, None),
    ({'library': 'glibc 2.34'}, None),
    ({'library': 'musl 1.2'}, None),
    ({'library': None}, None),
    ({'library': 'glibc'}, None),
    ({'kernel': '[always] madvise never'}, None),
    ({'kernel': 'always madvise [never]'}, None),
    ({'kernel': None}, None),
  ],
)
def test_huge_pages_are_asked_for_where_they_change_something(system, known, expected):
  system(**known)
  before = os.environ.get(huge_pages.VARIABLE)
  assert huge_pages.ask_for() == (expected is not None)
  assert os.environ.get(huge_pages.VARIABLE) == (expected or before)
  assert not huge_pages.ask_for()


def test_a_system_without_confstr_has_no_huge_pages(system, monkeypatch):
  system()
  monkeypatch.delattr(os, 'confstr')
  assert not huge_pages.ask_for()


def test_a_program_that_has_imported_jax_goes_on(system, monkeypatch):
  system()
  monkeypatch.setattr(os, 'execv', None)
  assert 'jax' in sys.modules
  huge_pages.restart()
  assert huge_pages.VARIABLE not in os.environ


PROGRAM = """
import os, sys
from csba_jax.runtime import huge_pages
huge_pages._helps = lambda: True
print('start', os.getpid(), sys.argv[1:])
huge_pages.restart()
print(os.getpid(), os.environ['GLIBC_TUNABLES'])
sys.exit(7)
"""


def test_a_program_starts_again_once_as_the_same_process(monkeypatch):
  monkeypatch.delenv(huge_pages.VARIABLE, raising=False)
  words = ['a b', '--config.model.name=x', '']
  command = [sys.executable, '-W', 'error', '-c', PROGRAM, *words]
  found = subprocess.run(command, capture_output=True, text=True)
  assert (found.returncode, found.stderr) == (7, '')
  first, second, last = found.stdout.splitlines()
  assert first == second
  assert first.endswith(str(words))
  assert last == f'{first.split()[1]} {SETTING}'


@pytest.mark.parametrize('arguments', [[], ['-', '--x']])
def test_a_program_from_standard_input_goes_on(monkeypatch, arguments):
  monkeypatch.delenv(huge_pages.VARIABLE, raising=False)
  program = PROGRAM.replace("os.environ['GLIBC_TUNABLES']", "os.environ.get('GLIBC_TUNABLES')")
  command = [sys.executable, *arguments]
  found = subprocess.run(command, input=program, capture_output=True, text=True)
  assert (found.returncode, found.stderr) == (7, '')
  assert [line.split()[-1] for line in found.stdout.splitlines()] == [
    str(arguments[1:]),
    'None',
  ]


def test_a_notebook_goes_on(system, monkeypatch):
  system()
  monkeypatch.setattr(os, 'execv', None)
  monkeypatch.setattr(sys, 'argv', ['csba-train'])
  monkeypatch.delitem(sys.modules, 'jax')
  monkeypatch.setitem(sys.modules, 'IPython', None)
  huge_pages.restart()
  assert huge_pages.VARIABLE not in os.environ


@pytest.mark.seconds
def test_commands_start_again_only_to_compute(monkeypatch, tmp_path):
  monkeypatch.delenv(huge_pages.VARIABLE, raising=False)
  (tmp_path / 'sitecustomize.py').write_text(
    'import os\n'
    'os.execv = lambda *given: (print("RESTART", given[1][1:]), os._exit(0))\n'
    'os.confstr = lambda name: "glibc 2.36"\n'
    'import pathlib\n'
    'pathlib.Path.read_text = lambda self, *a, _read=pathlib.Path.read_text, **b: (\n'
    '  "[madvise]" if self.name == "enabled" else _read(self, *a, **b)\n'
    ')\n'
  )
  monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(tmp_path), str(ROOT)]))

  def said(*command):
    command = [sys.executable, '-m', *command]
    return subprocess.run(command, capture_output=True, text=True).stdout

  train = ['csba_jax.bin.train', '--config=digits_lt', f'--workdir={tmp_path / "run"}']
  assert said(*train) == f'RESTART {["-m", *train]}\n'
  for binary, more in (('evaluate', []), ('diagnose', []), ('predict', ['photos'])):
    command = [f'csba_jax.bin.{binary}', f'--workdir={tmp_path / "none"}', *more]
    assert said(*command) == f'RESTART {["-m", *command]}\n'
  for more, expected in (('--dry_run', 'parameters'), ('--list_fields', 'model.name')):
    out = said(*train, more)
    assert expected in out
    assert 'RESTART' not in out
  assert not said(*train, '--config.model.nme=x')  # one line on standard error
  assert not (tmp_path / 'run').exists()


def test_workers_of_a_study_start_with_huge_pages(system, monkeypatch):
  system()
  started = []

  class Process:
    def __init__(self, **options):
      pass

    def start(self):
      started.append(os.environ.get(huge_pages.VARIABLE))

  ends = SimpleNamespace(close=lambda: None)
  context = SimpleNamespace(Pipe=lambda: (ends, ends), Process=Process)
  monkeypatch.setattr(runner.multiprocessing, 'get_context', lambda kind: context)
  runner._Worker.start(None, ())
  assert started == [SETTING]
