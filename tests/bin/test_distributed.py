"""What binaries print, and when."""

from pathlib import Path

import pytest

from csba_jax.bin import _distributed
from csba_jax.errors import UserError


def test_a_result_is_printed_before_it_is_written(capsys):
  def write():
    assert capsys.readouterr().out == 'the result\n'
    return [Path('a'), Path('b')]

  _distributed.tell_and_write('the result', write)
  assert capsys.readouterr().out == 'written: a\nwritten: b\n'


def test_a_result_that_cannot_be_written_is_printed(capsys):
  def write():
    raise UserError('a workdir that can be written at x', 'Read-only file system', 'free space')

  with pytest.raises(UserError) as error:
    _distributed.tell_and_write('the result', write)
  assert capsys.readouterr().out == 'the result\n'
  assert str(error.value) == (
    'expected a workdir that can be written at x; found Read-only file system; the result was '
    'printed; to fix it: make room there, or make it writable, and start again to keep the result'
  )
