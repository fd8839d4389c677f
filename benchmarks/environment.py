"""What a measurement was taken on, and the memory that it took."""

import importlib.metadata

from csba_jax.run import workdir
from csba_jax.study import collect


def describe() -> dict[str, object]:
  """Device, versions (of PyTorch and Grain where they are installed) and commit."""
  found = {'device': collect.hardware()}
  for package in ('torch', 'grain'):
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found | workdir.versions() | {'commit': workdir.commit()}


def peak_mebibytes() -> float:
  """The most memory this process has held; getrusage would count its parent's too."""
  with open('/proc/self/status') as file:
    (peak,) = (int(line.split()[1]) / 1024 for line in file if line.startswith('VmHWM'))
  return peak
