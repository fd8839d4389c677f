r"""CIFAR-10-LT, ResNet-32: balanced softmax, moving averages evaluated.

  csba-train --config=configs/cifar10_lt_ema.py --workdir=runs/cifar10_lt_ema

The decay of the averages is 0.999 a step, which averages over about ten epochs of 97 steps.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_balanced_softmax.py."""
  c = config.sibling(__file__, 'cifar10_lt_balanced_softmax')
  c.train.ema_decay = 0.999
  return c
