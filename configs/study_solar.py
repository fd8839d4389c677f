r"""Solar-panel photos, six classes: F1 of Physical-Damage, `none`, `none_wide` and `csba`.

  csba-study --config=configs/study_solar.py --workdir=results/solar --jobs=2
  csba-report --workdir=results/solar

Needs $CSBA_IMAGE_FOLDER: CLASS/photo.jpg with a manifest.csv whose column dup_group names copies.
Protocol: docs/study.md. Five folds, twice, copies of a photo on one side; and once as if there were
no copies. As the photos are (3:1), and cut to 20:1 with Physical-Damage the rarest.
"""

from csba_jax import config
from csba_jax.study import grid


def get_config():
  """The study."""
  c = grid.default()
  c.name = 'solar'
  c.base = config.sibling(__file__, 'image_folder')
  c.base.data.image_size = 48
  c.base.model.gate = 'half'  # as in the committed results
  c.base.data.num_classes = 6
  c.base.data.class_order = 'frequency'
  c.base.data.manifest = 'manifest.csv'
  c.base.data.group_column = 'dup_group'
  c.base.data.folds = 5
  c.base.train.epochs = 40
  c.base.train.eval_every = 10
  c.base.train.log_every = 5  # so that levels of loss are met closely
  c.base.diagnostics.snapshots = '0,0.1,0.5,1'
  c.base.diagnostics.loss_levels = '1,0.3'
  c.imbalance_factors = (1.0, 20.0)
  c.repeats = 2
  c.naive_repeats = 1
  c.tuned_by = 'results/solar_tuning'
  c.outcome = 'f1:Physical-Damage'
  return c
