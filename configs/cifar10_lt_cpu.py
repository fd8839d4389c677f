r"""CIFAR-10-LT, imbalance factor 100, narrow and short, for two CPU cores.

  csba-train --config=configs/cifar10_lt_cpu.py --workdir=runs/cifar10_lt_cpu

The net has half the channels of cifar10_lt.py and trains for a tenth of its epochs. Schedules are
given as fractions of the run.
Results: docs/toolbox.md (one seed, JPEG copy); a run takes 4 to 6 minutes on two cores of an AMD
EPYC (benchmarks/README.md).
"""

from csba_jax import config


def get_config():
  """The recipe: what differs from cifar10_lt.py."""
  c = config.sibling(__file__, 'cifar10_lt')
  c.model.width = 0.5
  c.train.epochs = 20
  c.train.batch_size = 64
  c.train.learning_rate = 0.05
  c.train.weight_decay = 5e-4
  c.train.warmup_fraction = 0.1
  c.train.eval_every = 2
  return c
