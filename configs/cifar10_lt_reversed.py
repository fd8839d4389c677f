r"""CIFAR-10-LT, ResNet-32: reversed sampling, as in the second branch of BBN (Zhou et al. 2020).

  csba-train --config=configs/cifar10_lt_reversed.py --workdir=runs/cifar10_lt_reversed

The rarest class is drawn most often. It is a control, not a method to use.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_resnet32.py."""
  c = config.sibling(__file__, 'cifar10_lt_resnet32')
  c.sampler.name = 'reversed'
  return c
