"""The soak (make soak) in short, and that it would notice what it is for."""

import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent


@pytest.fixture
def soak(monkeypatch):
  monkeypatch.syspath_prepend(HERE)
  return importlib.import_module('soak')


@pytest.mark.slow
@pytest.mark.parametrize(('setting', 'ends'), [('one', 2), ('two', 1)])
def test_runs_ended_at_random_moments_end_as_if_undisturbed(tmp_path, setting, ends):
  out = tmp_path / 'soak.md'
  options = [f'--settings={setting}', f'--ends={ends}', '--epochs=3']
  found = subprocess.run(
    [sys.executable, HERE / 'soak.py', *options, f'--out={out}', f'--keep={tmp_path / "runs"}'],
    env=os.environ | {'PYTHONPATH': str(HERE.parent), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )
  assert found.returncode == 0, found.stdout + found.stderr
  assert found.stdout.count(' SIGKILL to process ') == ends
  assert found.stdout.count(' SIGTERM to process ') == ends
  assert 'Problems: none.' in out.read_text()


def ended(soak, **changes):
  """SIGTERM to the first of two processes in training, answered as promised."""
  end = soak.End(
    signal='TERM',
    moment=soak.Moment(1.0),
    told=0,
    phase='training',
    seconds=[2.0, 2.0],
    codes=[75, 75],
    logs=['stopped at step 7: saved, start again to go on', ''],
    steps=[5, 7],
    finished=False,
  )
  return list(dataclasses.replace(end, **changes).problems())


def test_a_stop_that_is_not_as_promised_is_a_problem(soak):
  assert ended(soak) == []
  assert ended(soak, seconds=[2.0, 31.0]) == ['left after 31 s, more than 30']
  assert ended(soak, seconds=[2.0, 31.0], phase='compiling') == []
  assert ended(soak, seconds=[2.0, 31.0], phase='loading') == ['left after 31 s, more than 30']
  assert ended(soak, seconds=[2.0, 31.0], codes=[75, 1], phase='start-up') == []
  alone = {'seconds': [31.0], 'codes': [75], 'phase': 'start-up', 'logs': ['']}
  assert ended(soak, **alone) == ['left after 31 s, more than 30']
  assert ended(soak, phase='loading', logs=['', ''], steps=[]) == []
  assert ended(soak, codes=[75, 0]) == ['left with [75, 0]']
  assert ended(soak, codes=[-15, 75]) == ['left with [-15, 75]']
  assert ended(soak, codes=[-15, -6], finished=True) == []
  assert ended(soak, steps=[5]) == ['says it saved at 7, and there are checkpoints of [5]']
  assert ended(soak, logs=['', '']) == [
    'says it saved at None, and there are checkpoints of [5, 7]'
  ]


def test_a_kill_that_the_others_do_not_notice_is_a_problem(soak):
  killed = {'signal': 'KILL', 'codes': [-9, -6], 'logs': ['', '']}
  assert ended(soak, **killed) == []
  assert ended(soak, **killed | {'seconds': [0.1, 61.0]}) == ['left after 61 s, more than 60']
  assert 'hung' in ended(soak, **killed | {'seconds': [0.1, soak.PATIENCE]})
  assert ended(soak, **killed | {'codes': [-9, 0]}) == ['others left with [0]']
  assert ended(soak, **killed | {'codes': [-9, 1]}) == ['others left with [1]']
  assert ended(soak, **killed | {'codes': [-9, 1], 'phase': 'start-up'}) == []


def test_one_bit_is_a_difference(soak):
  state = {'metrics.jsonl': [{'step': 1, 'loss': 0.1}], 'checkpoint': b'\0\1'}
  assert soak.differences(dict(state), state) == []
  assert soak.differences(state | {'checkpoint': b'\0\3'}, state) == ['checkpoint']
  assert soak.differences({'checkpoint': b'\0\1'}, state) == ['metrics.jsonl']


@pytest.mark.parametrize(
  ('places', 'half_written', 'phase'),
  [
    (None, False, 'start-up'),
    ('start', False, 'loading'),
    ('start before-config after-config', False, 'restoring'),
    ('start before-step', False, 'compiling'),
    ('start before-step after-step before-step', False, 'training'),
    ('start before-step after-step before-step', True, 'saving'),
    ('start before-step after-step before-save saving', False, 'saving'),
    ('start before-snapshot', False, 'compiling'),
    ('start before-diagnosis after-diagnosis before-diagnosis', True, 'diagnosing'),
    ('start before-result after-result', False, 'finishing'),
  ],
)
def test_phases(soak, tmp_path, places, half_written, phase):
  trace = tmp_path / 'trace'
  if places:
    trace.write_text('\n'.join(places.split()) + '\n')
  assert soak.phase_of(trace, half_written) == phase
  assert phase in soak.ORDER


def test_a_moment_counts_from_the_start_or_from_a_turn(soak, tmp_path):
  trace = tmp_path / 'trace'
  assert soak.Moment(1.5).counts_from(trace)
  aimed = soak.Moment(0.01, 'before-save', 2)
  assert not aimed.counts_from(trace)
  trace.write_text('start\nbefore-save\nsaving\nbefore-sa')
  assert not aimed.counts_from(trace)
  trace.write_text('start\nbefore-save\nsaving\nbefore-save\n')
  assert aimed.counts_from(trace)


def test_half_of_the_moments_are_of_what_a_run_does_once_it_is_compiled(soak):
  turns = dict.fromkeys(soak.AIMS, 10)
  outcome = soak.Outcome(None, 'KILL', soak.Reference({}, 8.0, turns), seconds=8.0)
  rng = np.random.default_rng(0)
  moments = [soak.drawn(rng, outcome) for _ in range(1000)]
  anywhere = [moment.seconds for moment in moments if not moment.place]
  aimed = [moment for moment in moments if moment.place]
  assert 450 < len(anywhere) < 550
  assert 0 < min(anywhere) < 0.1
  assert 7.9 < max(anywhere) < 8
  assert {moment.place for moment in aimed} == set(soak.AIMS)
  assert {moment.turn for moment in aimed} == set(range(1, 7))
  assert all(moment.seconds < soak.AIMS[moment.place] for moment in aimed)


def test_its_places_are_those_of_the_driver(soak):
  """A renamed one would never be reached, and no signal sent there."""
  named = {*soak.PHASES, *soak.AIMS, *soak.COMPILED} - {'', 'start'}
  assert named <= set(soak.driver.PLACES)
