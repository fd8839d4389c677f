r"""CIFAR-10-LT, ResNet-32: mixup (Zhang et al. 2018).

  csba-train --config=configs/cifar10_lt_mixup.py --workdir=runs/cifar10_lt_mixup

alpha is 1.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_resnet32.py."""
  c = config.sibling(__file__, 'cifar10_lt_resnet32')
  c.mixing.name = 'mixup'
  return c
