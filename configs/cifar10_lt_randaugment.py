r"""CIFAR-10-LT, ResNet-32: balanced softmax with RandAugment (Cubuk et al. 2020).

  csba-train --config=configs/cifar10_lt_randaugment.py --workdir=runs/cifar10_lt_randaugment

Each image gets two operations of magnitude 14 of 30, not tuned.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_balanced_softmax.py."""
  c = config.sibling(__file__, 'cifar10_lt_balanced_softmax')
  c.augment.policy = 'randaugment'
  c.augment.randaugment_ops = 2
  c.augment.randaugment_magnitude = 14
  return c
