"""Which runs can be compared, and what a refusal says; a single run; one run of each net."""

import json

import pytest

from csba_jax import config as config_lib
from csba_jax.errors import UserError
from csba_jax.report import folder
from csba_jax.report.terminal import by_net, same_splits


def result(splits='a', source='s', macro_f1=0.5):
  return {
    'accuracy': 0.75,
    'macro_f1': macro_f1,
    'balanced_accuracy': 0.625,
    'expected_calibration_error': 0.1,
    'group_accuracy': {'many': 0.5, 'medium': None, 'few': None},
    'per_class': {
      'f1': [0.5, 0.25],
      'precision': [0.5, 0.5],
      'recall': [0.5, 0.5],
      'support': [10, 4],
    },
    'class_names': ['cat', 'ox'],
    'class_counts': [50, 5],
    'confusion_matrix': [[8, 2], [1, 3]],
    'splits_sha256': splits,
    'source_sha256': source,
    'checkpoint_step': 3,
  }


@pytest.fixture
def make(tmp_path, monkeypatch):
  """make(name, found, field=value, ...): the workdir of a run; found None: it is not finished."""
  monkeypatch.chdir(tmp_path)

  def run(name, found, **fields):
    config = config_lib.default()
    for field, value in fields.items():
      section, _, leaf = field.rpartition('__')
      (config[section] if section else config)[leaf] = value
    (tmp_path / name).mkdir()
    (tmp_path / name / 'config.json').write_text(json.dumps({'config': config.to_dict()}))
    if found is not None:
      (tmp_path / name / 'result.json').write_text(json.dumps(found))
    return name

  return run


def test_runs_on_the_same_splits_pass():
  same_splits.check({'x': result(), 'y': result()})


def test_a_refusal_names_the_kinds_the_fields_and_the_ways(make):
  make('a', result())
  make('b', result(), model__attention='none')
  make('c', result('other'), data__imbalance_factor=2.0)
  with pytest.raises(UserError) as error:
    by_net.of_workdirs(['a', 'b', 'c'])
  assert str(error.value) == (
    'expected runs on the same splits, so that differences come from the nets and not from the '
    'test images; found 2 different ones: a, b; c (data.imbalance_factor: 1.0 there, 2.0 here); to '
    'fix it: compare those of one kind: csba-report --workdirs=a,b, or train c anew with the data '
    'fields of a, or train each net with the same seeds, which csba-report pairs'
  )


def test_of_two_runs_none_can_be_compared(make):
  make('a', result())
  make('c', result('a', 'pixels'))
  with pytest.raises(UserError) as error:
    by_net.of_workdirs(['a', 'c'])
  assert (
    'found 2 different ones: a; c (other images: names, labels or the content of files);'
    in str(error.value)
  )
  assert error.value.do.startswith('train c anew with the data fields of a, or ')


def test_pixels_that_were_replaced_between_two_runs(make):
  make('a', result() | {'content_sha256': 'x'})
  make('b', result())  # of an earlier version
  make('c', result() | {'content_sha256': 'x'})
  by_net.of_workdirs(['a', 'b', 'c'])
  make('d', result() | {'content_sha256': 'y'})
  with pytest.raises(UserError, match=r'found 2 different ones: a, b, c; d \(other images: names'):
    by_net.of_workdirs(['a', 'b', 'c', 'd'])


def test_seeds_that_are_paired_are_told_apart_too(make):
  paths = []
  for seed in range(2):
    for net in ('none', 'csba'):
      splits = 'wrong' if (net, seed) == ('csba', 1) else f'of {seed}'
      fields = {'seed': seed, 'data__seed': seed, 'model__attention': net}
      paths.append(make(f'{net}-s{seed}', result(splits), **fields))
  with pytest.raises(UserError, match='2 different ones: none-s1; csba-s1'):
    by_net.of_workdirs(paths)


def test_one_run_of_each_proves_nothing_and_says_what_is_needed(make):
  make('a', result())
  make('b', result(macro_f1=0.6), model__attention='none')
  lines = by_net.of_workdirs(['a', 'b']).splitlines()
  assert lines[-2:] == [
    'One run of each proves nothing: another seed gives other numbers. Needed: the same 6 seeds or '
    'more of each (csba-study, or all their workdirs in --workdirs).',
    'workdirs: a b',
  ]
  assert 'proves nothing' not in by_net.of_workdirs(['a'])


def test_the_folder_of_a_single_run_takes_no_pool(make):
  make('a', result())
  with pytest.raises(UserError) as error:
    folder.describe('a', pool=True)
  assert str(error.value) == (
    'expected --pool with the folder of a study; found a single run in a; to fix it: remove it'
  )


def test_a_run_that_is_not_finished_says_so(make):
  make('a', None)
  for show in (folder.describe, lambda path: by_net.of_workdirs([path])):
    with pytest.raises(UserError) as error:
      show('a')
    assert str(error.value) == (
      'expected a finished run in a; found a run that goes on or was stopped: no result.json '
      'there; to fix it: wait for it or start it again; csba-evaluate --checkpoint=latest shows '
      'how far it is'
    )


def test_a_folder_of_neither_is_refused_as_no_study(make, tmp_path):
  with pytest.raises(UserError, match=r'the folder of a study .*; found no study\.json there'):
    folder.describe(str(tmp_path))
