r"""CIFAR-10-LT at imbalance factor 100 on two cores: five variants, two losses, ten seeds.

  csba-study --config=configs/study_cifar10_lt_cpu.py --workdir=results/cifar10_lt_cpu --jobs=2
  csba-report --workdir=results/cifar10_lt_cpu

100 runs. Protocol: docs/study.md, CIFAR-10-LT on two cores. Width and length of a run:
study_cifar10_lt_cpu_recipe.py. Learning rates: study_cifar10_lt_cpu_tuning.py.
Result: not yet run.
"""

from csba_jax import config
from csba_jax.study import grid


def get_config():
  """The study."""
  c = grid.default()
  c.name = 'cifar10_lt_cpu'
  c.base = config.sibling(__file__, 'cifar10_lt_cpu')
  c.base.data.val_fraction = 0.2
  c.base.model.width = 0.25
  c.base.train.log_every = 155  # about once an epoch: a look at the loss takes all training images
  c.base.diagnostics.snapshots = '0.1,1'
  c.base.diagnostics.loss_levels = '1'
  c.variants = ('none', 'none_wide', 'se', 'csba', 'csba_class')
  c.methods = ('cross_entropy', 'balanced_softmax')
  c.first_seed = 700
  c.tuned_by = 'results/cifar10_lt_cpu_tuning'
  return c
