r"""CIFAR-10-LT at 100, small: cross-entropy with tuned weight decay (Alshammari et al. 2022).

  csba-train --config=configs/cifar10_lt_weight_decay_cpu.py \
    --workdir=runs/cifar10_lt_weight_decay_cpu

The decay is 2e-3. Validation macro-F1 (best epoch, seed 0, attention none) was 0.592 at 5e-4, 0.580
at 1e-3, 0.643 at 2e-3, 0.604 at 5e-3 and 0.537 at 1e-2. csba uses the same decay.
Result: docs/toolbox.md, one seed, JPEG copy.
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_cpu.py."""
  c = config.sibling(__file__, 'cifar10_lt_cpu')
  c.train.weight_decay = 2e-3
  return c
