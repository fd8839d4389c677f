"""Settings that JAX reads when it starts: the compilation cache and GPU flags."""

import os

from csba_jax.files import expanded
from csba_jax.runtime import numerics

# They select kernels of cuBLAS, cuDNN and XLA that give the same bits every time.
DETERMINISTIC = ('--xla_gpu_deterministic_ops=true', '--xla_gpu_exclude_nondeterministic_ops=true')


def prepare(deterministic: bool = False, threads: int | None = None) -> None:
  """Sets XLA flags and the compilation cache; settings of the environment take precedence.

  Compiled programs are kept in $JAX_COMPILATION_CACHE_DIR. The default is the folder `xla` beside
  the decoded images, in $CSBA_CACHE_DIR, else ~/.cache/csba_jax. They are not kept with
  JAX_ENABLE_COMPILATION_CACHE=false.

  Args:
    deterministic: use GPU kernels that give the same bits every time, as those of CPU and TPU do.
    threads: of XLA on CPUs, which decide the last bits; None: as many as there are cores.

  Raises:
    UserError: the default of the cache is in a home folder that nobody knows.
  """
  numerics.use_threads(threads)
  if deterministic:
    found = os.environ.get('XLA_FLAGS', '')
    wanted = [flag for flag in DETERMINISTIC if flag.partition('=')[0] not in found]
    os.environ['XLA_FLAGS'] = ' '.join([found, *wanted]).strip()
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    import jax

    root = expanded(os.environ.get('CSBA_CACHE_DIR') or '~/.cache/csba_jax')
    jax.config.update('jax_compilation_cache_dir', str(root / 'xla'))


def missing_flags() -> list[str]:
  """The flags of DETERMINISTIC that the environment does not set, or sets to another value."""
  found = dict(word.partition('=')[::2] for word in os.environ.get('XLA_FLAGS', '').split())

  def is_set(name: str) -> bool:
    return name in found and found[name].lower() in ('', '1', 'true')

  return [flag for flag in DETERMINISTIC if not is_set(flag.partition('=')[0])]
