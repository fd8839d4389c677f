"""csba-train --config=RECIPE|--data=FOLDER --workdir=DIR [--config.FIELD=VALUE ...] [--dry_run]

Trains a net and evaluates it once on the test part. With --data it looks at a folder of photos,
CLASS/photo.jpg, as csba-audit does, and chooses the settings for it and for this machine.
Example: csba-train --config=digits_lt --workdir=runs/digits --config.model.attention=none
"""

from absl import flags

from csba_jax import config as config_lib
from csba_jax.bin import _distributed, _main, _photos

_CONFIG = _main.define_config('Recipe', 'digits_lt')
_LAUNCH = _distributed.define()
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run. Give the same command again to continue a run.'
)
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'Do not train. Print parameters, FLOPs, memory and the config.'
)

_LIST_FIELDS = flags.DEFINE_bool(*_main.LIST_FIELDS)


def main() -> int:
  """Trains, or describes what training would be."""
  if _LIST_FIELDS.value:
    from csba_jax.report.terminal import fields

    print(fields.of_run(_CONFIG.value))
    return 0
  config = _main.required(_CONFIG, 'digits_lt', computes=not _DRY_RUN.value)
  config = _photos.with_settings(config, _WORKDIR, _DRY_RUN.value, _distributed.launch(_LAUNCH))
  config_lib.check(config)
  if _DRY_RUN.value:
    from csba_jax.planning import dry_run

    print(dry_run.describe(config))
    return 0
  workdir = _main.required(_WORKDIR, 'runs/digits')

  from csba_jax.run.workdir import threads_of

  _distributed.start(_LAUNCH, config.deterministic, threads_of(workdir))

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
  _main.run(main, recipes=_photos.RECIPES)


if __name__ == '__main__':
  cli()
