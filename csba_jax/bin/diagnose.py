"""csba-diagnose --workdir=DIR [--checkpoint=best|latest|init|STEP] [--exact] [--layers=REGEX]

Measures which classes are in conflict, prints the matrix and writes it and its pictures to
DIR/conflict. For a net with BatchNorm it measures the gradient that training takes, from training
batches (--statistics=batch); for others, and with --statistics=frozen, that of the net as it is
evaluated: of every training image, or of a sample where that takes long. Where the result is an
estimate, * marks what differs from 0 with 95 % confidence. It ends in advice, which the validation
images and the conflict give: what the problem is, and which training to try next.
Example: csba-diagnose --workdir=runs/digits
"""

from absl import flags

from csba_jax.bin import _distributed, _main, _sample

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a run that csba-train made.')
_CHECKPOINT = flags.DEFINE_string('checkpoint', 'best', 'Which one. best: on validation images.')
_LAYERS = flags.DEFINE_string('layers', None, 'Measure only parameters whose names match.')
_LAUNCH = _distributed.define()
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Folder of the data, if it has moved.')


def main() -> int:
  """Measures the class-gradient conflict of a run's net; prints it and writes conflict/."""
  workdir = _main.required(_WORKDIR, 'runs/digits', computes=True)
  _sample.check()
  _distributed.start(_LAUNCH)
  _distributed.compare(_WORKDIR, _CHECKPOINT, *_sample.FLAGS, _LAYERS)

  from csba_jax.analysis.advice import of_run, rules
  from csba_jax.gradients.conflict import Conflict
  from csba_jax.measure import diagnose, training_conflict
  from csba_jax.report.terminal import advice, diagnosis
  from csba_jax.run import restore

  diagnose.check_layers(_LAYERS.value, workdir)
  run = restore.load_run(workdir, _CHECKPOINT.value, _DATA_DIR.value)
  statistics = training_conflict.choose(_sample.statistics(), run.net, run.config)
  _sample.check(statistics)

  def measured(tick: _main.Tick) -> Conflict:
    if statistics == 'batch':
      batches = training_conflict.Batches(**_sample.of_batches())
      return training_conflict.of_run(run, _CHECKPOINT.value, batches, _LAYERS.value, tick)
    images = diagnose.Sampling(**_sample.of_images())
    return diagnose.diagnose_run(run, images, _LAYERS.value, tick)

  found = _main.unless_stopped(measured, 'stopped: nothing was written')
  _distributed.tell_and_write(diagnosis.describe(found), lambda: diagnose.save(found, run.workdir))
  evidence = of_run.evidence_of(run, found)
  _distributed.tell(advice.describe(rules.advise(evidence), workdir))
  return 0


def cli() -> None:
  """Entry point of the console script."""
  _main.run(main)


if __name__ == '__main__':
  cli()
