"""The choices that depend on the backend."""

import jax
import jax.numpy as jnp
import pytest

from csba_jax.runtime import backend


def test_one_step_a_dispatch_on_cpu_only(monkeypatch):
  assert backend.steps_per_dispatch(50) == 1
  for name in ('gpu', 'tpu'):
    monkeypatch.setattr(jax, 'default_backend', lambda name=name: name)
    assert backend.steps_per_dispatch(50) == 50
    assert backend.compiler_options() == {}


def test_the_compiler_takes_its_options():
  options = backend.compiler_options()
  assert options
  assert float(jax.jit(lambda x: x.sum(), compiler_options=options)(jnp.ones(8))) == 8
  with pytest.raises(jax.errors.JaxRuntimeError):  # what a misspelt one would do
    jax.jit(lambda x: x.sum(), compiler_options={'xla_cpu_nix': '1'})(jnp.ones(8))
