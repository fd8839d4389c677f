r"""Learning rates for the study of CIFAR-10-LT on two cores: validation scores alone.

  csba-study --config=configs/study_cifar10_lt_cpu_tuning.py --workdir=results/cifar10_lt_cpu_tuning

60 runs: the same three rates and two seeds for every variant and method. The seeds, and the subsets
that they draw, are none of the study's.
Result: not yet run.
"""

from csba_jax import config


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_cifar10_lt_cpu')
  c.name = 'cifar10_lt_cpu_tuning'
  c.learning_rates = (0.05, 0.1, 0.2)
  c.first_seed, c.seeds = 100, 2
  c.base.train.log_every = 50  # nothing is looked at on the way
  c.base.diagnostics.snapshots = c.base.diagnostics.loss_levels = ''
  c.tuned_by = ''
  c.test = False
  return c
