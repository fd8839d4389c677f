r"""Digits-LT with class-balanced sampling and deferred re-weighting: five variants.

  csba-study --config=configs/study_digits_methods.py --workdir=results/digits_methods --jobs=2

As configs/study_digits.py otherwise, but with the recipe's own learning rate. Result: not yet run.
"""

from csba_jax import config


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_digits')
  c.name = 'digits_lt_methods'
  c.variants = ('none', 'none_wide', 'half', 'csba', 'csba_class')
  c.methods = ('class_balanced', 'drw')
  c.tuned_by = ''
  return c
