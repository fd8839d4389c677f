r"""Digits-LT at imbalance factor 20: seven variants, cross-entropy and balanced softmax.

  csba-study --config=configs/study_digits.py --workdir=results/digits --jobs=2
  csba-report --workdir=results/digits

Protocol: docs/study.md. Each seed has its own test part, long-tail subset, initial weights and
batches, the same for every variant. Learning rates: configs/study_digits_tuning.py.
"""

from csba_jax import config
from csba_jax.study import grid


def get_config():
  """The study."""
  c = grid.default()
  c.name = 'digits_lt'
  c.base = config.sibling(__file__, 'digits_lt')
  c.base.train.log_every = 4  # so that levels of loss are met closely
  c.base.diagnostics.snapshots = '1'  # and of the tested net
  c.base.diagnostics.loss_levels = '0.3'
  c.variants = ('none', 'none_wide', 'half', 'csba', 'csba_class', 'se', 'cbam')
  c.methods = ('cross_entropy', 'balanced_softmax')
  c.first_seed, c.seeds = 200, 10
  c.tuned_by = 'results/digits_tuning'
  return c
