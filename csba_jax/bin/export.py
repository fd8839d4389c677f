"""csba-export --workdir=DIR --out=DIR [--min_confidence=P] [--thresholds=macro_f1]

Writes the net of a finished run as files that need neither csba_jax nor the data: a StableHLO
program for CPU, CUDA and TPU with calibrated probabilities, a script that predicts, the weights as
safetensors, and a model card.
Example: csba-export --workdir=runs/photos --out=exported
"""

from absl import flags

from csba_jax.bin import _decisions, _main, _new

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a run that csba-train made.')
_OUT = flags.DEFINE_string('out', None, 'New folder. Its name is the title of the model card.')


def main() -> int:
  """Exports the net of a run."""
  workdir = _main.required(_WORKDIR, 'runs/photos')
  _main.required(_OUT, 'exported')
  out = _new.folder(_OUT)
  assert out is not None

  from csba_jax.runtime import jax_setup

  jax_setup.prepare()

  from csba_jax.analysis import run_facts
  from csba_jax.export import folder
  from csba_jax.measure.predict import Predictor
  from csba_jax.report.run import card
  from csba_jax.runtime import backend

  backend.start()
  facts = run_facts.facts_of(workdir)
  predictor = Predictor.load(workdir, **_decisions.of_predictor())
  least = _decisions.CONFIDENCE.value
  text = card.render(facts, predictor, least, out.absolute().name)
  for path in folder.write(out, predictor, least, text):
    print(f'written: {path}')
  return 0


def cli() -> None:
  """Entry point of the console script."""
  _main.run(main)


if __name__ == '__main__':
  cli()
