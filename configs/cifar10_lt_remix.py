r"""CIFAR-10-LT, ResNet-32: Remix (Chou et al. 2020).

  csba-train --config=configs/cifar10_lt_remix.py --workdir=runs/cifar10_lt_remix

kappa is 3, tau 0.5 and alpha 1, as in the paper, with deferred re-weighting.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_ce_drw.py."""
  c = config.sibling(__file__, 'cifar10_lt_ce_drw')
  c.mixing.name = 'remix'
  return c
