r"""CIFAR-10-LT at 100, small: balanced softmax with tuned weight decay.

  csba-train --config=configs/cifar10_lt_combination_cpu.py \
    --workdir=runs/cifar10_lt_combination_cpu

It combines the two methods with the largest effect here; the decay is that of
cifar10_lt_weight_decay_cpu.py.
Result: docs/toolbox.md, one seed, JPEG copy.
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_balanced_softmax_cpu.py."""
  c = config.sibling(__file__, 'cifar10_lt_balanced_softmax_cpu')
  c.train.weight_decay = 2e-3
  return c
