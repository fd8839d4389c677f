r"""CIFAR-10-LT, ResNet-32: deferred re-sampling (Cao et al. 2019).

  csba-train --config=configs/cifar10_lt_ce_drs.py --workdir=runs/cifar10_lt_ce_drs

Batches are class-balanced from epoch 160 of 200 on.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_resnet32.py."""
  c = config.sibling(__file__, 'cifar10_lt_resnet32')
  c.sampler.name = 'class'
  c.sampler.start = 0.8
  return c
