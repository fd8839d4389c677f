r"""CIFAR-10-LT, imbalance factor 100, the full multi-branch net: the recipe for an accelerator.

  csba-train --config=configs/cifar10_lt.py --workdir=runs/cifar10_lt

It trains 200 epochs as LDAM-DRW's code does (batch 128, SGD 0.1 with Nesterov momentum, weight
decay 2e-4, 5 epochs of warm-up), but with a cosine schedule in place of two steps. It needs
CIFAR-10 prepared for TFDS as array_record under $TFDS_DATA_DIR.
Result: not yet run. On two CPU cores it would take many hours; use cifar10_lt_cpu.py there.
"""

from csba_jax import config


def get_config():
  """The recipe."""
  c = config.default()
  c.data.source = 'tfds'
  c.data.name = 'cifar10'
  c.data.image_size = 32
  c.data.channels = 3
  c.data.imbalance_factor = 100.0
  c.augment.crop_padding = 4
  c.augment.flip = True
  c.train.epochs = 200
  c.train.eval_every = 5
  return c
