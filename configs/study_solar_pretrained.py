r"""Solar-panel photos from pretrained weights: EfficientNet-Lite0, fine-tuned and frozen.

  csba-study --config=configs/study_solar_pretrained.py --workdir=runs/solar_pretrained --jobs=2 \
    --config.base.model.init=lite0.safetensors
  csba-report --workdir=runs/solar_pretrained

Needs $CSBA_IMAGE_FOLDER as configs/study_solar.py does, and the weights that docs/pretrained.md
converts. Five folds with copies on one side, and once as if there were no copies. No setting is
tuned. 96 pixels, tried first, are too few: the classifier alone had a macro-F1 of 0.58 and 0.59 on
two test folds (balanced softmax, 10 epochs). Result: not yet run.

`frozen` trains the classifier (and attention) alone, with balanced softmax. Every variant
has the last stage three times in parallel; `csba` gates the branches, `none` does not.
"""

from csba_jax import config


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_solar')
  c.name = 'solar_pretrained'
  c.base.data.image_size = 224
  c.base.model.name = 'efficientnet_lite0_branches'
  c.base.model.width = 1.0
  c.base.model.gate = 'identity'
  c.base.train.epochs = 6
  c.base.train.eval_every = 3
  c.base.train.log_every = 50
  c.base.train.frozen = 0.2
  c.base.train.pretrained_rate = 0.1
  c.base.diagnostics.snapshots = c.base.diagnostics.loss_levels = ''
  c.variants = ('none', 'csba')
  c.methods = ('balanced_softmax', 'frozen', 'cross_entropy')
  c.own_methods = {'frozen': {'loss.name': 'balanced_softmax', 'train.frozen': 1.0}}
  c.imbalance_factors = (1.0,)
  c.repeats = 1
  c.tuned_by = ''
  c.outcome = 'macro_f1'
  return c
