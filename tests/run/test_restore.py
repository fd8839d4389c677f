"""Which checkpoint a name means while a run goes on, and what is said where there is none."""

import shutil

import pytest

from csba_jax.errors import UserError
from csba_jax.run import restore
from csba_jax.run.state import TrainState

LIKE = TrainState(*[{}] * 5)


class Kept:
  """Checkpoints of a run that goes on: {step: its progress}; the folder may lose some."""

  def __init__(self, folder, kept):
    self._folder, self._kept = folder, kept
    for step in kept:
      (folder / 'checkpoints' / str(step)).mkdir(parents=True)

  def steps(self):
    return sorted(self._kept)

  def restore(self, step, like):
    del like
    if not (self._folder / 'checkpoints' / str(step)).exists() or self._kept[step] is None:
      raise UserError(f'a whole checkpoint at step {step}', 'one that is damaged', 'use another')
    return LIKE.saved(), self._kept[step]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
  monkeypatch.setattr(restore, 'BEING_REMOVED_SECONDS', 0.0)


def find(kept, folder, which='best', validates=True):
  return restore._find_step(kept, folder, which, LIKE, validates)


def test_best_before_the_first_validation_says_so(tmp_path):
  kept = Kept(tmp_path, {40: {'step': 40}, 80: {'step': 80}})
  with pytest.raises(UserError) as error:
    find(kept, tmp_path)
  assert str(error.value) == (
    f'expected a checkpoint that was validated in {tmp_path}, for --checkpoint=best; found no '
    'validation up to step 80, in a run that is not finished; to fix it: wait for the first '
    'validation, or set --checkpoint=latest'
  )
  assert find(kept, tmp_path, 'latest') == 80
  assert find(kept, tmp_path, '40') == 40
  assert find(kept, tmp_path, validates=False) == 80  # a run without a validation part


def test_best_of_a_run_that_goes_on_is_the_best_so_far(tmp_path):
  best = {'best_step': 40, 'best_score': 0.5}
  assert find(Kept(tmp_path, {40: best, 80: best | {'step': 80}}), tmp_path) == 40


def test_best_of_a_finished_run_is_in_its_result(tmp_path, monkeypatch):
  (tmp_path / 'result.json').touch()
  monkeypatch.setattr(restore, 'read_result', lambda _: {'checkpoint_step': 7})
  assert find(Kept(tmp_path, {7: None, 9: {}}), tmp_path) == 7


def test_a_checkpoint_that_the_run_has_replaced_is_not_called_damaged(tmp_path):
  kept = Kept(tmp_path, {40: {}, 80: {}})
  shutil.rmtree(tmp_path / 'checkpoints/40')
  with pytest.raises(UserError) as error:
    restore._restore(kept, 40, tmp_path, LIKE)
  assert str(error.value) == (
    f'expected checkpoint 40 in {tmp_path}; found that the run, which goes on, has replaced it by '
    '80; to fix it: give the command again, or wait until the run is finished'
  )


def test_a_damaged_one_that_is_there_is(tmp_path):
  with pytest.raises(UserError, match='one that is damaged'):
    restore._restore(Kept(tmp_path, {40: None}), 40, tmp_path, LIKE)


@pytest.mark.parametrize(
  ('steps', 'which', 'message'),
  [
    (
      None,
      'best',
      'a run with checkpoints in .*; found none yet; to fix it: wait until csba-train',
    ),
    ((), 'best', 'a saved checkpoint in .*; found none yet; to fix it: wait until csba-train'),
    ((3, 20), '7', '--checkpoint=best, latest, init or one of 3, 20; found 7; '),
    ((3, 20), 'wrost', 'init or one of 3, 20; found wrost; '),
  ],
)
def test_a_checkpoint_that_cannot_be_there_is_refused_by_its_name(tmp_path, steps, which, message):
  if steps is not None:
    (tmp_path / 'checkpoints').mkdir()
  for step in steps or ():
    (tmp_path / 'checkpoints' / str(step)).mkdir()
  with pytest.raises(UserError, match=message):
    restore._check_named(tmp_path, which)
