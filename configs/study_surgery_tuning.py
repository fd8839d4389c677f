r"""Digits-LT with gradient surgery, second step: a setting and a learning rate for each aggregator.

  csba-study --config=configs/study_surgery_tuning.py --workdir=results/surgery_tuning

Validation scores alone, with the seeds of the first step, which took four batches a measurement.
There, with cross-entropy at a rate of 0.4, two fifths scored below 0.2; and four batches resolve
so little that `interference`, and `dual_projection` every 50 steps, had the scores of plain
training where they left uncertain conflict out. So a measurement has 16 batches here, every 50 of
330 steps, and settings and rates are tuned together. `mgda`, a negative control, is left out. For
each aggregator and loss the setting and the rate with the best mean score are chosen; the two
aggregators with the best scores, in the mean over both losses, go on to the study. 252 runs.
Result: not yet run.
"""

from csba_jax import config


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_surgery_settings')
  c.name = 'digits_lt_surgery_tuning'
  c.learning_rates = (0.05, 0.1, 0.2)
  c.base.surgery.batches = 16
  c.own_methods = {
    method: {field: value for field, value in fields.items() if field != 'train.learning_rate'}
    for method, fields in c.own_methods.items()
    if fields['surgery.name'] != 'mgda' and fields['surgery.every'] == 50
  }
  c.methods = tuple(c.own_methods)
  return c
