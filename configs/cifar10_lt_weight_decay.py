r"""CIFAR-10-LT, ResNet-32: cross-entropy with tuned weight decay (Alshammari et al. 2022).

  csba-train --config=configs/cifar10_lt_weight_decay.py --workdir=runs/cifar10_lt_weight_decay

The decay is 5e-3, the peak rate 0.01 and the schedule a cosine, as in the authors' code for
CIFAR-100-LT (ResNet-34, batch 64, 320 epochs). They are not tuned here: choose the decay with
--config.data.val_fraction=0.1.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_resnet32.py."""
  c = config.sibling(__file__, 'cifar10_lt_resnet32')
  c.train.schedule = 'cosine'
  c.train.learning_rate = 0.01
  c.train.weight_decay = 5e-3
  return c
