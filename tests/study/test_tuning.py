"""Learning rates from a study that only tunes: the best mean, and no half-done study."""

import json
import runpy
import types
from pathlib import Path

import pytest

from csba_jax import config as config_lib
from csba_jax.errors import UserError
from csba_jax.study import grid, results, tuning

simulated = types.SimpleNamespace(**runpy.run_path(Path(__file__).parents[1] / 'simulated.py'))
KEY = 'depth=1 imbalance_factor=33.0 method=cross_entropy model=multibranch variant={} width=0.25'
SCORES = {'none': {0.1: [0.7, 0.6], 0.02: [0.5, 0.9]}, 'csba': {0.1: [0.8, 0.8], 0.02: [0.1, 0.9]}}


def asked(folder, **base):
  """A study that asks for the rates of a folder; fields of its base as train__epochs=1."""
  c = grid.default()
  c.variants, c.tuned_by, c.first_seed = ('none', 'csba'), str(folder), 100
  for name, value in base.items():
    section, field = name.split('__')
    c.base[section][field] = value
  return c


def write(folder, about, records):
  """The same with the base of `asked`."""
  base = config_lib.default().to_dict()
  return simulated.write(folder, about | {'config': about['config'] | {'base': base}}, records)


def test_scores_are_those_of_the_runs(tmp_path):
  found = tuning.scores(results.read(simulated.write(tmp_path, *simulated.tuning(SCORES))))
  assert found == {KEY.format(variant): by_rate for variant, by_rate in SCORES.items()}


@pytest.mark.parametrize(
  ('by_rate', 'wanted'),
  [
    ({0.1: [0.5, 0.7], 0.2: [0.9, 0.2]}, 0.1),  # by the mean, not by the best run
    ({0.2: [0.6, 0.6], 0.1: [0.5, 0.6]}, 0.2),
    ({0.1: [0.5, 0.5, 0.5], 0.2: [0.6]}, 0.2),  # nor by the sum
    ({0.2: [0.25, 0.75], 0.1: [0.5, 0.5], 0.4: [0.5, 0.5]}, 0.1),  # equal: the smallest
    ({0.3: [0.0]}, 0.3),
  ],
)
def test_best(by_rate, wanted):
  assert tuning.best(by_rate) == wanted


WANTED = {KEY.format('none'): 0.02, KEY.format('csba'): 0.1}


def test_chosen_rates(tmp_path):
  write(tmp_path, *simulated.tuning(SCORES))
  assert tuning.chosen_rates(asked(tmp_path)) == WANTED
  assert tuning.chosen_rates(asked('')) is None


ENDS = {
  'none': {0.02: [0.5, 0.5], 0.1: [0.7, 0.7], 0.5: [0.6, 0.6]},
  'se': {0.02: [0.7, 0.7], 0.1: [0.5, 0.5], 0.5: [0.6, 0.6]},
  'csba': {0.02: [0.5, 0.5], 0.1: [0.6, 0.6], 0.5: [0.7, 0.7]},
  'cbam': {0.02: [0.5, 0.5], 0.1: [0.6, 0.6], 0.5: [0.7, 0.7]},
}


def test_rates_at_an_end_of_the_grid_are_named(tmp_path):
  write(tmp_path, *simulated.tuning(ENDS))
  study = asked(tmp_path)
  study.variants = tuple(ENDS)
  assert tuning.at_ends(study) == [
    f'learning rates of {tmp_path}: the smallest of 0.02, 0.1, 0.5 was the best for variant=se; a '
    'smaller one was not tried',
    f'learning rates of {tmp_path}: the largest of 0.02, 0.1, 0.5 was the best for variant=cbam '
    'and variant=csba; a larger one was not tried',
  ]
  assert tuning.at_ends(asked('')) == []
  (note,) = tuning.at_ends(asked(tmp_path))  # of none and csba alone
  assert note.endswith('was the best for variant=csba; a larger one was not tried')
  study.methods = ('balanced_softmax',)  # the tuning has cross_entropy
  assert tuning.at_ends(study) == []


@pytest.mark.parametrize(
  ('by_rate', 'found'),
  [({0.1: [0.5], 0.2: [0.7], 0.4: [0.6]}, 0), ({0.1: [0.5]}, 0), ({0.1: [0.5], 0.2: [0.7]}, 1)],
)
def test_one_rate_alone_has_no_ends(tmp_path, by_rate, found):
  write(tmp_path, *simulated.tuning({'none': by_rate}))
  assert len(tuning.at_ends(asked(tmp_path))) == found


def test_naive_folds_have_no_part_in_the_choice(tmp_path):
  about, records = simulated.tuning(SCORES)
  naive = [json.loads(json.dumps(record)) for record in records]
  for record in naive:
    record['axes']['split'] = 'naive'
    record['run'] += '-naive'
    record['result']['validation_macro_f1'] = 1 - record['result']['validation_macro_f1']
  write(tmp_path, about, [*records, *naive])
  assert tuning.chosen_rates(asked(tmp_path)) == WANTED


def test_rates_of_another_base_are_refused(tmp_path):
  write(tmp_path, *simulated.tuning(SCORES))
  with pytest.raises(UserError) as error:
    tuning.chosen_rates(asked(tmp_path, train__epochs=3, loss__tau=0.5))
  assert str(error.value) == (
    f'expected the base of this study in {tmp_path}; found loss.tau: 1.0 there, 0.5 here; '
    'train.epochs: 10 there, 3 here; to fix it: tune this base, or correct it'
  )


def test_a_base_may_lie_elsewhere_and_measure_more(tmp_path):
  about, records = simulated.tuning(SCORES)
  write(tmp_path, about, records)
  c = asked(
    tmp_path, data__dir='/x', data__cache_dir='/y', diagnostics__snapshots='0,1',
    train__learning_rate=7.0,
  )  # fmt: skip
  assert tuning.chosen_rates(c) == WANTED


def test_a_field_newer_than_the_tuning_had_its_default(tmp_path):
  about, records = simulated.tuning(SCORES)
  base = config_lib.default().to_dict()
  del base['loss']['tau'], base['mixing']
  simulated.write(tmp_path, about | {'config': about['config'] | {'base': base}}, records)
  assert tuning.chosen_rates(asked(tmp_path)) == WANTED
  with pytest.raises(UserError, match='loss.tau: 1.0 there, 0.5 here'):
    tuning.chosen_rates(asked(tmp_path, loss__tau=0.5))


@pytest.mark.parametrize(
  ('fields', 'found'),
  [
    ({'first_seed': 1, 'seeds': 3}, 'seed 1 in both'),
    ({'first_seed': 100, 'seeds': 3, 'subsets': 2}, 'data.seed 0 in both'),
  ],
)
def test_rates_chosen_on_seeds_of_the_study_are_refused(tmp_path, fields, found):
  about, records = simulated.tuning(SCORES)
  for record in records:
    record['config']['data'] = {'seed': 0}
  write(tmp_path, about, records)
  c = asked(tmp_path)
  c.update(fields)
  with pytest.raises(UserError, match=f'none of this study; found {found}; '):
    tuning.chosen_rates(c)


def test_runs_that_the_plan_has_and_no_rate(tmp_path):
  """As many runs of every rate, but fewer than planned."""
  about, records = simulated.tuning(SCORES)
  about['config']['seeds'] = 3
  write(tmp_path, about, records)
  with pytest.raises(UserError, match=f'3 runs of every .* in {tmp_path}; found 2 to 2 for '):
    tuning.chosen_rates(asked(tmp_path))


@pytest.mark.parametrize('name', ['digits', 'solar'])
def test_the_rates_of_the_repository_are_those_of_its_studies(name, monkeypatch):
  """As they were asked for: configs/ may be for the next time."""
  monkeypatch.chdir(Path(__file__).parents[2])
  found = results.read(f'results/{name}')
  c = grid.default()
  there = found.study['config']
  there['base'] = config_lib.completed(there['base'])
  c.update({key: tuple(v) if isinstance(v, list) else v for key, v in there.items()})
  rates = tuning.chosen_rates(c)
  used = {grid.rate_key(run.axes): run.config.train.learning_rate for run in grid.runs(c, rates)}
  assert {
    grid.rate_key(record['axes']): record['config']['train']['learning_rate']
    for record in found.done
  } == used


def test_an_unfinished_study_chooses_nothing(tmp_path):
  about, records = simulated.tuning(SCORES)
  write(tmp_path, about, records[:-1])
  message = f'every learning rate in {tmp_path}; found 1 to 2 for {KEY.format("csba")}; '
  with pytest.raises(UserError, match=message):
    tuning.chosen_rates(asked(tmp_path))


def test_a_failed_run_is_no_run(tmp_path):
  about, records = simulated.tuning(SCORES)
  records[0] = {k: v for k, v in records[0].items() if k != 'result'} | {'status': 'failed'}
  write(tmp_path, about, records)
  with pytest.raises(UserError, match=f'found 1 to 2 for {KEY.format("none")}; '):
    tuning.chosen_rates(asked(tmp_path))


def test_a_rate_without_any_run_is_missed(tmp_path):
  about, records = simulated.tuning(SCORES)
  about['config']['learning_rates'] = [0.02, 0.1, 0.2]
  write(tmp_path, about, records)
  with pytest.raises(UserError, match=f'found 0 to 2 for {KEY.format("csba")}; '):
    tuning.chosen_rates(asked(tmp_path))


def test_only_failed_runs(tmp_path):
  about, records = simulated.tuning(SCORES)
  failed = [
    {k: v for k, v in record.items() if k != 'result'} | {'status': 'failed', 'error': 'no disk'}
    for record in records
  ]
  write(tmp_path, about, failed)
  with pytest.raises(UserError, match='found 8 failed ones, the first with: no disk;'):
    tuning.chosen_rates(asked(tmp_path))


def without_rate(record):
  del record['axes']['learning_rate']


def with_null_score(record):
  record['result']['validation_macro_f1'] = None


def without_score(record):
  del record['result']['validation_macro_f1']


@pytest.mark.parametrize('spoil', [without_rate, with_null_score, without_score])
def test_a_run_without_rate_or_validation_score_is_named(tmp_path, spoil):
  about, records = simulated.tuning(SCORES)
  spoil(records[3])
  write(tmp_path, about, records)
  message = f'a study of learning rates, .*; found run {records[3]["run"]} without; '
  with pytest.raises(UserError, match=message):
    tuning.chosen_rates(asked(tmp_path))


def test_no_study(tmp_path):
  with pytest.raises(UserError, match='no study.json there'):
    tuning.chosen_rates(asked(tmp_path))
