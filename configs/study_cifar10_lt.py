r"""CIFAR-10-LT at imbalance factor 100: six kinds of attention, four methods.

  csba-study --config=configs/study_cifar10_lt.py --workdir=runs/study_cifar10_lt --shard=0/8
  csba-report --workdir=runs/study_cifar10_lt

240 runs: ten seeds, each with a long-tail subset of its own; with fewer, none of the 16 tests of
the family could be significant after Holm. Protocol: docs/study.md. Learning rates:
configs/study_cifar10_lt_tuning.py, in runs/study_cifar10_lt_tuning. Needs an accelerator.
Result: not yet run.
"""

from csba_jax import config
from csba_jax.study import grid


def get_config():
  """The study."""
  c = grid.default()
  c.name = 'cifar10_lt'
  c.base = config.sibling(__file__, 'cifar10_lt')
  c.base.diagnostics.snapshots = '0,0.1,0.5,1'
  c.base.diagnostics.loss_levels = '1,0.3'
  c.variants = ('none', 'none_wide', 'se', 'cbam', 'csba', 'csba_class')
  c.methods = ('cross_entropy', 'balanced_softmax', 'class_balanced', 'drw')
  c.seeds = c.subsets = 10
  c.tuned_by = 'runs/study_cifar10_lt_tuning'
  return c
