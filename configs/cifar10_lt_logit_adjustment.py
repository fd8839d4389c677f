r"""CIFAR-10-LT, ResNet-32: logit adjustment (Menon et al. 2021).

  csba-train --config=configs/cifar10_lt_logit_adjustment.py \
    --workdir=runs/cifar10_lt_logit_adjustment

With tau 1 it is balanced softmax. Choose tau on a validation part (--config.data.val_fraction=0.1).
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_resnet32.py."""
  c = config.sibling(__file__, 'cifar10_lt_resnet32')
  c.loss.name = 'logit_adjustment'
  c.loss.tau = 1.0
  return c
