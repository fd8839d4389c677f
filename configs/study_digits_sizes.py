r"""Digits-LT: does the conflict matrix guide depth and width of the multi-branch net?

  csba-study --config=configs/study_digits_sizes.py --workdir=results/digits_sizes --jobs=2

`none` and `csba` at three widths and two depths. Result: not yet run.
"""

from csba_jax import config


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_digits')
  c.name = 'digits_lt_sizes'
  c.variants = ('none', 'csba')
  c.methods = ('cross_entropy',)
  c.widths = (0.125, 0.25, 0.5)
  c.depths = (1, 2)
  c.seeds = 5
  c.tuned_by = ''
  return c
