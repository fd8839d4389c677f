r"""Digits-LT with gradient surgery: two aggregators against plain training and two controls.

  csba-study --config=configs/study_surgery.py --workdir=results/surgery --jobs=2
  csba-report --workdir=results/surgery

100 runs. Protocol: docs/study.md. Settings and rates are those of study_surgery_tuning.py for the
aggregators, of study_surgery_controls.py for the controls, which take the weights of the same runs,
and of study_digits_tuning.py for plain training.
Result: docs/surgery.md.
"""

from csba_jax import config

# learning rate, and of an aggregator what counts as conflict
CHOSEN = {
  'cross_entropy': {
    'plain': (0.4, ''),
    'dual_projection': (0.2, 'certain'),
    'gradnorm': (0.1, 'certain'),
    'fixed': (0.2, ''),
    'random': (0.2, ''),
  },
  'balanced_softmax': {
    'plain': (0.05, ''),
    'dual_projection': (0.05, 'certain'),
    'gradnorm': (0.1, 'all'),
    'fixed': (0.1, ''),
    'random': (0.1, ''),
  },
}
PAIRS = (
  ('dual_projection', 'plain'),
  ('gradnorm', 'plain'),
  ('dual_projection', 'fixed'),
  ('dual_projection', 'random'),
)


def method(loss: str, name: str) -> dict:
  """The fields of a treatment with a loss."""
  rate, conflict = CHOSEN[loss][name]
  found = {'loss.name': loss, 'train.learning_rate': rate}
  if name in ('fixed', 'random'):
    found |= {'surgery.name': name, 'surgery.source': f'runs/surgery_{loss}'}
  elif name != 'plain':
    found |= {
      'surgery.name': name,
      'surgery.every': 50,
      'surgery.batches': 16,
      'surgery.certain': conflict == 'certain',
      'surgery.rate': 0.3,  # of gradnorm, which has few measurements to move by
    }
  return found


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_digits')
  c.name = 'digits_lt_surgery'
  c.variants = ('none',)
  c.own_methods = {
    f'{name}_{loss}': method(loss, name) for loss, names in CHOSEN.items() for name in names
  }
  c.methods = tuple(c.own_methods)
  c.method_pairs = tuple(
    (f'{treatment}_{loss}', f'{control}_{loss}') for loss in CHOSEN for treatment, control in PAIRS
  )
  c.base.diagnostics.loss_levels = ''
  c.first_seed = 500
  c.tuned_by = ''
  return c
