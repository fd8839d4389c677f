r"""CIFAR-10-LT at 100, small: tau-normalisation (Kang et al. 2020).

  csba-train --config=configs/cifar10_lt_tau_norm_cpu.py \
    --config.stage.source=runs/cifar10_lt_cpu --workdir=runs/cifar10_lt_tau_norm_cpu

This is the second stage of a run of cifar10_lt_cpu.py. It does not train and takes seconds. tau is
the best of 0, 0.1, ... 2 on the validation part.
Result: docs/toolbox.md, one seed, JPEG copy.
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_cpu.py."""
  c = config.sibling(__file__, 'cifar10_lt_cpu')
  c.stage.method = 'tau_norm'
  return c
