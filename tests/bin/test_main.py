"""What every binary does at its end: signals, exit codes, flags from a file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
START = 'import os, signal, sys, time\nfrom absl import flags\nfrom csba_jax.bin import _main\n'


def child(program, *arguments):
  """(exit code, standard output, standard error) of a program that calls _main.run."""
  done = subprocess.run(
    [sys.executable, '-c', START + program, *arguments],
    env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=120,
  )
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(('name', 'code'), [('SIGTERM', 75), ('SIGINT', 130)])
def test_a_signal_after_the_last_tick_is_answered(name, code):
  program = (
    'def work(tick):\n'
    '  tick(1, 1)\n'
    f'  os.kill(os.getpid(), signal.{name})\n'
    '  time.sleep(0.1)\n'
    'def main():\n'
    "  _main.unless_stopped(work, 'stopped here')\n"
    "  print('went on')\n"
    '_main.run(main)\n'
  )
  assert child(program) == (code, '', 'stopped here\n')


@pytest.mark.parametrize(
  ('end', 'code', 'err'),
  [("sys.exit('no luck')", 1, 'no luck\n'), ('sys.exit(7)', 7, ''), ('None', 0, ''), ('3', 3, '')],
)
def test_exit_codes(end, code, err):
  assert child(f'_main.run(lambda: {end})\n') == (code, '', err)


def test_fields_that_are_given_on_the_command_line_or_in_a_file(tmp_path):
  (tmp_path / 'flags.txt').write_text('--config.train.epochs=3\n')
  program = (
    "config = _main.define_config('Recipe', 'digits_lt')\n"
    "_main.run(lambda: print(_main.given_fields(config.value)), recipes={'data': 'digits_lt'})\n"
  )
  code, out, err = child(
    "flags.DEFINE_string('data', None, '')\n" + program,
    '--data=x',
    f'--flagfile={tmp_path}/flags.txt',
    '--config.augment.flip',
    '--config.model.width',
    '0.5',
  )
  assert (code, err) == (0, '')
  given = {'augment.flip': True, 'model.width': 0.5, 'train.epochs': 3}
  assert eval(out) == given
