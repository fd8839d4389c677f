"""What differs between CPU and accelerators, in one place."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax

# Classes unrolled in one program where a loop would be slow, at most: compile time grows with it.
LONGEST_UNROLLING = 16
# Images of several classes that an accelerator works on together; not yet measured on one.
_IMAGES_AT_ONCE = 1024
# Bytes of class gradients that may exist at once, unless a single layer needs more.
CLASS_GRADIENT_BYTES = 4 * 2**30
# Bytes of decoded images from which data.input 'auto' streams them. Below, a copy lies on the host
# and on every device: a quarter of the 16 GB that the smallest accelerators of the clouds have.
IN_MEMORY_BYTES = 4 * 2**30
# Threads that read batches: a read from a disk or a network drive is mostly waiting.
READING_THREADS = 4
# Bytes of batches read ahead: at 224 pixels ten batches of 128, and seconds of a training step.
READ_AHEAD_BYTES = 256 * 2**20


def steps_per_dispatch(longest: int) -> int:
  """How many training steps one compiled call does: `longest` on GPU and TPU, 1 on CPU.

  Convolutions inside a scan are about 40 times slower on the CPU backend, unless they are rewritten
  as in csba_jax.gradients.loops.
  """
  return 1 if is_cpu() else longest


def compiler_options() -> dict[str, str]:
  """XLA options of the programs that take gradients.

  On CPU, reductions go to XLA's YNN library, which spreads the sums of batch normalisation over the
  cores; matrix products do not. benchmarks/README.md has the times.
  """
  if not is_cpu():
    return {}
  return {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE'}


def jit(function: Callable[..., Any], **options: Any) -> Callable[[], jax.stages.Wrapped]:
  """A function that gives `jax.jit(function, **options)` with these compiler options.

  Made at the first call, because asking for the backend starts it; not for use inside other jitted
  functions, whose options hold there.
  """
  return functools.cache(lambda: jax.jit(function, **options, compiler_options=compiler_options()))


def is_cpu() -> bool:
  """Whether programs run on the host."""
  return jax.default_backend() == 'cpu'


def device_bytes() -> int:
  """Bytes of memory of a device; on CPU, a device's share of what the host has."""
  found = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')
  if found:
    return found
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // jax.local_device_count()


def classes_at_once(classes: int, images: int) -> int:
  """How many classes one turn of the loop over classes takes, `images` images each.

  One on CPU: sixteen images keep two cores busy and the caches warm (benchmarks/README.md). On
  accelerators as many as make a large batch.
  """
  if is_cpu():
    return 1
  return max(1, min(classes, _IMAGES_AT_ONCE // images))


def images_per_dispatch() -> int:
  """Images of one call where a pass over data is a loop on the host."""
  return 32 if is_cpu() else 512
