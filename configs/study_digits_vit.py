r"""Digits-LT: a small vision transformer with and without CSBA over its heads.

  csba-study --config=configs/study_digits_vit.py --workdir=results/digits_vit --jobs=2

AdamW, 60 epochs. Result: not yet run.
"""

from csba_jax import config


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_digits')
  c.name = 'digits_lt_vit'
  c.variants = ('none', 'none_wide', 'csba', 'csba_class')
  c.base.model.name = 'vit'
  c.base.model.width = 0.25
  c.base.train.optimizer = 'adamw'
  c.base.train.learning_rate = 1e-3
  c.base.train.weight_decay = 0.05
  c.base.train.epochs = 60
  c.tuned_by = ''
  return c
