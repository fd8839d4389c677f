"""csba-train --config=configs/NAME.py --workdir=DIR [--config.field=value ...] [--dry_run]"""

from absl import flags

from csba_jax import config as config_lib
from csba_jax.bin import _distributed, _main

_CONFIG = _main.define_config()
_LAUNCH = _distributed.define()
flags.declare_key_flag('config')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of this run; the same again goes on.')
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'Compile without training; print parameters, FLOPs, memory and the config.'
)


def main() -> int:
  """Trains, or describes what training would be."""
  config = _main.required(_CONFIG, 'configs/digits_lt.py')
  config_lib.check(config)
  if _DRY_RUN.value:
    from csba_jax.planning import dry_run

    print(dry_run.describe(config))
    return 0
  workdir = _main.required(_WORKDIR, 'runs/digits')
  _distributed.start(_LAUNCH, config.deterministic)

  from csba_jax.report.terminal import table
  from csba_jax.runtime.signals import StopRequest
  from csba_jax.training import loop

  stop = StopRequest()
  result = loop.train_and_evaluate(config, workdir, stop)
  if result is None:
    return stop.exit_code
  _distributed.tell(f'{table.single(result)}\nworkdir: {workdir}')
  return 0


def cli() -> None:
  """Entry point of the console script."""
  _main.run(main)


if __name__ == '__main__':
  cli()
