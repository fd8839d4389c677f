"""A request to stop, from the signal to the loop that answers it."""

import os
import signal

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
