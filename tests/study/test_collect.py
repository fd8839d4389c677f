"""From a finished run to its record: nothing is lost but digits, and scopes are what they say."""

import itertools
import json
import os

import jax
import numpy as np
import pytest

from csba_jax import config as config_lib
from csba_jax.gradients import conflict as conflict_lib
from csba_jax.gradients.conflict import Conflict
from csba_jax.measure import diagnose
from csba_jax.models import multibranch, registry
from csba_jax.run.records import TESTED, Records, snapshot_file
from csba_jax.run.state import TrainState
from csba_jax.run.workdir import Workdir, read_result
from csba_jax.runtime.signals import StopRequest
from csba_jax.study import collect, results
from csba_jax.training import loop

CLOSE = 10.0 ** (1 - collect.DIGITS)  # of a number with so many significant digits


def made_up(layers, rng, step, part):
  """A conflict of random class gradients in these layers; the last class has no val image."""
  counts = np.array([200, 120, 60, 30, 15, 8, 5, 3, 2, 1])
  seen = counts if part == 'train' else counts // 3
  gradients = rng.normal(size=(len(layers), 10, 12)) + 0.3
  grams = gradients @ gradients.transpose(0, 2, 1) * 10.0 ** rng.uniform(-6, 3, (len(layers), 1, 1))
  grams *= ((seen > 0)[:, None] & (seen > 0)[None])[None]
  trunk = [not name.startswith('head') for name in layers]
  return Conflict(
    scopes=('shared', 'total', *layers),
    grams=np.stack([grams[trunk].sum(0), grams.sum(0), *grams]),
    **{name: np.zeros((len(layers) + 2, 10, 10)) for name in ('errors', 'low', 'high')},
    losses=np.where(seen > 0, rng.uniform(0.1, 3, 10), 0.0),
    counts=seen,
    class_names=tuple('0123456789'),
    class_counts=counts,
    prior=counts / counts.sum(),
    about={'step': step, 'target': f'{part}, exact'},
  )


def branches(rng):
  """What `branch_similarity.measure` gives, with an absent class."""
  gates = rng.uniform(size=(3, 10))
  gates[:, -1] = np.nan
  return {
    'cka': {'stage1/block1': rng.uniform(size=(3, 3)).tolist()},
    'gates': {'stage1/block1': gates.tolist(), 'head': gates.tolist()},
    'gate_spread': {'stage1/block1': float(rng.uniform())},
  }


RESULT = dict.fromkeys(collect.OF_TUNING, 7) | {
  'validation_macro_f1': 0.7,
  'macro_f1': 0.123456789,
  'accuracy': 0.5,
  'balanced_accuracy': 0.123456789,
  'expected_calibration_error': float('nan'),
  'group_accuracy': {'many': 0.25, 'medium': None, 'few': None},
  'per_class': {name: [0.123456789] * 10 for name in ('precision', 'recall', 'f1')}
  | {'support': [3] * 10},
  'class_names': list('0123456789'),
  'class_counts': [9] * 10,
  'splits_sha256': 'x',
  'source_sha256': 'y',
  'content_sha256': 'z',
  'timing': {'devices': 1},
}


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A csba_class net at the start, at the end, and at the one of two losses that it reached."""
  path = tmp_path_factory.mktemp('collect') / 'run'
  config, rng = layers('csba_class'), np.random.default_rng(0)
  config.diagnostics.snapshots, config.diagnostics.loss_levels = '0,1', '0.9,0.01'
  model = registry.build(config.model, 10, (8, 8, 1))
  names = sorted(diagnose.from_input_to_output(model, (8, 8, 1)))  # as the parameter tree has them
  with Workdir(path, config.to_dict()) as folder:
    folder.begin()
    with Records(folder) as records:
      records.resume(TrainState(*[{}] * 5), {})
      for snapshot, step in (('0', 0), ('loss 0.9', 30), ('1', 99), (TESTED, 66)):
        records.progress.step = step
        found = {p: (made_up(names, rng, step, p), branches(rng)) for p in ('train', 'val')}
        records.snapshot_line(snapshot, step / 11, found, 1.0)
    folder.write_result(RESULT)
  return path


@pytest.fixture(scope='module')
def found(workdir):
  return collect.collect(workdir)


@pytest.fixture(scope='module')
def whole(workdir):
  """The conflict over the training part at the end, as it was saved."""
  return Conflict.load(workdir / 'conflict' / f'{snapshot_file("1", "train")}.npz')


def layers(attention, name='multibranch', depth=1, head='linear'):
  config = config_lib.default()
  config.model.update(name=name, attention=attention, width=0.1, depth=depth, head=head)
  return config


def common(config):
  return diagnose.common_layers(config, 10, (8, 8, 1))


# ---- what is kept


def test_snapshots_and_parts_in_order(found):
  entries = [(entry['at'], entry['part']) for entry in found['conflict']]
  assert entries == [
    ('loss 0.9', 'train'),
    ('loss 0.9', 'val'),
    *(('0', 'train'), ('0', 'val')),
    *(('1', 'train'), ('1', 'val')),
    *(('tested', 'train'), ('tested', 'val')),
  ]
  assert [(entry['at'], entry['part']) for entry in found['branches']] == entries
  assert [entry['step'] for entry in found['conflict']] == [30, 30, 0, 0, 99, 99, 66, 66]
  assert set(found) == {'result', 'conflict', 'branches'}


def test_the_result_is_that_of_the_run(workdir, found):
  assert found['result'] == read_result(workdir)


def test_grams_come_back_from_their_upper_triangles(found, whole):
  entry = results.conflict_entry(found, '1', 'train')
  assert set(entry['grams']) == {'shared', 'common', *multibranch.BRANCHES}
  shared = results.gram(entry, 'shared')
  np.testing.assert_allclose(shared, whole.gram('shared'), rtol=CLOSE)
  np.testing.assert_array_equal(shared, shared.T)
  of_control = common(layers('none'))
  names = [name for name in whole.layers if name in of_control]
  expected = sum(whole.gram(name) for name in names)
  np.testing.assert_allclose(results.gram(entry, 'common'), expected, rtol=CLOSE)
  assert len(entry['grams']['common']) == 55
  for branch in multibranch.BRANCHES:
    own = sum(whole.gram(name) for name in names if f'/{branch}/' in name)
    np.testing.assert_allclose(results.gram(entry, branch), own, rtol=CLOSE)
  for at, part in (('1', 'val'), ('0', 'train'), ('tested', 'train')):
    assert set(results.conflict_entry(found, at, part)['grams']) == {'shared', 'common'}
  assert (results.gram(entry, 'common') != shared).any()  # the gates of csba are not in it


def test_numbers_of_an_entry(workdir, found):
  for entry in found['conflict']:
    path = workdir / 'conflict' / f'{snapshot_file(entry["at"], entry["part"])}.npz'
    saved = Conflict.load(path)
    there = saved.counts > 0
    losses = np.array(entry['losses'], np.float64)
    np.testing.assert_allclose(losses[there], saved.losses[there], rtol=CLOSE)
    assert np.isnan(losses[~there]).all()
    assert entry['counts'] == saved.counts.tolist()
    np.testing.assert_allclose(entry['prior'], saved.prior, rtol=CLOSE)
    assert there.sum() == (10 if entry['part'] == 'train' else 8)
    mean = (saved.losses[there] * saved.counts[there]).sum() / saved.counts.sum()
    assert entry['loss'] == pytest.approx(mean, rel=CLOSE)
    assert entry['step'] == saved.about['step']


def test_scopes_are_summaries_of_sums_of_layers(found, whole):
  """Stages add up to common, and branches to all of it but stem and projections."""
  entry = results.conflict_entry(found, '1', 'train')
  stages, branches = ['stem', 'stage1', 'stage2', 'stage3'], list(multibranch.BRANCHES)
  assert sorted(entry['scopes']) == sorted(['shared', 'common', *stages, *branches])
  of_control = common(layers('none'))
  shared = [name for name in whole.layers if name in of_control]
  by_stage = {s: [n for n in shared if n.startswith(f'{s}/')] for s in stages}
  by_branch = {b: [n for n in shared if f'/{b}/' in n] for b in branches}
  assert sorted(itertools.chain(*by_stage.values())) == sorted(shared)
  rest = set(shared) - set(itertools.chain(*by_branch.values()))
  assert rest
  assert all(name.startswith('stem/') or '/project/' in name for name in rest)
  for scope, names in (by_stage | by_branch | {'common': shared}).items():
    gram = sum(whole.gram(name) for name in names)
    expected = conflict_lib.summary(gram, whole.class_counts, whole.prior)
    for measure, value in expected.items():
      assert entry['scopes'][scope][measure] == pytest.approx(value, rel=CLOSE, abs=1e-12), scope
  expected = conflict_lib.summary(whole.gram('shared'), whole.class_counts, whole.prior)
  assert entry['scopes']['shared'] == pytest.approx(expected, rel=CLOSE)


def test_gates_are_kept_of_the_last_snapshot_alone(workdir, found):
  for entry in found['branches']:
    saved = json.loads(
      (workdir / 'conflict' / f'{snapshot_file(entry["at"], entry["part"])}.json').read_text()
    )
    assert ('gates' in entry) == (entry['at'] == '1')
    for kind in entry.keys() - {'at', 'step', 'part'}:
      assert entry[kind].keys() == saved[kind].keys()
      for block, values in saved[kind].items():
        np.testing.assert_allclose(
          np.array(entry[kind][block], float), np.array(values, float), rtol=CLOSE
        )
  assert 'head' in found['branches'][-3]['gates']


def test_a_record_is_strict_json_of_few_digits(found):
  text = json.dumps({k: found[k] for k in ('conflict', 'branches')}, allow_nan=False)
  assert json.loads(text) == {k: found[k] for k in ('conflict', 'branches')}
  for number in jax.tree.leaves(found['conflict'][0]['grams']):
    assert float(f'{number:.5g}') == number


def test_tuning_keeps_no_number_of_the_test_part(workdir):
  kept = collect.collect(workdir, test=False)
  whole = read_result(workdir)
  assert set(kept) == {'result'}
  assert set(kept['result']) == {
    'surgery',
    'validation_macro_f1',
    'checkpoint_step',
    'parameters',
    'class_counts',
    'timing',
    'splits_sha256',
    'source_sha256',
    'content_sha256',
  }
  assert kept['result'] == {name: whole[name] for name in kept['result']}


@pytest.mark.seconds
def test_a_run_without_snapshots_or_validation_has_no_entries(driver, tmp_path):
  for name, fields, parts in (
    ('plain', {}, []),
    ('last', {'diagnostics__snapshots': '1', 'data__val_fraction': 0.0}, ['train', 'train']),
  ):
    with StopRequest() as stop:
      config = driver.tiny_config(train__epochs=1, **fields)
      loop.train_and_evaluate(config, str(tmp_path / name), stop)
    found = collect.collect(tmp_path / name)
    assert [entry['part'] for entry in found['conflict']] == parts
    assert [entry['part'] for entry in found['branches']] == parts


# ---- common


@pytest.mark.seconds
@pytest.mark.parametrize('attention', ['none', 'none_wide', 'se', 'cbam', 'csba', 'csba_class'])
@pytest.mark.parametrize('depth', [1, 2])
def test_common_is_what_the_control_has_too(attention, depth):
  config = layers(attention, depth=depth)
  names = common(config)
  assert names == common(layers('none', depth=depth))
  assert names[0] == 'stem/full/conv'
  for word in ('head', 'attention', 'class_gate'):
    assert not any(word in name for name in names)
  with_attention = [
    name
    for name in diagnose.from_input_to_output(
      registry.build(config.model, 10, (8, 8, 1)), (8, 8, 1)
    )
    if 'attention' not in name and not name.startswith(('head', 'class_gate'))
  ]
  assert names == with_attention
  assert config.model.attention == attention  # as it was


@pytest.mark.parametrize('name', ['vit', 'resnet32_branches'])
def test_common_of_other_models(name):
  names = common(layers('csba', name))
  assert names == common(layers('none', name))
  assert names
  assert not any('attention/' in n or n.startswith(('head', 'class_gate')) for n in names)


def test_a_scaled_head_is_a_head():
  assert common(layers('none', head='scaled')) == common(layers('none'))


# ---- pieces


def test_rounding():
  found = collect._rounded(
    {'a': [1.234567, float('nan')], 'b': (float('inf'), -0.000123456), 'c': 7, 'd': 'x', 'e': None}
  )
  assert found == {'a': [1.2346, None], 'b': [None, -0.00012346], 'c': 7, 'd': 'x', 'e': None}
  assert collect._rounded(np.float64(1 / 3)) == 0.33333


def test_hardware_in_words(monkeypatch):
  words = collect.hardware()
  cores = len(os.sched_getaffinity(0))
  assert words.endswith(f', {cores} of {os.cpu_count()} cores')
  assert not words.startswith(',')
  assert '\n' not in words

  class Device:
    platform, device_kind = 'gpu', 'H9000'

  monkeypatch.setattr(jax, 'devices', lambda: [Device(), Device()])
  assert collect.hardware() == '2 x H9000'
