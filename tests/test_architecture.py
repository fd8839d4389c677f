"""The house: who may import whom, what an import loads, and how long things may be."""

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'csba_jax'
# An import goes only to a smaller rank, also one inside a function.
RANKS = {
  'csba_jax': 0,
  'csba_jax.backend': 0,
  'csba_jax.errors': 0,
  'csba_jax.events': 0,
  'csba_jax.files': 0,
  'csba_jax.jax_internals': 0,
  'csba_jax.startup': 0,
  'csba_jax.data.decoding': 0,
  'csba_jax.models.capacity': 0,
  'csba_jax.models.layers': 0,
  'csba_jax.report.blocks': 0,
  'csba_jax.collectives': 1,
  'csba_jax.config': 1,
  'csba_jax.longtail': 1,
  'csba_jax.processes': 1,
  'csba_jax.stages': 1,
  'csba_jax.stats': 1,
  'csba_jax.data.policy': 1,
  'csba_jax.data.rows': 1,
  'csba_jax.data.sources': 1,
  'csba_jax.gradients.batches': 1,
  'csba_jax.gradients.coupling': 1,
  'csba_jax.gradients.gram': 1,
  'csba_jax.gradients.loops': 1,
  'csba_jax.models.attention': 1,
  'csba_jax.checkpoint': 2,
  'csba_jax.evidence': 2,
  'csba_jax.grid': 2,
  'csba_jax.hardware': 2,
  'csba_jax.room': 2,
  'csba_jax.metrics': 2,
  'csba_jax.optimizers': 2,
  'csba_jax.parallel': 2,
  'csba_jax.plan': 2,
  'csba_jax.progress': 2,
  'csba_jax.signals': 2,
  'csba_jax.recipes': 2,
  'csba_jax.workdir': 2,
  'csba_jax.data.augment': 2,
  'csba_jax.data.cache': 2,
  'csba_jax.data.image_folder': 2,
  'csba_jax.data.splits': 2,
  'csba_jax.data.tfds_source': 2,
  'csba_jax.gradients.conflict': 2,
  'csba_jax.gradients.per_class': 2,
  'csba_jax.models.heads': 2,
  'csba_jax.study_file': 3,
  'csba_jax.losses': 3,
  'csba_jax.results_file': 3,
  'csba_jax.words': 3,
  'csba_jax.data.pipeline': 3,
  'csba_jax.data.sampling': 3,
  'csba_jax.gradients.data_set': 3,
  'csba_jax.gradients.flow': 3,
  'csba_jax.models.multibranch': 3,
  'csba_jax.models.resnet': 3,
  'csba_jax.models.vit': 3,
  'csba_jax.results': 4,
  'csba_jax.gradients.estimate': 4,
  'csba_jax.plots': 4,
  'csba_jax.train_state': 4,
  'csba_jax.data.mixing': 4,
  'csba_jax.data.streaming': 4,
  'csba_jax.models.registry': 4,
  'csba_jax.comparisons': 5,
  'csba_jax.tuning': 5,
  'csba_jax.decoupling': 5,
  'csba_jax.gradients': 5,
  'csba_jax.records': 5,
  'csba_jax.mechanism': 6,
  'csba_jax.inputs': 6,
  'csba_jax.step': 6,
  'csba_jax.trained': 6,
  'csba_jax.design': 7,
  'csba_jax.verdicts': 7,
  'csba_jax.diagnose': 7,
  'csba_jax.evaluate': 7,
  'csba_jax.report.seeds': 7,
  'csba_jax.report.table': 7,
  'csba_jax.findings': 8,
  'csba_jax.collect': 8,
  'csba_jax.second_stage': 8,
  'csba_jax.report.diagnosis': 8,
  'csba_jax.report.tuning': 8,
  'csba_jax.train': 9,
  'csba_jax.bin.launch': 9,
  'csba_jax.bin.run': 9,
  'csba_jax.report.svg': 9,
  'csba_jax.dry_run': 10,
  'csba_jax.report.figures': 10,
  'csba_jax.study': 11,
  'csba_jax.report.tabulate': 11,
  'csba_jax.report.associations': 12,
  'csba_jax.report.measurements': 12,
  'csba_jax.report.content': 13,
  'csba_jax.report.markdown': 14,
  'csba_jax.report.page': 14,
  'csba_jax.report.readme': 15,
  'csba_jax.report.study': 15,
  'csba_jax.bin.diagnose': 16,
  'csba_jax.bin.evaluate': 16,
  'csba_jax.bin.report': 16,
  'csba_jax.bin.study': 16,
  'csba_jax.bin.train': 16,
}
# what a user waits for, or does not have
HEAVY = {'tensorflow', 'tensorflow_datasets', 'matplotlib', 'sklearn', 'torch', 'tensorboardX'}
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_BINARY = 450, 90, 60  # lines
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
EMPTY = {name for name, path in FILES.items() if not path.read_text().strip()}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
MODULES = sorted(FILES.keys() - EMPTY)


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


def test_every_module_has_a_rank():
  assert RANKS.keys() == set(MODULES), 'give a new module its rank, by what it may know'


@pytest.mark.parametrize('name', MODULES)
def test_imports_go_to_a_smaller_rank(name):
  own = {target for target in imports(name) if target.split('.')[0] == 'csba_jax'}
  assert own <= RANKS.keys()
  wrong = {target: RANKS[target] for target in own if RANKS[target] >= RANKS[name]}
  assert not wrong, f'{name} has rank {RANKS[name]}'


def test_packages_are_light():
  packages = {module_name(path) for path in PACKAGE.rglob('__init__.py')}
  assert packages - {'csba_jax', 'csba_jax.gradients'} <= EMPTY
  assert not list(imports('csba_jax'))
  assert all(target.startswith('csba_jax.gradients.') for target in imports('csba_jax.gradients'))


def loaded(statement):
  """Top-level names in sys.modules after a statement in a new process."""
  script = f'import sys; {statement}; print(*sys.modules)'
  run = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  return {name.split('.')[0] for name in run.stdout.split()}


def test_importing_the_package_loads_next_to_nothing():
  assert not loaded('import csba_jax') & {'jax', 'numpy', *HEAVY}


def test_training_loads_nothing_heavy_before_it_is_needed():
  found = loaded('import csba_jax.train, csba_jax.dry_run, csba_jax.plots')
  assert 'jax' in found
  assert found & HEAVY == set()


@pytest.mark.parametrize('binary', ['train', 'evaluate', 'diagnose', 'report'])
def test_a_wrong_flag_is_reported_before_jax_is_loaded(binary):
  assert not loaded(f'import csba_jax.bin.{binary}') & {'jax', *HEAVY}


def test_no_drawer_for_everything():
  assert not [
    path for path in PACKAGE.rglob('*') if re.fullmatch(r'(utils?|helpers)(\.py)?', path.name)
  ]


@pytest.mark.parametrize('name', MODULES)
def test_files_and_functions_stay_short(name):
  limit = LONGEST_BINARY if name.startswith('csba_jax.bin.') else LONGEST_FILE
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
    command, module, function = re.fullmatch(r'(csba-\w+) = ([\w.]+):(\w+)', script).groups()
    assert command == f'csba-{module.rsplit(".", 1)[1]}'
    assert function in [f.name for f in TREES[module].body if isinstance(f, ast.FunctionDef)]
