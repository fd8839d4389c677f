r"""Digits-LT: csba against none under cross-entropy, and under LDAM with a cosine classifier.

  csba-study --config=configs/study_digits_ldam.py --workdir=runs/digits_ldam --jobs=2
  csba-report --workdir=runs/digits_ldam

An example of a study that declares its own pairs of variants and its own methods (docs/study.md);
48 runs. All variants have the recipe's own learning rate. Result: not yet run.
"""

from csba_jax import config


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_digits')
  c.name = 'digits_lt_ldam'
  c.variants = ('none', 'se', 'csba')
  c.pairs = (('csba', 'none'), ('csba', 'se'))  # the first decides
  c.methods = ('cross_entropy', 'ldam_cosine')
  c.own_methods = {
    'ldam_cosine': {
      'loss.name': 'ldam',
      'loss.max_margin': 0.5,
      'model.head': 'cosine',
      'loss.weights': 'effective',  # deferred re-weighting
      'loss.weights_start': 0.8,
    },
  }
  c.seeds = 8
  c.tuned_by = ''
  return c
