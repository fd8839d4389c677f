r"""CIFAR-10-LT: a small vision transformer with and without CSBA over its heads.

  csba-study --config=configs/study_cifar10_lt_vit.py --workdir=runs/study_vit --shard=0/8

100 runs. Exploratory: with the learning rate of the recipe, which was tuned for none of the
variants. Result: not yet run.
"""

from csba_jax import config


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_cifar10_lt')
  c.name = 'cifar10_lt_vit'
  base = config.sibling(__file__, 'cifar10_lt_vit')
  base.diagnostics.update(c.base.diagnostics)
  base.data.val_fraction = c.base.data.val_fraction  # its own recipe has none
  base.train.log_every = c.base.train.log_every
  base.train.eval_every = c.base.train.eval_every
  c.base = base
  c.variants = ('none', 'none_wide', 'se', 'csba', 'csba_class')
  c.methods = ('cross_entropy', 'balanced_softmax')
  c.tuned_by = ''
  return c
