r"""CIFAR-10-LT, ResNet-32: label smoothing (Szegedy et al. 2016).

  csba-train --config=configs/cifar10_lt_label_smoothing.py \
    --workdir=runs/cifar10_lt_label_smoothing

eps is 0.1, not tuned.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_resnet32.py."""
  c = config.sibling(__file__, 'cifar10_lt_resnet32')
  c.loss.name = 'label_smoothing'
  c.loss.smoothing = 0.1
  return c
