r"""CIFAR-10-LT: does the conflict matrix guide depth and width of the multi-branch net?

  csba-study --config=configs/study_cifar10_lt_sizes.py --workdir=runs/study_sizes --shard=0/8

120 runs: `none` and `csba` at three widths and two depths. Exploratory: with the learning rate of
the recipe, which was tuned for none of them. Result: not yet run.
"""

from csba_jax import config


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_cifar10_lt')
  c.name = 'cifar10_lt_sizes'
  c.variants = ('none', 'csba')
  c.methods = ('cross_entropy',)
  c.widths = (0.25, 0.5, 1.0)
  c.depths = (1, 2)
  c.tuned_by = ''
  return c
