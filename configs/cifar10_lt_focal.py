r"""CIFAR-10-LT, ResNet-32: focal loss (Lin et al. 2017).

  csba-train --config=configs/cifar10_lt_focal.py --workdir=runs/cifar10_lt_focal

gamma is 1, as in the tables of LDAM-DRW (Cao et al. 2019).
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_resnet32.py."""
  c = config.sibling(__file__, 'cifar10_lt_resnet32')
  c.loss.name = 'focal'
  c.loss.gamma = 1.0
  return c
