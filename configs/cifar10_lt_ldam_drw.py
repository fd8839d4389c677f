r"""CIFAR-10-LT, ResNet-32: LDAM with deferred re-weighting (Cao et al. 2019).

  csba-train --config=configs/cifar10_lt_ldam_drw.py --workdir=runs/cifar10_lt_ldam_drw

The largest margin is 0.5, cosines are scaled by 30, and class weights apply from epoch 160 on.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_ce_drw.py."""
  c = config.sibling(__file__, 'cifar10_lt_ce_drw')
  c.model.head = 'cosine'
  c.loss.name = 'ldam'
  c.loss.max_margin = 0.5
  c.model.scale = 30.0
  return c
