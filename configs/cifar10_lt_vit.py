r"""CIFAR-10-LT, a small ViT whose heads are the branches that CSBA gates.

  csba-train --config=configs/cifar10_lt_vit.py --workdir=runs/cifar10_lt_vit

It uses AdamW at 1e-3 with weight decay 0.05 and a cosine schedule, not tuned. Controls:
--config.model.attention=none, none_wide, se, csba_class.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_resnet32.py."""
  c = config.sibling(__file__, 'cifar10_lt_resnet32')
  c.model.name = 'vit'
  c.model.attention = 'csba'
  c.train.optimizer = 'adamw'
  c.train.schedule = 'cosine'
  c.train.learning_rate = 1e-3
  c.train.weight_decay = 0.05
  c.augment.policy = 'randaugment'
  return c
