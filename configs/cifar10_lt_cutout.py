r"""CIFAR-10-LT, ResNet-32: Cutout (DeVries & Taylor 2017).

  csba-train --config=configs/cifar10_lt_cutout.py --workdir=runs/cifar10_lt_cutout

The square has 16 pixels a side, as in the paper for CIFAR-10.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_resnet32.py."""
  c = config.sibling(__file__, 'cifar10_lt_resnet32')
  c.augment.cutout = 16
  return c
