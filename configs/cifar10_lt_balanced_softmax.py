r"""CIFAR-10-LT, ResNet-32: balanced softmax (Ren et al. 2020).

  csba-train --config=configs/cifar10_lt_balanced_softmax.py \
    --workdir=runs/cifar10_lt_balanced_softmax

It has no hyperparameters.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_resnet32.py."""
  c = config.sibling(__file__, 'cifar10_lt_resnet32')
  c.loss.name = 'balanced_softmax'
  return c
