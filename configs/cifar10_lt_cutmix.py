r"""CIFAR-10-LT, ResNet-32: CutMix (Yun et al. 2019).

  csba-train --config=configs/cifar10_lt_cutmix.py --workdir=runs/cifar10_lt_cutmix

alpha is 1, on half of the batches, as in the authors' code for CIFAR.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_resnet32.py."""
  c = config.sibling(__file__, 'cifar10_lt_resnet32')
  c.mixing.name = 'cutmix'
  c.mixing.probability = 0.5
  return c
