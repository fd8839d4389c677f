"""Strict defaults for every test: CPU, 8 host devices, rank promotion raises."""

import datetime
import gc
import importlib.util
import itertools
import os
import random
import time

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    # small programs, compiled once: code that is made quickly; not level 0, whose code is wrong
    '--xla_backend_optimization_level=1',
  ]
)
# commands that tests start have huge pages from their start, and need not start again
os.environ.setdefault('GLIBC_TUNABLES', 'glibc.malloc.hugetlb=1')

import jax
import pytest

HERE = os.path.dirname(os.path.abspath(__file__))

jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_collection_modifyitems(items):
  """With $CSBA_TEST_DEADLINE, which may leave tests out, each day begins with other files."""
  if os.environ.get('CSBA_TEST_DEADLINE'):
    files = [list(group) for _, group in itertools.groupby(items, lambda item: item.path)]
    random.Random(datetime.date.today().toordinal()).shuffle(files)
    items[:] = itertools.chain.from_iterable(files)


def pytest_runtest_setup(item):
  """A slow test does not begin after the time in $CSBA_TEST_DEADLINE, seconds since the epoch."""
  deadline = float(os.environ.get('CSBA_TEST_DEADLINE') or 'inf')
  if item.get_closest_marker('slow') and time.time() > deadline:
    pytest.skip('no time left for slow tests: run them with make test-slow')


@pytest.fixture(scope='session')
def data_root():
  """Folder of prepared TFDS sets, or a skip that says how to get one."""
  root = os.environ.get('TFDS_DATA_DIR')
  if not root or not os.path.isdir(os.path.join(root, 'cifar10')):
    pytest.skip('no real CIFAR-10: set TFDS_DATA_DIR to a folder that holds cifar10/')
  return root


@pytest.fixture(scope='session')
def photo_folder():
  """Folder of CLASS/file photos with a manifest, or a skip that says how to get one."""
  root = os.environ.get('CSBA_IMAGE_FOLDER')
  if not root or not os.path.isdir(root):
    pytest.skip('no real photos: set CSBA_IMAGE_FOLDER to a folder of CLASS/file.jpg')
  return root


@pytest.fixture(scope='session', autouse=True)
def cache_dir(tmp_path_factory):
  """Decoded images go to a folder of this test session, never to the user's cache.

  Compiled programs go to .pytest_cache, for all workers, their child processes, and the next time:
  the suite spends most of its time compiling. `make clean` removes them.
  """
  os.environ['CSBA_CACHE_DIR'] = str(tmp_path_factory.mktemp('cache'))
  programs = os.path.join(os.path.dirname(HERE), '.pytest_cache', 'xla')
  seconds = 0.2  # that compiling took, or more
  os.environ['JAX_COMPILATION_CACHE_DIR'] = programs
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = str(seconds)
  jax.config.update('jax_compilation_cache_dir', programs)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', seconds)
  return os.environ['CSBA_CACHE_DIR']


@pytest.fixture(autouse=True)
def few_memory_maps(last_count=[0.0]):  # noqa: B006
  """Lets compiled programs go before they use up the memory maps Linux grants a process.

  Every program compiled for CPUs takes several; at vm.max_map_count (65,530) LLVM dies.
  """
  yield
  if time.monotonic() - last_count[0] < 5:  # the maps are counted in milliseconds, not in no time
    return
  last_count[0] = time.monotonic()
  try:
    with open('/proc/self/maps') as file:
      maps = sum(1 for _ in file)
  except OSError:  # not Linux
    return
  if maps > 20_000:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope='session')
def driver():
  """The module tests/driver.py: a run of seconds, and ways to end it before its time."""
  spec = importlib.util.spec_from_file_location('driver', os.path.join(HERE, 'driver.py'))
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
