r"""CIFAR-10-LT, ResNet-32: deferred re-weighting (Cao et al. 2019).

  csba-train --config=configs/cifar10_lt_ce_drw.py --workdir=runs/cifar10_lt_ce_drw

Classes are weighted by effective number from epoch 160 of 200 on.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_class_weights.py."""
  c = config.sibling(__file__, 'cifar10_lt_class_weights')
  c.loss.weights_start = 0.8
  return c
