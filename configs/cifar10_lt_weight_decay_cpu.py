r"""CIFAR-10-LT at 100, small: cross-entropy with tuned weight decay (Alshammari et al. 2022).

  csba-train --config=configs/cifar10_lt_weight_decay_cpu.py \
    --workdir=runs/cifar10_lt_weight_decay_cpu

WDTEXT
Result: README, one seed, JPEG copy.
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_cpu.py."""
  c = config.sibling(__file__, 'cifar10_lt_cpu')
  c.train.weight_decay = 2e-3
  return c
