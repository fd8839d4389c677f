r"""CIFAR-10-LT in small with gradient surgery: five treatments, without and with CSBA.

  csba-study --config=configs/study_small_surgery.py --workdir=results/small_surgery

100 runs: `none` and `csba`, the treatments of study_surgery.py with both losses, five seeds, each
with a training subset of its own. Protocol: docs/study.md, Gradient surgery on CIFAR-10-LT in
small. Learning rates: study_small_surgery_tuning.py, which says where `fixed` and `random`
have their weights from.
Result: not yet run.
"""

from csba_jax import config


def get_config():
  """The study."""
  c = config.sibling(__file__, 'study_cifar10_small')
  of_digits = config.sibling(__file__, 'study_surgery_csba')
  c.name = 'cifar10_small_surgery'
  c.variants = ('none', 'csba')
  c.own_methods = {
    method: {
      field: value.replace('surgery_csba', 'surgery_small') if field == 'surgery.source' else value
      for field, value in fields.items()
    }
    for method, fields in of_digits.own_methods.items()
  }
  c.methods, c.method_pairs = tuple(c.own_methods), of_digits.method_pairs
  c.pairs = (('csba', 'none'),)
  c.base.diagnostics.loss_levels = ''
  c.first_seed, c.seeds, c.subsets = 620, 5, 10
  c.tuned_by = 'results/small_surgery_tuning'
  return c
