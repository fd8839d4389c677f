"""Learning rates from a study that only tunes: the best mean, and no half-done study."""

import runpy
import types
from pathlib import Path

import pytest

from csba_jax import results, tuning
from csba_jax.errors import UserError

simulated = types.SimpleNamespace(**runpy.run_path(Path(__file__).with_name('simulated.py')))
KEY = 'depth=1 imbalance_factor=33.0 method=cross_entropy model=multibranch variant={} width=0.25'
SCORES = {'none': {0.1: [0.7, 0.6], 0.02: [0.5, 0.9]}, 'csba': {0.1: [0.8, 0.8], 0.02: [0.1, 0.9]}}


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


def test_chosen_rates(tmp_path):
  simulated.write(tmp_path, *simulated.tuning(SCORES))
  assert tuning.chosen_rates(str(tmp_path)) == {KEY.format('none'): 0.02, KEY.format('csba'): 0.1}


def test_an_unfinished_study_chooses_nothing(tmp_path):
  about, records = simulated.tuning(SCORES)
  simulated.write(tmp_path, about, records[:-1])
  message = f'every learning rate in {tmp_path}; found 1 to 2 for {KEY.format("csba")}; '
  with pytest.raises(UserError, match=message):
    tuning.chosen_rates(str(tmp_path))


def test_a_failed_run_is_no_run(tmp_path):
  about, records = simulated.tuning(SCORES)
  records[0] = {k: v for k, v in records[0].items() if k != 'result'} | {'status': 'failed'}
  simulated.write(tmp_path, about, records)
  with pytest.raises(UserError, match=f'found 1 to 2 for {KEY.format("none")}; '):
    tuning.chosen_rates(str(tmp_path))


def test_a_rate_without_any_run_is_missed(tmp_path):
  about, records = simulated.tuning(SCORES)
  about['config']['learning_rates'] = [0.02, 0.1, 0.2]
  simulated.write(tmp_path, about, records)
  with pytest.raises(UserError, match=f'found 0 to 2 for {KEY.format("csba")}; '):
    tuning.chosen_rates(str(tmp_path))


def test_only_failed_runs(tmp_path):
  about, records = simulated.tuning(SCORES)
  failed = [
    {k: v for k, v in record.items() if k != 'result'} | {'status': 'failed', 'error': 'no disk'}
    for record in records
  ]
  simulated.write(tmp_path, about, failed)
  with pytest.raises(UserError, match='found 8 failed ones, the first with: no disk;'):
    tuning.chosen_rates(str(tmp_path))


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
  simulated.write(tmp_path, about, records)
  message = f'a study of learning rates, .*; found run {records[3]["run"]} without; '
  with pytest.raises(UserError, match=message):
    tuning.chosen_rates(str(tmp_path))


def test_no_study(tmp_path):
  with pytest.raises(UserError, match='no study.json there'):
    tuning.chosen_rates(str(tmp_path))
