r"""CIFAR-10-LT, ResNet-32: classifier re-training, cRT (Kang et al. 2020).

  csba-train --config=configs/cifar10_lt_crt.py \
    --config.stage.source=runs/cifar10_lt_resnet32 --workdir=runs/cifar10_lt_crt

Second stage of a run of cifar10_lt_resnet32.py: a new classifier on the old features, class-
balanced batches, 10 epochs; the norms keep their statistics, where the official code lets them go
on.
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
