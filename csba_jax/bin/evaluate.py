"""csba-evaluate --workdir=DIR [--checkpoint=best|latest|init|STEP] [--split=test|val]

Evaluates a checkpoint of a run. Prints every metric and the confusion matrix, which is drawn too:
DIR/confusion_SPLIT_stepSTEP.png.
Example: csba-evaluate --workdir=runs/digits --checkpoint=latest
"""

from absl import flags

from csba_jax.bin import _distributed, _main

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a run that csba-train made.')
_CHECKPOINT = flags.DEFINE_string('checkpoint', 'best', 'Which one. best: on validation images.')
_SPLIT = flags.DEFINE_enum('split', 'test', ['test', 'val'], 'Which part of the data.')
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Folder of the data, if it has moved.')

_LAUNCH = _distributed.define()
_TAU = flags.DEFINE_float(
  'post_hoc_tau',
  None,
  'Strength of the logit adjustment of the predictions. Default: that of the run.',
)


def main() -> int:
  """Evaluates a checkpoint of a run, prints every metric, and draws the confusion matrix."""
  workdir = _main.required(_WORKDIR, 'runs/digits', computes=True)
  _distributed.start(_LAUNCH)
  _distributed.compare(_WORKDIR, _CHECKPOINT, _SPLIT, _TAU)

  from csba_jax.measure import evaluate
  from csba_jax.report.terminal import confusion, predictions, table
  from csba_jax.runtime import distributed
  from csba_jax.runtime.progress import say
  from csba_jax.runtime.signals import Stopped, StopRequest

  stop = StopRequest()
  try:
    result = evaluate.evaluate_run(
      workdir, _CHECKPOINT.value, _SPLIT.value, _DATA_DIR.value, _TAU.value, stop
    )
  except Stopped:
    say('stopped')
    return stop.exit_code
  where = f'{_SPLIT.value} part, checkpoint of step {result["checkpoint_step"]} in {workdir}'
  said = [table.single(result), '', confusion.describe(result), where]
  said += predictions.trust(result['trust'])
  _distributed.tell('\n'.join(said))
  if distributed.is_first():
    say(evaluate.draw_confusion(result, workdir, _SPLIT.value))
  return 0


def cli() -> None:
  """Entry point of the console script."""
  _main.run(main)


if __name__ == '__main__':
  cli()
