"""The README: its length, its links, its commands and its code."""

import os
import re
import runpy
import shlex
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from csba_jax import config as config_lib
from csba_jax.study import grid, tuning

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'^```(\w+)\n(.*?)^```$', README, re.MULTILINE | re.DOTALL)
SMALL = ('--config.train.epochs=1', '--config.model.width=0.05', '--config.data.image_size={}')


def commands():
  """Every line of the bash blocks, in order."""
  return [line for kind, text in BLOCKS if kind == 'bash' for line in text.splitlines()]


OURS = [line for line in commands() if line.startswith('csba-')]
# run by hand: they install, download or take longer than a test may
BY_HAND = ('make demo', 'source ', 'git clone ', 'python -m venv ', 'pip install ')


def test_it_is_short_and_begins_with_a_sentence_and_a_picture():
  assert len(README.splitlines()) <= 200
  title, _, sentence, *rest = README.splitlines()
  assert title == '# csba_jax'
  assert sentence.startswith('csba_jax ')
  assert any(line.startswith('![') for line in rest[:4])


@pytest.mark.parametrize('target', sorted(set(re.findall(r'\]\(([^)#]+)\)', README))))
def test_links_lead_somewhere(target):
  if target.startswith('https://'):
    pytest.skip('a link into the web')
  assert (ROOT / target).exists()


def test_every_block_is_run_or_shown():
  assert {kind for kind, _ in BLOCKS} == {'bash', 'text', 'python'}
  others = [line for line in commands() if line not in OURS]
  assert all(line.startswith(BY_HAND) for line in others), others
  assert {line.split()[0] for line in OURS} >= {'csba-train', 'csba-diagnose', 'csba-report'}


def test_the_python_block(tmp_path, monkeypatch, capsys):
  (block,) = [text for kind, text in BLOCKS if kind == 'python']
  monkeypatch.chdir(tmp_path)
  exec(compile(block, 'README.md', 'exec'), {})
  assert (tmp_path / 'conflict.png').read_bytes().startswith(b'\x89PNG')
  assert '1.' in capsys.readouterr().out


def call(line, cwd):
  """Runs a command of the README; training is cut short."""
  program, *arguments = shlex.split(line)
  if program == 'csba-train':
    side = 16 if '--data=' in line else 8
    arguments += [word.format(side) for word in SMALL]
  environment = {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  module = f'csba_jax.bin.{program.removeprefix("csba-")}'
  return subprocess.run(
    [sys.executable, '-m', module, *arguments],
    cwd=cwd,
    env=os.environ | environment,
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.slow
def test_the_commands(tmp_path):
  """In the order of the page, in a folder with photos and with what `make demo` leaves."""
  rng = np.random.default_rng(0)
  for c, (name, number) in enumerate((('cat', 60), ('dog', 40))):
    (tmp_path / 'photos' / name).mkdir(parents=True)
    for i in range(number):
      pixels = rng.integers(100 * c, 100 * c + 150, (16, 16, 3), np.uint8)
      Image.fromarray(pixels).save(tmp_path / 'photos' / name / f'{i}.png')
  before = 'csba-train --config=digits_lt --workdir=runs/demo/runs/none-s0'
  for line in (before, *OURS):
    done = call(line, tmp_path)
    assert done.returncode == 0, f'{line}\n{done.stderr}'
    assert done.stdout.strip(), line
  assert list((tmp_path / 'runs/none/conflict').glob('*.png'))


DEMO = (ROOT / 'launch/demo.sh').read_text()


def test_the_demo_trains_with_the_rates_that_the_tuning_chose():
  (command,) = re.findall(r'"\$\{bin\}csba-study" ((?:.*\\\n)*.*)\n', DEMO)
  words = shlex.split(command.replace('\\\n', ' '))
  study = config_lib.load(words[0].removeprefix('--config='))
  assert study.tuned_by == 'results/digits_tuning'
  chosen = {
    net: rate
    for key, rate in tuning.chosen_rates(study).items()
    for net in ('none', 'csba')
    if {'method=cross_entropy', f'variant={net}'} <= set(key.split())
  }
  text = ' '.join(DEMO.replace('\n#', '').split())
  assert f'{chosen["none"]:g} for none and {chosen["csba"]:g} for csba' in text
  study.variants, study.methods = ('none', 'csba'), ('cross_entropy',)
  study.first_seed, study.seeds = 0, 3
  runs = grid.runs(study, tuning.chosen_rates(study))
  assert [run.name for run in runs] == [f'{n}-s{s}' for n in ('none', 'csba') for s in range(3)]
  assert {run.config.train.learning_rate for run in runs} == set(chosen.values())
  flags = ("--config.variants=('none', 'csba')", '--config.first_seed=0', '--config.seeds=3')
  for flag in (*flags, '--keep_runs'):
    assert flag in words


def test_the_picture_is_drawn_from_the_runs_of_the_demo():
  module = types.SimpleNamespace(**runpy.run_path(ROOT / 'docs/images/make.py'))
  assert module.main.__defaults__ == ('runs/demo/runs', 'docs/images/demo.png')
  assert (ROOT / 'docs/images/demo.png').read_bytes().startswith(b'\x89PNG')
