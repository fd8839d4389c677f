r"""CIFAR-10-LT on two cores at imbalance factors from 10 to 500: does the effect grow?

  csba-study --config=configs/study_cifar10_cpu_factors.py --workdir=results/cifar10_cpu_factors

60 runs: `none` and `csba`, two losses, five factors, three seeds. Exploratory: one learning rate
for all, and with three seeds no gain can be supported. The report has the effect against the
imbalance.
Result: not yet run.
"""

from csba_jax import config


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_cifar10_lt_cpu')
  c.name = 'cifar10_cpu_factors'
  c.variants = ('none', 'csba')
  c.pairs = (('csba', 'none'),)
  c.imbalance_factors = (10.0, 50.0, 100.0, 200.0, 500.0)
  c.base.train.learning_rate = 0.1
  c.base.diagnostics.snapshots, c.base.diagnostics.loss_levels = '1', ''
  c.first_seed, c.seeds = 710, 3
  c.tuned_by = ''
  return c
