r"""Solar-panel photos from pretrained weights: EfficientNet-Lite0, fine-tuned and frozen.

  csba-study --config=configs/study_solar_pretrained.py --workdir=results/solar_pretrained
  csba-report --workdir=results/solar_pretrained

Needs $CSBA_IMAGE_FOLDER as configs/study_solar.py does, and lite0.safetensors, the weights that
docs/pretrained.md converts, in the folder where the command is given. Five folds with copies on one
side; `none` with balanced softmax also as if there were no copies. `frozen` trains the classifier
(and attention) alone. Every variant has the last stage three times in parallel; `csba` gates the
branches, `none` does not. Protocol: docs/study.md. Settings: study_pretrained_tuning.py.
Result: docs/pretrained.md.
"""

from csba_jax import config


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_solar')
  c.name = 'solar_pretrained'
  c.base.data.image_size = 160
  c.base.model.name = 'efficientnet_lite0_branches'
  c.base.model.init = 'lite0.safetensors'
  c.base.model.width = 1.0
  c.base.model.gate = 'identity'
  c.base.train.epochs = 8
  c.base.train.eval_every = 4
  c.base.train.log_every = 50
  c.base.train.learning_rate = 0.01
  c.base.train.frozen = 0.2
  c.base.diagnostics.snapshots = c.base.diagnostics.loss_levels = ''
  c.variants = ('none', 'csba')
  c.methods = ('balanced_softmax', 'frozen', 'cross_entropy', 'frozen_cross_entropy')
  c.own_methods = {
    'frozen': {'loss.name': 'balanced_softmax', 'train.frozen': 1.0},
    'frozen_cross_entropy': {'loss.name': 'cross_entropy', 'train.frozen': 1.0},
  }
  c.imbalance_factors = (1.0,)
  c.first_seed, c.repeats, c.naive_repeats = 300, 1, 1
  c.naive_variants, c.naive_methods = ('none',), ('balanced_softmax', 'frozen')
  c.tuned_by = ''
  c.outcome = 'macro_f1'
  return c
