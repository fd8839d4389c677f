r"""Digits-LT with gradient surgery, second step: a setting and a learning rate for each aggregator.

  csba-study --config=configs/study_digits_surgery_tuning.py --workdir=results/surgery_tuning

Validation scores alone. The first step compared settings at one rate, 0.4 with cross-entropy, and
there most aggregators did not learn. So settings and rates are tuned together here, with the same
seeds. `mgda` is left out, a negative control, and the dearest setting, which was the worst. For
each aggregator and loss the setting and the rate with the best mean score are chosen; the two
aggregators with the best scores, in the mean over both losses, go on to the study. 378 runs.
Result: not yet run.
"""

from csba_jax import config
from csba_jax.gradients.surgery import AGGREGATORS


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_digits_surgery_settings')
  c.name = 'digits_lt_surgery_tuning'
  c.learning_rates = (0.05, 0.1, 0.2)
  names = [name for name in AGGREGATORS if name != 'mgda']
  c.own_methods = {
    method: {field: value for field, value in fields.items() if field != 'train.learning_rate'}
    for method, fields in c.own_methods.items()
    if fields['surgery.name'] in names and not method.endswith('_all_10')
  }
  c.methods = tuple(c.own_methods)
  return c
