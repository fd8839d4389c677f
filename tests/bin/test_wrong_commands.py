"""Wrong command lines, as a new user gives them: one line each that says what to write instead."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# One process imports the binary; each command line has a child of its own.
SCRIPT = """
import importlib, json, os, sys, tempfile
binary = importlib.import_module(f'csba_jax.bin.{sys.argv[1]}')
results = []
for arguments in json.loads(sys.argv[2]):
  files = [tempfile.TemporaryFile('w+') for _ in range(2)]
  child = os.fork()
  if not child:
    for number, file in enumerate(files, 1):
      os.dup2(file.fileno(), number)
    sys.argv[:] = [f'csba-{sys.argv[1]}', *arguments]
    code = 0
    try:
      binary.cli()
    except SystemExit as error:
      code = error.code or 0
    except BaseException:
      import traceback
      traceback.print_exc()
      code = 99
    sys.stdout.flush()
    os._exit(code)
  code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  texts = []
  for file in files:
    file.seek(0)
    texts.append(file.read())
  results.append([code, *texts])
print(json.dumps(results))
"""


def calls(binary, command_lines, cwd):
  """(exit code, standard output, standard error) of a binary for each list of arguments."""
  process = subprocess.run(
    [sys.executable, '-c', SCRIPT, binary, json.dumps(command_lines)],
    cwd=cwd,
    env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=300,
    check=True,
  )
  return json.loads(process.stdout)


D = '--config=digits_lt'
FLAGS = 'expected flags as --help lists them; found '
FIELD = 'expected a field of the config; found '
TRAIN = [
  (
    [D, '--config.train.epoch=3'],
    f'{FIELD}--config.train.epoch; to fix it: set --config.train.epochs',
  ),
  ([D, '--config.epochs=3'], f'{FIELD}--config.epochs; to fix it: set --config.train.epochs'),
  (
    [D, '--config.tau', '3'],
    f'{FIELD}--config.tau; to fix it: set --config.loss.tau or --config.mixing.tau or '
    '--config.stage.tau',
  ),
  ([D, '--noconfig.flip'], f'{FIELD}--config.flip; to fix it: set --config.augment.flip'),
  (
    [D, '--config.zzzz=3'],
    f'{FIELD}--config.zzzz; to fix it: use a field that --list_fields names',
  ),
  (
    [D, '--config.mixing=mixup'],
    'expected a field of section mixing, not the section; found --config.mixing; to fix it: set '
    'one of its fields: --config.mixing.alpha, --config.mixing.kappa, --config.mixing.name, '
    '--config.mixing.probability, --config.mixing.start, --config.mixing.stop or 1 more',
  ),
  (
    [D, '--config.train.epochs=ten'],
    "expected --config.train.epochs: an integer: at least 1; found 'ten'; to fix it: correct "
    '--config.train.epochs=...',
  ),
  (
    [D, f'--config.train.learning_rate={10**400}'],
    'expected train.learning_rate: a finite number > 0; found inf; to fix it: set '
    '--config.train.learning_rate=...',
  ),
  (
    [D, f'--config.train.epochs={10**400}'],
    f'expected train.epochs below 2**31; found 1{"0" * 39}... (401 characters); to fix it: set '
    '--config.train.epochs=...',
  ),
  (
    ['--config.train.epochs=3'],
    f'{FLAGS}--config.train.epochs; to fix it: put --config=NAME before it',
  ),
  (
    ['--data', 'photos'],
    'expected --workdir; found none; to fix it: add e.g. --workdir=runs/photos',
  ),
  (
    [D, '--dataset=cifar10'],
    f'{FLAGS}--dataset; to fix it: set --config=RECIPE (a recipe has its data), or '
    '--config.data.name=NAME of a TFDS set',
  ),
  ([D, '--epochs=3'], f'{FLAGS}--epochs; to fix it: set --config.train.epochs'),
  ([D, '--lr', '0.1'], f'{FLAGS}--lr; to fix it: set --config.train.learning_rate=VALUE'),
  ([D, '--batch_size=8'], f'{FLAGS}--batch_size; to fix it: set --config.train.batch_size'),
  ([D, '--output_dir=x'], f'{FLAGS}--output_dir; to fix it: set --workdir=DIR'),
  ([D, '--wrkdir=x'], f'{FLAGS}--wrkdir; to fix it: set --workdir'),
  (
    [D, '--zzzz'],
    f'{FLAGS}--zzzz; to fix it: use a flag that --help lists, or a field of --list_fields',
  ),
  (
    [D, '--processes=two'],
    "expected --processes: an integer; found 'two'; to fix it: correct --processes=...",
  ),
  (
    [D, '--distributed=maybe'],
    "expected --distributed: auto or on or off; found 'maybe'; to fix it: correct "
    '--distributed=...',
  ),
  (
    [D, '--workdir'],
    f'{FLAGS}Missing value for flag --workdir; to fix it: correct the command line',
  ),
  (
    ['--config=digitslt'],
    'expected the name of a recipe that ships, the path of one that ends in .py, or of a '
    "run's config.json; "
    "found 'digitslt'; to fix it: use digits_lt or study_digits or study_digits_vit",
  ),
  (
    ['--config=exits.py'],
    'expected a config file that runs; found sys.exit(0) in exits.py, line 2; to fix it: remove '
    'it: a config file only returns a config',
  ),
  (
    ['--config=none.py'],
    'expected get_config() that returns the config; found None from none.py, line 1; to fix it: '
    'end it with: return c, where c is config.default() with your changes',
  ),
]
S = '--config=study_digits'
STUDY = [
  ([S, '--config.epochs=3'], f'{FIELD}--config.epochs; to fix it: set --config.base.train.epochs'),
  (
    [S, '--config.train.epochs=3'],
    f'{FIELD}--config.train.epochs; to fix it: set --config.base.train.epochs',
  ),
  ([S, '--config.variant=csba'], f'{FIELD}--config.variant; to fix it: set --config.variants'),
  (
    [S, '--config.own_methods={}'],
    'expected own_methods in a config file; found --config.own_methods; to fix it: write a config '
    'file that sets it',
  ),
  (
    [S, f'--config.seeds={10**400}'],
    f'expected seeds: 1 to 10000; found 1{"0" * 39}... (401 characters); to fix it: set '
    '--config.seeds=...',
  ),
  ([S, '--job=2'], f'{FLAGS}--job; to fix it: set --jobs'),
]
OTHERS = {
  'evaluate': [
    (
      ['--config=digits_lt'],
      f'{FLAGS}--config; to fix it: remove it: the config is that of the workdir',
    ),
    (['--data=x'], f'{FLAGS}--data; to fix it: set --data_dir'),
    (['--split=all'], "expected --split: test or val; found 'all'; to fix it: correct --split=..."),
  ],
  'diagnose': [
    (['--zzzz'], f'{FLAGS}--zzzz; to fix it: use a flag that --help lists'),
    (
      ['--seed=-1'],
      "expected --seed: a non-negative integer; found '-1'; to fix it: correct --seed=...",
    ),
  ],
  'predict': [(['photos', '--recall=a:1'], f'{FLAGS}--recall; to fix it: set --min_recall')],
  'audit': [(['photos', '--workdr=a'], f'{FLAGS}--workdr; to fix it: set --workdir')],
  'report': [(['--workdirs=a', '--pol'], f'{FLAGS}--pol; to fix it: set --pool')],
}


@pytest.mark.parametrize('binary', ['train', 'study', *OTHERS])
def test_one_line_says_what_to_write_instead(tmp_path, binary):
  (tmp_path / 'exits.py').write_text('import sys\nsys.exit(0)\n')
  (tmp_path / 'none.py').write_text('def get_config():\n  return None\n')
  cases = {'train': TRAIN, 'study': STUDY}.get(binary) or OTHERS[binary]
  more = ['--dry_run'] if binary == 'study' else []
  found = calls(binary, [[*arguments, *more] for arguments, _ in cases], tmp_path)
  for (arguments, expected), (code, out, err) in zip(cases, found, strict=True):
    assert (code, out) == (1, ''), (arguments, err)
    assert err == f'csba-{binary}: {expected}\n', arguments
  assert sorted(path.name for path in tmp_path.iterdir()) == ['exits.py', 'none.py']


@pytest.mark.parametrize('binary', ['train', 'study', *OTHERS])
def test_every_way_to_ask_for_help_is_a_success(tmp_path, binary):
  asks = ['--help', '-help', '-h', '--helpshort', '--helpfull', '-helpfull', '--helpxml']
  found = dict(zip(asks, calls(binary, [[ask] for ask in asks], tmp_path), strict=True))
  assert {code for code, *_ in found.values()} == {0}
  assert {err for *_, err in found.values()} == {''}
  operand = {'audit': 'FOLDER', 'predict': 'PHOTOS'}.get(binary, '--')
  assert all(out.startswith(f'csba-{binary} {operand}') for _, out, _ in found.values())
  assert '--verbosity' in found['--helpfull'][1]  # a flag of a library
  assert '--verbosity' not in found['--help'][1]


@pytest.mark.parametrize(('binary', 'config'), [('train', D), ('study', S)])
def test_fields_are_listed_without_and_with_a_config(tmp_path, binary, config):
  field = 'seed' if binary == 'train' else 'first_seed'
  plain, named = calls(
    binary, [['--list_fields'], ['--list_fields', config, f'--config.{field}=3']], tmp_path
  )
  assert (plain[0], named[0], plain[2], named[2]) == (0, 0, '', '')
  lines = {line.split()[0]: line.split()[1] for line in reversed(named[1].splitlines()) if line}
  assert lines[field] == '3*'
  assert 'train.weight_decay' in lines
  assert plain[1] != named[1]
