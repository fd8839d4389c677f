"""What JAX has to be told before it starts: where compiled programs are kept, and GPU flags."""

import os
from pathlib import Path

# The kernels of cuBLAS, cuDNN and XLA that give the same bits every time.
DETERMINISTIC = ('--xla_gpu_deterministic_ops=true', '--xla_gpu_exclude_nondeterministic_ops=true')


def prepare(deterministic: bool = False) -> None:
  """Sets flags and the compilation cache; what the user's environment says comes first.

  Compiled programs are kept in $JAX_COMPILATION_CACHE_DIR, by default in `xla` beside decoded
  images ($CSBA_CACHE_DIR, else ~/.cache/csba_jax); with JAX_ENABLE_COMPILATION_CACHE=false nowhere.

  Args:
    deterministic: GPU kernels that give the same bits every time; CPU and TPU do anyway.
  """
  if deterministic:
    found = os.environ.get('XLA_FLAGS', '')
    wanted = [flag for flag in DETERMINISTIC if flag.partition('=')[0] not in found]
    os.environ['XLA_FLAGS'] = ' '.join([found, *wanted]).strip()
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    import jax

    root = Path(os.environ.get('CSBA_CACHE_DIR') or '~/.cache/csba_jax').expanduser()
    jax.config.update('jax_compilation_cache_dir', str(root / 'xla'))


def missing_flags() -> list[str]:
  """Those of DETERMINISTIC that the environment does not set, or sets to something else."""
  found = dict(word.partition('=')[::2] for word in os.environ.get('XLA_FLAGS', '').split())

  def is_set(name):
    return name in found and found[name].lower() in ('', '1', 'true')

  return [flag for flag in DETERMINISTIC if not is_set(flag.partition('=')[0])]
