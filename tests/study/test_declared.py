"""Methods and pairs of variants that a study config declares for itself."""

import re

import pytest

from csba_jax import config as config_lib
from csba_jax.errors import UserError
from csba_jax.study import declared, grid, protocol, study_json, tuning

LDAM = {'loss.name': 'ldam', 'model.head': 'cosine', 'sampler.name': 'class'}


def study(**fields):
  c = grid.default()
  c.seeds = 1
  c.base.data.imbalance_factor = 20.0
  for name, value in fields.items():
    c[name] = value
  return c


def of_methods(**methods):
  return study(own_methods=methods, methods=tuple(methods))


def changed(c, method):
  """What differs between the base and the run of a method."""
  c = c.copy_and_resolve_references()
  c.variants, c.methods = ('csba',), (method,)
  base = config_lib.flatten(c.base)
  (run,) = grid.runs(c)
  return {f: v for f, v in config_lib.flatten(run.config).items() if v != base[f]}


def test_an_own_method_sets_its_fields_and_no_others():
  c = of_methods(ldam=LDAM, decay={'train.weight_decay': 1})
  assert changed(c, 'ldam') == LDAM
  assert changed(c, 'decay') == {'train.weight_decay': 1.0}
  assert changed(c, 'balanced_softmax') == {'loss.name': 'balanced_softmax'}
  assert type(grid.runs(c)[-1].config.train.weight_decay) is float


def test_every_method_sets_every_field_that_any_of_them_changes():
  c = of_methods(ldam=LDAM, decay={'train.weight_decay': 0.1})
  c.base.train.weight_decay = 0.02
  found = declared.methods(c)
  assert found.keys() == {*protocol.METHODS, 'ldam', 'decay'}
  fields = {*protocol.PLAIN, 'model.head', 'train.weight_decay'}
  assert all(changes.keys() == fields for changes in found.values())
  assert found['ldam'] == protocol.PLAIN | LDAM | {'train.weight_decay': 0.02}
  assert found['drw'] == protocol.METHODS['drw'] | {
    'model.head': 'linear',
    'train.weight_decay': 0.02,
  }


def test_fields_in_which_runs_may_differ():
  c = of_methods(decay={'train.weight_decay': 0.1})
  assert grid.fields_of_runs(c) == {*grid.OF_RUN, 'train.weight_decay'}
  assert grid.fields_of_runs({}) == {*grid.OF_RUN}  # of an old study.json


def test_what_a_study_declares_is_not_in_its_digest():
  assert grid.digest(of_methods(ldam=LDAM)) == grid.digest(study())


def test_pairs_of_the_protocol_stand_in_for_none():
  for config in ({}, {'pairs': []}, study()):
    assert protocol.family(config) == protocol.FAMILY
    assert protocol.secondary(config) == protocol.SECONDARY
  own = {'pairs': [['se', 'none'], ['cbam', 'se']]}  # as JSON has it
  assert protocol.family(own) == (('se', 'none'), ('cbam', 'se'))
  assert protocol.secondary(own) == ()


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      {'own_methods': {'drw': LDAM}},
      'expected names of own_methods of letters, digits and _, other than those of the protocol '
      "(cross_entropy, balanced_softmax, class_balanced, drw); found 'drw'; to fix it: rename the "
      'method',
    ),
    ({'own_methods': {'a b': LDAM}}, "found 'a b'; to fix it: rename the method"),
    (
      {'own_methods': {'ldam': {}}},
      "expected own_methods.ldam as fields of base with their values, such as {'loss.name': "
      "'ldam'}; found {}; to fix it: correct the config",
    ),
    ({'own_methods': {'ldam': 'ldam'}}, "found 'ldam'; to fix it: correct the config"),
    (
      {'own_methods': {'ldam': {'loss.nam': 'ldam'}}},
      'expected fields of csba_jax.config.default() in own_methods; found loss.nam in ldam; to fix '
      'it: correct the name of the field',
    ),
    (
      {'own_methods': {'wide': {'model.width': 2.0}}},
      'expected own_methods that set fields of the training alone; found model.width in wide: '
      'every run gets it from widths; to fix it: remove it from the method',
    ),
    ({'own_methods': {'x': {'model.name': 'vit'}}}, 'every run gets it from models;'),
    ({'own_methods': {'x': {'model.depth': 2}}}, 'every run gets it from depths;'),
    ({'own_methods': {'x': {'model.attention': 'se'}}}, 'every run gets it from variants;'),
    ({'own_methods': {'x': {'seed': 2}}}, 'every run gets it from first_seed;'),
    ({'own_methods': {'x': {'data.fold': 1}}}, 'every run gets it from repeats;'),
    (
      {'own_methods': {'x': {'data.imbalance_factor': 2.0}}},
      'every run gets it from imbalance_factors;',
    ),
    (
      {'own_methods': {'x': {'train.learning_rate': 0.1}}, 'tuned_by': 'results/x'},
      'every run gets it from tuned_by;',
    ),
    (
      {'own_methods': {'x': {'train.learning_rate': 0.1}}, 'learning_rates': (0.1,)},
      'every run gets it from learning_rates;',
    ),
    (
      {'own_methods': {'x': {'data.val_fraction': 0.2}}},
      'found data.val_fraction in x: all runs of a unit have the same images;',
    ),
    (
      {'own_methods': {'x': {'parallel.devices': 2}}},
      'found parallel.devices in x: it says where a run is done, not what it is;',
    ),
    (
      {'own_methods': {'x': {'loss.tau': 'much'}}},
      "expected loss.tau of type float in own_methods.x; found 'much'; to fix it: correct the "
      'config',
    ),
    (
      {'own_methods': {'x': {'loss.beta': 2.0}}},
      'expected in own_methods.x loss.beta: ',
    ),
    (
      {'methods': ('cross_entropy', 'ldam'), 'own_methods': {'other': LDAM}},
      'expected methods: some of cross_entropy, balanced_softmax, class_balanced, drw, other; '
      "found 'ldam'; to fix it: set --config.methods=..., or define it in own_methods",
    ),
    (
      {'pairs': ('csba',)},
      'expected pairs of two variants, (treatment, control), such as '
      "pairs=(('csba', 'none'),); found 'csba'; to fix it: correct the config",
    ),
    ({'pairs': (('csba', 'none', 'se'),)}, "found ('csba', 'none', 'se');"),
    ({'pairs': (('csba', 'csba'),)}, "found ('csba', 'csba');"),
    ({'pairs': ((1, 'csba'),)}, "found (1, 'csba');"),
    (
      {'pairs': (('csba', 'se'),)},
      'expected pairs of the variants that are run (none, none_wide, csba); found se in '
      "('csba', 'se'); to fix it: add it to variants, or correct the pair",
    ),
    (
      {'pairs': (('csba', 'none'), ('none', 'csba'))},
      "expected each pair of variants once; found ('none', 'csba'); to fix it: name it once",
    ),
    (
      {'method_pairs': ('drw', 'cross_entropy')},
      'expected pairs of two methods, (treatment, control), such as '
      "method_pairs=(('balanced_softmax', 'cross_entropy'),); found 'drw'; to fix it: ",
    ),
    (
      {'method_pairs': (('drw', 'cross_entropy'),), 'methods': ('cross_entropy',)},
      'expected pairs of the methods that are run (cross_entropy); found drw in '
      "('drw', 'cross_entropy'); to fix it: add it to methods, or correct the pair",
    ),
    (
      {
        'method_pairs': (('drw', 'cross_entropy'), ('cross_entropy', 'drw')),
        'methods': ('cross_entropy', 'drw'),
      },
      "expected each pair of methods once; found ('cross_entropy', 'drw'); to fix it: name it once",
    ),
  ],
)
def test_a_wrong_declaration_is_one_line(fields, message):
  with pytest.raises(UserError, match=re.escape(message)) as caught:
    grid.check(study(**fields))
  assert '\n' not in str(caught.value)


def test_a_learning_rate_of_a_method_where_no_axis_sets_it():
  assert changed(of_methods(slow={'train.learning_rate': 0.01}), 'slow') == {
    'train.learning_rate': 0.01
  }


def test_pairs_belong_to_a_study_and_methods_may_grow(tmp_path):
  first = study(pairs=(('csba', 'none'),))
  study_json.claim(tmp_path, first)
  more = study(pairs=(('csba', 'none'),), own_methods={'ldam': LDAM}, methods=('ldam',))
  study_json.claim(tmp_path, more)
  assert study_json.read(tmp_path)['config']['own_methods'] == {'ldam': LDAM}
  for other in ({'pairs': (('none_wide', 'none'),)}, {'method_pairs': (('drw', 'ldam'),)}):
    with pytest.raises(UserError, match=next(iter(other))):
      study_json.claim(tmp_path, study(**{'pairs': (('csba', 'none'),)} | other))


def test_a_tuning_of_another_method_of_the_same_name():
  here = of_methods(ldam=LDAM, other={'loss.tau': 2.0})
  there = {'own_methods': {'ldam': LDAM | {'model.head': 'linear'}}}
  assert tuning._other_methods(there, here) == [
    "own_methods.ldam.model.head: 'linear' there, 'cosine' here"
  ]
  assert tuning._other_methods({}, here) == []
