"""A training run of seconds, as a process that can end itself at a chosen place.

  python tests/driver.py WORKDIR [--end=PLACE:N] [--signal=KILL|TERM|INT|none]
    [--config.field=value ...] [--float64] [--trace=FILE]
    [--coordinator=HOST:PORT --processes=N --process=I [--peer_timeout=S]]

--end: at its N-th arrival at a PLACE of `PLACES` the process sends itself the signal; with
--signal=none it raises a UserError instead. A run that finishes without that arrival fails.
--trace: the process writes every place that it reaches to a file, for a parent that ends it.
--float64: parameters and computation are float64, which JAX_ENABLE_X64 must allow.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from csba_jax import config
from csba_jax.bin import _main
from csba_jax.data import pipeline
from csba_jax.errors import UserError
from csba_jax.measure import evaluate, probe, snapshots
from csba_jax.models import classifiers, layers, multibranch, registry
from csba_jax.run import checkpoint, records
from csba_jax.run import state as state_lib
from csba_jax.run import workdir as workdir_lib
from csba_jax.runtime import distributed, jax_setup
from csba_jax.runtime.signals import StopRequest
from csba_jax.training import loop

EPOCHS, STEPS_PER_EPOCH = 3, 12


class Tiny(nn.Module):
  """A perceptron with a norm: it compiles in a second and has every kind of state."""

  num_classes: int
  classifier: classifiers.Classifier = classifiers.LINEAR
  head = classifiers.HEAD

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(16, name='hidden')(x.reshape(x.shape[0], -1))
    x = nn.relu(layers.BatchNorm(use_running_average=not train, name='norm')(x))
    return classifiers.classify(x[:, None], self.num_classes, self.classifier, 'none', jnp.float32)


def build_tiny(num_classes, *_, classifier, depth):
  return Tiny(num_classes, classifier)


registry.MODELS['tiny'] = registry.Model(build_tiny)


def build_wide_numbers(num_classes, image_shape, attention, width, _, **others):
  return multibranch.build(num_classes, image_shape, attention, width, jnp.float64, **others)


def in_float64():
  """Makes every new state float64, and registers a net that computes in float64.

  Use it only in a new process: in this one another test reads the whole table of models.
  """
  registry.MODELS['multibranch64'] = registry.Model(build_wide_numbers, ('branches',))
  initial = state_lib._initial

  def wide(*args):
    state = initial(*args)
    return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, state)

  state_lib._initial = wide
  state_lib._compiled_initial = jax.jit(wide, static_argnums=(0, 1, 2, 3))


def tiny_config(**overrides):
  """Digits-LT with the perceptron; overrides are written train__epochs=1."""
  c = config.default()
  c.data.imbalance_factor = 20.0
  c.data.test_fraction = 0.3
  c.augment.crop_padding = 1
  c.model.name, c.model.attention = 'tiny', 'none'
  c.train.epochs, c.train.batch_size, c.train.log_every = EPOCHS, 32, 5
  c.train.learning_rate = 0.1
  c.diagnostics.statistics = 'frozen'
  c.parallel.devices = 1  # of the eight that the suite pretends to have
  for name, value in overrides.items():
    section, _, field = name.rpartition('__')
    target = c[section] if section else c
    target[field] = value
  return c


# (owner, name, place before each call, place after it). A module that imports a function by name
# calls its own name for it: name that module as the owner.
WRAPPED = (
  (pipeline, 'load', 'before-load', 'after-load'),
  (workdir_lib.Workdir, 'begin', 'before-config', 'after-config'),
  (probe.ImageProbe, 'measure', 'before-diagnosis', 'after-diagnosis'),
  (snapshots, 'snapshot', 'before-snapshot', 'after-snapshot'),
  (workdir_lib.Workdir, 'append_metrics', 'before-line', 'after-line'),
  (checkpoint.Checkpoints, 'save', 'before-save', 'saving'),
  (records.Records, 'wait', 'before-last-wait', 'all-saved'),
  (evaluate, 'evaluate', 'before-evaluation', 'after-evaluation'),
  (workdir_lib.Workdir, 'write_result', 'before-result', 'after-result'),
)
STEPS = (loop, 'compiled_steps', 'before-step', 'after-step')  # it returns the function to wrap
PLACES = tuple(place for row in (*WRAPPED, STEPS) for place in row[2:])


def places(arrive, put=setattr):
  """Calls `arrive(place)` at each of PLACES from now on; AttributeError where a name is gone.

  put: monkeypatch.setattr in a process that goes on with other tests.
  """

  def wrap(function, before, after):
    def wrapped(*args, **kwargs):
      arrive(before)
      result = function(*args, **kwargs)
      arrive(after)
      return result

    return wrapped

  for owner, name, before, after in WRAPPED:
    put(owner, name, wrap(getattr(owner, name), before, after))
  owner, name, before, after = STEPS
  steps = getattr(owner, name)()
  put(owner, name, lambda: wrap(steps, before, after))


def start(workdir, *arguments, devices=1, program=(__file__,), **kwargs):
  """Starts the driver as a child process with so many devices; its output is captured."""
  command = [sys.executable, *program, str(workdir), *arguments]
  flags = '--xla_backend_optimization_level=1'  # as conftest.py has it, to the bit
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(Path(__file__).parents[1]),
    'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count={devices}',
  }
  if '--float64' in arguments:
    environment['JAX_ENABLE_X64'] = '1'
  return subprocess.Popen(
    command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs
  )


def free_address():
  """An address of this host with a free port."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{free.getsockname()[1]}'


def start_all(workdir, *arguments, processes=2, devices=4, own=(), **kwargs):
  """Starts several processes of one run; `own` {process: [its arguments]}."""
  meet = (
    f'--coordinator={free_address()}',
    f'--processes={processes}',
    '--config.parallel.devices=0',
  )
  return [
    start(
      workdir, *arguments, *meet, f'--process={i}', *dict(own).get(i, ()), devices=devices, **kwargs
    )
    for i in range(processes)
  ]


def finish(process):
  """(exit code, standard output, standard error) of a child."""
  out, err = process.communicate(timeout=600)
  return process.returncode, out, err


def without_gloo(lines):
  """Without empty lines and Gloo's: its threads print at once, and break up each other's lines."""
  return [
    line for line in lines if line.strip() and '[Gloo]' not in line and 'peer ranks' not in line
  ]


def records_of(workdir):
  """All that must be reproducible: config, metric lines and result, without timing."""
  workdir = Path(workdir)
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  result = json.loads((workdir / 'result.json').read_text())
  for record in (*lines, result):
    del record['timing']
  return json.loads((workdir / 'config.json').read_text()), lines, result


def die_at(end, number):
  """The process sends itself a signal, or fails, at an arrival that is written PLACE:N.

  Returns a function that says whether that arrival is still to come.
  """
  place, count = end.split(':')
  if place not in PLACES:
    raise ValueError(f'--end={end}: {place} is not among {", ".join(PLACES)}')
  left = int(count)

  def arrive(at):
    nonlocal left
    left -= at == place
    if at != place or left:
      return
    if number is None:
      raise UserError('a disk', 'none', 'buy one')
    os.kill(os.getpid(), number)

  places(arrive)
  return lambda: left > 0


def tell(trace):
  """The process writes every place that it reaches, one a line."""
  file = open(trace, 'a')  # noqa: SIM115
  print('start', file=file, flush=True)
  places(lambda place: print(place, file=file, flush=True))


def give_up(error):
  print(f'driver.py: {error}', file=sys.stderr, flush=True)
  os._exit(1)


def main():
  workdir, *arguments = sys.argv[1:]
  if '--float64' in arguments:
    arguments.remove('--float64')
    in_float64()
  options = dict(argument.removeprefix('--').split('=', 1) for argument in arguments)
  launch = {
    name: int(options.pop(name))
    for name in ('processes', 'process', 'peer_timeout', 'start_timeout')
    if name in options
  }
  launch['coordinator'] = options.pop('coordinator', '')
  trace = options.pop('trace', None)
  end, number = options.pop('end', None), options.pop('signal', 'KILL')
  overrides = {
    name.removeprefix('config.').replace('.', '__'): json.loads(value)
    for name, value in options.items()
  }
  sys.argv[1:] = []

  def train_tiny():
    jax_setup.prepare()
    distributed.start(distributed.Launch(**launch), give_up)
    to_come = lambda: False  # noqa: E731
    if end:  # not before: it asks for the devices
      to_come = die_at(end, None if number == 'none' else getattr(signal, f'SIG{number}'))
    if trace:
      tell(trace)
    stop = StopRequest()
    loop.train_and_evaluate(tiny_config(**overrides), workdir, stop)
    if to_come() and not stop.exit_code:
      raise RuntimeError(f'the run is finished, and --end={end} never came')
    return stop.exit_code

  _main.run(train_tiny)


if __name__ == '__main__':
  main()
