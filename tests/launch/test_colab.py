"""Executes the Colab notebook on CPU, as a user would, with small settings."""

import base64
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / 'launch' / 'csba_colab.ipynb'
SMALL = {'EPOCHS': 2, 'WIDTH': 0.05}
FOLDER = 'digits-LT_factor20_width0.05_epochs2'
PNG = b'\x89PNG\r\n\x1a\n'

nbclient = pytest.importorskip('nbclient')
nbformat = pytest.importorskip('nbformat')


def read():
  return nbformat.read(NOTEBOOK, as_version=4)


def set_fields(notebook, **settings):
  """The notebook with other values in its forms."""
  for name, value in settings.items():
    found = 0
    for cell in notebook.cells:
      if '# @param' in cell.source:
        cell.source, n = re.subn(
          rf'^{name} = .*?(?=  # @param)', f'{name} = {value!r}', cell.source, flags=re.MULTILINE
        )
        found += n
    assert found == 1, f'{name} is in {found} forms'
  return notebook


@pytest.fixture(scope='module')
def execute(tmp_path_factory):
  """Runs a notebook in a folder as Colab does, and returns it with its output."""
  compiled = str(tmp_path_factory.mktemp('compiled'))
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(ROOT),
    'XLA_FLAGS': '--xla_backend_optimization_level=1',  # as conftest.py has it
    'JAX_COMPILATION_CACHE_DIR': compiled,
  }

  def run(notebook, folder):
    client = nbclient.NotebookClient(
      notebook, timeout=800, kernel_name='python3', resources={'metadata': {'path': str(folder)}}
    )
    client.execute(env=environment)
    return notebook

  return run


@pytest.fixture(scope='module')
def ran(execute, tmp_path_factory):
  """(folder, the notebook after all of it ran)."""
  folder = tmp_path_factory.mktemp('colab')
  return folder, execute(set_fields(read(), **SMALL), folder)


def shown(notebook, name):
  """The text that a cell wrote to stdout or stderr."""
  return {
    cell.id: ''.join(
      output.text
      for output in cell.get('outputs', ())
      if output.output_type == 'stream' and output.name == name
    )
    for cell in notebook.cells
  }


# ---- the file


def test_it_is_a_valid_notebook_without_outputs():
  notebook = read()
  nbformat.validate(notebook)
  assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
  assert notebook.metadata.kernelspec.name == 'python3'
  ids = [cell.id for cell in notebook.cells]
  assert len(set(ids)) == len(ids)
  assert all(re.fullmatch(r'[a-z][a-z-]+', one) for one in ids)  # given, not drawn at random
  for cell in notebook.cells:
    if cell.cell_type == 'code':
      assert cell.outputs == []
      assert cell.execution_count is None
  text = NOTEBOOK.read_text()
  assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + '\n'


def test_it_calls_the_library_and_parses_no_flags():
  sources = [cell.source for cell in read().cells if cell.cell_type == 'code']
  for source in sources:
    compile(source, 'cell', 'exec')  # plain Python: no ! and no %
    assert not re.search(r'\bcsba-|csba_jax\.bin|argparse|absl import .*flags|absl\.flags', source)
  assert sum('pip' in source for source in sources) == 1


def test_nothing_is_set_that_is_somebodys():
  source = '\n'.join(cell.source for cell in read().cells)
  for name, value in {'REPOSITORY': '', 'SAVE_TO': 'this machine', 'DATA': 'digits-LT'}.items():
    assert re.search(rf"^{name} = '{value}'  # @param", source, re.MULTILINE)


# ---- the cell that installs


@pytest.fixture
def install(tmp_path, monkeypatch):
  """Runs the cell in a folder, with or without csba_jax; the commands that it would run."""

  def run(there, repository='', exit_code=0):
    commands, kinds = [], []

    def record(command, **_):
      commands.append(command)
      return types.SimpleNamespace(returncode=exit_code, stdout='', stderr='no such host')

    shell = types.SimpleNamespace(set_custom_exc=lambda given, handler: kinds.extend(given))
    spec = types.SimpleNamespace(origin=str(ROOT)) if there else None
    with monkeypatch.context() as patch:
      patch.chdir(tmp_path)
      patch.setattr(sys, 'path', list(sys.path))
      patch.setattr('importlib.util.find_spec', lambda name: spec)
      patch.setattr(subprocess, 'run', record)
      (cell,) = [c for c in set_fields(read(), REPOSITORY=repository).cells if c.id == 'install']
      names = {'get_ipython': lambda: shell}
      error = None
      try:
        exec(cell.source, names)
      except names['CannotInstall'] as raised:
        error = str(raised)
      assert kinds == [names['CannotInstall']]
      return commands, error, list(sys.path)

  return run


def test_what_is_there_is_not_installed_again(install, tmp_path):
  commands, error, _ = install(there=True)
  assert commands == []
  assert error is None
  assert not list(tmp_path.iterdir())


def test_without_a_repository_one_line_says_what_to_do(install):
  commands, error, _ = install(there=False)
  assert commands == []
  assert error.startswith('expected csba_jax installed, or REPOSITORY; found neither; to fix it:')


def test_it_installs_beside_the_jax_that_is_there(install, tmp_path):
  import jax
  import jaxlib

  (clone, pip), error, path = install(there=False, repository='https://example.org/csba_jax')
  assert error is None
  assert clone[:2] == ['git', 'clone']
  assert clone[-2:] == ['https://example.org/csba_jax', 'csba_jax_source']
  assert pip[:4] == [sys.executable, '-m', 'pip', 'install']
  (constraint,) = [word.partition('=')[2] for word in pip if word.startswith('--constraint')]
  pinned = (tmp_path / constraint).read_text().split()
  assert {f'jax=={jax.__version__}', f'jaxlib=={jaxlib.__version__}'} <= set(pinned)
  assert all(re.match(r'jax|libtpu', line) for line in pinned)
  assert path[0] == str(tmp_path / 'csba_jax_source')

  (tmp_path / 'csba_jax_source').mkdir()  # cloned before, and cut off
  commands, *_ = install(there=False, repository='https://example.org/csba_jax')
  assert [command[:1] for command in commands] == [[sys.executable]]


def test_an_installation_that_fails_ends_there(install, capsys):
  commands, error, _ = install(there=False, repository='https://nowhere', exit_code=128)
  assert len(commands) == 1
  assert error.startswith('git clone')
  assert 'no such host' in capsys.readouterr().err


# ---- all of it


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(ran):
  folder, notebook = ran
  said = shown(notebook, 'stdout')
  assert 'Traceback' not in json.dumps(notebook)
  assert 'WARNING' not in json.dumps(notebook)

  results = {
    net: json.loads((folder / 'csba_jax_runs' / FOLDER / f'{net}_seed0/result.json').read_text())
    for net in ('none', 'csba')
  }
  table = said['table'].splitlines()
  assert re.fullmatch(r'F1 of class +training images +none +csba', table[1])
  (line,) = [line for line in table if line.startswith('macro-F1')]
  assert line.split()[1:] == [f'{results[net]["macro_f1"]:.3f}' for net in ('none', 'csba')]
  difference = results['csba']['macro_f1'] - results['none']['macro_f1']
  assert f'a difference of {difference:+.3f}' in said['one-seed']
  assert 'one seed cannot tell' in said['one-seed']
  assert re.search(r'^none: \d+% of all pairs', said['conflict'], re.MULTILINE)


@pytest.mark.slow
def test_its_pictures_are_shown_and_saved(ran):
  folder, notebook = ran
  pictures = {
    cell.id: [
      base64.b64decode(output.data['image/png'])
      for output in cell.get('outputs', ())
      if 'image/png' in output.get('data', {})
    ]
    for cell in notebook.cells
  }
  counts = {name: len(found) for name, found in pictures.items() if found}
  assert counts == {'table': 1, 'conflict': 2, 'difference': 1, 'flow': 2}
  there = [path.read_bytes() for path in (folder / 'csba_jax_runs').rglob('*.png')]
  for picture in itertools.chain(*pictures.values()):
    assert picture.startswith(PNG)
    assert len(picture) > 10_000
    assert picture in there


@pytest.mark.slow
def test_run_again_it_goes_on_from_what_is_there(ran, execute):
  folder, before = ran
  again = execute(set_fields(read(), **SMALL), folder)
  assert shown(again, 'stderr')['train'].count('is finished: nothing to do') == 2
  for name in ('table', 'one-seed', 'conflict'):
    assert shown(again, 'stdout')[name] == shown(before, 'stdout')[name]


@pytest.mark.seconds
@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'IMBALANCE_FACTOR': 0.05}, r'expected data\.imbalance_factor: n_max / n_min >= 1.*; found'),
    pytest.param(
      {'EPOCHS': -1},
      r'expected train\.epochs: at least 1; found -1; to fix it: .*',
      marks=pytest.mark.slow,
    ),
    pytest.param(
      {'SEEDS': 0}, r'expected SEEDS of at least 1; found 0; to fix it: .*', marks=pytest.mark.slow
    ),
    pytest.param(
      {'DATA': 'birds'},
      r"expected the name of a recipe .*; found 'birds'; to fix it: .*",
      marks=pytest.mark.slow,
    ),
    pytest.param(
      {'SAVE_TO': 'Google Drive'},
      r'expected Colab, to save to Google Drive; found another .*',
      marks=pytest.mark.slow,
    ),
  ],
)
def test_a_bad_setting_is_one_line(settings, message, execute, tmp_path):
  notebook = set_fields(read(), **settings)
  with pytest.raises(nbclient.exceptions.CellExecutionError):
    execute(notebook, tmp_path)
  (line,) = shown(notebook, 'stderr')['prepare'].splitlines()
  assert re.match(message, line)
  assert all(o.output_type == 'stream' for c in notebook.cells for o in c.get('outputs', ()))
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_interrupted_it_saves_and_goes_on(execute, tmp_path):
  """The stop button during training, then the whole notebook again."""
  notebook = set_fields(read(), **SMALL | {'EPOCHS': 200})
  tell = nbformat.v4.new_code_cell("open('pid', 'w').write(str(__import__('os').getpid()))")
  notebook.cells.insert(0, tell)
  notebook.cells = notebook.cells[: 1 + [c.id for c in notebook.cells].index('train')]
  done = threading.Event()

  def interrupt():
    while not done.wait(0.05):
      if any(path.stat().st_size for path in tmp_path.rglob('metrics.jsonl')):  # a step is done
        os.kill(int((tmp_path / 'pid').read_text()), signal.SIGINT)
        return

  thread = threading.Thread(target=interrupt)
  thread.start()
  try:
    with pytest.raises(nbclient.exceptions.CellExecutionError):
      execute(notebook, tmp_path)
  finally:
    done.set()
    thread.join()
  said = shown(notebook, 'stderr')['train'].splitlines()
  assert said[-1] == 'stopped and saved: run this cell again to go on'
  stopped = int(re.search(r'^stopped at step (\d+)', '\n'.join(said), re.MULTILINE)[1])
  assert 0 < stopped < 2200

  notebook = set_fields(read(), **SMALL | {'EPOCHS': 200})
  notebook.cells = notebook.cells[: 1 + [c.id for c in notebook.cells].index('train')]
  execute(notebook, tmp_path)
  steps = re.findall(r'^step (\d+)/2200', shown(notebook, 'stderr')['train'], re.MULTILINE)
  assert int(steps[0]) > stopped


@pytest.mark.slow
def test_no_process_is_left(ran):
  folder, _ = ran
  deadline = time.monotonic() + 10
  while left := processes_in(folder):
    assert time.monotonic() < deadline, left
    time.sleep(0.2)


def processes_in(folder):
  """Ids of the processes whose working directory is this folder."""
  found = []
  for process in Path('/proc').glob('[0-9]*'):
    with contextlib.suppress(OSError):
      if (process / 'cwd').resolve() == folder.resolve():
        found.append(process.name)
  return found


@pytest.mark.slow
def test_cifar10_with_two_seeds(data_root, execute, tmp_path, monkeypatch):
  small = {'DATA': 'CIFAR-10-LT', 'EPOCHS': 1, 'WIDTH': 0.05, 'IMBALANCE_FACTOR': 500, 'SEEDS': 2}
  notebook = execute(set_fields(read(), **small), tmp_path)
  said = shown(notebook, 'stdout')
  assert re.search(r'^airplane +4500 ', said['table'], re.MULTILINE)
  assert 'csba - none, mean of 2 seeds: macro-F1' in said['one-seed']
