r"""Digits-LT with gradient surgery: a first look, on validation scores alone.

  csba-study --config=configs/study_digits_surgery_tuning.py --workdir=runs/surgery --jobs=2

Every aggregator with cross-entropy and with balanced softmax, at rates and seeds of
configs/study_digits_tuning.py, whose runs without surgery stand beside it. No number of a test part
is kept. 192 runs of about half a minute on one core. Result: not yet run.
"""

from csba_jax import config
from csba_jax.gradients.surgery import AGGREGATORS


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_digits_tuning')
  c.name = 'digits_lt_surgery_tuning'
  c.variants = ('none',)
  c.learning_rates = (0.05, 0.1, 0.2, 0.4)
  c.base.surgery.every = 30  # of 330 steps: eleven measurements
  c.base.surgery.beta, c.base.surgery.rate = 0.1, 0.3  # which move once a measurement
  c.own_methods = {
    name + suffix: {'surgery.name': name, 'loss.name': loss}
    for suffix, loss in (('', 'cross_entropy'), ('_balanced_softmax', 'balanced_softmax'))
    for name in AGGREGATORS
  }
  c.methods = tuple(c.own_methods)
  return c
