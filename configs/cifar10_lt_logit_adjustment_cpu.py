r"""CIFAR-10-LT at 100, small: logit adjustment (Menon et al. 2021).

  csba-train --config=configs/cifar10_lt_logit_adjustment_cpu.py \
    --workdir=runs/cifar10_lt_logit_adjustment_cpu

LATEXT
Result: README, one seed, JPEG copy.
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_cpu.py."""
  c = config.sibling(__file__, 'cifar10_lt_cpu')
  c.loss.name = 'logit_adjustment'
  c.loss.tau = 1.5
  return c
