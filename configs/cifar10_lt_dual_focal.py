r"""CIFAR-10-LT, ResNet-32: dual focal loss (Tao et al. 2023).

  csba-train --config=configs/cifar10_lt_dual_focal.py --workdir=runs/cifar10_lt_dual_focal

We do not know the gamma of the paper for CIFAR-10. It is 2 here, not tuned.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_resnet32.py."""
  c = config.sibling(__file__, 'cifar10_lt_resnet32')
  c.loss.name = 'dual_focal'
  c.loss.gamma = 2.0
  return c
