r"""CIFAR-10-LT, ResNet-32: weights by effective number, from the start (Cui et al. 2019).

  csba-train --config=configs/cifar10_lt_class_weights.py --workdir=runs/cifar10_lt_class_weights

The weights apply from the first step on; cifar10_lt_ce_drw.py defers them.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_resnet32.py."""
  c = config.sibling(__file__, 'cifar10_lt_resnet32')
  c.loss.weights = 'effective'
  c.loss.beta = 0.9999
  return c
