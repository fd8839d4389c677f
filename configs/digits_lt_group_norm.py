r"""Digits-LT with GroupNorm in place of BatchNorm: no image depends on the others of its batch.

  csba-train --config=configs/digits_lt_group_norm.py --workdir=runs/digits_group_norm

What csba-diagnose measures is then the gradient that training takes, but for augmentation.
Results: docs/study.md.
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from digits_lt.py."""
  c = config.sibling(__file__, 'digits_lt')
  c.model.norm = 'group'
  return c
