"""The environment of a measurement, and its peak memory."""

import importlib.metadata
import os

from csba_jax.run import workdir
from csba_jax.runtime import huge_pages
from csba_jax.study import collect


def describe() -> dict[str, object]:
  """Device, malloc's settings, versions (of PyTorch and Grain where installed) and commit."""
  found = {'device': collect.hardware(), 'malloc': os.environ.get(huge_pages.VARIABLE, '')}
  for package in ('torch', 'grain'):
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found | workdir.versions() | {'commit': workdir.commit()}


def peak_mebibytes() -> float:
  """Peak memory of this process, MiB; getrusage would include that of its parent."""
  with open('/proc/self/status') as file:
    (peak,) = (int(line.split()[1]) / 1024 for line in file if line.startswith('VmHWM'))
  return peak
