"""Memory in pages of 2 MiB, for programs that compute on CPUs.

XLA takes the memory of all intermediate values of a step from malloc when the step begins and gives
it back when it ends. With pages of 4 KiB, Linux then maps tens of thousands of pages in every step,
which took 8 to 45 % of its time (benchmarks/README.md). glibc's malloc can ask for huge pages
instead, but it reads that setting only when a program starts.
"""

import os
import sys
from pathlib import Path

VARIABLE, SETTING = 'GLIBC_TUNABLES', 'glibc.malloc.hugetlb'
KERNEL = Path('/sys/kernel/mm/transparent_hugepage/enabled')
OLDEST = (2, 35)  # version of glibc that knows the setting


def ask_for() -> bool:
  """Sets $GLIBC_TUNABLES for programs that start from now on; whether that changes anything.

  It changes nothing where the variable names the setting already (so that
  GLIBC_TUNABLES=glibc.malloc.hugetlb=0 keeps small pages), with another C library, and where the
  kernel gives huge pages to all programs or to none.
  """
  present = os.environ.get(VARIABLE, '')
  if SETTING in present or not _helps():
    return False
  os.environ[VARIABLE] = ':'.join(filter(None, (present, f'{SETTING}=1')))
  return True


def restart() -> None:
  """Starts this program again with huge pages, in the same process, where they are not in use yet.

  Call it before anything was read, written or started. It does nothing once JAX is imported, in a
  notebook, and in a program that comes from standard input, which cannot be read twice.
  """
  if {'jax', 'IPython'} & sys.modules.keys() or sys.argv[0] in ('', '-') or not ask_for():
    return
  sys.stdout.flush()
  sys.stderr.flush()
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _helps() -> bool:
  """Whether this system has glibc, and gives huge pages to programs that ask for them."""
  try:
    name, _, version = (os.confstr('CS_GNU_LIBC_VERSION') or '').partition(' ')
    numbers = tuple(int(part) for part in version.split('.')[:2])
    return name == 'glibc' and numbers >= OLDEST and '[madvise]' in KERNEL.read_text()
  except (AttributeError, OSError, ValueError):  # no Linux, or no glibc
    return False
