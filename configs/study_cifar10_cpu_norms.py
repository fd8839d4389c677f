r"""CIFAR-10-LT on two cores with GroupNorm: conflict without the statistics of a batch.

  csba-study --config=configs/study_cifar10_cpu_norms.py --workdir=results/cifar10_cpu_norms

6 runs: `none` and `csba`, cross-entropy, three seeds. Exploratory: one learning rate for both.
The seeds are the first three of study_cifar10_lt_cpu.py. With GroupNorm the gradients are those
of all training images, without augmentation.
Result: not yet run.
"""

from csba_jax import config


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_cifar10_lt_cpu')
  c.name = 'cifar10_cpu_norms'
  c.base.model.norm = 'group'
  c.variants = ('none', 'csba')
  c.pairs = (('csba', 'none'),)
  c.methods = ('cross_entropy',)
  c.base.train.learning_rate = 0.1
  c.first_seed, c.seeds = 700, 3
  c.tuned_by = ''
  return c
