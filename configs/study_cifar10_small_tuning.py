r"""Learning rates for the study on CIFAR-10-LT in small: validation scores alone.

  csba-study --config=configs/study_cifar10_small_tuning.py --workdir=results/cifar10_small_tuning

252 runs: the same six rates and three seeds for every variant and method. Four rates were run
first; choices lay at both of their ends, so 0.025 and 0.8 were added for all. The seeds have the
last three of the 13 subsets, which share no image with the ten of the study.
Result: docs/study.md, CIFAR-10-LT in small.
"""

from csba_jax import config


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_cifar10_small')
  c.name = 'cifar10_small_tuning'
  c.variants = ('none', 'none_wide', 'half', 'se', 'cbam', 'csba', 'csba_class')
  c.learning_rates = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
  c.first_seed, c.seeds, c.subsets = 101, 3, 13  # 101 % 13 is 10
  c.base.diagnostics.snapshots = c.base.diagnostics.loss_levels = ''
  c.tuned_by = ''
  c.test = False
  return c
