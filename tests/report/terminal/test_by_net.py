"""Runs of several seeds in one table: means, spread, and what does not go together."""

import json

import numpy as np
import pytest

from csba_jax import config as config_lib
from csba_jax.errors import UserError
from csba_jax.report.terminal import by_net


def result(macro_f1, f1=(0.5, None), counts=(50, 5), splits='a'):
  support = [0 if score is None else n for score, n in zip(f1, (10, 4), strict=True)]
  return {
    'accuracy': 0.75,
    'macro_f1': macro_f1,
    'balanced_accuracy': 0.625,
    'per_class': {name: list(f1) for name in ('precision', 'recall', 'f1')} | {'support': support},
    'checkpoint_step': 1,
    'class_names': ['cat', 'ox'],
    'class_counts': list(counts),
    'confusion_matrix': [[n, 0] for n in support],
    'splits_sha256': splits,
    'source_sha256': 's',
  }


GROUPS = dict.fromkeys(('many', 'medium', 'few'))


@pytest.fixture
def runs(tmp_path):
  """make(name, seed, attention, result) -> the workdir of a finished run."""

  def make(name, seed, attention, found):
    config = config_lib.default()
    config.seed = config.data.seed = seed
    config.model.attention = attention
    folder = tmp_path / name
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps({'config': config.to_dict()}))
    found = found | {'expected_calibration_error': 0.1, 'group_accuracy': GROUPS}
    (folder / 'result.json').write_text(json.dumps(found))
    return str(folder)

  return make


def test_a_column_for_each_net_with_its_mean_and_spread(runs):
  none = [(0.5, 0.25), (0.7, 0.75), (0.9, 0.5)]
  csba = [0.6, 0.6, 0.9]
  paths = [runs(f'none-s{s}', s, 'none', result(*none[s][:1], f1=none[s])) for s in range(3)]
  paths += [runs(f'csba-s{s}', s, 'csba', result(csba[s])) for s in (2, 0, 1)]  # in any order
  lines = by_net.of_workdirs(paths).splitlines()
  assert lines[0].split() == ['F1', 'of', 'class', 'training', 'images', 'none', 'csba']
  mean, spread = np.mean([0.5, 0.7, 0.9]), np.std([0.5, 0.7, 0.9], ddof=1)
  assert lines[1].split() == [
    'cat',
    '50',
    f'{mean:.3f}',
    '±',
    f'{spread:.3f}',
    *['0.500', '±', '0.000'],
  ]
  assert lines[2].split() == ['ox', '5', *['0.500', '±', '0.250'], '-']
  assert lines[4].split() == [
    'macro-F1',
    f'{mean:.3f}',
    '±',
    f'{spread:.3f}',
    *['0.700', '±', '0.173'],
  ]
  assert 'Mean ± standard deviation over 3 seeds.' in lines
  assert any(line.startswith('csba - none, mean of 3 seeds: macro-F1 +0.000') for line in lines)


def test_class_sizes_that_differ_between_seeds(runs):
  paths = [runs(f'n{s}', s, 'none', result(0.5, counts=(50 + s, 5))) for s in range(2)]
  assert by_net.of_workdirs(paths).splitlines()[1].split()[:2] == ['cat', '50-51']


def test_one_seed_a_net_is_a_column_for_each_run(runs):
  paths = [runs('a', 0, 'none', result(0.5)), runs('b', 0, 'csba', result(0.25))]
  lines = by_net.of_workdirs(paths).splitlines()
  assert lines[0].split()[-2:] == ['a', 'b']
  assert lines[4].split() == ['macro-F1', '0.500', '0.250']


def test_the_same_run_twice_is_two_columns(runs):
  paths = [runs(name, 0, 'none', result(0.5)) for name in ('first', 'again')]
  assert by_net.of_workdirs(paths).splitlines()[0].split()[-2:] == ['first', 'again']


def test_what_does_not_go_together(runs):
  none = [runs(f'none-s{s}', s, 'none', result(0.5)) for s in range(2)]
  csba = [runs('csba-s0', 0, 'csba', result(0.5))]
  with pytest.raises(
    UserError, match=r'the same seeds for every net; found 2 of .*, 1 of .*csba-s0'
  ):
    by_net.of_workdirs([*none, *csba])
  csba.append(runs('csba-s1', 1, 'csba', result(0.5, splits='b')))
  with pytest.raises(UserError, match=r'runs on the same splits, .*; found 2 different ones: '):
    by_net.of_workdirs([*none, *csba])


@pytest.mark.parametrize(
  ('fields', 'splits', 'shared'),
  [
    ({'source': 'digits', 'test_fraction': 0.3}, 'abc', (0.3 / 0.7, 'seeds')),
    ({'source': 'digits', 'test_fraction': 0.3}, 'aaa', None),  # the same test images each time
    ({'source': 'image_folder', 'folds': 5, 'test_fraction': 0.0}, 'abc', (0.25, 'folds')),
    ({'source': 'tfds', 'test_split': 'test', 'test_fraction': 0.0}, 'abc', None),
    ({'source': 'tfds', 'test_split': 'test', 'test_fraction': 0.0}, 'aaa', None),
    ({'source': 'tfds', 'test_split': 'test'}, 'aabb', (None, 'subsets')),
  ],
)
def test_seeds_that_share_images(tmp_path, monkeypatch, fields, splits, shared):
  paths, given = [], []
  for name in ('none', 'csba'):
    for seed, split in enumerate(splits):
      config = config_lib.default()
      config.seed = config.data.seed = seed
      config.model.attention = name
      config.data.update(fields)
      folder = tmp_path / f'{name}-s{seed}'
      folder.mkdir()
      (folder / 'config.json').write_text(json.dumps({'config': config.to_dict()}))
      found = result(0.5 + 0.1 * seed, splits=split)
      found |= {'expected_calibration_error': 0.1, 'group_accuracy': GROUPS}
      (folder / 'result.json').write_text(json.dumps(found))
      paths.append(str(folder))
  monkeypatch.setattr(by_net.seeds, 'describe', lambda *args: given.append(args[3]) or '')
  by_net.of_workdirs(paths)
  if shared:
    ratio, units = shared
    ratio = None if ratio is None else pytest.approx(ratio)
    shared = by_net.seeds.Overlap(ratio, units, tuple(splits))
  assert given == [shared]


def test_images_that_were_replaced_between_two_seeds(runs):
  paths = []
  for seed, content in enumerate('xy'):
    for net in ('none', 'csba'):
      found = result(0.5, splits=f'of {seed}') | {'content_sha256': content}
      paths.append(runs(f'{net}-s{seed}', seed, net, found))
  with pytest.raises(UserError, match=r'expected runs .*; found 2 different ones: .*none-s0'):
    by_net.of_workdirs(paths)
