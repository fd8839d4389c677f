"""What a measurement was taken on, and the memory that it took."""

import os
import platform

from csba_jax import workdir


def describe() -> dict[str, object]:
  """Device, versions and commit."""
  import torch

  cpu = platform.processor()
  if os.path.exists('/proc/cpuinfo'):
    with open('/proc/cpuinfo') as file:
      names = [line for line in file if line.startswith('model name')]
    cpu = names[0].split(':')[1].strip()
  found = {'device': f'{cpu}, {os.cpu_count()} cores', 'torch': torch.__version__}
  return found | workdir.versions() | {'commit': workdir.commit()}


def peak_mebibytes() -> float:
  """The most memory this process has held; getrusage would count its parent's too."""
  with open('/proc/self/status') as file:
    (peak,) = (int(line.split()[1]) / 1024 for line in file if line.startswith('VmHWM'))
  return peak
