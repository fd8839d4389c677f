r"""CIFAR-10-LT, ResNet-32: label-aware smoothing, the second stage of MiSLAS (Zhong et al. 2021).

  csba-train --config=configs/cifar10_lt_label_aware.py \
    --config.stage.source=runs/cifar10_lt_mixup --workdir=runs/cifar10_lt_label_aware

It trains the classifier and a factor for each class, with class-balanced batches, for 10 epochs.
eps is 0.3 for the largest class and 0 for the smallest, as in the authors' config for CIFAR-10 at
imbalance factor 100. MiSLAS trains its first stage with mixup: use cifar10_lt_mixup.py.
Result: not yet run.
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_crt.py."""
  c = config.sibling(__file__, 'cifar10_lt_crt')
  c.stage.method = 'label_aware'
  c.model.head = 'scaled'
  c.loss.name = 'label_aware_smoothing'
  c.loss.smoothing = 0.3
  c.loss.smoothing_tail = 0.0
  return c
