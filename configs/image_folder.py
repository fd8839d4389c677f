r"""A folder of photos, CLASS/file.jpg, with its own imbalance; the multi-branch net with CSBA.

  csba-train --config=configs/image_folder.py --config.data.dir=PHOTOS --workdir=runs/photos

`csba-train --data=PHOTOS` takes this recipe, and chooses settings for the photos and the machine.

Photos are resized to 64 pixels (shorter side) and cropped to a square. Byte-identical photos stay
on one side of a split. csba-audit lists copies that only look the same, in a CSV file with a column
`file` and a column of groups, so that no copy of a training photo is in the test part:
--config.data.manifest=DIR/copies.csv --config.data.group_column=group.
Result: not yet run.
"""

from csba_jax import config


def get_config():
  """The recipe."""
  c = config.default()
  c.data.source = 'image_folder'
  c.data.image_size = 64
  c.data.channels = 3
  c.data.num_classes = 0
  c.data.profile = 'natural'
  c.augment.crop_padding = 4
  c.augment.flip = True
  c.model.width = 0.5
  c.train.epochs = 30
  c.train.batch_size = 32
  c.train.learning_rate = 0.05
  c.train.weight_decay = 5e-4
  c.train.warmup_fraction = 0.1
  return c
