"""The settings that JAX reads when it starts."""

import os
import types

import jax
import pytest

from csba_jax import config as config_lib
from csba_jax.errors import UserError
from csba_jax.runtime import jax_setup, sharding
from csba_jax.study import runner


@pytest.fixture(autouse=True)
def settings(monkeypatch):
  """Restores the settings of this process."""
  monkeypatch.setenv('XLA_FLAGS', os.environ.get('XLA_FLAGS', ''))
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  before = jax.config.jax_compilation_cache_dir
  yield
  jax.config.update('jax_compilation_cache_dir', before)


def test_deterministic_kernels_are_asked_for_once(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_gpu_deterministic_ops=false --xla_dump_to=x')
  jax_setup.prepare(deterministic=True)
  jax_setup.prepare(deterministic=True)
  flags = os.environ['XLA_FLAGS'].split()
  # what the user set stays as it is
  assert flags[:2] == ['--xla_gpu_deterministic_ops=false', '--xla_dump_to=x']
  assert flags[2:] == ['--xla_gpu_exclude_nondeterministic_ops=true']


def test_without_the_wish_nothing_is_set(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '')
  jax_setup.prepare()
  assert os.environ['XLA_FLAGS'] == ''


def test_programs_are_kept_beside_decoded_images(monkeypatch, tmp_path):
  monkeypatch.setenv('CSBA_CACHE_DIR', str(tmp_path))
  jax_setup.prepare()
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'xla')


def test_a_cache_that_the_user_named_stays(monkeypatch, tmp_path):
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path))  # JAX reads it itself
  before = jax.config.jax_compilation_cache_dir
  jax_setup.prepare()
  assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.parametrize(
  ('flags', 'enough'),
  [
    ('', False),
    (jax_setup.DETERMINISTIC[0], False),
    (' '.join(jax_setup.DETERMINISTIC), True),
    ('--xla_gpu_deterministic_ops --xla_gpu_exclude_nondeterministic_ops=1', True),
    (f'{" ".join(jax_setup.DETERMINISTIC)} --xla_gpu_deterministic_ops=false', False),  # the last
  ],
)
def test_a_gpu_that_was_not_told_is_no_silent_no(monkeypatch, flags, enough):
  """A caller of the library, such as a notebook, gets the error."""
  monkeypatch.setenv('XLA_FLAGS', flags)
  gpu = types.SimpleNamespace(platform='gpu', process_index=0, id=0, slice_index=0)
  config = config_lib.default()
  config.deterministic = True
  sharding.layout(config)  # of the CPU, which needs none
  monkeypatch.setattr(jax, 'devices', lambda: [gpu])
  monkeypatch.setattr(sharding, '_mesh', lambda *_: None)
  if enough:
    sharding.layout(config)
    return
  with pytest.raises(UserError, match='expected XLA_FLAGS with .* for deterministic=True') as error:
    sharding.layout(config)
  assert '\n' not in str(error.value)
  config.deterministic = False
  sharding.layout(config)


@pytest.mark.parametrize('deterministic', [False, True])
def test_workers_of_a_study_are_prepared_before_they_run(monkeypatch, deterministic):
  config = config_lib.default()
  config.deterministic = deterministic
  done = []
  monkeypatch.setattr(runner.signal, 'signal', lambda *_: None)
  monkeypatch.setattr(runner, '_end_with_parent', lambda: None)
  monkeypatch.setattr(jax_setup, 'prepare', lambda *of: done.append(of))
  monkeypatch.setattr(runner, 'do_run', lambda name, *_: done.append(name))
  connection = types.SimpleNamespace(
    recv=lambda: ('run', 'shape', config.to_dict()), send=lambda found: None
  )
  runner._serve(connection, types.SimpleNamespace(threads=3), [])
  assert done == [(deterministic, 3), 'run']
