"""csba-convert-weights as a user meets it."""

import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]


class Harm:
  """Calls the system when a pickle of it is loaded."""

  def __reduce__(self):
    return os.system, ('touch harm',)


def call(*arguments, cwd):
  """(exit code, standard output, standard error) of csba-convert-weights."""
  done = subprocess.run(
    [sys.executable, '-m', 'csba_jax.bin.convert_weights', *arguments],
    cwd=cwd,
    env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=120,
  )
  return done.returncode, done.stdout, done.stderr


def archive(program, numbers=b''):
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w') as content:
    content.writestr('net/data.pkl', program)
    content.writestr('net/data/0', numbers)
  return file.getvalue()


def text(words):
  return b'X' + len(words).to_bytes(4, 'little') + words.encode()


def one_tensor(name='layer.weight'):
  """A file with one tensor [2, 3], written by hand: PyTorch need not be there."""
  storage = (
    b'(' + text('storage') + b'ctorch\nFloatStorage\n' + text('0') + text('cpu') + b'K\x06tQ'
  )
  arguments = storage + b'K\x00K\x02K\x03\x86K\x01K\x02\x86\x89}'
  rebuild = b'ctorch._utils\n_rebuild_tensor_v2\n(' + arguments + b'tR'
  return archive(b'\x80\x02}' + text(name) + rebuild + b's.', np.arange(6, dtype='<f4').tobytes())


@pytest.mark.seconds
def test_names_and_numbers_stay(tmp_path):
  (tmp_path / 'net.pth').write_bytes(one_tensor())
  code, out, err = call('net.pth', '--out=net.safetensors', cwd=tmp_path)
  assert (code, err) == (0, '')
  assert out == 'written: net.safetensors (1 tensors, 6 numbers)\n'
  found = load_file(tmp_path / 'net.safetensors')
  assert list(found) == ['layer.weight']
  np.testing.assert_array_equal(found['layer.weight'], [[0, 2, 4], [1, 3, 5]])
  assert (tmp_path / 'net.safetensors').stat().st_mode & 0o777 == 0o644
  before = (tmp_path / 'net.safetensors').read_bytes()
  code, out, err = call('net.pth', '--out=net.safetensors', cwd=tmp_path)
  assert (code, out) == (1, '')
  assert 'expected a new file for --out; found net.safetensors, which exists; ' in err
  assert (tmp_path / 'net.safetensors').read_bytes() == before


WRONG = {
  'no file': (['--out=x.safetensors'], 'expected one FILE.pth; found none'),
  'no --out': (['harm.pth'], 'expected --out; found none'),
  'another ending': (['harm.pth', '--out=x.npz'], 'expected --out=FILE.safetensors; found x.npz'),
  'no folder': (['harm.pth', '--out=a/x.safetensors'], 'expected a folder for --out; found no a'),
  'file not there': (['none.pth', '--out=x.safetensors'], 'No such file or directory; to fix it: '),
  'harm': (['harm.pth', '--out=x.safetensors'], f"found '{os.system.__module__}.system', which"),
  'a name that safetensors keeps': (['meta.pth', '--out=x.safetensors'], 'found __metadata__; '),
}


@pytest.mark.seconds
@pytest.mark.parametrize('case', WRONG)
def test_one_line_says_what_is_wrong(tmp_path, case):
  (tmp_path / 'harm.pth').write_bytes(archive(pickle.dumps({'x': Harm()}, 2)))
  (tmp_path / 'meta.pth').write_bytes(one_tensor('__metadata__'))
  arguments, expected = WRONG[case]
  code, out, err = call(*arguments, cwd=tmp_path)
  assert (code, out) == (1, '')
  assert expected in err
  assert len(err.splitlines()) == 1
  assert sorted(path.name for path in tmp_path.iterdir()) == ['harm.pth', 'meta.pth']
