"""A request to stop, from the signal to the loop that answers it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from csba_jax.signals import Stopped, StopRequest


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


def test_before_there_is_anything_to_save_sigterm_leaves_with_its_code():
  """While a binary starts, and after its result is written: started again it goes on."""
  code = (
    'import os, signal, time\n'
    'from csba_jax.bin import run\n'
    'run.run(lambda: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60))\n'
  )
  root = Path(__file__).parents[1]
  found = subprocess.run(
    [sys.executable, '-c', code],
    env=os.environ | {'PYTHONPATH': str(root)},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert (found.returncode, found.stdout, found.stderr) == (75, '', '')
