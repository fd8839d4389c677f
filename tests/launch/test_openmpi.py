"""mpirun starts one training as two processes, which need no flags to find each other."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
  pytest.mark.slow,
  pytest.mark.timeout(600),
  pytest.mark.skipif(not shutil.which('mpirun'), reason='no mpirun: apt-get install openmpi-bin'),
]
# from a launcher this test runs under
FOREIGN = ('OMPI_', 'PMIX_', 'SLURM_', 'JAX_COORDINATOR')
MPIRUN = [
  'mpirun',
  '--allow-run-as-root',
  '--oversubscribe',
  '-n',
  '2',
  '--tag-output',
  '--bind-to',
  'none',
]
# one machine: what mpirun's own daemons listen to
MPIRUN += ['--mca', 'oob_tcp_if_include', 'lo', '--mca', 'btl_tcp_if_include', 'lo']


def train(prefix, workdir, devices):
  """(exit code, standard output, standard error) of a tiny run of digits, two devices in all."""
  environment = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
  environment |= {
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(ROOT),
    'XLA_FLAGS': '--xla_backend_optimization_level=1 '
    f'--xla_force_host_platform_device_count={devices}',
  }
  program = [sys.executable, '-m', 'csba_jax.bin.train', f'--config={ROOT}/configs/digits_lt.py']
  options = ['--config.model.width=0.05', '--config.train.epochs=1', '--config.train.log_every=4']
  child = subprocess.Popen(
    [*prefix, *program, *options, f'--workdir={workdir}'],
    env=environment,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    start_new_session=True,
  )
  try:
    out, err = child.communicate(timeout=800)
  finally:
    if child.poll() is None:
      os.killpg(child.pid, signal.SIGKILL)
      child.communicate()
  return child.returncode, out, err


def lines_of(workdir, name):
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [(line['step'], line[name]) for line in lines if name in line]


def of_rank(rank, text):
  """The lines of a rank."""
  tag = f',{rank}]<'
  return [line.split('>:', 1)[1] for line in text.splitlines() if tag in line.split('>:')[0]]


def test_two_ranks_are_one_run(driver, tmp_path):
  code, out, err = train(MPIRUN, tmp_path / 'two', 1)
  assert code == 0, err
  alone, alone_out, alone_err = train([], tmp_path / 'one', 2)
  assert alone == 0, alone_err
  for name in ('train_loss', 'val_loss'):
    found, expected = lines_of(tmp_path / 'two', name), lines_of(tmp_path / 'one', name)
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], abs=1e-3)
  result = json.loads((tmp_path / 'two/result.json').read_text())
  assert (result['timing']['processes'], result['timing']['devices']) == (2, 2)
  # the first rank alone speaks and writes
  assert any('compiling' in line for line in of_rank(0, err))
  said = driver.without_gloo(of_rank(0, out))
  assert 'workdir: ' in said[-1]
  assert len(said) == len(driver.without_gloo(alone_out.splitlines()))
  assert driver.without_gloo(of_rank(1, out)) == of_rank(1, err) == []
  names = {path.name for path in (tmp_path / 'two').iterdir()}
  assert names == {path.name for path in (tmp_path / 'one').iterdir()}
  assert len(list((tmp_path / 'two/tensorboard').iterdir())) == 1
