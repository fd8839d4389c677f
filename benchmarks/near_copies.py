"""Copies in a folder of photos against a manifest that names them, and the time of the search.

  python -m benchmarks.near_copies --dir=PHOTOS [--manifest=manifest.csv] [--hashes=100000] \
    [--cifar=DIR]

It prints, of the manifest's groups of identical originals and of all its groups, the share that
`csba_jax.data.audit` has in one set; the pairs of photos that it puts together and the manifest
does not; with --cifar the groups among 5,000 images, which have no manifest: look at them; and the
seconds of the search among random hashes, of which a tenth has a near one.
"""

import csv
import itertools
import time
from pathlib import Path

import numpy as np
from absl import app, flags

from csba_jax.data import near_copies
from csba_jax.data.audit import audit_folder
from csba_jax.data.tfds_source import TfdsSource

CIFAR_IMAGES = 5_000

_DIR = flags.DEFINE_string('dir', None, 'Folder of CLASS/photo files.', required=True)
_MANIFEST = flags.DEFINE_string(
  'manifest', 'manifest.csv', 'In it: file, original_sha1, dup_group.'
)
_CIFAR = flags.DEFINE_string('cifar', None, 'Folder of CIFAR-10 as TFDS prepares it.')
_HASHES = flags.DEFINE_integer('hashes', 100_000, 'Number of random hashes.', 1)


def groups(rows: list[dict], column: str) -> list[set[str]]:
  """Files of each value of a column, of those with two or more."""
  found: dict[str, set[str]] = {}
  for row in rows:
    if row[column]:
      found.setdefault(row[column], set()).add(row['file'])
  return [files for files in found.values() if len(files) > 1]


def pairs(sets: list[set[str]]) -> set[tuple[str, str]]:
  """All pairs of files that are in one set."""
  return {pair for files in sets for pair in itertools.combinations(sorted(files), 2)}


def random_hashes(n: int) -> np.ndarray:
  """Distinct random hashes; each tenth is one of the others with up to DISTANCE bits flipped."""
  rng = np.random.default_rng(0)
  hashes = rng.integers(0, 2**64, n, dtype=np.uint64)
  for i in range(0, n, 10):
    flipped = rng.choice(near_copies.BITS, rng.integers(1, near_copies.DISTANCE + 1), replace=False)
    hashes[i] = hashes[(i + 1) % n] ^ np.uint64(sum(1 << int(bit) for bit in flipped))
  return np.unique(hashes)


def print_cifar(folder: str) -> None:
  """Groups among the first test images, by their names."""
  source = TfdsSource('cifar10', 'test', folder)
  looks = [near_copies.look(source[i]['image']) for i in range(CIFAR_IMAGES)]
  group_of = near_copies.groups(
    near_copies.Looks(np.asarray([h for h, _ in looks]), np.stack([small for _, small in looks]))
  )
  several = np.flatnonzero(np.bincount(group_of) > 1)
  print(f'CIFAR-10, {CIFAR_IMAGES} test images: {len(several)} groups')
  for group in several:
    print('  ' + ' = '.join(source.names[i] for i in np.flatnonzero(group_of == group)))


def main(_) -> None:
  """Prints the numbers."""
  begin = time.perf_counter()
  audit = audit_folder(_DIR.value)
  print(f'{len(audit.names)} photos in {time.perf_counter() - begin:.1f} s')
  with (Path(_DIR.value) / _MANIFEST.value).open(newline='') as file:
    rows = list(csv.DictReader(file))
  sets = [set(names) for names in audit.copies]
  for name, column in (('identical originals', 'original_sha1'), ('all groups', 'dup_group')):
    wanted = groups(rows, column)
    found = sum(any(files <= s for s in sets) for files in wanted)
    print(f'{name}: {found} of {len(wanted)} in one set')
  others = sorted(pairs(sets) - pairs(groups(rows, 'dup_group')))
  print(f'pairs in one set: {len(pairs(sets))}, of which not in the manifest: {len(others)}')
  for one, two in others:
    print(f'  {one} = {two}')
  if _CIFAR.value:
    print_cifar(_CIFAR.value)
  hashes = random_hashes(_HASHES.value)
  begin = time.perf_counter()
  found_pairs = near_copies.hash_pairs(hashes, near_copies.DISTANCE)
  seconds = time.perf_counter() - begin
  print(f'{len(hashes)} hashes: {len(found_pairs)} pairs in {seconds:.1f} s')


if __name__ == '__main__':
  app.run(main)
