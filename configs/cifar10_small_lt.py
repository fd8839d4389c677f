r"""CIFAR-10-LT in small: 384 images of the largest class, imbalance factor 20, 16x16 pixels.

  csba-train --config=configs/cifar10_small_lt.py --workdir=runs/cifar10_small_lt

For comparisons that need many runs. CIFAR-10's training part is cut into 13 subsets that share no
image; data.seed, 0 to 12, says which. The test part is whole. It needs CIFAR-10 prepared for TFDS
as array_record under $TFDS_DATA_DIR.
Results: docs/study.md, CIFAR-10-LT in small (JPEG copy).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt_cpu.py."""
  c = config.sibling(__file__, 'cifar10_lt_cpu')
  c.data.image_size = 16
  c.data.imbalance_factor = 20.0
  c.data.largest_class = 384
  c.data.disjoint_subsets = 13
  c.data.val_fraction = 0.2
  c.augment.crop_padding = 2
  c.model.width = 0.25
  c.train.epochs = 40  # chosen by study_cifar10_small_epochs.py
  c.train.batch_size = 32
  c.train.eval_every = 5
  return c
