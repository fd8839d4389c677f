"""Reads files that are damaged at random: every one is read, or refused in one line.

  python tests/fuzz.py [--inputs=10000] [--seed=0] [--out=FILE.md]

Inputs are photos of all formats, manifests, weights (safetensors, and both formats of PyTorch),
validation logits and class files of a run. Each is a good file with some bytes flipped, cut out,
doubled, moved or overwritten. A problem is an exception other than the documented one, more than
SECONDS, or a read in which the peak size of the process grows to more than MEBIBYTES (growth below
an earlier peak cannot be seen). Exit code 1 where there was a problem.
"""

import argparse
import collections
import io
import json
import pickle
import platform
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image
from safetensors.numpy import save

from csba_jax.data import image_folder
from csba_jax.data.audit import audit_folder
from csba_jax.data.decoding import PILLOW_FORMATS, decode_image, without_warnings_of_pillow
from csba_jax.data.sources import Unreadable
from csba_jax.errors import UserError
from csba_jax.measure.calibration import FILE, Validation
from csba_jax.models import pretrained, torch_files
from csba_jax.run import net
from csba_jax.study.collect import hardware

SECONDS, MEBIBYTES = 20, 2048
INTERESTING = (b'\0\0\0\0', b'\xff\xff\xff\xff', b'\x7f\xff\xff\xff', b'\x80\0\0\0', b'NaN', b'-1')


class Kind(NamedTuple):
  """Inputs of one kind: good files, and what reads one of them."""

  seeds: list[bytes]
  read: Callable[[Path], object]
  name: str  # of the file
  share: float  # of all inputs


def photos() -> list[bytes]:
  """One of each format, with smooth pixels, which compress as photos do."""
  y, x = np.mgrid[:48, :64]
  pixels = np.stack([4 * x, 5 * y, (x * y) % 256], -1).astype(np.uint8)
  found = []
  for kind in PILLOW_FORMATS:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    found.append(file.getvalue())
  file = io.BytesIO()
  Image.fromarray(pixels).quantize(16).save(file, 'PNG', transparency=3)
  return [*found, file.getvalue()]


def decode(path: Path) -> None:
  """As training and prediction read a photo, and as an audit does."""
  content = path.read_bytes()
  with without_warnings_of_pillow():
    for channels in (1, 3):
      decode_image(content, channels=channels, image_size=32)


def audit(path: Path) -> None:
  """The audit of a folder of two classes with this photo in it."""
  audit_folder(path.parent.parent)


def manifest(path: Path) -> None:
  """Groups of copies in a manifest."""
  names = tuple(f'a/{i}.png' for i in range(20))
  image_folder._manifest_groups(path, 'group', 'file', names)


def class_file(path: Path) -> None:
  """Class names, counts and preprocessing of a run."""
  net.read(path.parent)


def torch_file(old: bool) -> bytes:
  """A dict of two tensors as PyTorch writes it; b'' where PyTorch is not installed."""
  try:
    import torch
  except ImportError:
    return b''
  file = io.BytesIO()
  tensors = {'conv.weight': torch.ones(4, 3, 3, 3), 'fc.bias': torch.zeros(7).half()}
  torch.save(tensors, file, _use_new_zipfile_serialization=not old)
  return file.getvalue()


def kinds() -> dict[str, Kind]:
  """All of them."""
  rng = np.random.default_rng(0)
  rows = '\n'.join(f'a/{i}.png,{i // 3}' for i in range(20))
  logits = rng.normal(size=(40, 3)).astype(np.float32)
  validation = Validation(logits, rng.integers(0, 3, 40, np.int32)).to_bytes()
  metadata = net.Metadata(('a', 'b', 'ü'), np.asarray([5, 3, 2]), (8, 8, 3), net.Preprocessing())
  tensors = {
    'layer4.1.bn2.weight': np.ones(4, np.float32),
    'conv1.weight': np.ones((2, 3, 1, 1), np.float16),
  }
  old_and_new = [content for content in map(torch_file, (True, False)) if content]
  if not old_and_new:
    old_and_new = [pickle.dumps({'a': 1})]
  return {
    'photo': Kind(photos(), decode, 'photo.png', 0.6),
    'photo in an audit': Kind(photos(), audit, 'photo.png', 0.06),
    'manifest': Kind([f'file,group\n{rows}\n'.encode()], manifest, 'm.csv', 0.1),
    'safetensors': Kind([save(tensors)], weights, 'w.safetensors', 0.08),
    'PyTorch file': Kind(old_and_new, torch_files.read_tensors, 'w.pth', 0.08),
    'validation logits': Kind([validation], logits_of, FILE, 0.04),
    'class file': Kind([json.dumps(metadata.record()).encode()], class_file, 'net.json', 0.04),
  }


def weights(path: Path) -> None:
  """Names, and tensors, of a file of weights."""
  pretrained.recognise(str(path))
  variables = {'params': {'stem': {'conv': {'kernel': np.zeros((1, 1, 3, 2), np.float32)}}}}
  pretrained.load('resnet18', str(path), variables)


def logits_of(path: Path) -> None:
  """Validation logits of a run."""
  Validation.load(path.parent, 3)


def damaged(content: bytes, rng: random.Random) -> bytes:
  """A few random changes."""
  data = bytearray(content)
  for _ in range(rng.choice((1, 1, 2, 4, 16))):
    if not data:
      break
    # headers decide most: half of the changes are among the first bytes
    at = rng.randrange(min(len(data), 64) if rng.random() < 0.5 else len(data))
    length = rng.choice((1, 2, 4, 16, len(data) // 4 + 1))
    match rng.randrange(6):
      case 0:
        data[at] ^= 1 << rng.randrange(8)
      case 1:
        del data[at : at + length]
      case 2:
        data[at:at] = data[at : at + length]
      case 3:
        data[at : at + length] = rng.randbytes(len(data[at : at + length]))
      case 4:
        data[at : at + 4] = rng.choice(INTERESTING)
      case _:
        data = data[:at]
  return bytes(data[: 1 << 20])


def peak_mebibytes() -> float:
  """The largest size that this process has had until now."""
  status = Path('/proc/self/status')
  if status.exists():  # getrusage of Linux counts what the parent had when it started this process
    found = re.search(r'^VmHWM:\s+(\d+) kB$', status.read_text(), re.MULTILINE)
    if found:
      return int(found[1]) / 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def attempt(read: Callable[[Path], object], path: Path) -> tuple[str, str]:
  """('read' or 'refused', '') or (the problem, its traceback)."""
  before, largest = time.monotonic(), peak_mebibytes()
  signal.alarm(SECONDS)
  try:
    read(path)
    said = 'read'
  except (UserError, Unreadable) as error:
    said = 'refused' if '\n' not in str(error) else f'a message of several lines: {error}'
  except BaseException as error:
    return f'{type(error).__name__}: {error}'[:200], traceback.format_exc()
  finally:
    signal.alarm(0)
  if time.monotonic() - before > SECONDS:
    return f'more than {SECONDS} s', ''
  if (peak := peak_mebibytes()) > max(MEBIBYTES, largest):
    return f'{peak:.0f} MiB', ''
  return said, ''


def hang(*_: object) -> None:
  """Ends a read that takes too long."""
  raise TimeoutError(f'more than {SECONDS} s')


def run(inputs: int, seed: int) -> tuple[dict[str, collections.Counter], list[str]]:
  """({kind: how many were read, refused, a problem}, the problems); these are printed, too."""
  rng = random.Random(seed)
  signal.signal(signal.SIGALRM, hang)
  counts: dict[str, collections.Counter] = {}
  problems: list[str] = []
  with tempfile.TemporaryDirectory() as made:
    folder = Path(made, 'photos/a')
    folder.mkdir(parents=True)
    (folder.parent / 'b').mkdir()
    for place in (folder, folder.parent / 'b'):
      (place / 'good.png').write_bytes(photos()[0])
    for name, kind in kinds().items():
      path, counts[name] = folder / kind.name, collections.Counter()
      for i in range(round(kind.share * inputs)):
        path.write_bytes(damaged(rng.choice(kind.seeds), rng))
        said, trace = attempt(kind.read, path)
        counts[name][said if said in ('read', 'refused') else 'problem'] += 1
        if said not in ('read', 'refused'):
          problems.append(f'{name} {i}: {said}')
          print(f'{problems[-1]}\n{trace}', file=sys.stderr, flush=True)
      path.unlink()
  return counts, problems


def main() -> int:
  """Damages, reads, counts."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--inputs', type=int, default=10_000)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', type=Path)
  args = parser.parse_args()
  began = time.monotonic()
  counts, problems = run(args.inputs, args.seed)
  lines = [
    f'`python tests/fuzz.py --inputs={args.inputs} --seed={args.seed}`: '
    f'{sum(sum(c.values()) for c in counts.values()):,} damaged files in '
    f'{time.monotonic() - began:.0f} s, at most {peak_mebibytes():.0f} MiB. {hardware()}, Python '
    f'{platform.python_version()}, Pillow {PIL.__version__}.',
    '',
    '| kind | read | refused | problems |',
    '| --- | --: | --: | --: |',
    *(f'| {name} | {c["read"]} | {c["refused"]} | {c["problem"]} |' for name, c in counts.items()),
    '',
    f'Problems: {"; ".join(problems) or "none"}.',
  ]
  print('\n'.join(lines))
  if args.out:
    args.out.write_text('\n'.join(lines) + '\n')
  return 1 if problems else 0


if __name__ == '__main__':
  sys.exit(main())
