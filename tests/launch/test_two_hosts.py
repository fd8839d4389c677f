"""Two hosts, made of network namespaces: one run across them, and a link that goes down."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

PEER_TIMEOUT = 10
BOUND = 2 * PEER_TIMEOUT  # seconds; as docs/launching.md says
PORT = 12355  # of hosts that nobody else is on


def ip(*words, check=True):
  return subprocess.run(['ip', *words], check=check, capture_output=True, text=True)


class Hosts:
  """Two namespaces with a link; each resolves its name to the address that the other sees."""

  def __init__(self):
    mark = secrets.token_hex(3)
    self.names = [f'csba-{mark}-{i}' for i in range(2)]
    self.links = [f'c{mark}{i}' for i in range(2)]  # of up to 15 characters
    self.addresses = ['10.77.0.1', '10.77.0.2']

  def make(self):
    for name in self.names:
      ip('netns', 'add', name)
    first, second = zip(self.links, self.names, strict=True)
    peer = ['peer', 'name', second[0], 'netns', second[1]]
    ip('link', 'add', first[0], 'netns', first[1], 'type', 'veth', *peer)
    for name, link, address in zip(self.names, self.links, self.addresses, strict=True):
      ip('-n', name, 'addr', 'add', f'{address}/24', 'dev', link)
      ip('-n', name, 'link', 'set', 'lo', 'up')
      ip('-n', name, 'link', 'set', link, 'up')
      folder = Path('/etc/netns', name)  # Gloo gives others the address of its host's name
      folder.mkdir(parents=True)
      (folder / 'hosts').write_text(f'127.0.0.1 localhost\n{address} {socket.gethostname()}\n')

  def remove(self):
    for name in self.names:
      for pid in ip('netns', 'pids', name, check=False).stdout.split():
        with contextlib.suppress(ProcessLookupError):
          os.kill(int(pid), signal.SIGKILL)
      ip('netns', 'del', name, check=False)
      shutil.rmtree(Path('/etc/netns', name), ignore_errors=True)

  def unplug(self, host):
    ip('-n', self.names[host], 'link', 'set', self.links[host], 'down')

  def start(self, driver, workdir, *arguments):
    """A run of the driver over both; standard error goes to files beside the workdir."""
    flags = '--xla_backend_optimization_level=1 --xla_force_host_platform_device_count=4'
    environment = os.environ | {
      'JAX_PLATFORMS': 'cpu',
      'PYTHONPATH': str(Path(driver.__file__).parents[1]),
      'XLA_FLAGS': flags,
    }
    program = [sys.executable, driver.__file__, str(workdir), *arguments]
    program += [f'--coordinator={self.addresses[0]}:{PORT}', '--processes=2', '--start_timeout=60']
    program += [f'--peer_timeout={PEER_TIMEOUT}', '--config.parallel.devices=0']
    children = []
    for i, name in enumerate(self.names):
      with open(f'{workdir}.{i}', 'w') as log:
        command = ['ip', 'netns', 'exec', name, *program, f'--process={i}']
        children.append(
          subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=log)
        )
    return children


@pytest.fixture
def hosts():
  if not shutil.which('ip') or not hasattr(os, 'geteuid') or os.geteuid():
    pytest.skip('needs root and ip: apt-get install iproute2')
  hosts = Hosts()
  try:
    try:
      hosts.make()
    except subprocess.CalledProcessError as error:
      pytest.skip(f'needs network namespaces: {error.stderr}')
    yield hosts
  finally:
    hosts.remove()
  left = ip('netns', 'list').stdout
  assert not any(name in left for name in hosts.names)


def end(children, workdir, seconds):
  """[(exit code, standard error, seconds)]; all must end within so many seconds."""
  began, took = time.monotonic(), {}
  try:
    while len(took) < len(children):
      assert time.monotonic() < began + seconds, f'after {seconds} s {took} only have ended'
      for i, child in enumerate(children):
        if child.poll() is not None:
          took.setdefault(i, time.monotonic() - began)
      time.sleep(0.05)
  finally:
    for child in children:
      child.kill()
      child.wait()
  return [
    (child.returncode, Path(f'{workdir}.{i}').read_text(), took[i])
    for i, child in enumerate(children)
  ]


def losses_of(workdir):
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [line['train_loss'] for line in lines if 'train_loss' in line]


@pytest.mark.slow
def test_a_run_across_two_hosts_has_the_losses_of_one_process(driver, hosts, tmp_path):
  for code, err, _ in end(hosts.start(driver, tmp_path / 'two'), tmp_path / 'two', 240):
    assert code == 0, err
  one = driver.start(tmp_path / 'one', '--config.parallel.devices=0', devices=8)
  code, _, err = driver.finish(one)
  assert code == 0, err
  found, expected = losses_of(tmp_path / 'two'), losses_of(tmp_path / 'one')
  assert len(expected) == 9
  np.testing.assert_allclose(found, expected, atol=1e-3)
  result = json.loads((tmp_path / 'two/result.json').read_text())
  assert (result['timing']['processes'], result['timing']['devices']) == (2, 8)


@pytest.mark.slow
@pytest.mark.parametrize('host', [0, 1])
def test_both_end_when_a_link_goes_down(driver, hosts, tmp_path, host):
  workdir = tmp_path / 'run'
  children = hosts.start(driver, workdir, '--config.train.epochs=500')
  metrics = workdir / 'metrics.jsonl'
  try:
    deadline = time.monotonic() + 120
    while not metrics.exists() or not metrics.stat().st_size:
      assert time.monotonic() < deadline
      assert [child.poll() for child in children] == [None, None]
      time.sleep(0.1)
    hosts.unplug(host)
  finally:
    ended = end(children, workdir, BOUND)
  print(f'link of host {host}: ended after', *(f'{seconds:.1f} s' for *_, seconds in ended))
  for code, err, _ in ended:
    assert code == -signal.SIGABRT, err
    assert 'JAX distributed service detected fatal errors' in err
  assert 'tasks are unhealthy' in ended[0][1]
