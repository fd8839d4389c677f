r"""Learning rates for the studies on CIFAR-10-LT, on validation scores alone.

  csba-study --config=configs/study_cifar10_lt_tuning.py --workdir=runs/study_cifar10_lt_tuning

The same three rates for every variant and method, one seed of a subset that is none of the study's.
Result: not yet run.
"""

from csba_jax import config


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_cifar10_lt')
  c.name = 'cifar10_lt_tuning'
  c.learning_rates = (0.05, 0.1, 0.2)
  c.first_seed, c.seeds, c.subsets = 100, 1, 0
  c.base.diagnostics.moments = c.base.diagnostics.loss_levels = ''
  c.tuned_by = ''
  c.test = False
  return c
