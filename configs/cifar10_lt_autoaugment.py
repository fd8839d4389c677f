r"""CIFAR-10-LT, ResNet-32: balanced softmax with AutoAugment and Cutout.

  csba-train --config=configs/cifar10_lt_autoaugment.py --workdir=runs/cifar10_lt_autoaugment

The policy for CIFAR-10 (Cubuk et al. 2019) was found on balanced data of the same images. Ren et
al. 2020 also train with it.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_balanced_softmax.py."""
  c = config.sibling(__file__, 'cifar10_lt_balanced_softmax')
  c.augment.policy = 'autoaugment'
  c.augment.cutout = 16
  return c
