"""What JAX is told before it starts."""

import os

import jax
import pytest

from csba_jax import startup


@pytest.fixture(autouse=True)
def settings(monkeypatch):
  """The settings of this process are put back."""
  monkeypatch.setenv('XLA_FLAGS', os.environ.get('XLA_FLAGS', ''))
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  before = jax.config.jax_compilation_cache_dir
  yield
  jax.config.update('jax_compilation_cache_dir', before)


def test_deterministic_kernels_are_asked_for_once(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_gpu_deterministic_ops=false --xla_dump_to=x')
  startup.prepare(deterministic=True)
  startup.prepare(deterministic=True)
  flags = os.environ['XLA_FLAGS'].split()
  # what the user set stays as it is
  assert flags[:2] == ['--xla_gpu_deterministic_ops=false', '--xla_dump_to=x']
  assert flags[2:] == ['--xla_gpu_exclude_nondeterministic_ops=true']


def test_without_the_wish_nothing_is_set(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '')
  startup.prepare()
  assert os.environ['XLA_FLAGS'] == ''


def test_programs_are_kept_beside_decoded_images(monkeypatch, tmp_path):
  monkeypatch.setenv('CSBA_CACHE_DIR', str(tmp_path))
  startup.prepare()
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'xla')


def test_a_cache_that_the_user_named_stays(monkeypatch, tmp_path):
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path))  # JAX reads it itself
  before = jax.config.jax_compilation_cache_dir
  startup.prepare()
  assert jax.config.jax_compilation_cache_dir == before
