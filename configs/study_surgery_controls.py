r"""Digits-LT with gradient surgery, controls: a learning rate for fixed and for permuted weights.

  csba-study --config=configs/study_surgery_controls.py --workdir=results/surgery_controls

`fixed` trains with the mean weights of one run with dual_projection (seed 100, the setting and the
rate that study_surgery_tuning.py chose), and `random` with these weights, their classes permuted by
the seed. Make both runs first, one a loss, in the folder where the command is given:
docs/surgery.md.
Validation scores alone, with the seeds and rates of the tuning. 36 runs.
Result: docs/surgery.md.
"""

from csba_jax import config
from csba_jax.methods.surgery import CONTROLS


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_surgery_tuning')
  c.name = 'digits_lt_surgery_controls'
  c.own_methods = {
    f'{control}_{loss}': {
      'loss.name': loss,
      'surgery.name': control,
      'surgery.source': f'runs/surgery_{loss}',
    }
    for control in CONTROLS
    for loss in ('cross_entropy', 'balanced_softmax')
  }
  c.methods = tuple(c.own_methods)
  return c
