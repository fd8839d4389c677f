"""Standard streams that are closed, full, or of another encoding: no run ends because of them."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from csba_jax.runtime import console, progress

ROOT = Path(__file__).parents[2]


class Full(io.StringIO):
  """A file on a full disk: some calls fail, with an error of their own."""

  def __init__(self):
    super().__init__()
    self.calls = 0

  def write(self, text):
    del text
    self.calls += 1
    raise OSError(28, f'No space left on device, call {self.calls}')

  flush = write_through = lambda self: self.write('')


def test_what_cannot_be_written_is_dropped_and_the_first_error_kept():
  stream = console.Forgiving(Full())
  print('a line', file=stream, flush=True)
  assert stream.error.strerror == 'No space left on device, call 1'
  closed = io.StringIO()
  closed.close()
  stream = console.Forgiving(closed)
  print('a line', file=stream, flush=True)
  assert 'closed' in str(stream.error)
  assert not stream.isatty()
  stream = console.Forgiving(None)  # what Python has where the descriptor is closed
  print('a line', file=stream, flush=True)
  assert stream.error is None
  assert not stream.isatty()


def test_characters_that_the_encoding_lacks_become_escapes():
  raw = io.BytesIO()
  stream = console.Forgiving(io.TextIOWrapper(raw, 'ascii'))
  print('Straße 犬', file=stream, flush=True)
  assert raw.getvalue() == b'Stra\\xdfe \\u72ac\n'
  assert stream.error is None
  assert stream.encoding == 'ascii'


@pytest.mark.parametrize('stream', [None, Full()])
def test_progress_goes_on_where_nobody_can_read_it(monkeypatch, stream):
  monkeypatch.setattr(sys, 'stderr', stream)
  progress.say('a line')
  with progress.TrainingBar(2, 0) as bar, progress.WorkBar() as work:
    bar.update(1, 0.5, 100.0)
    bar.update(2, 0.5, 100.0)
    work.update(1, 2)
  assert stream is None or stream.calls


def child(program, closed=(), **streams):
  """(exit code, standard output, standard error) of Python code that secures its streams."""
  close = ' '.join(f'{number}>&-' for number in closed)
  python = [sys.executable, '-c', f'from csba_jax.runtime import console\n{program}']
  command = ['sh', '-c', f'exec "$@" {close}', 'sh', *python]
  plain = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
  process = subprocess.Popen(
    command, text=True, env=os.environ | {'PYTHONPATH': str(ROOT)}, **plain | streams
  )
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


SPEAK = """
import sys
console.secure('csba-train')
file = open('/dev/null')
print('progress', file=sys.stderr, flush=True)
print('result', file.fileno() > 2)
sys.exit(75)
"""


@pytest.mark.parametrize('closed', [(0,), (2,), (0, 2)])
def test_a_closed_stream_is_nothing_to_a_command_and_no_file_takes_its_place(closed):
  code, out, err = child(SPEAK, closed)
  assert (code, out) == (75, 'result True\n')
  assert err == ('' if 2 in closed else 'progress\n')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_full_standard_error_or_output():
  with open('/dev/full', 'w') as full:
    code, out, _ = child(SPEAK, stderr=full)
    assert (code, out) == (75, 'result True\n')
    code, _, err = child(SPEAK, stdout=full)
  assert code == 1
  assert err == (
    'progress\ncsba-train: expected a standard output with room for the result; found No space '
    'left on device; to fix it: send it elsewhere and start the same command again\n'
  )


def test_a_reader_that_leaves_is_told_nothing():
  reader, writer = os.pipe()
  os.close(reader)
  code, _, err = child(SPEAK, stdout=writer)
  os.close(writer)
  assert (code, err) == (1, 'progress\n')
