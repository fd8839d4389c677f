r"""CIFAR-10-LT, ResNet-32: VS loss (Kini et al. 2021).

  csba-train --config=configs/cifar10_lt_vector_scaling.py \
    --workdir=runs/cifar10_lt_vector_scaling

gamma is 0.15 and tau 1.25, as in the code of GLMC for CIFAR-10-LT.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_resnet32.py."""
  c = config.sibling(__file__, 'cifar10_lt_resnet32')
  c.loss.name = 'vector_scaling'
  c.loss.gamma = 0.15
  c.loss.tau = 1.25
  return c
