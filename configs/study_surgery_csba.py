r"""Digits-LT with gradient surgery and CSBA: the treatments of study_surgery.py on `csba`.

  csba-study --config=configs/study_surgery_csba.py --workdir=results/surgery_csba --jobs=2
  csba-report --workdir=results/surgery_csba

100 runs. Protocol: docs/study.md, Gradient surgery with CSBA. The seeds are those of
study_surgery.py, so that its runs without attention are the other half of each pair. Learning
rates: study_surgery_csba_tuning.py, which says where `fixed` and `random` have their weights from.
Result: not yet run.
"""

from csba_jax import config


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_surgery')
  c.name = 'digits_lt_surgery_csba'
  c.variants = ('csba',)
  c.own_methods = {
    method: {
      field: value.replace('runs/surgery_', 'runs/surgery_csba_')
      if field == 'surgery.source'
      else value
      for field, value in fields.items()
      if field != 'train.learning_rate'  # that of the tuning
    }
    for method, fields in c.own_methods.items()
  }
  c.tuned_by = 'results/surgery_csba_tuning'
  return c
