r"""CIFAR-10-LT, ResNet-32: CMO (Park et al. 2022).

  csba-train --config=configs/cifar10_lt_cmo.py --workdir=runs/cifar10_lt_cmo

Half of the batches get patches of class-balanced images, except in the first four and the last
three epochs, as in the authors' code.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_resnet32.py."""
  c = config.sibling(__file__, 'cifar10_lt_resnet32')
  c.mixing.name = 'cmo'
  c.mixing.probability = 0.5
  c.mixing.start = 4 / 200
  c.mixing.stop = 197 / 200
  return c
