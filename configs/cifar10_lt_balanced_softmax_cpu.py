r"""CIFAR-10-LT at 100, small: balanced softmax (Ren et al. 2020).

  csba-train --config=configs/cifar10_lt_balanced_softmax_cpu.py \
    --workdir=runs/cifar10_lt_balanced_softmax_cpu

It takes minutes on two CPU cores. The control is --config.model.attention=none.
Result: docs/toolbox.md, one seed, JPEG copy.
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_cpu.py."""
  c = config.sibling(__file__, 'cifar10_lt_cpu')
  c.loss.name = 'balanced_softmax'
  return c
