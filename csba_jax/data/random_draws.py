"""Random numbers that depend only on a key: the same on every machine and NumPy version."""

import hashlib
import json

import numpy as np


def permutation(words: tuple, n: int) -> np.ndarray:
  """A permutation of 0..n-1 that depends only on `words`, on every machine and NumPy version.

  It is the stable argsort of n raw 64-bit outputs of Philox. The key of Philox is the first 128
  bits of the SHA-256 of `words` as JSON. NumPy guarantees the raw stream of a bit generator, but
  not the methods of Generator.

  Args:
    words: the key, ints and strings such as (seed, 'train', epoch).
    n: length.

  Returns:
    [n] int64.
  """
  return np.argsort(_raw(words, n), kind='stable').astype(np.int64)


def draws(words: tuple, n: int, size: int) -> np.ndarray:
  """`size` draws from 0..n-1 with replacement that depend only on `words`.

  They are raw outputs as in `permutation`, modulo n; probabilities differ by n / 2**64 at most.

  Returns:
    [size] int64.
  """
  return (_raw(words, size) % np.uint64(n)).astype(np.int64)


def uniforms(words: tuple, size: int) -> np.ndarray:
  """`size` numbers in [0, 1), multiples of 2**-53, that depend only on `words`.

  Returns:
    [size] float64.
  """
  return (_raw(words, size) >> np.uint64(11)) * 2.0**-53


def _raw(words: tuple, size: int) -> np.ndarray:
  digest = hashlib.sha256(json.dumps(words, default=int).encode()).digest()
  return np.random.Philox(key=int.from_bytes(digest[:16], 'little')).random_raw(size)
