r"""CIFAR-10-LT at 100, small: LDAM with deferred re-weighting (Cao et al. 2019).

  csba-train --config=configs/cifar10_lt_ldam_drw_cpu.py --workdir=runs/cifar10_lt_ldam_drw_cpu

The largest margin is 0.5 and cosines are scaled by 30. Class weights, by effective number, apply
after 80 % of the run.
Result: docs/toolbox.md, one seed, JPEG copy.
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_cpu.py."""
  c = config.sibling(__file__, 'cifar10_lt_cpu')
  c.model.head = 'cosine'
  c.loss.name = 'ldam'
  c.loss.weights = 'effective'
  c.loss.weights_start = 0.8
  return c
