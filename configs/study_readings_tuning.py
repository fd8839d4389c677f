r"""Digits-LT: CSBA with the class in the trunk, validation scores alone.

  csba-study --config=configs/study_readings_tuning.py --workdir=runs/readings_tuning --jobs=2

Rates and seeds of study_digits_tuning.py; 30 runs. Result: docs/study.md.
"""

from csba_jax import config


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_digits_tuning')
  c.name = 'digits_lt_readings_tuning'
  c.variants = ('csba_trunk',)
  return c
