r"""CIFAR-10-LT, ResNet-32: post-hoc logit adjustment of plain cross-entropy (Menon et al. 2021).

  csba-train --config=configs/cifar10_lt_post_hoc.py --workdir=runs/cifar10_lt_post_hoc

Training is that of cifar10_lt_resnet32.py, to the bit; only the evaluation differs. So a run of
that recipe can be adjusted as well: csba-evaluate --workdir=DIR --post_hoc_tau=1. Choose tau with
--split=val on a run with a validation part.
Result: not yet run (an accelerator recipe: 200 epochs).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_resnet32.py."""
  c = config.sibling(__file__, 'cifar10_lt_resnet32')
  c.loss.post_hoc_tau = 1.0
  return c
