r"""CIFAR-10-LT, ResNet-32: progressively balanced sampling (Kang et al. 2020).

  csba-train --config=configs/cifar10_lt_progressive.py --workdir=runs/cifar10_lt_progressive

Sampling changes from instance-balanced to class-balanced over the run.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_resnet32.py."""
  c = config.sibling(__file__, 'cifar10_lt_resnet32')
  c.sampler.name = 'progressive'
  return c
