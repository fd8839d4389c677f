"""csba-diagnose --workdir=DIR [--checkpoint=best|latest|init|STEP] [--exact] [--layers=REGEX]

Measures which classes are in conflict, prints the matrix and writes it and its pictures to
DIR/conflict. For a net with BatchNorm it measures the gradient that training takes, from training
batches (--statistics=batch); for others, and with --statistics=frozen, that of the net as it is
evaluated: of every training image, or of a sample where that takes long. Where the result is an
estimate, * marks what differs from 0 with 95 % confidence.
Example: csba-diagnose --workdir=runs/digits
"""

from collections.abc import Iterable

from absl import flags

from csba_jax.bin import _distributed, _main

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a run that csba-train made.')
_CHECKPOINT = flags.DEFINE_string('checkpoint', 'best', 'Which one. best: on validation images.')
_EXACT = flags.DEFINE_bool(
  'exact', None, 'Take every training image, however long it takes; --noexact: a sample.'
)
_TARGET = flags.DEFINE_enum(
  'target', 'train', ['train', 'population'], 'Intervals for the training set, or its population.'
)
_IMAGES = flags.DEFINE_integer('images', 64, 'Images of each class in the sample.')
_FOLDS = flags.DEFINE_integer('folds', 8, 'Parts of the sample, for the intervals.')
_STATISTICS = flags.DEFINE_enum(
  'statistics',
  'auto',
  ['auto', 'batch', 'frozen'],
  'Of BatchNorm: of each batch, as in training, or running ones (frozen), as evaluated.',
)
_BATCHES = flags.DEFINE_integer('batches', 64, 'With --statistics=batch: how many batches.')
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the sample.', lower_bound=0)
_LAYERS = flags.DEFINE_string('layers', None, 'Measure only parameters whose names match.')
_LAUNCH = _distributed.define()
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Folder of the data, if it has moved.')


def main() -> int:
  """Measures the class-gradient conflict of a run's net; prints it and writes conflict/."""
  workdir = _main.required(_WORKDIR, 'runs/digits')
  of_sample, statistics = (_TARGET, _IMAGES, _FOLDS), _STATISTICS.value
  of_images = (_EXACT, *of_sample)
  if statistics == 'auto' and any(flag.present for flag in of_images):
    statistics = 'frozen'  # which alone reads them
  _check_flags(statistics, of_images)
  exact = _EXACT.value
  if exact:
    _main.without(of_sample, '--exact')
  elif any(flag.present for flag in of_sample):
    exact = False
  _distributed.start(_LAUNCH)
  _distributed.compare(_WORKDIR, _CHECKPOINT, _STATISTICS, *of_images, _BATCHES, _SEED, _LAYERS)

  from csba_jax.gradients.conflict import Conflict
  from csba_jax.measure import diagnose, training_conflict
  from csba_jax.report.terminal import diagnosis
  from csba_jax.run import restore

  run = restore.load_run(workdir, _CHECKPOINT.value, _DATA_DIR.value)
  statistics = training_conflict.choose(statistics, run.net, run.config)
  _check_flags(statistics, of_images)

  def measured(tick: _main.Tick) -> Conflict:
    if statistics == 'batch':
      batches = training_conflict.Batches(_BATCHES.value, _SEED.value)
      return training_conflict.of_run(run, _CHECKPOINT.value, batches, _LAYERS.value, tick)
    options = {flag.name: flag.value for flag in (*of_sample, _SEED)}
    return diagnose.diagnose_run(run, diagnose.Sampling(exact, **options), _LAYERS.value, tick)

  found = _main.unless_stopped(measured, 'stopped: nothing was written')
  _distributed.tell_and_write(diagnosis.describe(found), lambda: diagnose.save(found, run.workdir))
  return 0


def _check_flags(statistics: str, of_images: Iterable[flags.FlagHolder]) -> None:
  """Refuses flags that nothing reads with these statistics."""
  unread = {'batch': of_images, 'frozen': [_BATCHES]}.get(statistics, [])
  _main.without(unread, f'--statistics={statistics}')


def cli() -> None:
  """Entry point of the console script."""
  _main.run(main)


if __name__ == '__main__':
  cli()
