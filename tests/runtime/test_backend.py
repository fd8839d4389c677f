"""The choices that depend on the backend."""

import jax
import jax.numpy as jnp
import pytest

from csba_jax.errors import UserError
from csba_jax.runtime import backend


def test_one_step_a_dispatch_on_cpu_only(monkeypatch):
  assert backend.steps_per_dispatch(50) == 1
  for name in ('gpu', 'tpu'):
    monkeypatch.setattr(jax, 'default_backend', lambda name=name: name)
    assert backend.steps_per_dispatch(50) == 50
    assert backend.compiler_options() == {}


@pytest.mark.parametrize(
  ('error', 'found'),
  [
    (RuntimeError("Unable to initialize backend 'cud': unknown. (set JAX_P"), 'Unable .* unknown'),
    (AssertionError(), 'none of this kind, or no JAX that knows it'),
  ],
)
def test_a_device_that_is_not_here(monkeypatch, error, found):
  def devices():
    raise error

  monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
  monkeypatch.setattr(jax, 'devices', devices)
  with pytest.raises(UserError, match=f'.JAX_PLATFORMS=cuda.; found {found}; to fix it: unset'):
    backend.start()


def test_the_compiler_takes_its_options():
  options = backend.compiler_options()
  assert options
  assert float(jax.jit(lambda x: x.sum(), compiler_options=options)(jnp.ones(8))) == 8
  with pytest.raises(jax.errors.JaxRuntimeError):  # what a misspelt one would do
    jax.jit(lambda x: x.sum(), compiler_options={'xla_cpu_nix': '1'})(jnp.ones(8))
