"""The table of tasks that follow a step: its order, what is kept of it, and its stopwatch."""

import types

import pytest

from csba_jax.run.records import Progress
from csba_jax.run.schedule import Plan
from csba_jax.runtime.signals import Stopped
from csba_jax.training import after_step
from csba_jax.training.after_step import Stopwatch, Task

PLAN = Plan(
  steps_per_epoch=12,
  total=24,
  log_every=4,
  eval_every=12,
  diagnose_every=6,
  snapshots=(('0', 0), ('0.5', 12)),
  save_every=8,
  surgery_every=12,
)


def context_at(step, done=()):
  """A context without data, whose tasks are those of a made-up table."""
  records = types.SimpleNamespace(progress=Progress(step=step, done=list(done)))
  job = types.SimpleNamespace(plan=PLAN, batch_size=16)
  return after_step.Context(job, records, None, None, Stopwatch(step), None)


@pytest.fixture
def table(monkeypatch):
  """{name: function to do, None as long as it is not set}; the table with what it does recorded."""
  table = types.SimpleNamespace(log=[], instead={})

  def do(name):
    def one(context, state):
      table.log.append(name)
      return table.instead.get(name, lambda *_: None)(context, state)

    return one

  rows = tuple(Task(task.name, task.is_due, do(task.name)) for task in after_step.TASKS)
  monkeypatch.setattr(after_step, 'TASKS', rows)
  return table


def test_names_are_those_that_stored_checkpoints_hold():
  names = [task.name for task in after_step.TASKS]
  assert names == [
    'diagnosis',
    'snapshots',
    'levels',
    'surgery',
    'line',
    'validation',
    'checkpoint',
  ]


@pytest.mark.parametrize(
  ('step', 'due'),
  [
    (0, ['snapshots', 'surgery']),
    (1, []),
    (4, ['levels', 'line']),
    (6, ['diagnosis']),
    (8, ['levels', 'line', 'checkpoint']),
    (12, ['diagnosis', 'snapshots', 'levels', 'surgery', 'line', 'validation', 'checkpoint']),
    (24, ['diagnosis', 'levels', 'line', 'validation', 'checkpoint']),
  ],
)
def test_what_is_due_is_done_in_order_and_once(table, step, due):
  context = context_at(step)
  after_step.run_due(context, None)
  assert table.log == due == context.records.progress.done
  after_step.run_due(context, None)
  assert table.log == due


def test_a_task_that_was_stopped_is_done_again_and_those_before_it_are_not(table):
  context = context_at(12)

  def stop(context, state):
    raise Stopped

  table.instead['levels'] = stop
  with pytest.raises(Stopped):
    after_step.run_due(context, None)
  assert context.records.progress.done == ['diagnosis', 'snapshots']
  del table.instead['levels'], table.log[:]
  after_step.run_due(context_at(12, context.records.progress.done), None)
  assert table.log == ['levels', 'surgery', 'line', 'validation', 'checkpoint']


def test_later_tasks_and_the_run_have_the_state_that_a_task_returns(table):
  seen = []
  table.instead |= {
    'levels': lambda _, state: seen.append(state),
    'surgery': lambda _, state: f'{state} with weights',
    'checkpoint': lambda _, state: seen.append(state),
  }
  assert after_step.run_due(context_at(12), 'state') == 'state with weights'
  assert seen == ['state', 'state with weights']


def test_a_stop_leaves_the_state_after_the_tasks_that_are_done(table):
  """It is saved together with their names, so that they are not done again."""

  def stop(context, state):
    raise Stopped

  table.instead |= {'surgery': lambda _, state: f'{state} with weights', 'validation': stop}
  context = context_at(12)
  with pytest.raises(Stopped):
    after_step.run_due(context, 'state')
  assert context.state == 'state with weights'
  assert 'surgery' in context.records.progress.done


def test_a_checkpoint_says_of_itself_that_it_is_done_and_has_the_score_of_its_step(table):
  saved = []

  def validate(context, state):
    context.score = 0.7

  def save(context, state):
    saved.append((list(context.records.progress.done), context.score))

  table.instead |= {'validation': validate, 'checkpoint': save}
  context = context_at(12)
  after_step.run_due(context, None)
  assert saved == [([task.name for task in after_step.TASKS], 0.7)]
  context.records.progress.step, context.records.progress.done = 16, []
  after_step.run_due(context, None)
  assert saved[1] == (['levels', 'line', 'checkpoint'], None)  # no score of an earlier step


def test_the_stopwatch_times_training_alone(monkeypatch, table):
  clock = types.SimpleNamespace(now=100.0)
  monkeypatch.setattr(after_step.time, 'monotonic', lambda: clock.now)

  def slow(context, state):
    clock.now += 1000

  def line(context, state):
    lines.append((context.stopwatch.seconds(), context.images_per_second()))
    clock.now += 10
    context.stopwatch.restart(context.step)

  lines = []
  table.instead |= {'diagnosis': slow, 'line': line, 'validation': slow, 'checkpoint': slow}
  context = context_at(0)
  clock.now += 50  # before the first step, such as restoring a stream
  for step in range(25):
    context.records.progress.step, context.records.progress.done = step, []
    after_step.run_due(context, None)
    clock.now += 2  # a step
  assert lines == [(8.0, 16 * 4 / 8.0)] * 6
  assert context.images_per_second() == 0  # of no step yet
