r"""How long the runs of CIFAR-10-LT in small train: validation scores of `none` alone.

  csba-study --config=configs/study_cifar10_small_epochs.py --workdir=results/cifar10_small_epochs

9 runs: 20, 40 or 80 epochs with cross-entropy, at a rate of 0.1, on the three subsets of the
tuning (study_cifar10_small_tuning.py).
Result: docs/study.md, CIFAR-10-LT in small. The recipe took 40.
"""

from csba_jax import config

EPOCHS = (20, 40, 80)


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_cifar10_small_tuning')
  c.name = 'cifar10_small_epochs'
  c.variants = ('none',)
  c.own_methods = {
    f'epochs_{epochs}': {
      'loss.name': 'cross_entropy',
      'train.epochs': epochs,
      'train.eval_every': epochs // 4,
    }
    for epochs in EPOCHS
  }
  c.methods = tuple(c.own_methods)
  c.learning_rates = (0.1,)
  c.base.train.epochs = 20  # as the recipe was before this study
  return c
