r"""Learning rates for the study on solar panels: validation scores alone, none of a test part.

  csba-study --config=configs/study_solar_tuning.py --workdir=results/solar_tuning --jobs=2

The same six rates and five folds for every variant and imbalance; the folds are none of the
study's.
"""

from csba_jax import config


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_solar')
  c.name = 'solar_tuning'
  c.learning_rates = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
  c.first_seed, c.repeats, c.naive_repeats = 100, 1, 0
  c.base.diagnostics.snapshots = c.base.diagnostics.loss_levels = ''
  c.base.diagnostics.statistics = 'frozen'  # as in the committed results; nothing is measured
  c.base.train.log_every = 50  # nothing is looked at on the way
  c.tuned_by = ''
  c.test = False
  return c
