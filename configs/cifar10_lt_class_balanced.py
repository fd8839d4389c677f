r"""CIFAR-10-LT, ResNet-32: class-balanced sampling.

  csba-train --config=configs/cifar10_lt_class_balanced.py \
    --workdir=runs/cifar10_lt_class_balanced

Every class is drawn equally often, from the start (Kang et al. 2020 compare such samplers).
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_resnet32.py."""
  c = config.sibling(__file__, 'cifar10_lt_resnet32')
  c.sampler.name = 'class'
  return c
