"""results.jsonl: lines that survive a kill, shards that merge, runs that are not mixed silently."""

import copy
import json
import math
import os
import random
import re
import runpy
import types
from pathlib import Path

import numpy as np
import pytest

from csba_jax import config as config_lib
from csba_jax.errors import UserError
from csba_jax.study import results, store

simulated = types.SimpleNamespace(**runpy.run_path(Path(__file__).parents[1] / 'simulated.py'))


@pytest.fixture(scope='module')
def made():
  """(study.json, records) of two variants and three seeds."""
  return simulated.make(seeds=3, variants=('none', 'csba'))


@pytest.fixture
def new(made):
  """Copies of them that a test may change."""
  return copy.deepcopy(made)


def lines_of(path):
  return path.read_text().splitlines()


def key(record):
  return record['axes']['variant'], record['axes']['seed']


def test_what_is_appended_is_read(tmp_path, made):
  about, records = made
  (tmp_path / 'study.json').write_text(json.dumps(about))
  for record in records:
    assert store.append(tmp_path / 'results.jsonl', record) is None
  found = results.read(tmp_path)
  assert sorted(found.done, key=key) == sorted(records, key=key)
  assert (found.study, found.failed, found.notes) == (about, (), ())


def test_a_line_is_strict_json_with_null_for_nan(tmp_path):
  record = {
    'a': float('nan'),
    'b': [math.inf, 1.5, (2,)],
    'c': {'d': np.float32('nan'), 'e': np.arange(2), 'f': np.bool_(True)},
    'g': 'é\n',
  }
  store.append(tmp_path / 'r.jsonl', record)
  (line,) = lines_of(tmp_path / 'r.jsonl')
  wanted = {'a': None, 'b': [None, 1.5, [2]], 'c': {'d': None, 'e': [0, 1], 'f': True}, 'g': 'é\n'}
  assert json.loads(line, parse_constant=pytest.fail) == wanted


def test_an_append_is_one_write_then_a_sync(tmp_path, monkeypatch):
  calls, write, fsync = [], os.write, os.fsync
  monkeypatch.setattr(os, 'write', lambda h, b: calls.append(len(b)) or write(h, b))
  monkeypatch.setattr(os, 'fsync', lambda h: calls.append('sync') or fsync(h))
  store.append(tmp_path / 'r.jsonl', {'long': 'x' * 1_000_000})
  assert calls == [(tmp_path / 'r.jsonl').stat().st_size, 'sync']


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
  path, write = tmp_path / 'r.jsonl', os.write
  store.append(path, {'a': 1})
  monkeypatch.setattr(os, 'write', lambda h, b: write(h, b[:5]))
  with pytest.raises(UserError, match='with room .* no room for 10 bytes in r.jsonl'):
    store.append(path, {'b': 22})
  assert path.read_text() == '{"a": 1}\n'


@pytest.mark.seconds
def test_a_kill_at_any_byte_of_the_last_line_loses_that_line_at_most(tmp_path, made):
  about, records = made
  short = [{k: v for k, v in r.items() if k not in ('conflict', 'branches')} for r in records]
  short = [
    r | {'config': {}, 'versions': {}, 'result': {'macro_f1': 0.5, 'class_names': ['a', 'é']}}
    for r in short
  ]
  (tmp_path / 'study.json').write_text(json.dumps(about))
  lines = [(json.dumps(record, ensure_ascii=False) + '\n').encode() for record in short]
  before, last = b''.join(lines[:-1]), lines[-1]
  path, torn = tmp_path / 'results.jsonl', tmp_path / 'results.jsonl.torn'
  for length in range(len(last) + 1):
    path.write_bytes(before + last[:length])
    torn.unlink(missing_ok=True)
    whole = length >= len(last) - 1  # all but the line end
    read, notes = store.load(path)
    assert read == short[: len(short) if whole else -1]
    assert len(notes) == (not whole and length > 0)
    assert path.read_bytes() == before + last[:length], 'reading must not write'
    repaired = store.repair(path)
    assert path.read_bytes() == before + (last if whole else b'')
    assert (repaired is None) == (length in (0, len(last)))
    assert torn.exists() == (0 < length < len(last) - 1)
    if torn.exists():
      assert torn.read_bytes() == last[:length] + b'\n'
      assert notes == (f'results.jsonl: the last line is torn ({length} bytes) and left out',)
      assert 'was torn' in repaired
      assert f'({length} bytes, kept in results.jsonl.torn); repaired' in repaired
    assert store.repair(path) is None


def test_the_first_append_repairs(tmp_path):
  path = tmp_path / 'r.jsonl'
  path.write_text('{"a": 1}\n{"b": ')
  assert 'was torn (6 bytes' in store.append(path, {'c': 3})
  assert lines_of(path) == ['{"a": 1}', '{"c": 3}']
  assert store.append(path, {'d': 4}) is None
  assert store.repair(tmp_path / 'none.jsonl') is None


def test_torn_lines_are_all_kept(tmp_path):
  path = tmp_path / 'r.jsonl'
  for piece in ('{"b": ', 'not json\n'):
    path.write_text('{"a": 1}\n' + piece)
    store.repair(path)
  assert lines_of(tmp_path / 'r.jsonl.torn') == ['{"b": ', 'not json']


def test_a_torn_last_line_is_noted_by_read(tmp_path, made):
  folder = simulated.write(tmp_path, *made)
  file = folder / 'results.jsonl'
  file.write_bytes(file.read_bytes()[:-20])
  found = results.read(folder)
  assert len(found.done) == len(made[1]) - 1
  (note,) = found.notes
  assert note.startswith('results.jsonl: the last line is torn')


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path, made):
  folder = simulated.write(tmp_path, *made)
  file = folder / 'results.jsonl'
  lines = lines_of(file)
  file.write_text('\n'.join([lines[0], lines[1][:-9], *lines[2:]]) + '\n')
  with pytest.raises(UserError, match='damaged line 2; to fix it: remove it .sed -i 2d'):
    results.read(folder)


def joined(folder, about, records, cut):
  """A study's folder after `cat A B`, where A lacks its last `cut` bytes."""
  folder = simulated.write(folder, about, records)
  file = folder / 'results.jsonl'
  first, second, *rest = file.read_bytes().splitlines(keepends=True)
  file.write_bytes(b''.join([first[:-cut] + second, *rest]))
  return folder


def test_two_whole_lines_without_a_line_end_between_them_are_both_kept(tmp_path, made):
  folder = joined(tmp_path, *made, cut=1)
  found = results.read(folder)
  assert sorted(found.done, key=key) == sorted(made[1], key=key)
  assert found.notes == (
    'results.jsonl: line 1 held 2 runs without a line end between them; nothing is lost',
  )


@pytest.mark.parametrize('cut', [2, 9, 300, 1000, 9999])
def test_of_a_torn_line_before_a_whole_one_the_whole_one_is_kept(tmp_path, made, cut):
  about, records = made
  folder = joined(tmp_path, about, records, cut)
  lost, kept = records[0]['run'], records[1]['run']
  found = results.read(folder)
  assert sorted(found.done, key=key) == sorted(records[1:], key=key)
  length = len(json.dumps(records[0])) + 1 - cut
  assert found.notes == (
    f'results.jsonl: line 1 was damaged: run {kept} is kept, {length} bytes of run {lost} are lost',
  )


def test_a_whole_line_before_a_torn_last_one_is_kept(tmp_path, made):
  """B, which was killed in its first line, behind A without its line end."""
  about, records = made
  folder = simulated.write(tmp_path, about, records)
  file = folder / 'results.jsonl'
  *rest, first, second = file.read_bytes().splitlines(keepends=True)
  file.write_bytes(b''.join([*rest, first[:-1] + second[:500]]))
  found = results.read(folder)
  assert sorted(found.done, key=key) == sorted(records[:-1], key=key)
  (note,) = found.notes
  assert note.endswith(
    f'run {records[-2]["run"]} is kept, 500 bytes of run {records[-1]["run"]} are lost'
  )


@pytest.mark.parametrize('cut', [1, 9])
def test_a_study_mends_its_joined_lines_for_good(tmp_path, made, cut):
  about, records = made
  file = joined(tmp_path, about, records, cut) / 'results.jsonl'
  damaged = lines_of(file)[0]
  note = store.repair(file)
  assert f'run {records[1]["run"]} is kept' in note or 'nothing is lost' in note
  kept = records if cut == 1 else records[1:]
  assert lines_of(file) == [json.dumps(record) for record in kept]
  torn = tmp_path / 'results.jsonl.torn'
  assert torn.exists() == (cut > 1)
  assert cut == 1 or torn.read_text() == damaged + '\n'
  assert store.repair(file) is None
  assert results.read(tmp_path).notes == ()


def test_an_object_inside_a_torn_record_is_no_record(tmp_path, made):
  """Its axes and versions are whole objects, too, and the tear may come right behind one."""
  folder = simulated.write(tmp_path, *made)
  file = folder / 'results.jsonl'
  *rest, last = lines_of(file)
  end = last.index('}', last.index('"axes"')) + 1
  file.write_text('\n'.join([*rest, last[:end]]))
  found, notes = store.load(file)
  assert len(found) == len(rest)
  assert notes == (f'results.jsonl: the last line is torn ({end} bytes) and left out',)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'schema': 2}, 'schema 1, on line 1 of .*; found schema 2'),
    ({'status': 'begun'}, "found status 'begun'"),
    ({'versions': ...}, 'found without versions'),
    ({'result': {}}, 'found without result'),
    ({'axes': {'variant': 'csba', 'seed': 0}}, 'without axes.split, axes.repeat, axes.fold'),
    ({'axes': 3}, 'without axes.variant, axes.split'),
  ],
)
def test_a_record_of_another_kind_is_refused(tmp_path, new, change, message):
  about, records = new
  for field, value in change.items():
    records[0][field] = value
    if value is ...:
      del records[0][field]
  with pytest.raises(UserError, match=message):
    results.read(simulated.write(tmp_path, about, records))


def test_shards_and_their_concatenation_are_equal(tmp_path, made):
  about, records = made
  whole, shards = simulated.write(tmp_path / 'whole', about, records), tmp_path / 'shards'
  simulated.write(shards, about, records[:2])
  (shards / 'results.jsonl').rename(shards / 'results-000-of-002.jsonl')
  lines = lines_of(whole / 'results.jsonl')
  (shards / 'results-001-of-002.jsonl').write_text('\n'.join(lines[2:]) + '\n')
  # duplicates, also across files, change nothing
  (shards / 'results.jsonl').write_text(lines[3] + '\n')
  a, b = results.read(whole), results.read(shards)
  assert a.done == b.done
  assert b.notes == ()


def test_the_order_of_lines_does_not_matter(tmp_path, made):
  about, records = made
  shuffled = random.Random(0).sample(records, len(records))
  assert shuffled != records
  a = results.read(simulated.write(tmp_path / 'a', about, records))
  b = results.read(simulated.write(tmp_path / 'b', about, shuffled))
  assert a.done == b.done


def failed(record):
  kept = {k: v for k, v in record.items() if k not in ('result', 'conflict', 'branches')}
  return kept | {'status': 'failed', 'error': 'no room'}


@pytest.mark.parametrize('later', [False, True])
def test_a_failure_under_another_name_is_made_good(tmp_path, made, later):
  """The run of one variant is called s0, of two none-s0."""
  about, records = made
  before = failed(records[0]) | {'run': 's0'}
  lines = [*records, before] if later else [before, *records]
  found = results.read(simulated.write(tmp_path, about, lines))
  assert (len(found.done), found.failed) == (len(records), ())


@pytest.mark.parametrize('beside', [False, True])
def test_commands_are_those_of_the_tuning_then_its_own(tmp_path, made, monkeypatch, beside):
  about, records = made
  tuned = tmp_path / ('studies/tuning' if beside else 'elsewhere/tuning')
  simulated.write(tuned, about | {'commands': ['tune', 'tune --jobs=2']}, records)
  monkeypatch.chdir(tmp_path)
  about = about | {'config': about['config'] | {'tuned_by': 'elsewhere/tuning'}}
  found = results.read(simulated.write(tmp_path / 'studies/one', about, records))
  assert found.commands == ('tune', 'tune --jobs=2', about['command'])
  gone = about | {'config': about['config'] | {'tuned_by': 'nowhere/else'}}
  found = results.read(simulated.write(tmp_path / 'studies/two', gone, records))
  assert found.commands == (about['command'],)


@pytest.mark.parametrize('later', [False, True])
def test_finished_wins_over_failed(tmp_path, made, later):
  about, records = made
  lines = [*records, failed(records[0])] if later else [failed(records[0]), *records]
  found = results.read(simulated.write(tmp_path, about, lines))
  assert len(found.done) == len(records)
  assert found.failed == ()


def test_a_run_that_only_failed_is_kept_apart(tmp_path, made):
  about, records = made
  again = failed(records[0]) | {'error': 'the second time'}
  found = results.read(simulated.write(tmp_path, about, [failed(records[0]), again, *records[1:]]))
  assert len(found.done) == len(records) - 1
  assert [record['error'] for record in found.failed] == ['the second time']


def test_the_latest_of_two_results_counts_and_is_noted(tmp_path, new):
  about, records = new
  other = copy.deepcopy(records[0])
  other['result']['macro_f1'] = 0.123
  found = results.read(simulated.write(tmp_path, about, [*records, other]))
  (same,) = (r for r in found.done if r['run'] == other['run'])
  assert same['result']['macro_f1'] == 0.123
  assert found.notes == (
    f'run {other["run"]} finished more than once with different results: its latest line counts',
  )


def test_two_runs_of_the_same_axes_are_refused(tmp_path, new):
  about, records = new
  records.append(records[0] | {'run': 'again'})
  with pytest.raises(UserError, match=f'runs again and {records[0]["run"]} of the same axes'):
    results.read(simulated.write(tmp_path, about, records))


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'versions': {'jax': '0.11.0'}}, r'versions.jax: 0.10.2 in 5 runs, 0.11.0 in 1'),
    ({'versions': {'csba_jax': '0.6'}}, r'versions.csba_jax: 0.5.0 in 5 runs, 0.6 in 1'),
    ({'config': {'train': {'epochs': 3}}}, r'train.epochs: 10 in 5 runs, 3 in 1'),
    ({'study': 'other'}, r'study: simulated in 5 runs, other in 1'),
    ({'result': {'source_sha256': 'e' * 64}}, 'source_sha256: [0-9a-f]{12} in 5 runs, e{12} in 1'),
    ({'result': {'content_sha256': 'e' * 64}}, 'content_sha256: 7{12} in 5 runs, e{12} in 1'),
    (
      {'result': {'splits_sha256': 'e' * 64}},
      'splits_sha256: of seed 1 not the same for all variants',
    ),
    (
      {'config': {'train': {'learning_rate': 0.5}}},
      r'train.learning_rate: 0.1 in 2 runs, 0.5 in 1 .none, model multibranch, .*, split grouped.',
    ),
    (
      {'config': {'loss': {'name': 'drw'}}},
      'loss.name: cross_entropy in 5 runs, drw in 1 .model multibranch, .*, split grouped.',
    ),
  ],
)
def test_runs_of_different_origin_are_pooled_only_on_request(tmp_path, new, change, words):
  about, records = new
  for field, value in change.items():
    records[2][field] = records[2][field] | value if isinstance(value, dict) else value
  folder = simulated.write(tmp_path, about, records)
  with pytest.raises(UserError, match=f'{words}; to fix it: analyse them apart.*--pool'):
    results.read(folder)
  found = results.read(folder, pool=True)
  assert len(found.done) == 6
  (note,) = found.notes
  assert re.fullmatch(f'pooled: {words}', note)


def test_what_variants_and_units_may_differ_in_is_no_mixture(tmp_path, new):
  about, records = new
  for record in records:
    variant, seed = record['axes']['variant'], record['axes']['seed']
    rate = 0.1 if variant == 'csba' else 0.2
    record['config'] |= {'seed': seed, 'data': {'seed': seed, 'fold': seed}}
    record['config'] |= {'train': {'learning_rate': rate}, 'parallel': {'devices': seed}}
  assert results.read(simulated.write(tmp_path, about, records)).notes == ()


def test_runs_of_different_configs_in_different_cells_are_not_pooled(tmp_path):
  about, records = simulated.make(seeds=2, variants=('none',), methods=('cross_entropy', 'drw'))
  for record in records:
    method = record['axes']['method']
    record['config'] |= {'loss': {'weights': 'effective' if method == 'drw' else 'none'}}
  folder = simulated.write(tmp_path, about, records)
  assert results.read(folder).notes == ()
  for record in records:
    record['config'] |= {'augment': {'cutout': 4 * (record['axes']['method'] == 'drw')}}
  with pytest.raises(UserError, match='found augment.cutout: 0 in 2 runs, 4 in 2; '):
    results.read(simulated.write(tmp_path, about, records))


def test_records_before_and_after_a_field_was_added_are_of_one_config(tmp_path, new):
  """Their configs are compared, whatever digest was written; without any the digests are."""
  about, records = new
  old = config_lib.default().to_dict()
  del old['data']['input'], old['mixing']
  for i, record in enumerate(records):
    record['config'] = (old if i < 3 else config_lib.default().to_dict()) | record['config']
    record['config_sha256'] = 'of the first form' if i < 3 else 'of the second'
  assert results.read(simulated.write(tmp_path / 'kept', about, records)).notes == ()
  for record in records:
    del record['config']
  with pytest.raises(UserError, match='config_sha256: of the first in 3 runs, of the secon in 3'):
    results.read(simulated.write(tmp_path / 'gone', about, records))


def test_a_package_that_some_records_do_not_name_is_noted(tmp_path, new):
  about, records = new
  for record in records[:2]:
    record['versions'] = record['versions'] | {'scipy': '1.17.1'}
  folder = simulated.write(tmp_path, about, records)
  assert results.read(folder).notes == (
    'runs of more than one versions.scipy: None in 4 runs, 1.17.1 in 2',
  )
  records[3]['versions'] = records[3]['versions'] | {'scipy': '1.18.0'}
  with pytest.raises(UserError, match='versions.scipy: 1.17.1 in 2 runs, 1.18.0 in 1; '):
    results.read(simulated.write(tmp_path, about, records))


def test_rates_at_ends_are_a_note(tmp_path, made):
  about, records = made
  words = ['the best learning rate was the largest of 0.1, 0.2 for csba']
  found = results.read(simulated.write(tmp_path, about | {'rates_at_ends': words}, records))
  assert found.notes == tuple(words)


def test_failed_runs_may_be_of_another_version(tmp_path, new):
  about, records = new
  records[0] = failed(records[0]) | {'versions': {'jax': '0.1'}}
  assert results.read(simulated.write(tmp_path, about, records)).notes == ()


def test_threads_that_differ_are_noted(tmp_path, new):
  """Of runs that name theirs: those from before it was kept are not known to be others."""
  about, records = new
  for record, threads in zip(records, (1, 1, 2), strict=False):
    record['numerics'] = {'threads': threads, 'jax_enable_x64': False}
  assert results.read(simulated.write(tmp_path, about, records)).notes == (
    'runs of more than one numerics.threads: 1 in 2 runs, 2 in 1',
  )


def test_other_commits_and_devices_are_noted(tmp_path, new):
  about, records = new
  records[0]['commit'], records[1]['device'] = 'c' * 40, 'another'
  assert results.read(simulated.write(tmp_path, about, records)).notes == (
    f'runs of more than one commit: {"a" * 40} in 5 runs, {"c" * 40} in 1',
    'runs of more than one device: simulated CPU in 5 runs, another in 1',
  )


@pytest.mark.parametrize('lines', [None, ''])
def test_no_results_are_an_error(tmp_path, made, lines):
  (tmp_path / 'study.json').write_text(json.dumps(made[0]))
  if lines is not None:
    (tmp_path / 'results.jsonl').write_text(lines)
  found = 'no results.*.jsonl' if lines is None else 'no run in results.jsonl'
  with pytest.raises(UserError, match=f'results of csba-study in .*; found {found}'):
    results.read(tmp_path)


def test_a_folder_that_is_no_study_is_an_error(tmp_path, made):
  with pytest.raises(UserError, match='the folder of a study .*; found no study.json there'):
    results.read(tmp_path / 'nowhere')
  for text, words in [
    ('{', 'damaged one .Expecting'),
    ('{"name": "x", "config": {}}', 'no outcome, margin, smallest_effect in it'),
    (json.dumps({'config': made[0]['config']}), 'no name in it'),
    ('[]', 'damaged'),
  ]:
    (tmp_path / 'study.json').write_text(text)
    with pytest.raises(UserError, match=words):
      results.read(tmp_path)


def test_an_unreadable_file_is_an_error(tmp_path, made):
  (tmp_path / 'study.json').write_text(json.dumps(made[0]))
  (tmp_path / 'results.jsonl').mkdir()
  with pytest.raises(UserError, match='a readable .*results.jsonl'):
    results.read(tmp_path)


def test_units_and_cells(made):
  record = made[1][0]
  assert results.unit(record) == ('grouped', 0, 0, 0)
  cell = dict(results.cell(record))
  assert list(cell) == list(results.CELL)
  assert 'variant' not in cell
  other = {'axes': record['axes'] | {'zeta': 1, 'alpha': 2}}
  assert results.cell(other)[-2:] == (('alpha', 2), ('zeta', 1))


def test_pairs_name_what_one_side_lacks(tmp_path, new):
  about, records = new
  gone = [r for r in records if key(r) not in {('csba', 1), ('none', 2)}]
  found = results.read(simulated.write(tmp_path, about, gone))
  cell = results.cell(records[0])
  units, missing = results.pairs(found, cell, 'csba', 'none')
  assert units == [('grouped', 0, 0, 0)]
  assert missing == ('csba without seed 1', 'none without seed 2')
  units, missing = results.pairs(found, cell, 'csba', 'none_wide')
  assert (units, missing) == ([], ('none_wide without any run',))


def test_units_come_in_numerical_order(tmp_path):
  about, records = simulated.make(seeds=11, variants=('none',))
  found = results.read(simulated.write(tmp_path, about, records[::-1]))
  assert [record['axes']['seed'] for record in found.done] == list(range(11))


@pytest.mark.parametrize(
  ('options', 'unit', 'expected'),
  [
    ({}, ('grouped', 0, 0, 0), 'seed 0'),
    ({}, ('grouped', 0, 0, 7), 'seed 7'),
    ({'folds': 2}, ('grouped', 0, 0, 0), 'fold 0 of repeat 0 (seed 0)'),
    ({'folds': 2}, ('grouped', 1, 3, 8), 'fold 3 of repeat 1 (seed 8)'),
    (
      {'folds': 2, 'leak': 0.1},
      ('grouped', 0, 0, 0),
      'fold 0 of repeat 0 of the grouped split (seed 0)',
    ),
    (
      {'folds': 2, 'leak': 0.1},
      ('naive', 0, 1, 1),
      'fold 1 of repeat 0 of the naive split (seed 1)',
    ),
  ],
)
def test_units_are_named_by_what_the_study_has(tmp_path, options, unit, expected):
  found = results.read(simulated.study(tmp_path, seeds=2, variants=('none',), **options))
  assert results.unit_words(found, unit) == expected


def test_outcomes(new):
  record = new[1][0]
  result = record['result']
  result['per_class']['f1'] = [0.9, 0.7, 0.4, None]
  assert results.outcome(record, 'accuracy') == result['accuracy']
  assert results.outcome(record, 'f1:snow') == 0.4
  assert results.outcome(record, 'head_f1') == pytest.approx(0.8)  # more than 100 images each
  assert results.outcome(record, 'tail_f1') == 0.4  # of those that have one
  assert math.isnan(results.outcome(record, 'f1:broken'))
  result['macro_f1'], result['per_class']['f1'][2] = None, None
  assert math.isnan(results.outcome(record, 'macro_f1'))
  assert math.isnan(results.outcome(record, 'tail_f1'))
  for name in ('f1:rust', 'f2', ''):
    with pytest.raises(UserError) as error:
      results.outcome(record, name)
    assert 'an outcome among ' in str(error.value)
    assert 'clean, dusty, snow, broken' in str(error.value)
    # csba-study takes none but that of study.json
    assert str(error.value).endswith("correct it in study.json and in the study's config alike")


def test_snapshots_and_grams(new):
  record = new[1][0]
  entry = results.conflict_entry(record, 'loss 0.3', 'val')
  assert (entry['at'], entry['part']) == ('loss 0.3', 'val')
  assert results.conflict_entry(record, '0.7', 'val') is None
  assert results.conflict_entry(failed(record), '1', 'val') is None
  entry['grams']['common'] = [1, 2, None, 4, 5, 6]
  wanted = np.array([[1, 2, np.nan], [2, 4, 5], [np.nan, 5, 6]])
  np.testing.assert_array_equal(results.gram(entry, 'common'), wanted)
  assert results.gram(entry, 'shared').shape == (4, 4)
  with pytest.raises(UserError, match='a Gram of the scope stem; found shared, common'):
    results.gram(entry, 'stem')
  with pytest.raises(UserError, match='found none'):
    results.gram({'grams': None}, 'stem')
  entry['grams']['common'] = [1, 2]
  with pytest.raises(UserError, match='numbers in a Gram; found 2'):
    results.gram(entry, 'common')
