r"""Width and length of the runs of CIFAR-10-LT on two cores: validation scores of `none` alone.

  csba-study --config=configs/study_cifar10_lt_cpu_recipe.py --workdir=results/cifar10_lt_cpu_recipe

12 runs: a quarter or half of the width, 10, 20 or 40 epochs, cross-entropy at a rate of 0.1, on the
two subsets that study_cifar10_lt_cpu_tuning.py draws.
Result: not yet run.
"""

from csba_jax import config

EPOCHS = (10, 20, 40)


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_cifar10_lt_cpu_tuning')
  c.name = 'cifar10_lt_cpu_recipe'
  c.variants = ('none',)
  c.own_methods = {
    f'epochs_{epochs}': {
      'loss.name': 'cross_entropy',
      'train.epochs': epochs,
      'train.eval_every': epochs // 5,
    }
    for epochs in EPOCHS
  }
  c.methods = tuple(c.own_methods)
  c.widths = (0.25, 0.5)
  c.learning_rates = (0.1,)
  return c
