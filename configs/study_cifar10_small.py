r"""CIFAR-10-LT in small: three variants, two losses, ten subsets that share no image.

  csba-study --config=configs/study_cifar10_small.py --workdir=results/cifar10_small --jobs=2
  csba-report --workdir=results/cifar10_small

60 runs. Each seed has one of the first ten subsets of configs/cifar10_small_lt.py, and all have
the test part of CIFAR-10. Protocol: docs/study.md. Learning rates: study_cifar10_small_tuning.py.
Result: docs/study.md, CIFAR-10-LT in small.
"""

from csba_jax import config
from csba_jax.study import grid


def get_config():
  """The study."""
  c = grid.default()
  c.name = 'cifar10_small'
  c.base = config.sibling(__file__, 'cifar10_small_lt')
  c.base.train.log_every = 50  # a look at the loss of all images takes half a second
  c.base.diagnostics.snapshots = '1'  # and of the tested net
  c.base.diagnostics.loss_levels = '1'
  # without csba_class, half, se and cbam, whose runs have not been made: docs/study.md
  c.variants = ('none', 'none_wide', 'csba')
  c.methods = ('cross_entropy', 'balanced_softmax')
  c.first_seed, c.seeds, c.subsets = 600, 10, 10
  c.tuned_by = 'results/cifar10_small_tuning'
  return c
