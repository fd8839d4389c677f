r"""CIFAR-10-LT, ResNet-32: reversed sampling, of the second branch of BBN (Zhou et al. 2020).

  csba-train --config=configs/cifar10_lt_reversed.py --workdir=runs/cifar10_lt_reversed

The rarest class most often; a control rather than a remedy.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_resnet32.py."""
  c = config.sibling(__file__, 'cifar10_lt_resnet32')
  c.sampler.name = 'reversed'
  return c
