"""How the processes of a run start: the flags for it, and what comes before JAX is used."""

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from absl import flags

from csba_jax.errors import UserError
from csba_jax.runtime import distributed, jax_setup


def define() -> Mapping[str, flags.FlagHolder]:
  """The flags by which the processes of a run find each other; see `distributed.Launch`."""
  return {
    'mode': flags.DEFINE_enum(
      'distributed', 'auto', distributed.MODES, 'Whether to look for other processes of this run.'
    ),
    'coordinator': flags.DEFINE_string(
      'coordinator',
      '',
      'HOST:PORT of process 0. Set it where neither srun nor mpirun starts the processes.',
    ),
    'processes': flags.DEFINE_integer(
      'processes', 0, 'With --coordinator: how many processes there are.'
    ),
    'process': flags.DEFINE_integer(
      'process', -1, 'With --coordinator: the number of this process, from 0.'
    ),
    'start_timeout': flags.DEFINE_integer(
      'start_timeout', 120, 'Seconds to wait for the others at the start.'
    ),
    'peer_timeout': flags.DEFINE_integer(
      'peer_timeout', 60, 'Seconds without a sign of life after which a process counts as lost.'
    ),
  }


def launch(holders: Mapping[str, flags.FlagHolder]) -> distributed.Launch:
  """What the flags say."""
  return distributed.Launch(**{name: flag.value for name, flag in holders.items()})


def start(
  holders: Mapping[str, flags.FlagHolder], deterministic: bool = False, threads: int | None = None
) -> None:
  """Gets JAX ready, once, before anything uses a device: settings, cache, the other processes."""
  jax_setup.prepare(deterministic, threads)

  def give_up(error: UserError) -> None:
    print(f'{sys.argv[0].rsplit("/", 1)[-1]}: {error}', file=sys.stderr, flush=True)
    os._exit(1)

  distributed.start(launch(holders), give_up)

  from csba_jax.runtime import backend

  backend.start()


def compare(*holders: flags.FlagHolder) -> None:
  """Raises AgreedError in every process unless these flags are the same in all."""
  distributed.check_equal('flags', {f'--{flag.name}': flag.value for flag in holders})


def tell_and_write(text: str, write: Callable[[], Iterable[Path]]) -> None:
  """Prints a result before it is written, so that it is not lost where it cannot be; then where.

  Raises:
    UserError: it could not be written.
  """
  tell(text)
  try:
    paths = write()
  except UserError as error:
    raise UserError(
      error.expected,
      f'{error.found}; the result was printed',
      'make room there, or make it writable, and start again to keep the result',
    ) from error
  tell('\n'.join(f'written: {path}' for path in paths))


def tell(text: str) -> None:
  """Prints a result, from the first process alone."""
  if distributed.is_first():
    print(text)
