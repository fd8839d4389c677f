r"""Digits-LT with gradient surgery and CSBA: a learning rate for every treatment.

  csba-study --config=configs/study_surgery_csba_tuning.py --workdir=results/surgery_csba_tuning

120 runs: plain training, two aggregators and two controls, each with two losses, four rates and
three seeds that are none of the study's; validation scores alone. `fixed` and `random` have the
mean weights of one run of `csba` with dual_projection, seed 100 and a rate of 0.1. Make both of
them first, one a loss, in the folder where the command is given: docs/surgery.md.
Result: not yet run.
"""

from csba_jax import config


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_surgery_csba')
  c.name = 'digits_lt_surgery_csba_tuning'
  c.learning_rates = (0.05, 0.1, 0.2, 0.4)
  c.first_seed, c.seeds = 100, 3
  c.base.diagnostics.snapshots = ''
  c.base.train.log_every = 50  # nothing is looked at on the way
  c.tuned_by = ''
  c.method_pairs = ()
  c.test = False
  return c
