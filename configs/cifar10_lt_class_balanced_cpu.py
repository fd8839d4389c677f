r"""CIFAR-10-LT at 100, small: class-balanced sampling.

  csba-train --config=configs/cifar10_lt_class_balanced_cpu.py \
    --workdir=runs/cifar10_lt_class_balanced_cpu

Every class is drawn equally often, from the start.
Result: docs/toolbox.md, one seed, JPEG copy.
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_cpu.py."""
  c = config.sibling(__file__, 'cifar10_lt_cpu')
  c.sampler.name = 'class'
  return c
