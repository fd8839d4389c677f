"""What differs between CPU and accelerators, in one place."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax

from csba_jax.errors import UserError

# At most so many classes are unrolled, where a loop would be slow: compile time grows with them.
LONGEST_UNROLLING = 16
# Images of one class in a row of a training batch, where its gradients are taken class by class.
ROW_IMAGES = 12
# Images in one turn of the loop over classes on an accelerator. Not yet measured on one.
_IMAGES_AT_ONCE = 1024
# Bytes of class gradients that may exist at once, unless a single layer needs more.
CLASS_GRADIENT_BYTES = 4 * 2**30
# data.input 'auto' streams images that take more bytes than this when decoded. Others are kept in
# memory, on the host and on every device: a quarter of the 16 GB of the smallest accelerators.
IN_MEMORY_BYTES = 4 * 2**30
# Threads that read batches. Reading from a disk or a network drive is mostly waiting.
READING_THREADS = 4
# Bytes of batches that are read ahead: ten batches of 128 images of 224 pixels.
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
  """A function that returns `jax.jit(function, **options)` with `compiler_options()`.

  It calls jax.jit when it is first called, because asking for the backend starts it. Do not use it
  inside another jitted function: there the options of the outer function apply.
  """
  return functools.cache(lambda: jax.jit(function, **options, compiler_options=compiler_options()))


def is_cpu() -> bool:
  """Whether programs run on CPUs."""
  return jax.default_backend() == 'cpu'


def start() -> None:
  """Starts JAX's devices.

  Raises:
    UserError: there is none of the kind that $JAX_PLATFORMS names, or JAX finds none that works.
  """
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:  # the latter where the plugin is not installed
    wanted = os.environ.get('JAX_PLATFORMS', '')
    raise UserError(
      f'a device for JAX (JAX_PLATFORMS={wanted})',
      str(error).partition('. (')[0] or 'none of this kind, or no JAX that knows it',
      'unset JAX_PLATFORMS or set it to cpu, or install JAX for the device: '
      "pip install '.[cuda]' or '.[tpu]'",
    ) from error


def device_bytes() -> int:
  """Bytes of memory of one device; on CPU, its share of the host's memory."""
  found = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')
  if found:
    return found
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // jax.local_device_count()


def classes_at_once(classes: int, images: int) -> int:
  """How many classes one turn of the loop over classes takes, with `images` images each.

  One on CPU: sixteen images keep two cores busy and the caches warm (benchmarks/README.md). On
  accelerators so many that their images form a large batch.
  """
  if is_cpu():
    return 1
  return max(1, min(classes, _IMAGES_AT_ONCE // images))


def images_per_dispatch() -> int:
  """Images of one compiled call, where the host loops over a data set."""
  return 32 if is_cpu() else 512
