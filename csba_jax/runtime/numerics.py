"""What decides the last bits of a run's numbers, beside its config and the versions of packages.

On CPUs XLA divides its work among the threads of its pool, and sums are rounded otherwise where
they are divided otherwise. The number of threads is that of the cores that the process may use,
unless $PJRT_NPROC names another. With the same number of threads the bits are the same on any
number of cores.
"""

import os
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any

# The variables in which XLA looks for the number of its threads; the first one counts.
THREADS = ('PJRT_NPROC', 'NPROC')
# Settings of JAX that change numbers.
_SETTINGS = (
  'jax_enable_x64',
  'jax_default_matmul_precision',
  'jax_default_prng_impl',
  'jax_threefry_partitionable',
  'jax_numpy_dtype_promotion',
)
_VARIABLES = ('XLA_FLAGS', 'NVIDIA_TF32_OVERRIDE')
# How the instruction sets begin for which XLA compiles otherwise: of x86, and of Arm.
_INSTRUCTIONS = re.compile(r'(sse4|avx|fma|f16c|amx|asimd|sve|sme\d*$|bf16|i8mm)')
_MEANING = {
  'threads': 'set PJRT_NPROC to the old number before the start',
  'jax_enable_x64': 'set JAX_ENABLE_X64 as it was',
}


def threads() -> int:
  """How many threads XLA computes with on CPUs, if it starts now."""
  for name in THREADS:
    found = os.environ.get(name, '')
    if found.isdecimal() and int(found):
      return int(found)
  return cores()


def cores() -> int:
  """How many cores this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def use_threads(number: int | None) -> None:
  """Lets XLA compute with so many threads on CPUs, whatever the number of cores.

  It has no effect once JAX has started. A number that the environment names takes precedence.
  """
  if number and not any(os.environ.get(name) for name in THREADS):
    os.environ[THREADS[0]] = str(number)


def record(devices: int = 1) -> dict[str, Any]:
  """What decides the last bits here, as JSON.

  Args:
    devices: among which the run divides its batches.
  """
  import jax  # here: the first process of a study does without it

  device = jax.devices()[0]
  found = {'device': device.device_kind, 'devices': devices}
  if device.platform == 'cpu':
    # of several virtual devices, XLA gives each a thread at least
    number = max(threads(), jax.local_device_count())
    found |= {'threads': number, 'instructions': ' '.join(_instructions())}
  for name in _SETTINGS:
    value = getattr(jax.config, name, None)
    found[name] = value if value is None or isinstance(value, bool) else str(value)
  return found | {name: ' '.join(os.environ.get(name, '').split()) for name in _VARIABLES}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
  """What differs between two records, as 'name: THERE there, HERE here', and what to do about it.

  What only one of them names is no difference: another version of this code wrote the other.
  """
  found = []
  for name in (name for name in here if name in there and there[name] != here[name]):
    advice = f' ({_MEANING[name]})' if name in _MEANING else ''
    found.append(f'{name}: {there[name]!r} there, {here[name]!r} here{advice}')
  return found


def _instructions() -> Sequence[str]:
  """The instruction sets of this processor for which XLA compiles otherwise, sorted."""
  try:
    with open('/proc/cpuinfo') as file:
      lines = [line.partition(':') for line in file]
  except OSError:  # not Linux
    return [platform.machine()]
  named = [value for name, _, value in lines if name.strip().lower() in ('flags', 'features')]
  words = named[0].split() if named else []
  return [platform.machine(), *sorted(word for word in words if _INSTRUCTIONS.match(word))]
