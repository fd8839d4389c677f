"""csba-diagnose --workdir=DIR [--checkpoint=best|latest|init|STEP] [--exact] [--layers=REGEX]

Measures which classes are in conflict, prints the matrix and writes it and its pictures to
DIR/conflict. Without --exact it takes a sample of the training images, and marks with * what
differs from 0 with 95 % confidence.
Example: csba-diagnose --workdir=runs/digits --exact
"""

from absl import flags

from csba_jax.bin import _distributed, _main

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a run that csba-train made.')
_CHECKPOINT = flags.DEFINE_string('checkpoint', 'best', 'Which one. best: on validation images.')
_EXACT = flags.DEFINE_bool('exact', False, 'Use every training image: no sampling error.')
_TARGET = flags.DEFINE_enum(
  'target',
  'train',
  ['train', 'population'],
  'What the intervals are about: the training set itself, or what it is a sample of.',
)
_IMAGES = flags.DEFINE_integer('images', 64, 'Images of each class in the sample.')
_FOLDS = flags.DEFINE_integer('folds', 8, 'Parts of the sample, for the intervals.')
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the sample.', lower_bound=0)
_LAYERS = flags.DEFINE_string('layers', None, 'Measure only parameters whose names match.')
_LAUNCH = _distributed.define()
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Folder of the data, if it has moved.')


def main() -> int:
  """Measures the class-gradient conflict of a run's net; prints it and writes conflict/."""
  workdir = _main.required(_WORKDIR, 'runs/digits')
  _distributed.start(_LAUNCH)
  _distributed.compare(_WORKDIR, _CHECKPOINT, _EXACT, _TARGET, _IMAGES, _FOLDS, _SEED, _LAYERS)

  from csba_jax.measure import diagnose
  from csba_jax.report.terminal import diagnosis
  from csba_jax.run import restore
  from csba_jax.runtime.progress import WorkBar, say
  from csba_jax.runtime.signals import Stopped, StopRequest

  sample = diagnose.Sampling(_EXACT.value, _TARGET.value, _IMAGES.value, _FOLDS.value, _SEED.value)
  run = restore.load_run(workdir, _CHECKPOINT.value, _DATA_DIR.value)
  with StopRequest() as stop:
    try:
      stop.check()  # a signal to one of several processes has waited for this
      with WorkBar(stop.check) as bar:
        conflict = diagnose.diagnose_run(run, sample, _LAYERS.value, bar.update)
    except Stopped:
      say('stopped: nothing was written')
      return stop.exit_code
    paths = diagnose.save(conflict, run.workdir)
  _distributed.tell(
    '\n'.join([diagnosis.describe(conflict), *(f'written: {path}' for path in paths)])
  )
  return 0


def cli() -> None:
  """Entry point of the console script."""
  _main.run(main)


if __name__ == '__main__':
  cli()
