r"""CIFAR-10-LT at 100, small: classifier re-training, cRT (Kang et al. 2020).

  csba-train --config=configs/cifar10_lt_crt_cpu.py \
    --config.stage.source=runs/cifar10_lt_cpu --workdir=runs/cifar10_lt_crt_cpu

This is the second stage of a run of cifar10_lt_cpu.py: a new classifier, trained with
class-balanced batches for 5 epochs.
Result: docs/toolbox.md, one seed, JPEG copy.
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_cpu.py."""
  c = config.sibling(__file__, 'cifar10_lt_cpu')
  c.stage.method = 'crt'
  c.sampler.name = 'class'
  c.train.epochs = 5
  return c
