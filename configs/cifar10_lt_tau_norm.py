r"""CIFAR-10-LT, ResNet-32: tau-normalisation (Kang et al. 2020).

  csba-train --config=configs/cifar10_lt_tau_norm.py \
    --config.stage.source=runs/cifar10_lt_resnet32 --workdir=runs/cifar10_lt_tau_norm

This second stage does not train. If both stages have a validation part, tau can be chosen on it
(--config.data.val_fraction=0.1 --config.stage.tau=-1). This recipe has none: tau is 1.
Result: not yet run.
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_resnet32.py."""
  c = config.sibling(__file__, 'cifar10_lt_resnet32')
  c.stage.method = 'tau_norm'
  c.stage.tau = 1.0
  return c
