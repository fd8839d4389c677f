"""csba-train --config=configs/NAME.py --workdir=DIR [--config.field=value ...] [--dry_run]"""

from absl import flags

from csba_jax import config as config_lib
from csba_jax.bin import launch, run

_CONFIG = run.define_config()
_LAUNCH = launch.define()
flags.declare_key_flag('config')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of this run; the same again goes on.')
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'Compile without training; print parameters, FLOPs, memory and the config.'
)


def main() -> int:
  """Trains, or describes what training would be."""
  config = run.required(_CONFIG, 'configs/digits_lt.py')
  config_lib.check(config)
  if _DRY_RUN.value:
    from csba_jax import dry_run

    print(dry_run.describe(config))
    return 0
  workdir = run.required(_WORKDIR, 'runs/digits')
  launch.start(_LAUNCH, config.deterministic)

  from csba_jax import train
  from csba_jax.report import table
  from csba_jax.signals import StopRequest

  stop = StopRequest()
  result = train.train_and_evaluate(config, workdir, stop)
  if result is None:
    return stop.exit_code
  launch.tell(f'{table.single(result)}\nworkdir: {workdir}')
  return 0


def cli() -> None:
  """Entry point of the console script."""
  run.run(main)


if __name__ == '__main__':
  cli()
