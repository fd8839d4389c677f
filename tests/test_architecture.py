"""The house: who may import whom, what an import loads, and how long things may be."""

import ast
import configparser
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'csba_jax'
# what a user waits for, or does not have
HEAVY = {'tensorflow', 'tensorflow_datasets', 'matplotlib', 'sklearn', 'torch', 'tensorboardX'}
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_BINARY = 450, 90, 65  # lines
# distribution of an imported package where the names differ
DISTRIBUTIONS = {
  'PIL': 'Pillow',
  'absl': 'absl-py',
  'orbax': 'orbax-checkpoint',
  'sklearn': 'scikit-learn',
  'tensorflow_datasets': 'tensorflow-datasets',
}


def module_name(path):
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob('*.py'))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
MODULES = sorted(FILES)


def imports(name):
  """Dotted names that a module imports anywhere: modules of csba_jax, or top-level packages."""
  for node in ast.walk(TREES[name]):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{name}: relative import'
      for alias in node.names:
        inner = f'{node.module}.{alias.name}'
        yield inner if inner in FILES else node.module


def functions(tree):
  return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


# packages that bring names of their modules to their users
OPEN = {'csba_jax.gradients'}


def test_every_package_says_what_it_is_for():
  """And nothing else: importing a package loads no module that nobody asked for."""
  for path in PACKAGE.rglob('__init__.py'):
    name = module_name(path)
    text = ast.get_docstring(TREES[name])
    assert text, name
    if name not in {'csba_jax', *OPEN}:
      assert len(text.splitlines()) == 3, f'{name}: one line, a blank one, what it may not know'
      assert len(TREES[name].body) == 1, name
  assert not list(imports('csba_jax'))
  assert all(target.startswith('csba_jax.gradients.') for target in imports('csba_jax.gradients'))


def test_imports_are_held_by_contracts():
  """`make lint` runs them; every package must stand in the list."""
  contracts = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['importlinter']
  layers, _ = contracts['contracts']
  named = [name.strip() for line in layers['layers'] for name in line.split(':')]
  there = {path.stem for path in PACKAGE.iterdir() if re.fullmatch(r'[a-z]\w*(\.py)?', path.name)}
  assert sorted(named) == sorted(there)
  assert layers['exhaustive']
  makefile = (ROOT / 'Makefile').read_text()
  assert '$(BIN)/lint-imports' in makefile
  assert '$(BIN)/mypy' in makefile


def loaded(statement):
  """Top-level names in sys.modules after a statement in a new process."""
  script = f'import sys; {statement}; print(*sys.modules)'
  run = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  return {name.split('.')[0] for name in run.stdout.split()}


def test_importing_the_package_loads_next_to_nothing():
  assert not loaded('import csba_jax') & {'jax', 'numpy', *HEAVY}


def test_training_loads_nothing_heavy_before_it_is_needed():
  found = loaded(
    'import csba_jax.training.loop, csba_jax.planning.dry_run, csba_jax.gradients.plots'
  )
  assert 'jax' in found
  assert found & HEAVY == set()


def test_the_gradient_library_loads_little_beside_jax():
  assert not loaded('import csba_jax.gradients') & {'flax', 'optax', 'scipy', *HEAVY}


@pytest.mark.parametrize('binary', ['train', 'evaluate', 'diagnose', 'report', 'audit', 'predict'])
def test_a_wrong_flag_is_reported_before_jax_is_loaded(binary):
  assert not loaded(f'import csba_jax.bin.{binary}') & {'jax', *HEAVY}


def test_no_drawer_for_everything():
  assert not [
    path for path in PACKAGE.rglob('*') if re.fullmatch(r'(utils?|helpers)(\.py)?', path.name)
  ]


@pytest.mark.parametrize('name', MODULES)
def test_files_and_functions_stay_short(name):
  is_binary = re.match(r'csba_jax\.bin\.[a-z]', name)
  limit = LONGEST_BINARY if is_binary else LONGEST_FILE
  assert len(FILES[name].read_text().splitlines()) <= limit
  long = {
    f.name: f.end_lineno - f.lineno + 1
    for f in functions(TREES[name])
    if f.end_lineno - f.lineno + 1 > LONGEST_FUNCTION
  }
  assert not long


@pytest.mark.parametrize('name', MODULES)
def test_everything_public_has_a_docstring(name):
  tree = TREES[name]
  assert ast.get_docstring(tree)
  undocumented = []
  kinds = ast.FunctionDef | ast.ClassDef
  public = [n for n in tree.body if isinstance(n, kinds) and not n.name.startswith('_')]
  for node in public:
    members = node.body if isinstance(node, ast.ClassDef) else []
    methods = [m for m in members if isinstance(m, kinds) and not m.name.startswith('_')]
    undocumented += [n.name for n in (node, *methods) if not ast.get_docstring(n)]
  assert not undocumented


@pytest.mark.parametrize('name', MODULES)
def test_public_functions_are_typed(name):
  """Arguments and return; mypy checks what is inside."""
  untyped = []
  for node in TREES[name].body:
    members = node.body if isinstance(node, ast.ClassDef) else [node]
    for function in (m for m in members if isinstance(m, ast.FunctionDef)):
      if f'{node.name} {function.name}'.startswith('_') or function.name.startswith('_'):
        continue
      arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
      is_method = isinstance(node, ast.ClassDef) and 'staticmethod' not in map(
        ast.unparse, function.decorator_list
      )
      typed = all(argument.annotation for argument in arguments[is_method:])
      if not typed or function.returns is None:
        untyped.append(function.name)
  assert not untyped


def requirements():
  """(line, line before it) of install_requires."""
  text = (ROOT / 'setup.cfg').read_text()
  block = re.search(r'^install_requires =\n((?:[ \t]+.*\n)+)', text, re.MULTILINE).group(1)
  lines = [line.strip() for line in block.splitlines()]
  return [
    (line, before)
    for before, line in zip(['', *lines], lines, strict=False)
    if not line.startswith('#')
  ]


def test_every_requirement_gives_its_reason():
  assert len(requirements()) > 10
  assert not [line for line, before in requirements() if not re.match(r'# .{5,}', before)]


def canonical(name):
  return re.sub(r'[-_.]+', '-', name).lower()


def test_every_third_party_import_is_declared():
  declared = {canonical(re.match(r'[\w.-]+', line).group()) for line, _ in requirements()}
  used = {target.split('.')[0] for name in MODULES for target in imports(name)} - {
    'csba_jax',
    *sys.stdlib_module_names,
  }
  missing = {name for name in used if canonical(DISTRIBUTIONS.get(name, name)) not in declared}
  assert {'jax', 'flax', 'numpy', 'PIL', 'sklearn', 'absl'} <= used
  assert not missing


def test_console_scripts_exist():
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg')
  scripts = parser['options.entry_points']['console_scripts'].strip().splitlines()
  assert scripts
  for script in scripts:
    command, module, function = re.fullmatch(r'(csba-[\w-]+) = ([\w.]+):(\w+)', script).groups()
    assert command == f'csba-{module.rsplit(".", 1)[1].replace("_", "-")}'
    assert function in [f.name for f in TREES[module].body if isinstance(f, ast.FunctionDef)]
