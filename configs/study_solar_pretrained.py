r"""Solar-panel photos from pretrained weights: EfficientNet-Lite0, fine-tuned and frozen.

  csba-study --config=configs/study_solar_pretrained.py --workdir=runs/solar_pretrained --jobs=2 \
    --config.base.model.init=lite0.safetensors
  csba-report --workdir=runs/solar_pretrained

Needs $CSBA_IMAGE_FOLDER as configs/study_solar.py does, and the weights that docs/pretrained.md
converts. Five folds with copies on one side, and once as if there were no copies. `frozen` trains
the classifier (and attention) alone, with balanced softmax. Every variant has the last stage three
times in parallel; `csba` gates the branches, `none` does not.
No setting is tuned, but the image size: a start with 96 pixels was stopped after two test folds
were seen (classifier alone: macro-F1 0.58 and 0.59), and validation photos of one of these folds
then spoke for 224. So the folds are drawn anew. Result: not yet run.
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
  c.first_seed, c.repeats = 300, 1
  c.tuned_by = ''
  c.outcome = 'macro_f1'
  return c
