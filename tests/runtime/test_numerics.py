"""What decides the last bits: the number of threads, recorded, set and compared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from csba_jax.runtime import jax_setup, numerics

ROOT = Path(__file__).parents[2]
# A long matrix product and a gradient of a convolution, as a child: with so many threads, on the
# cores that it may use.
BITS = """
import hashlib, os, sys

os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[2])])
from csba_jax.runtime import numerics

numerics.use_threads(int(sys.argv[1]) or None)
import jax

x = jax.random.normal(jax.random.key(0), (4096, 32))
print(hashlib.sha256(jax.device_get(jax.jit(lambda x: x.T @ x)(x)).tobytes()).hexdigest())
print(numerics.record()['threads'])
"""


def bits(threads, cores):
  """(SHA-256 of a product, threads that were recorded) of a child with its own JAX."""
  others = (*numerics.THREADS, 'XLA_FLAGS')  # with 8 devices there are 8 threads at least
  plain = {k: v for k, v in os.environ.items() if k not in others}
  process = subprocess.run(
    [sys.executable, '-c', BITS, str(threads), str(cores)],
    env=plain | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=300,
    check=True,
  )
  found, recorded = process.stdout.split()
  return found, int(recorded)


@pytest.mark.seconds
@pytest.mark.skipif(numerics.cores() < 2, reason='needs two cores')
def test_the_threads_and_not_the_cores_decide_the_bits():
  alone, both = bits(2, 1), bits(2, 2)
  assert alone == both
  assert both == bits(0, 2)  # by itself JAX takes as many threads as there are cores
  one = bits(1, 2)
  assert one[1] == 1
  assert one[0] != both[0], 'if threads no longer matter, nothing here is needed'


def test_the_environment_names_the_threads(monkeypatch):
  for name in numerics.THREADS:
    monkeypatch.delenv(name, raising=False)
  assert numerics.threads() == len(os.sched_getaffinity(0))
  monkeypatch.setenv('NPROC', 'many')  # as XLA, which reads a number or nothing
  assert numerics.threads() == len(os.sched_getaffinity(0))
  monkeypatch.setenv('NPROC', '5')
  assert numerics.threads() == 5
  numerics.use_threads(7)
  assert 'PJRT_NPROC' not in os.environ  # what the user has set stays
  monkeypatch.setenv('PJRT_NPROC', '6')
  assert numerics.threads() == 6


def test_threads_are_set_before_jax_starts(monkeypatch):
  for name in numerics.THREADS:
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', 'anywhere')
  jax_setup.prepare(threads=None)
  assert 'PJRT_NPROC' not in os.environ
  monkeypatch.setenv('PJRT_NPROC', '')
  jax_setup.prepare(threads=3)
  assert os.environ['PJRT_NPROC'] == '3'


def test_a_record_is_json_and_knows_what_changes_numbers(monkeypatch):
  monkeypatch.setenv('PJRT_NPROC', '9')
  jax.devices()  # starts XLA, which would not know these flags
  monkeypatch.setenv('XLA_FLAGS', '  --a=1   --b ')
  found = numerics.record(devices=2)
  assert json.loads(json.dumps(found)) == found
  assert (found['threads'], found['devices'], found['XLA_FLAGS']) == (9, 2, '--a=1 --b')
  assert found['jax_enable_x64'] is False
  with jax.enable_x64(True), jax.default_matmul_precision('float32'):
    monkeypatch.setenv('PJRT_NPROC', '3')
    other = numerics.record(devices=2)
  precision = 'jax_default_matmul_precision'
  assert numerics.differences(found, other) == [
    f'threads: 9 there, {jax.local_device_count()} here '
    '(set PJRT_NPROC to the old number before the start)',
    'jax_enable_x64: False there, True here (set JAX_ENABLE_X64 as it was)',
    f"{precision}: None there, 'float32' here",
  ]


def test_what_one_record_lacks_is_no_difference():
  assert numerics.differences({}, numerics.record()) == []
  assert numerics.differences({'threads': 2, 'old': 1}, {'threads': 2, 'new': 1}) == []
  assert numerics.differences({'threads': 2}, {'threads': 1}) == [
    'threads: 2 there, 1 here (set PJRT_NPROC to the old number before the start)'
  ]


@pytest.mark.parametrize(
  ('cpuinfo', 'expected'),
  [
    (
      'processor : 0\nflags\t\t: fpu sse4_2 avx smep avx2 sse fma\nflags : x\n',
      'avx avx2 fma sse4_2',
    ),
    ('Features\t: fp asimd crc32 sve i8mm sme smefa64\n', 'asimd i8mm sme sve'),
    ('processor : 0\n', ''),
  ],
)
def test_instruction_sets(monkeypatch, tmp_path, cpuinfo, expected):
  (tmp_path / 'cpuinfo').write_text(cpuinfo)
  honest = open
  monkeypatch.setattr(
    'builtins.open',
    lambda path, *rest: honest(tmp_path / 'cpuinfo' if path == '/proc/cpuinfo' else path, *rest),
  )
  assert numerics._instructions()[1:] == expected.split()
