r"""CIFAR-10-LT, ResNet-32: balanced softmax, AutoAugment, Cutout, tuned weight decay and averages.

  csba-train --config=configs/cifar10_lt_combination.py --workdir=runs/cifar10_lt_combination

It combines cifar10_lt_autoaugment.py, cifar10_lt_weight_decay.py and cifar10_lt_ema.py. It may be
the strongest recipe; tune it with --config.data.val_fraction=0.1.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_autoaugment.py."""
  c = config.sibling(__file__, 'cifar10_lt_autoaugment')
  c.train.schedule = 'cosine'
  c.train.weight_decay = 2e-3
  c.train.ema_decay = 0.999
  return c
