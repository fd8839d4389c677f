r"""CIFAR-10-LT, ResNet-32: classifier re-training, cRT (Kang et al. 2020).

  csba-train --config=configs/cifar10_lt_crt.py \
    --config.stage.source=runs/cifar10_lt_resnet32 --workdir=runs/cifar10_lt_crt

This is the second stage of a run of cifar10_lt_resnet32.py. It trains a new classifier on the old
features, with class-balanced batches, for 10 epochs. Norm layers keep their statistics; in the
official code they are updated.
Result: not yet run.
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_resnet32.py."""
  c = config.sibling(__file__, 'cifar10_lt_resnet32')
  c.stage.method = 'crt'
  c.sampler.name = 'class'
  c.train.schedule = 'cosine'
  c.train.epochs = 10
  return c
