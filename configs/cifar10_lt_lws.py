r"""CIFAR-10-LT, ResNet-32: learnable weight scaling, LWS (Kang et al. 2020).

  csba-train --config=configs/cifar10_lt_lws.py \
    --config.stage.source=runs/cifar10_lt_resnet32 --workdir=runs/cifar10_lt_lws

This second stage trains one factor for each class, with class-balanced batches.
Result: not yet run.
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_crt.py."""
  c = config.sibling(__file__, 'cifar10_lt_crt')
  c.stage.method = 'lws'
  c.model.head = 'scaled'
  return c
