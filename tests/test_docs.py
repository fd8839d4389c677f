"""The pages of docs/: blocks run or say why not, links lead somewhere, the site builds.

A page's blocks run in their order: Python in one namespace, shell commands in one folder, which has
the recipes of the clone and is empty otherwise. Networks are narrow and trainings short.
"""

import configparser
import contextlib
import doctest
import html
import importlib
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from csba_jax import config as config_lib
from csba_jax.study import grid

ROOT = Path(__file__).parents[1]
DOCS = ROOT / 'docs'
PAGES = sorted(path.stem for path in DOCS.glob('*.md'))
FENCE = re.compile(
  r'(?:^<!-- not run: (?P<why>[^>\n]+) -->\n\n)?^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$',
  re.MULTILINE | re.DOTALL,
)
SHELL = ('shell', 'bash', 'sh', 'console')
# what follows the flags of a page's commands, so that they take seconds
SMALL = {
  'train': '--config.model.width=0.05 --config.train.epochs=2 --config.train.eval_every=1',
  'study': '--config.base.model.width=0.05 --config.base.train.epochs=1 '
  '--config.base.train.eval_every=1 --config.base.diagnostics.snapshots=1 '
  '--config.base.diagnostics.loss_levels=',
}
SMALLER = {'conflict_files': {'train': '--config.diagnostics.every=8'}}


class Block(NamedTuple):
  """A fenced block of a page."""

  page: str
  line: int  # of its first line of code, from 1
  language: str
  code: str
  why: str  # it is not run; '' for one that is

  def __str__(self):
    return f'{self.page}.md:{self.line}'


def text_of(page):
  return (DOCS / f'{page}.md').read_text()


def blocks_of(page):
  text = text_of(page)
  found = []
  for fence in FENCE.finditer(text):
    line = text[: fence.start('code')].count('\n') + 1
    found.append(Block(page, line, fence['language'], fence['code'], fence['why'] or ''))
  return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.language == 'python']
COMMANDS = [block for block in BLOCKS if block.language in SHELL]
TO_RUN = [block for block in (*PYTHON, *COMMANDS) if not block.why]


def console_scripts():
  """{command: module} of setup.cfg."""
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg')
  lines = parser['options.entry_points']['console_scripts'].strip().splitlines()
  return dict(re.split(r' = |:', line)[:2] for line in lines)


# ---- what every block has to be


def test_pages_have_blocks_of_known_languages():
  assert {'photos', 'own_model', 'launching', 'running_studies'} <= set(PAGES)
  assert len(PYTHON) > 15
  assert len(COMMANDS) > 15
  known = {'python', 'text', '', *SHELL}
  odd = [str(b) for b in BLOCKS if b.language not in known and not b.language.startswith('{')]
  assert not odd, 'python and shell blocks are run; text is what they print'


def test_blocks_that_are_not_run_say_why():
  """The marker stands in front of a block that would run; most blocks have none."""
  found = {str(block): block.why for block in (*PYTHON, *COMMANDS) if block.why}
  assert all(len(why) > 10 for why in found.values()), found
  assert len(found) < len(PYTHON) + len(COMMANDS) - len(found)
  markers = sum(text_of(page).count('<!-- not run') for page in PAGES)
  assert markers == len(found), 'a marker has one empty line, and then a block'


@pytest.mark.parametrize('page', PAGES)
def test_blocks_are_code(page):
  for block in blocks_of(page):
    if block.language == 'python':
      compile(block.code, str(block), 'exec')
    if block.language in SHELL:
      run = subprocess.run(
        ['bash', '-n'], input=block.code, text=True, capture_output=True, check=False
      )
      assert run.returncode == 0, f'{block}: {run.stderr}'


def calls(code):
  """(binary, its arguments) of every csba command in shell code."""
  code = re.sub(r'(^|\s)#.*', '', code, flags=re.MULTILINE).replace('\\\n', ' ')
  lexer = shlex.shlex(code, posix=True, punctuation_chars='|&;\n')
  lexer.whitespace, lexer.whitespace_split = ' \t', True
  found, current = [], None
  for word in lexer:
    if word.startswith('csba-'):
      current = (word.removeprefix('csba-'), [])
      found.append(current)
    elif set(word) <= set('|&;\n'):
      current = None
    elif current:
      current[1].append(word)
  return found


def test_calls_are_found_in_shell_code():
  code = (
    "x=1 csba-train --a=b \\\n  --c='d e' && csba-report # what\n/bin/csba-x; sh y csba-study -z\n"
  )
  expected = [('train', ['--a=b', '--c=d e']), ('report', []), ('study', ['-z'])]
  assert calls(code) == expected


@pytest.fixture(scope='module')
def flags_of():
  """{binary: names of its flags}"""
  found = {}
  for command, module in console_scripts().items():
    script = f'import {module}; from absl import flags; print(*flags.FLAGS)'
    run = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found[command.removeprefix('csba-')] = set(run.stdout.split())
  return found


def test_flags_fields_and_recipes_of_all_commands_exist(flags_of):
  """Also of those that are not run."""
  fields = {
    'train': set(config_lib.flatten(config_lib.default())),
    'study': set(config_lib.flatten(grid.default())),
  }
  wrong, number = [], 0
  for block in BLOCKS:
    if block.language in ('python', 'text'):
      continue
    for binary, arguments in calls(block.code):
      number += 1
      for flag in arguments:
        name, _, value = flag.partition('=')
        name = name.lstrip('-')
        if name == 'config' and not value.isupper():
          file = ROOT / value if value.endswith('.py') else ROOT / f'configs/{value}.py'
          wrong += [f'{block}: {value}'] * (not file.is_file())
        elif name.startswith('config.'):
          known = name.removeprefix('config.') in fields[binary]
          wrong += [f'{block}: {name}'] * (not known)
        elif flag.startswith('--'):
          wrong += [f'{block}: {binary} {flag}'] * (name not in flags_of[binary])
  assert number > 20
  assert not wrong


# ---- links


def slugs(text):
  """Anchors of a page's headings, as GitHub and MyST make them."""
  text = FENCE.sub('', text)
  headings = re.findall(r'^#{1,4} (.+)$', text, re.MULTILINE)
  return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def links(text):
  return re.findall(r'\]\(([^)\s]*)\)', FENCE.sub('', text))


@pytest.mark.parametrize('page', [*PAGES, 'api/gradients'])
def test_links_lead_somewhere(page):
  here = DOCS / f'{page}.md'
  lost = []
  for link in links(here.read_text()):
    if link.startswith('https://'):
      continue  # make docs-links asks the others
    name, _, anchor = link.partition('#')
    target = here.parent / name if name else here
    if not target.exists() or (anchor and anchor not in slugs(target.read_text())):
      lost.append(link)
  assert not lost


def test_every_page_stands_in_the_table_of_contents():
  index = text_of('index')
  entries = {
    line.strip()
    for toc in re.findall(r'```{toctree}\n(.*?)```', index, re.DOTALL)
    for line in toc.splitlines()
  }
  patterns = [re.compile(entry.replace('*', '.*')) for entry in entries if '*' in entry]
  listed = {p for p in PAGES if p in entries or any(x.fullmatch(p) for x in patterns)}
  assert listed == set(PAGES) - {'index'}
  packages = {path.stem for path in (DOCS / 'api').glob('*.md')}
  assert {f'api/{name}' for name in packages} <= entries
  assert {
    'gradients',
    'models',
    'methods',
    'data',
    'measure',
    'run',
    'training',
    'study',
  } == packages


# ---- running them


@pytest.fixture
def workplace(tmp_path, cache_dir, monkeypatch):
  """An empty folder with the recipes, and the binaries of this checkout on the path."""
  bin_dir = tmp_path / 'bin'
  bin_dir.mkdir()
  for command, module in console_scripts().items():
    binary = bin_dir / command
    small = f'$SMALL_{command.removeprefix("csba-").upper().replace("-", "_")}'
    binary.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m {module} "$@" {small}\n')
    binary.chmod(0o755)
  python = bin_dir / 'python'  # no link: Python finds its packages beside the path it is called by
  python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
  python.chmod(0o755)
  folder = tmp_path / 'clone'
  folder.mkdir()
  (folder / 'configs').symlink_to(ROOT / 'configs')
  monkeypatch.chdir(folder)
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_backend_optimization_level=1',  # as conftest.py has it
    'PYTHONPATH': str(ROOT),
    'PATH': f'{bin_dir}{os.pathsep}{os.environ["PATH"]}',
    'CSBA_CACHE_DIR': cache_dir,
  }
  return SimpleNamespace(folder=folder, environment=environment)


def free_port():
  with contextlib.closing(socket.socket()) as found:
    found.bind(('localhost', 0))
    return found.getsockname()[1]


def run_page(page, workplace):
  """(names of its Python blocks, what its commands printed)"""
  names, printed = {}, []
  more = SMALLER.get(page, {})
  small = {f'SMALL_{k.upper()}': f'{v} {more.get(k, "")}' for k, v in SMALL.items()}
  port = str(free_port())
  for block in blocks_of(page):
    if block.why:
      continue
    if block.language == 'python':
      code = compile('\n' * (block.line - 1) + block.code, str(block), 'exec')
      exec(code, names)
    if block.language in SHELL:
      run = subprocess.run(
        ['bash', '-euo', 'pipefail', '-c', re.sub(r'(localhost:)\d+', rf'\g<1>{port}', block.code)],
        cwd=workplace.folder,
        env=workplace.environment | small,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
      )
      assert run.returncode == 0, f'{block}: {run.stdout[-2000:]}{run.stderr[-2000:]}'
      printed.append(run.stdout)
  return names, '\n'.join(printed)


RUN_ELSEWHERE = {'own_model', 'photos', 'conflict_files'}  # with a look at what they say
OTHERS = sorted({block.page for block in TO_RUN} - RUN_ELSEWHERE)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize('page', OTHERS)
def test_blocks_run(page, workplace):
  run_page(page, workplace)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_own_model_says_what_its_blocks_print(workplace, capsys):
  names, _ = run_page('own_model', workplace)
  assert Path('conflict.png').read_bytes().startswith(b'\x89PNG\r\n\x1a\n')
  printed = capsys.readouterr().out
  assert names['conflict'].summary()['conflict_rate'] == pytest.approx(0.62, abs=0.03)
  assert [float(x) for x in re.findall(r'^\[\d, \d, \d\] (\S+)$', printed, re.MULTILINE)] == (
    pytest.approx([0.89, 0.54], abs=0.05)
  )
  exact, sample = names['exact'].cosine(), names['of_sample']
  at = sample.at('shared')
  inside = (sample.low[at] <= exact) & (exact <= sample.high[at])
  assert sum(inside[c, d] for c in range(10) for d in range(c)) == pytest.approx(44, abs=2)
  page = text_of('own_model')
  assert all(number in page for number in ('62 %', '0.89', '0.54', '44 of the 45'))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_photos_from_a_folder_to_a_report(workplace):
  _, printed = run_page('photos', workplace)
  classes = sorted(path.name for path in (workplace.folder / 'photos').iterdir())
  for name in classes:
    assert re.search(rf'^{name} ', printed, re.MULTILINE)
  assert 'conflict matrix' in printed
  assert list(workplace.folder.glob('runs/*/conflict/*_shared.png'))
  for table in re.findall(r'^```text\n(.*?)^```', text_of('photos'), re.MULTILINE | re.DOTALL):
    labels = {line.split('  ')[0] for line in table.splitlines() if line.strip()}
    missing = {label for label in labels if label not in printed and label != '...'}
    assert not missing, 'the page shows what the commands do not print'


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_conflict_files_have_the_names_of_the_page(workplace, capsys):
  _, printed = run_page('conflict_files', workplace)
  said = capsys.readouterr().out
  listed = set(printed.split())
  for kind in ('probe', 'train_exact', 'train_seed0'):
    assert any(re.fullmatch(rf'step\d{{6}}_{kind}\.npz', name) for name in listed)
  snapshots = {name for name in listed if re.search('_(train|val).json$', name)}
  assert {name.replace('.json', '.npz') for name in snapshots} <= listed
  for name in snapshots:
    assert f'`{name.split("_")[0]}_' in text_of('conflict_files')
  assert 'conflict_rate' in said
  assert {'matrix.png', 'layers.png', 'flow.png', 'over_training.png'} <= {
    path.name for path in workplace.folder.iterdir()
  }


# ---- docstrings and the site

WITH_EXAMPLES = [
  '.'.join(path.relative_to(ROOT).with_suffix('').parts)
  for path in sorted((ROOT / 'csba_jax').rglob('*.py'))
  if '>>>' in path.read_text()
]


@pytest.mark.parametrize('name', WITH_EXAMPLES)
def test_examples_of_docstrings_hold(name):
  module = importlib.import_module(name)
  failed, tried = doctest.testmod(module)
  assert tried
  assert not failed


def test_some_docstrings_have_examples():
  assert {'csba_jax.gradients.per_class', 'csba_jax.gradients.conflict'} <= set(WITH_EXAMPLES)


@pytest.fixture(scope='module')
def docstrings():
  return SimpleNamespace(**runpy.run_path(str(DOCS / '_ext/docstrings.py')))


def test_docstrings_become_restructured_text(docstrings):
  written = textwrap.dedent(
    """\
    Share |g_c| * x_ of `a_b|c`, C. Too.

    With K folds,
      G[c, d] = x * y
    the rest:
    - one
      more
    - two
    after.

    Args:
      num_classes: C.
      x: [N], |x|.

    Returns:
      'a': content.
      'b': all
        of it.
      Rounded.

    Raises:
      UserError: *never*.

    Example:
      >>> 2 * 3 | 4
      6
    """
  ).splitlines()
  expected = textwrap.dedent(
    r"""
    Share \|g_c\| \* x\_ of `a_b|c`, C\. Too.

    With K folds,

    ::

      G[c, d] = x * y

    the rest:

    - one
      more

    - two

    after.

    Args:
      num_classes: C\.
      x: [N], \|x\|.

    Returns:
      : - 'a': content.

      - 'b': all
        of it.

      Rounded.

    Raises:
      UserError: *never*.

    Example:
      >>> 2 * 3 | 4
      6
    """
  ).splitlines()[1:]
  assert docstrings.readable(written) == expected


class Annotated:
  """A class as the library writes them."""

  a: int  # [S]   of it
  b: str
  c: dict[str, int]  # later


def test_comments_behind_fields_are_their_documentation(docstrings):
  assert docstrings.field_comments(Annotated) == {'a': '[S]: of it', 'c': 'later'}
  assert docstrings.attributes(Annotated) == ['', 'Attributes:', '  a: [S]: of it', '  c: later']
  assert docstrings.attributes(int) == []


def dead_links(folder):
  """Links of a built site to a page or a place in a page that is not there."""
  found = [path for path in folder.rglob('*.html') if '_static' not in path.parts]  # templates
  pages = {path.resolve(): path.read_text() for path in found}
  places = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
  dead = []
  for path, text in pages.items():
    for link in set(re.findall(r'href="([^"]+)"', text)):
      target, _, place = html.unescape(link).partition('#')
      if re.match('[a-z]+:', target):
        continue  # into the web
      target = target.partition('?')[0]  # without the version of a style
      there = (path.parent / target).resolve() if target else path
      if not there.exists() or (place and there in places and place not in places[there]):
        dead.append(f'{path.relative_to(folder.resolve())}: {link}')
  return dead


def test_a_dead_link_is_found(tmp_path):
  (tmp_path / 'a.html').write_text('<p id="x"><a href="b.html#y"><a href="#x"><a href="#z">')
  (tmp_path / 'b.html').write_text('<a href="a.html"><a href="c.html"><a href="https://d.e#f">')
  assert sorted(dead_links(tmp_path)) == ['a.html: #z', 'a.html: b.html#y', 'b.html: c.html']


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_site_builds_without_a_warning(tmp_path):
  for name in ('sphinx', 'sphinx_book_theme', 'myst_parser', 'sphinx_gallery', 'sphinx_copybutton'):
    pytest.importorskip(name, reason='pip install .[docs]')
  command = [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-b', 'html']
  run = subprocess.run(
    [*command, f'--doctree-dir={tmp_path / "trees"}', str(DOCS), str(tmp_path / 'html')],
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stderr
  assert not dead_links(tmp_path / 'html')
  api = (tmp_path / 'html/api/gradients.html').read_text()
  assert all(f'id="csba_jax.gradients.{name}"' in api for name in ('class_grams', 'Conflict'))
