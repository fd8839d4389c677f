r"""CIFAR-10-LT, ResNet-32: cross-entropy with tuned weight decay (Alshammari et al. 2022).

  csba-train --config=configs/cifar10_lt_weight_decay.py --workdir=runs/cifar10_lt_weight_decay

5e-3, 25 times that of the standard recipe, as in their code for CIFAR; the cosine schedule is
theirs too.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_resnet32.py."""
  c = config.sibling(__file__, 'cifar10_lt_resnet32')
  c.train.schedule = 'cosine'
  c.train.weight_decay = 5e-3
  return c
