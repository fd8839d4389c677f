"""csba-predict PHOTOS --workdir=DIR [--out=FILE.csv|FILE.jsonl] [--min_confidence=P]

Predicts the classes of a photo, or of all photos in a folder, with the net of a run. The training
data is not needed. Probabilities are calibrated on the run's validation images.
Example: csba-predict new_photos --workdir=runs/photos --out=predictions.csv
"""

from absl import flags

from csba_jax.bin import _decisions, _main, _new

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a run that csba-train made.')
_OUT = flags.DEFINE_string(
  'out', None, 'New file, .csv or .jsonl, with all probabilities. Without it classes are printed.'
)
_GRAD_CAM = flags.DEFINE_string(
  'grad_cam', None, 'New folder of photos with the places where the net sees the class.'
)


def main(photos: str) -> int:
  """Predicts, prints or writes, and lists what cannot be read."""
  workdir = _main.required(_WORKDIR, 'runs/photos', computes=True)

  from csba_jax.data.folder_listing import images_below
  from csba_jax.files import expanded
  from csba_jax.runtime import jax_setup

  out, pictures = _new.file(_OUT, ('.csv', '.jsonl')), _new.folder(_GRAD_CAM)
  files = images_below(expanded(photos))
  jax_setup.prepare()

  from csba_jax.measure.predict import Prediction, Predictor
  from csba_jax.report.overlays import Overlays
  from csba_jax.report.terminal import predictions
  from csba_jax.runtime import backend
  from csba_jax.runtime.progress import say

  backend.start()
  predictor = Predictor.load(workdir, **_decisions.of_predictor())
  for text in predictions.explain(predictor):
    say(text)
  names = predictor.net.metadata.class_names

  def work(tick: _main.Tick) -> list[Prediction]:
    draw = Overlays(pictures, expanded(photos)) if pictures else None
    found = predictor.predict(files, _decisions.CONFIDENCE.value, tick, draw)
    return predictions.write(out, names, found) if out else predictions.show(names, found)

  unreadable = _main.unless_stopped(work, 'stopped')
  if out:
    print(f'written: {out} ({len(files) - len(unreadable):,} photos)')
  for one in unreadable:
    say(predictions.line(one, names))
  return 1 if unreadable else 0


def cli() -> None:
  """Entry point of the console script."""
  _main.run(main, operand='PHOTOS')


if __name__ == '__main__':
  cli()
