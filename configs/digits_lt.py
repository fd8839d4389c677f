r"""Digits-LT: 1,797 handwritten 8x8 digits, long-tailed at imbalance factor 20, CSBA.

  csba-train --config=configs/digits_lt.py --workdir=runs/digits_csba

The control is --config.model.attention=none. Results: README.
"""

from csba_jax import config


def get_config():
  """The recipe."""
  c = config.default()
  c.data.source = 'digits'
  c.data.imbalance_factor = 20.0
  c.data.test_fraction = 0.3
  c.data.val_fraction = 0.2
  c.model.width = 0.25
  c.augment.crop_padding = 1
  c.train.batch_size = 32
  c.train.epochs = 30
  c.train.learning_rate = 0.05
  c.train.weight_decay = 5e-4
  c.train.eval_every = 10
  return c
