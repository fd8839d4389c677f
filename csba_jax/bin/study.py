"""csba-study --config=STUDY --workdir=DIR [--jobs=2] [--shard=i/n] [--config.FIELD=VALUE ...]

Trains every run of a study that is missing: variants x methods x seeds. csba-report reads DIR.
Example: csba-study --config=study_digits --workdir=runs/my_study --jobs=2
"""

import shlex
import sys

from absl import flags

from csba_jax.bin import _main

_CONFIG = _main.define_config('Study', 'study_digits')
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the study. Give the same command again to continue a study.'
)
_JOBS = flags.DEFINE_integer('jobs', 1, 'How many runs to train at a time. They share the cores.')
_SHARD = flags.DEFINE_string(
  'shard', '0/1', 'Train only part i of n, counted from 0, for array jobs.'
)
_KEEP_RUNS = flags.DEFINE_bool(
  'keep_runs', False, 'Keep the workdirs of finished runs, under DIR/runs.'
)
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'List the runs and train none.')

_LIST_FIELDS = flags.DEFINE_bool(*_main.LIST_FIELDS)


def main() -> int:
  """Does the runs that are missing."""
  if _LIST_FIELDS.value:
    from csba_jax.report.terminal import fields

    print(fields.of_study(_CONFIG.value))
    return 0
  config = _main.required(_CONFIG, 'study_digits')

  from csba_jax.runtime.signals import StopRequest
  from csba_jax.study import planned, runner

  if _DRY_RUN.value:
    print(planned.describe(config, _SHARD.value))
    return 0
  workdir = _main.required(_WORKDIR, 'runs/study')
  command = shlex.join(['csba-study', *sys.argv[1:]])
  with StopRequest() as stop:
    ended = runner.run_study(
      config, workdir, stop, _SHARD.value, _JOBS.value, _KEEP_RUNS.value, command
    )
  print(f'{ended.done} runs done, {ended.failed} failed, {ended.missing} missing in {workdir}')
  if stop.requested:
    return stop.exit_code
  return 1 if ended.failed or ended.missing else 0


def cli() -> None:
  """Entry point of the console script."""
  _main.run(main)


if __name__ == '__main__':
  cli()
