"""A request to stop, from the signal to the loop that obeys it."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jax.experimental import multihost_utils

from csba_jax.runtime import distributed
from csba_jax.runtime.signals import Stopped, StopRequest


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_is_answered_at_the_next_check(number, code):
  before = signal.getsignal(number)
  with StopRequest() as stop:
    stop.check()
    assert stop.exit_code == 0
    os.kill(os.getpid(), number)
    assert stop.requested
    with pytest.raises(Stopped):
      stop.check()
    assert stop.exit_code == code
  assert signal.getsignal(number) is before


def test_a_patient_request_takes_a_second_signal():
  with StopRequest(patient=True) as stop:
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
      os.kill(os.getpid(), number)
    assert stop.requested


def program_that(does, **kwargs):
  """Starts a process of a binary, which prints a line and then runs `does`."""
  code = (
    'import os, signal, time\n'
    'from csba_jax.runtime import distributed, signals\n'
    'from csba_jax.bin import _main\n'
    f'def main():\n  print("ready", flush=True)\n{does}\n'
    '_main.run(main)\n'
  )
  child = subprocess.Popen(
    [sys.executable, '-c', code],
    env=os.environ | {'PYTHONPATH': str(Path(__file__).parents[2]), 'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert child.stdout.readline() == 'ready\n'
  return child


@pytest.mark.parametrize(('name', 'code'), [('SIGTERM', 75), ('SIGINT', 130)])
def test_before_there_is_anything_to_save_a_signal_leaves_with_its_code(name, code):
  """While a binary starts, and after its result is written."""
  child = program_that(f'  os.kill(os.getpid(), signal.{name})\n  time.sleep(60)')
  out, err = child.communicate(timeout=600)
  assert (child.returncode, out, err) == (code, '', '')


def left_after(child, number):
  """(exit code, standard error, seconds from the signal to the end)."""
  began = time.monotonic()
  child.send_signal(number)
  _, err = child.communicate(timeout=600)
  return child.returncode, err, time.monotonic() - began


@pytest.mark.slow
def test_sigterm_is_answered_while_processes_wait_for_each_other():
  """In a call of C++ that runs no Python handlers."""
  with socket.create_server(('127.0.0.1', 0)) as server:
    address = f'127.0.0.1:{server.getsockname()[1]}'  # that never answers
    launch = f'distributed.Launch(coordinator={address!r}, processes=2, process=1)'
    child = program_that(f'  import jax\n  distributed.start({launch}, print)')
    time.sleep(6)  # jax is imported, and it waits
    code, err, seconds = left_after(child, signal.SIGTERM)
  assert (code, err) == (75, '')
  assert seconds < 5


def test_a_request_takes_sigterm_over_and_gives_it_back():
  child = program_that(
    '  with signals.StopRequest() as stop:\n'
    '    while not stop.requested:\n'
    '      time.sleep(0.1)\n'
    '    time.sleep(1)\n'
    '  print("saved", flush=True)\n'
    '  os.kill(os.getpid(), signal.SIGTERM)\n'
    '  time.sleep(60)'
  )
  time.sleep(0.5)
  child.send_signal(signal.SIGTERM)
  out, err = child.communicate(timeout=300)
  assert (child.returncode, out, err) == (75, 'saved\n', '')


def test_a_request_may_be_entered_twice():
  before = signal.getsignal(signal.SIGTERM)
  with StopRequest() as stop:
    with stop:
      pass
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested
  assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_in_one_of_several_processes_is_its_code_in_all(monkeypatch):
  """In the view of each of two processes; their messages are made up."""
  said, told = [], []
  monkeypatch.setattr(distributed, 'count', lambda: 2)
  monkeypatch.setattr(distributed, 'gather', lambda text: said.append(text) or [text, ''])
  monkeypatch.setattr(multihost_utils, 'reached_preemption_sync_point', lambda _: bool(told))
  monkeypatch.setattr(os, 'kill', lambda _, number: told.append(number))
  with StopRequest() as stop:
    stop.check()
    signal.raise_signal(signal.SIGINT)
    assert told == [signal.SIGTERM]
    with pytest.raises(Stopped):
      stop.check()
  assert (stop.exit_code, said) == (130, ['2'])
  with StopRequest() as stop, pytest.raises(Stopped):
    stop.check()
  assert (stop.exit_code, said) == (75, ['2', ''])
