r"""CIFAR-10-LT in small with gradient surgery: a learning rate for every treatment.

  csba-study --config=configs/study_small_surgery_tuning.py --workdir=results/small_surgery_tuning

120 runs: each of ten treatments, without and with CSBA, has three rates and two subsets that are
none of the study's; validation scores alone. `fixed` and `random` have the mean weights of one run
of `none` with dual_projection, on subset 12 and at a rate of 0.2. Make both of them first, one a
loss, in the folder where the command is given: docs/surgery.md.
Result: not yet run.
"""

from csba_jax import config


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_small_surgery')
  c.name = 'cifar10_small_surgery_tuning'
  c.learning_rates = (0.1, 0.2, 0.4)
  c.first_seed, c.seeds, c.subsets = 101, 2, 13  # 101 % 13 is 10
  c.base.diagnostics.snapshots = ''
  c.pairs = c.method_pairs = ()
  c.tuned_by = ''
  c.test = False
  return c
