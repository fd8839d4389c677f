"""Random numbers that depend on words alone: the same on every machine and NumPy version."""

import hashlib
import json

import numpy as np


def permutation(words: tuple, n: int) -> np.ndarray:
  """A permutation of 0..n-1 that depends on the words alone, on every machine and NumPy version.

  The stable argsort of n raw 64-bit outputs of Philox, keyed with the first 128 bits of the SHA-256
  of the words as JSON. NumPy promises the raw stream of a bit generator, not Generator's methods.

  Args:
    words: ints and strings that name this permutation, such as (seed, 'train', epoch).
    n: length.

  Returns:
    [n] int64.
  """
  return np.argsort(_raw(words, n), kind='stable').astype(np.int64)


def draws(words: tuple, n: int, size: int) -> np.ndarray:
  """`size` draws from 0..n-1 with replacement, which depend on the words alone.

  Raw outputs as in `permutation`, modulo n: uneven by n / 2**64 at most.

  Returns:
    [size] int64.
  """
  return (_raw(words, size) % np.uint64(n)).astype(np.int64)


def uniforms(words: tuple, size: int) -> np.ndarray:
  """`size` numbers in [0, 1), multiples of 2**-53, which depend on the words alone.

  Returns:
    [size] float64.
  """
  return (_raw(words, size) >> np.uint64(11)) * 2.0**-53


def _raw(words: tuple, size: int) -> np.ndarray:
  digest = hashlib.sha256(json.dumps(words, default=int).encode()).digest()
  return np.random.Philox(key=int.from_bytes(digest[:16], 'little')).random_raw(size)
