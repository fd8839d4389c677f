r"""Settings for the study from pretrained weights, by validation photos alone.

  csba-study --config=configs/study_pretrained_tuning.py --workdir=results/pretrained_tuning

Needs what configs/study_solar_pretrained.py needs. Each setting has the five folds of another split
than the study's, without attention, with balanced softmax, smaller photos and fewer epochs: the
classifier alone at a low and a high rate (`frozen`), and all layers after a fifth of the run, the
layers of the file at an equal rate or at a third of it (`fine_tuned`). The study keeps its
settings, `frozen_low` and `fine_tuned_equal`, unless another one has a higher mean macro-F1 of the
validation photos, by more than one standard error of the paired difference. 20 runs.
Result: docs/pretrained.md.
"""

from csba_jax import config

_FROZEN = {'loss.name': 'balanced_softmax', 'train.frozen': 1.0}
_FINE_TUNED = {'loss.name': 'balanced_softmax', 'train.frozen': 0.2}


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_solar_pretrained')
  c.name = 'solar_pretrained_tuning'
  c.variants = ('none',)
  c.own_methods = {
    'frozen_low': _FROZEN | {'train.learning_rate': 0.01},
    'frozen_high': _FROZEN | {'train.learning_rate': 0.05},
    'fine_tuned_equal': _FINE_TUNED | {'train.learning_rate': 0.01},
    'fine_tuned_third': _FINE_TUNED | {'train.learning_rate': 0.01, 'train.pretrained_rate': 0.3},
  }
  c.methods = tuple(c.own_methods)
  c.base.data.image_size = 128
  c.base.train.epochs = 6
  c.base.train.eval_every = 2
  c.first_seed, c.naive_repeats = 400, 0
  c.naive_variants = c.naive_methods = ()
  c.test = False
  return c
