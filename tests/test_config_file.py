"""Config files that fail: each error is one line with the file and the line, and no success."""

import re
import shutil

import numpy as np
import pytest

from csba_jax import config as config_lib
from csba_jax import config_file
from csba_jax.config_file import ConfigFileError
from csba_jax.errors import UserError, shown

HEAD = 'from csba_jax import config\n'
DEFAULT = f'{HEAD}def get_config():\n  c = config.default()\n'
# name: (file, what the message holds with FILE in place of its path)
CASES = {
  'zero': (
    'def get_config():\n  return 1/0\n',
    'ZeroDivisionError: division by zero in FILE, line 2;',
  ),
  'zero at the top': ('a = 1\nb = a / 0\n', 'ZeroDivisionError: division by zero in FILE, line 2;'),
  'import': (
    'import nosuchmodule\n',
    "ModuleNotFoundError: No module named 'nosuchmodule' in FILE, line 1;",
  ),
  'syntax': ('x = 1\nthis is no Python\n', 'SyntaxError: invalid syntax in FILE, line 2;'),
  'null bytes': ('x = 1\0', 'SyntaxError: source code string cannot contain null bytes in FILE'),
  'exit': ('import sys\nsys.exit(0)\n', 'found sys.exit(0) in FILE, line 2;'),
  'exit later': ('def get_config():\n  exit()\n', 'found sys.exit(None) in FILE, line 2;'),
  'empty words': ('def get_config():\n  raise ValueError\n', 'found ValueError in FILE, line 2;'),
  'no end': (
    'def get_config():\n  return get_config()\n',
    'RecursionError: maximum recursion depth exceeded in FILE, line 2;',
  ),
  'no function': ('get_config = 1\n', 'expected a function get_config() in FILE; found none;'),
  'empty': ('', 'expected a function get_config() in FILE; found none;'),
  'argument': (
    f'{HEAD}def get_config(n):\n  return config.default()\n',
    "expected get_config() that takes no arguments; found missing a required argument: 'n' in "
    'FILE, line 2;',
  ),
  'no return': (
    DEFAULT,
    'expected get_config() that returns the config; found None from FILE, line 2; to fix it: '
    'end it with: return c',
  ),
  'a dict': ('def get_config():\n  return {}\n', 'found {} from FILE, line 1;'),
  'field': (
    f'{DEFAULT}  c.train.epoch = 3\n  return c\n',
    'cannot be added since the config is locked. Did you mean "epochs" instead of "epoch"? in '
    'FILE, line 4;',
  ),
  'type': (
    f"{DEFAULT}  c.train.epochs = 'ten'\n  return c\n",
    "cannot be casted to type <class 'int'> in FILE, line 4;",
  ),
  'numpy': (
    f'import numpy\n{DEFAULT}  c.train.epochs = numpy.int64(2)\n  return c\n',
    "cannot be casted to type <class 'int'> in FILE, line 5;",
  ),
  '400 digits': (
    f'{DEFAULT}  c.train.learning_rate = 10**400\n  return c\n',
    'int too large to convert to float in FILE, line 4;',
  ),
  'recipe': (
    f"{HEAD}def get_config():\n  return config.load('digitslt')\n",
    "found 'digitslt'; to fix it: use digits_lt",
  ),
}


@pytest.mark.parametrize('case', CASES)
def test_an_error_in_a_file_names_file_and_line(tmp_path, case):
  text, expected = CASES[case]
  file = tmp_path / 'mine.py'
  file.write_text(text)
  with pytest.raises(ConfigFileError) as error:
    config_lib.load(str(file))
  message = str(error.value)
  assert expected.replace('FILE', str(file)) in message
  assert '\n' not in message
  assert len(message) < 700
  assert [path.name for path in tmp_path.iterdir()] == ['mine.py']  # no __pycache__


def test_an_error_in_a_parent_names_the_parent(tmp_path):
  (tmp_path / 'parent.py').write_text('def get_config():\n  return 1/0\n')
  child = tmp_path / 'child.py'
  child.write_text(f"{HEAD}def get_config():\n  return config.sibling(__file__, 'parent')\n")
  with pytest.raises(
    ConfigFileError, match=r'found ZeroDivisionError: .* in .*parent\.py, line 2;'
  ):
    config_lib.load(str(child))
  child.write_text(f"{HEAD}def get_config():\n  return config.sibling(__file__, 'aunt')\n")
  with pytest.raises(ConfigFileError, match=r'FileNotFoundError: .*aunt\.py'):
    config_lib.load(str(child))


def test_a_broken_module_that_a_file_imports_is_named(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'helper_of_a_config.py').write_text('x = 1\ny = (\n')
  file = tmp_path / 'mine.py'
  file.write_text('import helper_of_a_config\n')
  with pytest.raises(
    ConfigFileError, match=r'SyntaxError: .* in .*helper_of_a_config\.py, line 2;'
  ):
    config_lib.load(str(file))


def test_ctrl_c_in_a_file_is_no_error_of_it(tmp_path):
  file = tmp_path / 'mine.py'
  file.write_text('raise KeyboardInterrupt\n')
  with pytest.raises(KeyboardInterrupt):
    config_lib.load(str(file))


def test_a_file_may_be_called_as_a_library_and_use_its_floats(tmp_path):
  file = tmp_path / 'numpy.py'
  text = '  c.train.learning_rate = np.float64(0.25)\n  return c\n'
  file.write_text(f'import numpy as np\n{DEFAULT}{text}')
  config = config_lib.load(str(file))
  assert type(config.train.learning_rate) is float
  config_lib.check(config)
  assert config.train.learning_rate == 0.25
  assert np.float64 is not float


def test_a_changed_file_is_read_anew(tmp_path):
  file = tmp_path / 'mine.py'
  for epochs in (3, 4):  # within one second, of one size
    file.write_text(f'{DEFAULT}  c.train.epochs = {epochs}\n  return c\n')
    assert config_lib.load(str(file)).train.epochs == epochs
  shutil.rmtree(tmp_path)


def test_long_values_are_cut():
  assert shown('x' * 10) == "'" + 'x' * 10 + "'"
  assert shown(10**400) == f'1{"0" * 39}... (401 characters)'
  assert re.fullmatch(r'an integer of \d+ bits', shown(10**5000))


@pytest.mark.parametrize('value', [2**31, 10**400, 10**5000], ids=['2**31', '10**400', '10**5000'])
@pytest.mark.parametrize('field', ['train.epochs', 'train.batch_size', 'seed', 'data.folds'])
def test_integers_without_end_are_refused(field, value):
  config = config_lib.default()
  *section, name = field.split('.')
  (config[section[0]] if section else config)[name] = value
  with pytest.raises(
    UserError, match=f'expected {field}.*; found .*; to fix it: set --config.{field}'
  ):
    config_lib.check(config)


def test_the_module_is_no_way_to_run_other_files(tmp_path):
  with pytest.raises(ConfigFileError, match='IsADirectoryError'):
    config_file.get_config(tmp_path)
