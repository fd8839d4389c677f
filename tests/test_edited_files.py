"""Files of a run that somebody edited, or that a newer version wrote: one line, or they are read.

Each kind of file is changed in many ways by chance: other types, other shapes, keys that are gone
or new, numbers out of range, and files that were cut. Nothing but a UserError may come of it.
"""

import contextlib
import copy
import dataclasses
import io
import json
import random
import runpy
import types
from pathlib import Path

import numpy as np
import pytest

from csba_jax import config as config_lib
from csba_jax.data.splits import Splits
from csba_jax.errors import UserError
from csba_jax.gradients.conflict import Conflict
from csba_jax.methods import metrics
from csba_jax.report.terminal import table
from csba_jax.run import net, restore, workdir
from csba_jax.run.records import Progress
from csba_jax.study import results, store

ROOT = Path(__file__).parents[1]
simulated = types.SimpleNamespace(**runpy.run_path(ROOT / 'tests/simulated.py'))
ROUNDS = 150  # of changes to each kind of file
OTHERS = (None, True, -1, 0, 7.5, 10**400, 'x', '', [], [1, 'a'], {}, {'a': 1}, [[1]], float('nan'))


def result_of(counts):
  """The content of a result.json, of a confusion matrix."""
  counts = np.array(counts)
  bins = np.array([0, counts.sum()])
  sums = types.SimpleNamespace(
    counts=counts, loss=12.5, bin_counts=bins, bin_correct=bins / 2, bin_confidence=bins / 3
  )
  found = metrics.summarise(sums, np.array([100, 20, 5])) | {
    'checkpoint_step': 12,
    'validation_macro_f1': 0.5,
    'post_hoc_tau': 0.0,
    'class_names': ['a', 'b', 'c'],
    'class_counts': [100, 20, 5],
    'parameters': 1000,
    'splits_sha256': 'x' * 64,
    'source_sha256': 'y' * 64,
    'unreadable_images': [],
    'timing': {'seconds': 1.5, 'device': 'cpu', 'devices': 1, 'processes': 1},
  }
  return json.loads(workdir.strict_json(found))


RESULT = result_of([[5, 1, 0], [2, 3, 0], [0, 0, 0]])  # no image of the last class


def places(value, at=()):
  """Every place in a JSON value, as keys and indices from outside."""
  items = value.items() if isinstance(value, dict) else enumerate(value)
  for key, item in items:
    yield (*at, key)
    if isinstance(item, dict | list):
      yield from places(item, (*at, key))


def changed(value, chance):
  """A copy with one to three places changed."""
  value = copy.deepcopy(value)
  for _ in range(chance.randint(1, 3)):
    *outer, last = chance.choice(list(places(value)))
    owner = value
    for key in outer:
      owner = owner[key]
    how = chance.randrange(5)
    if how == 0:
      del owner[last]
    elif how == 1 and isinstance(owner, dict):
      owner[f'{last}_of_tomorrow'] = owner[last]
    elif how == 2 and isinstance(owner[last], int | float):
      owner[last] = chance.choice((-owner[last] - 1, owner[last] * 8 + 1, owner[last] // 3))
    else:
      owner[last] = chance.choice(OTHERS)
    if not value:
      return value
  return value


def cut(content, chance):
  """The content, one time in eight only its beginning."""
  return content[: chance.randrange(len(content))] if chance.random() < 0.125 else content


def read_study(folder):
  """All that a report takes from a study before it computes."""
  found = results.read(folder, pool=True)
  for record in found.done:
    for name in ('macro_f1', 'tail_f1', 'accuracy'):
      results.outcome(record, name)
    for entry in record.get('conflict') or ():
      results.gram(entry, 'shared')
  return found.folds, found.splits, [results.cell(record) for record in found.done]


def read_config(folder):
  """The checked config, and what a run that goes on compares."""
  workdir.threads_of(folder)
  config = restore.config_of(folder)
  with workdir.Workdir(folder, config.to_dict()) as opened:
    opened.begin()


def files_of_json():
  """{name of a file: (content, what reads it in its folder)}."""
  about, records = simulated.make(seeds=1, variants=('none', 'csba'))
  numerics = {'threads': 2, 'jax_enable_x64': False}
  config = {
    'config': config_lib.default().to_dict(),
    'versions': {'jax': '1'},
    'numerics': numerics,
  }
  metadata = net.Metadata(('a', 'b'), np.array([3, 4]), (8, 8, 1)).record()
  return {
    'result.json': (RESULT, lambda f: table.single(workdir.read_result(f))),
    'net.json': (metadata, net.read),
    'config.json': (config, read_config),
    'study.json': (about, read_study),
    'results.jsonl': (records[0], read_study),
  }


JSON_FILES = files_of_json()


@pytest.mark.parametrize('name', JSON_FILES)
def test_json_that_was_edited(tmp_path, name):
  content, read = JSON_FILES[name]
  simulated.study(tmp_path, seeds=1, variants=('none', 'csba'))
  (tmp_path / name).write_text(json.dumps(content) + '\n')
  read(tmp_path)  # as it was written
  refused = 0
  for number in range(ROUNDS):
    chance = random.Random(number)
    text = cut(json.dumps(changed(content, chance)), chance)
    (tmp_path / name).write_text(f'{text}\n')
    refused += is_refused(lambda: read(tmp_path), f'change {number} of {name}: {text[:2000]}')
  assert 0 < refused < ROUNDS  # nothing is refused for no reason


def is_refused(read, change):
  """Whether reading raises a UserError; AssertionError with the change for any other exception."""
  try:
    read()
  except UserError:
    return True
  except Exception as error:
    raise AssertionError(change) from error
  return False


def an_npz(arrays, chance):
  """An npz file of these arrays, one or two of them changed."""
  arrays = dict(arrays)
  for name in chance.sample(sorted(arrays), chance.randint(1, 2)):
    array = np.asarray(arrays[name])
    how = chance.randrange(6)
    if how == 0:
      del arrays[name]
    elif how == 1:
      arrays[name] = array[..., None]
    elif how == 2:
      arrays[name] = array.ravel()[:-1]
    elif how == 3:
      arrays[name] = np.full(array.shape, 'text')
    elif how == 4:
      arrays[f'{name}_of_tomorrow'] = array
    else:
      arrays[name] = np.array(chance.choice(('{}', '[1]', 7, -1.5, '{"scopes": 3}')))
  file = io.BytesIO()
  np.savez(file, **arrays)
  return cut(file.getvalue(), chance)


def a_conflict(path):
  rng = np.random.default_rng(0)
  grams = rng.normal(size=(2, 3, 3))
  Conflict(
    **dict.fromkeys(('grams', 'errors', 'low', 'high'), grams),
    **dict.fromkeys(('losses', 'prior'), np.ones(3)),
    **dict.fromkeys(('counts', 'class_counts'), np.ones(3, int)),
    scopes=('shared', 'stem'),
    class_names=('a', 'b', 'c'),
    about={'step': 3, 'target': 'train', 'layers': None},
  ).save(path)


def some_splits(path):
  parts = [np.arange(4), np.arange(4, 6), np.arange(6, 9)]
  Splits(*parts, False, np.array([2, 2]), (), 'x').save(path)


@pytest.mark.parametrize(
  ('make', 'read'),
  [(a_conflict, lambda p: Conflict.load(p).summary()), (some_splits, Splits.load)],
)
def test_arrays_of_other_shapes_and_types(tmp_path, make, read):
  path = tmp_path / 'file.npz'
  make(path)
  read(path)
  with np.load(path) as file:
    arrays = dict(file)
  for number in range(ROUNDS):
    path.write_bytes(an_npz(arrays, random.Random(number)))
    is_refused(lambda: read(path), f'change {number}')


def test_the_progress_in_a_checkpoint():
  progress = Progress(step=7, losses=[0.5], done=['line'], levels=['0.5'], origin={'tau': 1.0})
  meta = json.loads(json.dumps(dataclasses.asdict(progress)))
  assert Progress.of(meta) == progress
  older = {name: value for name, value in meta.items() if name not in ('levels', 'origin')}
  assert Progress.of(older).levels == []
  for name, value in ({'best_score': 0.5, 'input': {'a': 1}}).items():
    assert getattr(Progress.of(meta | {name: value}), name) == value
  with pytest.raises(UserError, match='found momentum, which this version does not know; to fix'):
    Progress.of(meta | {'momentum': 3})
  for number in range(ROUNDS):
    with contextlib.suppress(UserError):
      Progress.of(changed(meta, random.Random(number)))
  for other in OTHERS:
    if other != {}:
      with pytest.raises(UserError, match='in place of an object|does not know'):
        Progress.of(other)


@pytest.mark.parametrize(
  ('change', 'found'),
  [
    ({'macro_f1': 7.5}, 'macro_f1 7.5 is not within 0 and 1'),
    ({'accuracy': -0.1}, 'accuracy -0.1 is not within 0 and 1'),
    ({'macro_f1': None}, 'macro_f1 is null for 11 examples'),
    ({'loss': 'low'}, "loss is 'low' and no number"),
    ({'examples': 12}, 'per_class.support adds up to 11, examples is 12'),
    ({'examples': 10**400}, 'examples is an integer of many digits and no count'),
    ({'class_counts': [100, 20]}, '3 class_names and 2 class_counts'),
    ({'class_counts': [100, 20, -5]}, r'class_counts\[2\] is -5 and no count'),
    ({'class_names': 'abc'}, "class_names is 'abc' and no list"),
    ({'class_names': [1, 2, 3]}, 'class_names has an entry that is no text'),
    ({'confusion_matrix': [[5, 1], [2, 3]]}, 'confusion_matrix is not 3 x 3'),
    ({'confusion_matrix': [[5, 0, 0], [2, 3, 0], [0, 0, 0]]}, 'do not add up to per_class.support'),
    (
      {'per_class': RESULT['per_class'] | {'f1': [0.5, None, None]}},
      'f1 is null for other classes',
    ),
    ({'per_class': RESULT['per_class'] | {'recall': [0.5]}}, 'recall has 1 entries for 3 classes'),
    ({'group_accuracy': {'few': 2}}, 'group_accuracy.few 2 is not within 0 and 1'),
    ({'splits_sha256': 3}, 'splits_sha256 is 3 and no text'),
    ({'timing': 3}, 'timing is 3 and no object'),
  ],
)
def test_a_result_that_cannot_be_one_names_file_line_and_field(tmp_path, change, found):
  (tmp_path / 'result.json').write_text(json.dumps(RESULT | change))
  with pytest.raises(UserError, match=f'a whole {tmp_path}/result.json; .*{found}'):
    workdir.read_result(tmp_path)
  _, [record, *_] = simulated.make(seeds=1, variants=('none',))
  kept = {key: record[key] for key in record if key not in ('conflict', 'branches')}
  lines = [kept | {'result': RESULT}, kept | {'result': RESULT | change}]
  path = tmp_path / 'results.jsonl'
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  with pytest.raises(UserError, match=f'on line 2 of {path}; found .*{found}.*; to fix it: remove'):
    store.load(path)


def test_a_result_without_a_number_that_is_reported(tmp_path):
  del (record := copy.deepcopy(RESULT))['macro_f1']
  (tmp_path / 'result.json').write_text(json.dumps(record))
  with pytest.raises(UserError, match="no 'macro_f1' in it"):
    workdir.read_result(tmp_path)


@pytest.mark.parametrize('study', ['digits', 'digits_tuning', 'solar', 'solar_tuning'])
def test_the_committed_studies_pass(study):
  records, notes = store.load(ROOT / f'results/{study}/results.jsonl')
  assert records
  assert notes == ()
