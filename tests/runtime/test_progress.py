"""The bar on a terminal and its plain lines elsewhere, with a clock that the test sets."""

import io

import pytest

from csba_jax.runtime import progress
from csba_jax.runtime.progress import TrainingBar


class Clock:
  """A clock that the test sets."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def clock():
  return Clock()


def test_plain_lines_come_every_ten_seconds_and_at_the_end(clock):
  stream = io.StringIO()
  with TrainingBar(100, 0, clock, stream) as bar:
    for step, seconds in ((5, 2), (10, 4), (50, 9), (60, 12), (99, 13), (100, 14)):
      clock.now = 100.0 + seconds
      bar.update(step, 1.0 / step, 12.4)
      if step == 50:
        bar.validated(0.6554)
  assert stream.getvalue().splitlines() == [
    'step 5/100  loss 0.2000  val macro-F1 -  12 images/s',
    'step 60/100  loss 0.0167  val macro-F1 0.655  12 images/s  16 s left',  # 5 steps took 2 s
    'step 100/100  loss 0.0100  val macro-F1 0.655  12 images/s  0 s left',
  ]


def test_lines_are_ten_seconds_apart_to_the_second(clock):
  stream = io.StringIO()
  bar = TrainingBar(1000, 0, clock, stream)
  for second in range(31):
    clock.now = 100.0 + second
    bar.update(second + 1, 1.0, 1.0)
  assert [line.split()[1] for line in stream.getvalue().splitlines()] == [
    '1/1000',
    '11/1000',
    '21/1000',
    '31/1000',
  ]


def test_time_left_counts_only_the_steps_of_this_process(clock):
  stream = io.StringIO()
  bar = TrainingBar(100, 60, clock, stream)
  for step, seconds in ((70, 300.0), (80, 20.0)):  # the first ten compile
    clock.now += seconds
    bar.update(step, 0.5, 1000.0)
  assert stream.getvalue().splitlines() == [
    'step 70/100  loss 0.5000  val macro-F1 -  1000 images/s',
    'step 80/100  loss 0.5000  val macro-F1 -  1000 images/s  40 s left',
  ]


def test_what_compiles_is_no_part_of_the_rate(clock):
  left = progress.TimeLeft(0, clock)
  found = []
  # (steps of the update, its seconds): the first of each number of steps compiles
  for steps, seconds in ((1, 30.0), (1, 1.0), (1, 1.0), (5, 40.0), (1, 1.0), (5, 5.0)):
    clock.now += seconds
    found.append(left.update(left._done + steps, 100))
  assert found == [None, None, 97.0, 92.0, 91.0, 86.0]


def test_nor_is_the_first_validation(clock):
  stream = io.StringIO()
  bar = TrainingBar(100, 0, clock, stream)
  for step, seconds in ((1, 60.0), (2, 10.0), (3, 50.0), (4, 10.0), (5, 30.0)):
    clock.now += seconds
    if step in (3, 5):  # before these two: the first compiles, the second is what one costs
      bar.validated(0.5)
    bar.update(step, 1.0, 1.0)
  lefts = [line.split('images/s')[1].strip() for line in stream.getvalue().splitlines()]
  assert lefts == ['', '980 s left', '970 s left', '960 s left', f'{50 / 3 * 95:.0f} s left']


def test_there_is_no_estimate_of_a_moment(clock):
  left = progress.TimeLeft(0, clock)
  for step in range(1, 12):
    clock.now += progress.MEASURED_SECONDS / 10
    found = left.update(step, 1000)
    assert (found is None) == (step < 11)
  assert found == pytest.approx(progress.MEASURED_SECONDS / 10 * (1000 - 11))


def test_a_run_resumed_at_its_end_divides_by_nothing(clock):
  stream = io.StringIO()
  TrainingBar(100, 100, clock, stream).update(100, 0.5, 10.0)
  assert stream.getvalue().endswith('  0 s left\n')


@pytest.mark.parametrize('make', [io.StringIO, Terminal])
def test_a_run_without_validation_goes_on(clock, make):
  stream = make()
  with TrainingBar(10, 0, clock, stream) as bar:
    bar.update(5, 0.5, 10.0)
    bar.validated(None)
    clock.now += 60
    bar.update(6, 0.5, 10.0)
  if make is io.StringIO:
    assert stream.getvalue().count('val macro-F1 -  ') == 2


def test_terminal_shows_a_bar(clock, monkeypatch):
  for name in ('NO_COLOR', 'FORCE_COLOR', 'TTY_COMPATIBLE'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('COLUMNS', '120')
  monkeypatch.setenv('TERM', 'xterm')
  stream = Terminal()
  with TrainingBar(100, 20, clock, stream) as bar:
    bar.validated(0.5)
    bar.update(60, 0.25, 321.0)
    bar.update(100, 0.125, 321.0)
  text = stream.getvalue()
  assert 'step 100/100' in text
  assert 'loss 0.1250  val macro-F1 0.500  321 images/s' in text
  assert '0 s left' in text


def test_terminal_bar_is_taken_down_when_the_run_fails(clock):
  bar = TrainingBar(100, 0, clock, Terminal())
  with pytest.raises(RuntimeError, match='boom'), bar:
    raise RuntimeError('boom')
  assert bar._bar.live.is_started is False


def test_say_writes_one_line_to_standard_error(capsys):
  progress.say('100 % of the data')
  progress.say('two')
  captured = capsys.readouterr()
  assert captured.err == '100 % of the data\ntwo\n'
  assert captured.out == ''


def test_work_tells_every_ten_seconds_what_is_left(clock):
  stream = io.StringIO()
  with progress.WorkBar(clock=clock, stream=stream) as bar:
    for done, seconds in ((10, 1), (50, 10), (60, 12), (100, 20)):
      clock.now = 100.0 + seconds
      bar.update(done, 100)
  assert stream.getvalue().splitlines() == ['50/100 images', '100/100 images  0 s left']


def test_work_tells_what_is_left_once_it_is_measured(clock):
  stream = io.StringIO()
  with progress.WorkBar(clock=clock, stream=stream) as bar:
    for done, seconds in ((10, 60), (20, 3), (30, 9)):
      clock.now += seconds
      bar.update(done, 100)
  assert stream.getvalue().splitlines() == ['10/100 images', '30/100 images  42 s left']


def test_work_on_a_terminal_is_a_bar():
  stream = Terminal()
  with progress.WorkBar(stream=stream) as bar:
    bar.update(30, 60)
  assert '30/60 images' in stream.getvalue()


def test_work_can_be_stopped_at_every_update():
  def check():
    raise KeyError('stop')

  with progress.WorkBar(check, stream=io.StringIO()) as bar, pytest.raises(KeyError, match='stop'):
    bar.update(1, 2)
