"""The driver of tests that end runs: its places are where it says, and a missing one is loud."""

import pytest

STEPS, EPOCHS = 12, 1


@pytest.fixture(scope='module')
def ended(driver, tmp_path_factory):
  """(places in order, exit code, standard error) of a short run that reaches all places.

  It is told to end at a step that it does not have.
  """
  folder = tmp_path_factory.mktemp('driver')
  options = (
    f'--config.train.epochs={EPOCHS}',
    '--config.diagnostics.every=6',
    '--config.diagnostics.snapshots="1"',
    f'--trace={folder / "trace"}',
    f'--end=before-step:{STEPS * EPOCHS + 1}',
  )
  code, _, err = driver.finish(driver.start(folder / 'run', *options))
  return (folder / 'trace').read_text().split(), code, err


@pytest.fixture
def trace(ended):
  return ended[0]


@pytest.mark.seconds
def test_every_place_is_reached_in_one_run(driver, trace):
  assert trace[0] == 'start'
  assert set(trace[1:]) == set(driver.PLACES)
  for _, _, before, after in (*driver.WRAPPED, driver.STEPS):
    calls = [place for place in trace if place in (before, after)]
    assert calls == [before, after] * (len(calls) // 2), before


@pytest.mark.seconds
def test_places_are_reached_as_often_and_in_the_order_of_a_run(trace):
  assert trace.count('before-step') == STEPS * EPOCHS
  assert trace.count('before-diagnosis') == STEPS * EPOCHS // 6
  assert trace.count('before-snapshot') == 2  # at the end, and of the net that is tested
  assert trace.count('before-evaluation') == EPOCHS + 1  # each validation, and the test
  once = ('after-load', 'before-config', 'after-config', 'before-result', 'after-result')
  assert [place for place in trace if place in once] == list(once)
  first, last = trace.index('before-step'), len(trace) - trace[::-1].index('after-step')
  assert trace.index('after-config') < first
  assert last <= trace.index('before-last-wait') < trace.index('before-result')


def test_a_place_that_is_gone_is_an_error(driver, monkeypatch):
  row = (driver.loop, 'a_function_that_was_renamed', 'before', 'after')
  monkeypatch.setattr(driver, 'WRAPPED', (row,))
  with pytest.raises(AttributeError, match='a_function_that_was_renamed'):
    driver.places(pytest.fail)
  with pytest.raises(ValueError, match='before-moment is not among before-load'):
    driver.die_at('before-moment:1', None)


@pytest.mark.seconds
def test_an_end_that_never_comes_fails_the_run(ended):
  _, code, err = ended
  assert code == 1
  assert 'the run is finished, and --end=before-step:13 never came' in err
