r"""Digits-LT: csba against none with BatchNorm and with GroupNorm, under cross-entropy.

  csba-study --config=configs/study_digits_norms.py --workdir=results/digits_norms --jobs=2
  csba-report --workdir=results/digits_norms

With BatchNorm the gradient that training takes is estimated from batches. With GroupNorm that of
all training images is exact, without the random crops of training.
40 runs. Every net has a learning rate of its own: configs/study_digits_norms_tuning.py.
"""

from csba_jax import config


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_digits')
  c.name = 'digits_lt_norms'
  c.variants = ('none', 'csba')
  c.methods = ('cross_entropy', 'group_norm')
  c.own_methods = {'group_norm': {'model.norm': 'group'}}
  c.first_seed = 400  # those of study_digits have been looked at
  c.tuned_by = 'results/digits_norms_tuning'
  return c
