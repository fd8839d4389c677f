r"""Digits-LT with gradient surgery, first step: how often to measure, and what counts as conflict.

  csba-study --config=configs/study_surgery_settings.py --workdir=results/surgery_settings

Validation scores alone, of seeds that are none of a study's. Every aggregator with cross-entropy
and with balanced softmax, each loss at the rate that results/digits_tuning chose for the same
network without surgery: measured every 10 or every 50 of 330 steps, with and without the conflict
that the interval of a measurement cannot tell from 0. The plan was to tune rates with the best
setting of each; study_surgery_tuning.py says what came instead, and why. 192 runs,
two of which ended with a loss that is not finite. Result: docs/surgery.md.
"""

from csba_jax import config
from csba_jax.gradients.surgery import AGGREGATORS

LOSSES = {'cross_entropy': 0.4, 'balanced_softmax': 0.05}  # and the rate of each
SETTINGS = {
  f'{certain}_{every}': (certain == 'certain', every)
  for certain in ('certain', 'all')
  for every in (10, 50)
}


def surgery(name: str, loss: str, setting: str) -> dict:
  """The fields of a training with surgery."""
  certain, every = SETTINGS[setting]
  moving = {'surgery.beta': 0.1, 'surgery.rate': 0.3}  # once a measurement, of which there are few
  return {
    'loss.name': loss,
    'surgery.name': name,
    'surgery.certain': certain,
    'surgery.every': every,
    **moving,
  }


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_digits_tuning')
  c.name = 'digits_lt_surgery_settings'
  c.variants = ('none',)
  c.learning_rates = ()
  c.own_methods = {
    f'{name}_{loss}_{setting}': {**surgery(name, loss, setting), 'train.learning_rate': rate}
    for name in AGGREGATORS
    for loss, rate in LOSSES.items()
    for setting in SETTINGS
  }
  c.methods = tuple(c.own_methods)
  return c
