"""A run's facts without the run, for the pages that show them."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np

from csba_jax import config as config_lib
from csba_jax.analysis import rates
from csba_jax.analysis.advice.rules import Finding
from csba_jax.analysis.run_facts import Mistake, RunFacts
from csba_jax.gradients.conflict import Conflict
from csba_jax.gradients.gram import ClassGrams
from csba_jax.measure.calibration import Calibration, Validation
from csba_jax.methods import metrics
from csba_jax.run.net import Metadata

NAMES = ('oak', 'ash', 'elm')
COUNTS = np.asarray([40, 100, 8])


def facts(names=NAMES, **changes):
  """The facts of a run of 76 test images that was not made."""
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(3), (30, 40, 6))
  logits = (rng.normal(size=(76, 3)) + 2 * np.eye(3)[labels]).astype(np.float32)
  sums = metrics.Confusion.from_logits(jnp.asarray(logits), labels, np.ones(76, bool)).to_host()
  result = metrics.summarise(sums, COUNTS) | {'post_hoc_tau': 0.0, 'class_names': list(names)}
  g = rng.normal(size=(3, 9))
  grams = {'stem': g @ g.T}
  found = ClassGrams(grams, g @ g.T, g @ g.T, np.full(3, 16), np.ones(3))
  made = RunFacts(
    workdir='runs/trees',
    config=config_lib.load('digits_lt'),
    result=json.loads(json.dumps(result)),
    rates=rates.intervals(np.asarray(result['confusion_matrix'])),
    metadata=Metadata(names, COUNTS, (8, 8, 3)),
    validation=Validation(logits, labels.astype(np.int32)),
    calibration=Calibration(1.25, np.zeros(3)),
    advice=(
      Finding('class sizes', 'yes', f'Rare: {names[2]}.', {'loss.name': 'balanced_softmax'}),
      Finding('interference', 'no', 'None.'),
    ),
    conflict=Conflict.of(found, names, COUNTS, {'step': 12}),
    mistakes=(Mistake(f'{names[0]}/1.jpg', np.full((8, 8, 3), 200, np.uint8), 0, 2, 0.97),),
  )
  return dataclasses.replace(made, **changes)
