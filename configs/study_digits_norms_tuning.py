r"""Learning rates for the study of norms on Digits-LT: validation scores alone, no test part.

  csba-study --config=configs/study_digits_norms_tuning.py --workdir=results/digits_norms_tuning \
    --jobs=2

The same five rates and three seeds for every net and norm; the seeds are none of the study's.
"""

from csba_jax import config


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_digits_norms')
  c.name = 'digits_lt_norms_tuning'
  c.learning_rates = (0.02, 0.05, 0.1, 0.2, 0.4)
  c.first_seed, c.seeds = 100, 3
  c.base.diagnostics.snapshots = c.base.diagnostics.loss_levels = ''
  c.base.diagnostics.statistics = 'frozen'  # nothing is measured
  c.base.train.log_every = 50  # nothing is looked at on the way
  c.tuned_by = ''
  c.test = False
  return c
