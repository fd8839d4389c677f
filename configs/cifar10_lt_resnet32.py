r"""CIFAR-10-LT, imbalance factor 100, ResNet-32: the recipe behind the tables of the literature.

  csba-train --config=configs/cifar10_lt_resnet32.py --workdir=runs/cifar10_lt_resnet32

It follows LDAM-DRW's code (Cao et al. 2019): 200 epochs, batch 128, SGD 0.1 with momentum 0.9,
weight decay 2e-4, 5 epochs of warm-up, rate / 100 at epochs 160 and 180, crop and flip, all
5000..50 images in training, the last checkpoint. It differs in five points: Nesterov momentum, no
weight decay on norms and biases, kernels initialised by fan-out, bfloat16, and images scaled to
[-1, 1] instead of standardised. To choose a hyperparameter, add a validation part:
--config.data.val_fraction=0.1. For another imbalance factor set --config.data.imbalance_factor=50.
On an accelerator an epoch is one dispatch.
Result: not yet run; published with original pixels: accuracy 70.4 % (IF 100), 74.8 % (50), 86.4 %
(10).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt.py."""
  c = config.sibling(__file__, 'cifar10_lt')
  c.model.name = 'resnet32'
  c.model.attention = 'none'
  c.model.dtype = 'bfloat16'
  c.data.val_fraction = 0.0
  c.train.schedule = 'steps'
  c.train.log_every = 97  # an epoch of 12,406 images
  c.train.eval_every = 20
  return c
