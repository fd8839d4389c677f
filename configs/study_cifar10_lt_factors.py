r"""CIFAR-10-LT at imbalance factors 10, 50, 200 and 500: where CSBA helps, and where it fails.

  csba-study --config=configs/study_cifar10_lt_factors.py --workdir=runs/study_factors --shard=0/8

320 runs. Exploratory: with the learning rate of the recipe, and ten seeds are too few for the 32
tests of its family, which would take eleven. Result: not yet run.
"""

from csba_jax import config


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_cifar10_lt')
  c.name = 'cifar10_lt_factors'
  c.variants = ('none', 'none_wide', 'csba', 'csba_class')
  c.methods = ('cross_entropy', 'balanced_softmax')
  c.imbalance_factors = (10.0, 50.0, 200.0, 500.0)
  c.tuned_by = ''
  return c
