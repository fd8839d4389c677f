r"""CIFAR-10-LT, ResNet-32: a last stage of three branches, CSBA.

  csba-train --config=configs/cifar10_lt_branches.py --workdir=runs/cifar10_lt_branches

The topology is that of multi-expert methods (RIDE, SADE), with one classifier. Controls:
--config.model.attention=none, none_wide, se, cbam, csba_class. Loss: balanced softmax.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_balanced_softmax.py."""
  c = config.sibling(__file__, 'cifar10_lt_balanced_softmax')
  c.model.name = 'resnet32_branches'
  c.model.attention = 'csba'
  return c
