r"""CIFAR-10-LT, ResNet-32: square-root sampling.

  csba-train --config=configs/cifar10_lt_square_root.py --workdir=runs/cifar10_lt_square_root

Classes are drawn by the square root of their size (Kang et al. 2020).
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_resnet32.py."""
  c = config.sibling(__file__, 'cifar10_lt_resnet32')
  c.sampler.name = 'square_root'
  return c
