r"""CIFAR-10-LT at 100, small: label-aware smoothing of MiSLAS, second stage (Zhong et al. 2021).

  csba-train --config=configs/cifar10_lt_label_aware_cpu.py \
    --config.stage.source=runs/cifar10_lt_cpu --workdir=runs/cifar10_lt_label_aware_cpu

This is the second stage of a run of cifar10_lt_cpu.py. eps is 0.3 for the largest class and 0 for
the smallest, as in the authors' config for CIFAR-10 at imbalance factor 100.
Result: docs/toolbox.md, one seed, JPEG copy.
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_crt_cpu.py."""
  c = config.sibling(__file__, 'cifar10_lt_crt_cpu')
  c.stage.method = 'label_aware'
  c.model.head = 'scaled'
  c.loss.name = 'label_aware_smoothing'
  c.loss.smoothing = 0.3
  c.loss.smoothing_tail = 0.0
  return c
