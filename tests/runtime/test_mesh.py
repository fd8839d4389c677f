"""A run on one device, on eight, and on two processes of four: same batches, losses, results."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csba_jax import config as config_lib
from csba_jax.data import pipeline, sampling
from csba_jax.errors import UserError
from csba_jax.measure import evaluate
from csba_jax.run import state as state_lib
from csba_jax.run.net import Metadata, Net
from csba_jax.runtime import sharding
from csba_jax.runtime.sharding import Layout
from csba_jax.training.job import Job
from csba_jax.training.step import compiled_steps

DEVICES = 8  # conftest.py
PLACES = {  # how a run is started, and on what
  'one': {'devices': 1},
  'eight': {'devices': 8},
  'fsdp': {'devices': 8, 'arguments': ('--config.parallel.fsdp=4',)},
  'two': {'devices': 4, 'processes': 2},
}
NET = ('--config.model.name="multibranch64"', '--config.model.attention="csba"')
FLOAT64 = ('--float64', *NET, '--config.model.width=0.05', '--config.train.epochs=2')
FLOAT32 = ('--config.train.epochs=2',)


def run_at(driver, place, workdir, *arguments, expected=0):
  """Standard error of each process of a run; all must exit with the expected code."""
  known = PLACES[place]
  every_step = ('--config.train.log_every=1', *known.get('arguments', ()), *arguments)
  if 'processes' in known:
    children = driver.start_all(workdir, *every_step, '--peer_timeout=30', devices=4)
  else:
    everything = '--config.parallel.devices=0'
    children = [driver.start(workdir, everything, *every_step, devices=known['devices'])]
  ends = [driver.finish(child) for child in children]
  assert [code for code, *_ in ends] == [expected] * len(ends), ends
  return [err for *_, err in ends]


def losses_of(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [line['train_loss'] for line in map(json.loads, lines) if 'train_loss' in line]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(('arguments', 'tolerance'), [(FLOAT64, 1e-9), (FLOAT32, 1e-3)])
def test_losses_are_the_same_everywhere(driver, tmp_path, arguments, tolerance):
  found = {}
  for place in PLACES:
    run_at(driver, place, tmp_path / place, *arguments)
    found[place] = losses_of(tmp_path / place)
    assert len(found[place]) == 24  # the issue asks for 20 steps
  for losses in found.values():
    np.testing.assert_allclose(losses, found['one'], rtol=0, atol=tolerance)
  assert len(set(found['one'])) == 24


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_goes_on_elsewhere(driver, tmp_path):
  """On one device to step 7, on eight to 15, split over four of them to 20, two processes: 24."""
  run_at(driver, 'one', tmp_path / 'whole', *FLOAT32)
  for place, step in (('one', 7), ('eight', 15), ('fsdp', 20)):
    here = step - {'one': 0, 'eight': 7, 'fsdp': 15}[place]
    end = (f'--end=after-step:{here}', '--signal=TERM')
    (err,) = run_at(driver, place, tmp_path / 'moved', *FLOAT32, *end, expected=75)
    assert f'stopped at step {step}: saved' in err
  first, _ = run_at(driver, 'two', tmp_path / 'moved', *FLOAT32)
  assert 'going on from the checkpoint at step 20' in first
  moved, whole = losses_of(tmp_path / 'moved'), losses_of(tmp_path / 'whole')
  np.testing.assert_allclose(moved, whole, rtol=0, atol=1e-3)
  ours, theirs = driver.records_of(tmp_path / 'moved')[2], driver.records_of(tmp_path / 'whole')[2]
  assert ours['splits_sha256'] == theirs['splits_sha256']
  assert ours['accuracy'] == pytest.approx(theirs['accuracy'], abs=0.02)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_one_step(driver, tmp_path):
  run_at(driver, 'two', tmp_path / 'whole')
  arguments = ('--config.train.log_every=1', '--peer_timeout=30')
  own = {1: ('--end=after-step:5', '--signal=TERM')}
  children = driver.start_all(tmp_path / 'run', *arguments, own=own)
  ends = [driver.finish(child) for child in children]
  assert [code for code, *_ in ends] == [75, 75], ends
  assert 'saved, start again to go on' in ends[0][2]
  assert 'stopped' not in ends[1][2]  # one process speaks for the run
  run_at(driver, 'two', tmp_path / 'run')
  assert driver.records_of(tmp_path / 'run')[1:] == driver.records_of(tmp_path / 'whole')[1:]


@pytest.mark.slow
def test_metrics_of_a_checkpoint_are_the_same_everywhere(driver, tmp_path):
  """csba-evaluate of one net, on one device, on eight, and on two processes of four."""
  net = ('--config.model.width=0.05', '--config.train.epochs=1')
  config = '--config=configs/digits_lt.py'
  program = ('-m', 'csba_jax.bin.train', config, *net, '--workdir')
  code, _, err = driver.finish(driver.start(tmp_path / 'run', program=program))
  assert code == 0, err
  program = ('-m', 'csba_jax.bin.evaluate', '--workdir')
  one = driver.finish(driver.start(tmp_path / 'run', program=program))
  eight = driver.finish(driver.start(tmp_path / 'run', program=program, devices=8))
  address = driver.free_address()
  meet = (f'--coordinator={address}', '--processes=2')
  children = [
    driver.start(tmp_path / 'run', *meet, f'--process={i}', program=program, devices=4)
    for i in range(2)
  ]
  two = [driver.finish(child) for child in children]
  assert one[0] == eight[0] == two[0][0] == two[1][0] == 0, (one, eight, two)
  assert 'macro-F1' in one[1]
  assert one[1] == eight[1]  # to the digits that are printed
  # beside what the runtime of several processes prints: how its parts found each other
  ours = [driver.without_gloo(out.splitlines()) for _, out, _ in two]
  assert ours == [driver.without_gloo(one[1].splitlines()), []]


# ---- in this process, on eight devices


def config_of(driver, **overrides):
  return driver.tiny_config(**{'parallel__devices': 0, **overrides})


@pytest.fixture(scope='module')
def data(driver):
  return pipeline.load(driver.tiny_config(), print)


def begun(driver, data, **overrides):
  job = Job.of(config_of(driver, **overrides), data)
  return job, job.begin()[0]


@pytest.mark.seconds
@pytest.mark.parametrize('fsdp', [1, 2, 8])
def test_steps_are_the_same_on_every_mesh(driver, data, fsdp):
  found = {}
  for devices in (1, DEVICES):
    ways = fsdp if devices > 1 else 1
    job, state = begun(driver, data, parallel__devices=devices, parallel__fsdp=ways)
    on_device = job.layout.place({'image': data.train.images, 'label': data.train.labels})
    inputs = job.layout.place_batch(sampling.draw(job.streams, 0, 4), axis=1)
    static = {'step_fn': job.program.step_fn, 'layout': job.layout}
    state, metrics = compiled_steps()(state, on_device, inputs, job.key, **static)
    shardings = job.layout.of_state(state)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
      assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
    found[devices] = jax.device_get((state, metrics))
  for one, many in zip(*map(jax.tree.leaves, found.values()), strict=True):
    np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-5)


def test_evaluation_is_the_same_on_every_mesh(driver, data):
  found = []
  for devices in (1, 3, DEVICES):  # 3 divides neither the batch nor the part
    model = begun(driver, data, parallel__devices=1)[0].program.model
    layout = sharding.for_evaluation(config_of(driver, parallel__devices=devices))
    assert layout.devices == devices
    tx = begun(driver, data, parallel__devices=1)[0].program.tx
    state = layout.place_state(state_lib.create(model, tx, (8, 8, 1), 0))
    net = Net.of(model, state, Metadata.of(data))
    found.append(evaluate.evaluate(net, data.test, 32))
  for other in found[1:]:
    np.testing.assert_array_equal(other.counts, found[0].counts)
    np.testing.assert_allclose(other.loss, found[0].loss, rtol=1e-5)


def test_parameters_are_split_where_fsdp_divides_them():
  config = config_lib.default()
  config.parallel.fsdp = 4
  layout = sharding.layout(config)
  shapes = {'large': (3, 64, 128), 'odd': (63, 127), 'small': (64,), 'step': ()}
  tree = {name: jnp.zeros(shape) for name, shape in shapes.items()}
  specs = {name: tuple(s.spec) for name, s in layout.of_state(tree).items()}
  assert specs == {'large': (None, None, 'fsdp'), 'odd': (), 'small': (), 'step': ()}
  placed = layout.place_state(tree)
  assert {x.data.shape for x in placed['large'].addressable_shards} == {(3, 64, 32)}


def test_rows_of_a_batch_go_round():
  layout = sharding.layout(config_lib.default())
  batch = np.arange(32).reshape(16, 2)
  np.testing.assert_array_equal(layout.rows(16), np.arange(16))  # one process has them all
  placed = layout.batch_of(lambda rows: batch[rows], 16)
  np.testing.assert_array_equal(placed, batch)
  assert {x.data.shape for x in placed.addressable_shards} == {(2, 2)}
  stacked = layout.place_batch(np.stack([batch, -batch]), axis=1)
  assert {x.data.shape for x in stacked.addressable_shards} == {(2, 2, 2)}


def test_computations_follow_their_data():
  layout = sharding.layout(config_lib.default())
  assert Layout.of(layout.place({'a': np.zeros(3)})) == layout
  alone = Layout.of({'a': jax.device_put(np.zeros(3), jax.devices()[2])})
  assert alone.mesh.devices.tolist() == [[jax.devices()[2]]]
  assert Layout.of([np.zeros(3)]).devices == 1


@pytest.mark.parametrize(
  ('fields', 'expected'),
  [
    ({'devices': 9}, 'parallel.devices of at most 8, the number of devices; found 9'),
    ({'devices': 6, 'fsdp': 4}, 'parallel.fsdp that divides the 6 devices; found 4'),
    ({'devices': 5}, 'train.batch_size that 5 devices divide; found 128; .*batch_size=125'),
  ],
)
def test_meshes_that_cannot_be(fields, expected):
  config = config_lib.default()
  config.parallel.update(fields)
  with pytest.raises(UserError, match=expected):
    sharding.layout(config)


# ---- devices that are not there


class Device(types.SimpleNamespace):
  """The attributes of a device that a mesh reads; hashable as a device is."""

  __hash__ = object.__hash__


def fake_gpus(nodes=2, each=8, own_process=False):
  """GPUs as JAX numbers them: a node is a slice; processes are numbered across the nodes."""
  return [
    Device(
      platform='gpu',
      device_kind='NVIDIA H100',
      id=node + nodes * i if own_process else node * each + i,
      process_index=node + nodes * i if own_process else node,
      slice_index=node,
    )
    for node in range(nodes)
    for i in range(each)
  ]


def fake_tpus(x, y, slices=1, kind='TPU v6 lite'):
  """Chips of slices of a two-dimensional torus, four on each host."""
  return [
    Device(
      platform='tpu',
      device_kind=kind,
      id=(s * y + j) * x + i,
      process_index=((s * y + j) * x + i) // 4,
      slice_index=s,
      coords=(i, j, 0),
      core_on_chip=0,
    )
    for s in range(slices)
    for j in range(y)
    for i in range(x)
  ]


def mesh_of(monkeypatch, devices, **fields):
  monkeypatch.setattr(jax, 'devices', lambda: devices)
  config = config_lib.default()
  config.parallel.update(fields)
  mesh = sharding.layout(config).mesh
  assert mesh.axis_names == sharding.AXES
  assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in devices)
  return mesh.devices


@pytest.mark.parametrize('own_process', [False, True])
@pytest.mark.parametrize('fsdp', [1, 2, 8])
def test_gpus_that_share_a_copy_are_of_one_node(monkeypatch, fsdp, own_process):
  devices = fake_gpus(own_process=own_process)[::-1]
  found = mesh_of(monkeypatch, devices, fsdp=fsdp)
  assert found.shape == (16 // fsdp, fsdp)
  assert [d.slice_index for d in found.flat] == [0] * 8 + [1] * 8
  for node in (found.ravel()[:8], found.ravel()[8:]):
    assert [d.process_index for d in node] == sorted(d.process_index for d in node)


def test_a_copy_over_whole_nodes(monkeypatch):
  found = mesh_of(monkeypatch, fake_gpus(nodes=4), fsdp=16)
  assert [{d.slice_index for d in row} for row in found] == [{0, 1}, {2, 3}]


@pytest.mark.parametrize('fsdp', [1, 2, 4, 8, 16])
@pytest.mark.parametrize('kind', ['TPU v6 lite', 'TPU v5 lite', 'TPU v4'])
def test_chips_of_a_slice(monkeypatch, kind, fsdp):
  """Neighbours in the torus, for any split; whole axes of it where they fit."""
  found = mesh_of(monkeypatch, fake_tpus(4, 4, kind=kind), fsdp=fsdp)
  assert found.shape == (16 // fsdp, fsdp)
  for row in found:
    sides = [len({d.coords[i] for d in row}) for i in (0, 1)]
    assert sides[0] * sides[1] == fsdp  # a box


def test_chips_that_are_no_box(monkeypatch):
  monkeypatch.setattr(jax, 'devices', lambda: fake_tpus(2, 2))
  config = config_lib.default()
  config.parallel.devices, config.train.batch_size = 3, 96
  assert [d.id for d in sharding.layout(config).mesh.devices.flat] == [0, 1, 2]


@pytest.mark.parametrize('fsdp', [1, 4, 8])
def test_the_batch_alone_is_split_over_slices(monkeypatch, fsdp):
  found = mesh_of(monkeypatch, fake_tpus(4, 4, slices=2), fsdp=fsdp)
  assert found.shape == (32 // fsdp, fsdp)
  assert [d.slice_index for d in found.flat] == [0] * 16 + [1] * 16


@pytest.mark.parametrize(
  ('devices', 'fsdp', 'expected'),
  [
    (fake_gpus(nodes=4, each=6), 4, 'divides the 6 devices of a node, or is a multiple of them'),
    (fake_gpus(nodes=3), 12, 'divides the 8 devices of a node, or is a multiple of them'),
    (fake_tpus(4, 4, slices=2), 32, 'divides the 16 devices of a TPU slice'),
  ],
)
def test_copies_that_would_lie_across(monkeypatch, devices, fsdp, expected):
  monkeypatch.setattr(jax, 'devices', lambda: devices)
  config = config_lib.default()
  config.parallel.fsdp, config.train.batch_size = fsdp, 8 * len(devices)
  with pytest.raises(UserError, match=f'parallel.fsdp that {expected}; found {fsdp}; '):
    sharding.layout(config)


def test_fake_devices_are_for_the_dry_run_alone(driver, data):
  config = config_of(driver, parallel__fake_devices=256)
  expected = 'parallel.fake_devices only with --dry_run; found 256 in a run; to fix it: add --dry'
  with pytest.raises(UserError, match=expected):
    Job.of(config, data)


@pytest.mark.slow
def test_a_stop_in_the_middle_of_an_evaluation_is_gone_on_with(driver, tmp_path):
  """SIGTERM at the start of a validation: the step is saved, and the next start validates first."""
  end = ('--end=before-evaluation:2', '--signal=TERM')
  code, _, err = driver.finish(driver.start(tmp_path / 'run', *end))
  assert code == 75, err
  assert 'stopped at step 24: saved' in err
  lines = (tmp_path / 'run/metrics.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines if 'val_score' in line] == [12]
  code, _, err = driver.finish(driver.start(tmp_path / 'run'))
  assert code == 0, err
  lines = (tmp_path / 'run/metrics.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines if 'val_score' in line] == [12, 24, 36]
