r"""CIFAR-10-LT in small: every method of one stage in the toolbox against its plain loss.

  csba-study --config=configs/study_cifar10_small_ladder.py --workdir=results/cifar10_small_ladder

84 runs of `none`. Exploratory: three seeds, on subsets that the study has as well, all with the
rate that study_cifar10_small_tuning.py chose for `none` with cross-entropy. A method has the
loss, sampling, mixing, augmentation and classifier of its recipe, configs/cifar10_lt_METHOD.py,
but for what fits neither small images nor few steps: cutout takes a square of 8 pixels, the
moving average of the weights has a decay of 0.99, and weight decay is that of
cifar10_lt_weight_decay_cpu.py. Methods of two stages are left out.
Result: not yet run.
"""

from csba_jax import config
from csba_jax.study.protocol import METHODS

RECIPES = (
  'autoaugment',
  'ce_drs',
  'class_weights',
  'cmo',
  'cutmix',
  'cutout',
  'dual_focal',
  'ema',
  'focal',
  'label_smoothing',
  'ldam_drw',
  'logit_adjustment',
  'mixup',
  'post_hoc',
  'progressive',
  'randaugment',
  'remix',
  'reversed',
  'square_root',
  'vector_scaling',
)
KEPT = ('augment.', 'loss.', 'mixing.', 'sampler.', 'model.head', 'train.ema_decay')
CROSS_ENTROPY, BALANCED = {'loss.name': 'cross_entropy'}, {'loss.name': 'balanced_softmax'}
SMALL = {'augment.cutout': 8, 'train.ema_decay': 0.99}  # where a recipe sets these
DECAY = {'train.weight_decay': 2e-3}


def method(recipe: str, plain: dict) -> dict:
  """What a recipe changes, of the fields that make its method."""
  fields = config.flatten(config.sibling(__file__, f'cifar10_lt_{recipe}'))
  changed = {f: v for f, v in fields.items() if f.startswith(KEPT) and v != plain[f]}
  return {f: SMALL.get(f, v) for f, v in changed.items()}


def plain_of(fields: dict) -> str:
  """What a method is compared with: balanced softmax, if it adds something to that loss."""
  added = fields['loss.name'] == 'balanced_softmax'
  return 'balanced_softmax' if added else 'cross_entropy'


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_cifar10_small')
  c.name = 'cifar10_small_ladder'
  plain = config.flatten(config.sibling(__file__, 'cifar10_lt'))
  own = {recipe: CROSS_ENTROPY | method(recipe, plain) for recipe in RECIPES}
  own['ldam'] = {'loss.name': 'ldam', 'model.head': 'cosine'}
  own['weight_decay'] = CROSS_ENTROPY | DECAY
  own['balanced_softmax_weight_decay'] = BALANCED | DECAY
  own['combination'] = own['autoaugment'] | own['ema'] | DECAY
  c.own_methods = own
  c.methods = (*METHODS, *own)
  c.method_pairs = (
    *((name, 'cross_entropy') for name in METHODS if name != 'cross_entropy'),
    *((name, plain_of(fields)) for name, fields in own.items()),
  )
  c.variants = ('none',)
  c.base.train.learning_rate = 0.2
  c.base.diagnostics.snapshots = c.base.diagnostics.loss_levels = ''
  c.first_seed, c.seeds = 610, 3
  c.tuned_by = ''
  return c
