r"""CIFAR-10-LT at 100, small: learnable weight scaling, LWS (Kang et al. 2020).

  csba-train --config=configs/cifar10_lt_lws_cpu.py \
    --config.stage.source=runs/cifar10_lt_cpu --workdir=runs/cifar10_lt_lws_cpu

This is the second stage of a run of cifar10_lt_cpu.py. It trains one factor for each class.
Result: docs/toolbox.md, one seed, JPEG copy.
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_crt_cpu.py."""
  c = config.sibling(__file__, 'cifar10_lt_crt_cpu')
  c.stage.method = 'lws'
  c.model.head = 'scaled'
  return c
