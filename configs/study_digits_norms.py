r"""Digits-LT: csba against none with BatchNorm and with GroupNorm, under cross-entropy.

  csba-study --config=configs/study_digits_norms.py --workdir=runs/digits_norms --jobs=2
  csba-report --workdir=runs/digits_norms

Both measure the gradient that training takes: with BatchNorm from batches, with GroupNorm exactly.
40 runs. All nets have the recipe's own learning rate. Result: not yet run.
"""

from csba_jax import config


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_digits')
  c.name = 'digits_lt_norms'
  c.variants = ('none', 'csba')
  c.methods = ('cross_entropy', 'group_norm')
  c.own_methods = {'group_norm': {'model.norm': 'group'}}
  c.tuned_by = ''
  return c
