"""The dry run: fake devices, what fits, how long a step would take, what a device cannot hold."""

import importlib
import json
import math
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csba_jax import config as config_lib
from csba_jax.errors import UserError
from csba_jax.gradients import class_grams, exact_conflict
from csba_jax.gradients.gram import Layers
from csba_jax.measure import probe
from csba_jax.planning import dry_run, hardware
from csba_jax.planning.collectives import Collective
from csba_jax.runtime import backend

ROOT = Path(__file__).parents[2]


def config_of(**fields):
  config = config_lib.default()
  config.model.width = 0.05
  config.train.batch_size = 16
  for field, value in fields.items():
    section, name = field.split('__')
    config[section][name] = value
  return config


# ---- hardware


@pytest.mark.parametrize('name', hardware.HARDWARE)
def test_constants_are_of_a_plausible_size(name):
  found = hardware.find(name)
  assert found.bfloat16 >= found.float32 > found.highest > 1e13
  assert 15e9 < found.memory < 200e9 < found.memory_rate < 1e13
  assert found.memory_rate > found.inside > found.between > 1e9
  assert found.node >= 8


def test_unknown_hardware_names_the_table():
  with pytest.raises(UserError, match=r"parallel.hardware among h100, .*; found 'tpu'; "):
    hardware.find('tpu')
  with pytest.raises(UserError, match='parallel.hardware among'):
    dry_run.describe(config_of(parallel__hardware='tpu'))


def test_seconds_by_hand():
  device = hardware.Accelerator(
    bfloat16=8e12, float32=4e12, highest=1e12, memory=1e9, memory_rate=1e12, inside=1e9,
    between=1e8, node=4,
  )  # fmt: skip
  inside = Collective('all-reduce', ('f32[25]',), 100, (0, 1, 2, 3))  # sends 150
  across = Collective('all-gather', ('f32[25]',), 100, (0, 4))  # sends 50
  used = hardware.UTILISATION
  found = hardware.seconds(device, 4e9, 1e9, [inside, across])
  assert math.isclose(found.compute, 1e-3 / used)
  assert math.isclose(found.memory, 1e-3)
  assert math.isclose(found.communication, 150 / 1e9 + 50 / 1e8)
  assert math.isclose(found.total, 1e-3 / used + found.communication)
  assert math.isclose(found.share, found.communication / found.total)
  quick = hardware.seconds(device, 4e9, 1e9, [], 'bfloat16', highest_flops=1e9)
  assert math.isclose(quick.compute, (0.5e-3 + 1e-3) / used)
  assert quick.share == 0


# ---- what is printed


def rows_of(table):
  """{label: cells} of an aligned table."""
  lines = (re.split(r'  +', line.strip()) for line in table.splitlines())
  return {label: cells for label, *cells in lines}


@pytest.fixture(scope='module')
def described():
  fields = {'fake_devices': 8, 'hardware': 'v5e'}
  fields = {f'parallel__{name}': value for name, value in fields.items()}
  return dry_run.describe(config_of(**fields, diagnostics__statistics='frozen'))


@pytest.mark.slow
def test_a_dry_run_prints_mesh_costs_and_assumptions(described):
  setting = dry_run.Setting.of(config_of())
  lines = described.splitlines()
  assert f'parameters: {setting.parameters}' in lines
  assert 'mesh: 8 fake devices; times for v5e' in lines
  rows = rows_of(described.split('config: ')[0])
  assert rows['one call, on each device'] == ['training step', 'diagnostic step']
  assert rows['fits into 14.9 GiB'] == ['yes', 'yes']
  assert rows['all-reduce, calls'][0] > '0'
  assert len(rows['reduce-scatter, calls']) == 2
  (training,) = (line for line in lines if line.startswith('training step: '))
  assert '2 of 16 images on each device' in training
  (diagnostic,) = (line for line in lines if line.startswith('diagnostic step '))
  assert '8 images of each of 10 classes in 4 folds' in diagnostic
  assert 'images: at most these, all training images' in lines
  assert 'not measurements: XLA compiled the programs for CPUs' in described
  assert '40% of the peak' in described


def cost_of(**fields):
  memory = types.SimpleNamespace(
    argument_size_in_bytes=3 * 2**20, temp_size_in_bytes=2**31, output_size_in_bytes=2 * 2**20,
    alias_size_in_bytes=2**20,
  )  # fmt: skip
  sent = (Collective('all-reduce', ('f32[262144]',), 2**20, tuple(range(8))),)
  known = {'flops': 2e9, 'highest_flops': 0.0, 'bytes_accessed': 2**30, 'memory': memory}
  return dry_run.Cost(**known | {'collectives': sent} | fields)


def test_every_cost_is_printed_once_a_column():
  setting, device = dry_run.Setting.of(config_of()), hardware.find('v5e')
  probe = cost_of(highest_flops=3e9, collectives=())
  costs = {'training step': cost_of(), 'diagnostic step': probe}
  table = dry_run._cost_table(setting, costs, dry_run.Images(2**20, ''), device)
  assert table.count('GFLOP') == 2
  rows = rows_of(table)
  assert len(rows) == len(table.splitlines())  # no label twice
  times = [dry_run.seconds(setting, cost, device) for cost in costs.values()]
  assert rows == {
    'one call, on each device': ['training step', 'diagnostic step'],
    'work, GFLOP': ['2.00', '2.00'],
    'and at the highest precision, GFLOP': ['0.00', '3.00'],
    'memory traffic, GiB': ['1.000', '1.000'],
    'memory held, GiB': ['2.005', '2.005'],  # 3 + 2048 + 2 - 1 MiB, and the images
    'arguments, MiB': ['3.0', '3.0'],
    'temporaries, MiB': ['2048.0', '2048.0'],
    'outputs, MiB': ['2.0', '2.0'],
    'of them shared by arguments and outputs, MiB': ['1.0', '1.0'],
    'images besides, MiB': ['1.0', '1.0'],
    'fits into 14.9 GiB': ['yes', 'yes'],
    'all-reduce, calls': ['1', '0'],
    'results, MiB': ['1.000', '0.000'],
    'sent, MiB': ['1.750', '0.000'],
    'time: max(compute, memory) + communication, ms': [f'{1e3 * t.total:.3f}' for t in times],
    'compute, ms': [f'{1e3 * t.compute:.3f}' for t in times],
    'memory, ms': [f'{1e3 * t.memory:.3f}' for t in times],
    'communication, ms': [f'{1e3 * t.communication:.3f}' for t in times],
    'share of communication': [f'{t.share:.0%}' for t in times],
    'images/s, on all devices': [f'{16 / times[0].total:.0f}'],
  }


def test_the_mesh_says_which_devices_it_has():
  alone = dry_run._mesh(dry_run.Setting.of(config_of(parallel__devices=1)))
  assert alone == 'mesh: 1 device of this machine (cpu); times for h100'
  here = dry_run._mesh(dry_run.Setting.of(config_of(parallel__devices=4, parallel__fsdp=2)))
  assert here == 'mesh: 4 devices of this machine (cpu), 2 to a copy of the state; times for h100'


def images_of(**fields):
  return dry_run.Images.of(dry_run.Setting.of(config_of(**fields)))


@pytest.mark.seconds
def test_images_count_where_it_is_said_what_fits(monkeypatch):
  monkeypatch.delenv('CSBA_IMAGE_FOLDER', raising=False)
  memory = images_of(data__input='memory')
  assert memory.held == 1797 * 64  # all of the digits, on each device
  assert memory.note == 'images: at most these, all training images'
  streamed = images_of(data__input='stream', train__log_every=11)
  assert streamed.held == 10 * 16 * 64 // 8
  assert streamed.note == 'images: 11 streamed batches'
  pairs = images_of(data__input='stream', train__log_every=11, mixing__name='cmo')
  assert pairs.held == 2 * streamed.held
  large = images_of(data__input='stream', train__log_every=1000)
  assert large.held == 63 * 16 * 64 // 8  # what waits in memory has a limit
  monkeypatch.setattr(backend, 'IN_MEMORY_BYTES', 1000)
  assert images_of().note.endswith('streamed batches')
  nowhere = {'data__source': 'image_folder', 'data__channels': 3}
  assert images_of(**nowhere) == dry_run.Images(
    0,
    'images: not counted, because the data is not here; data.input=auto puts all training images, '
    'up to 0 GiB, on every device',
  )
  assert images_of(**nowhere, data__input='memory').note.endswith(
    'data.input=memory puts all training images on every device'
  )


def test_images_that_fill_a_device_do_not_fit():
  setting, v5e = dry_run.Setting.of(config_of()), hardware.find('v5e')
  for held, expected in ((4 * 2**30, 'yes'), (15 * 2**30, 'no')):
    costs = {'training step': cost_of()}
    rows = rows_of(dry_run._cost_table(setting, costs, dry_run.Images(held, ''), v5e))
    assert rows['fits into 14.9 GiB'] == [expected]


@pytest.mark.slow
def test_a_dry_run_allocates_nothing():
  before = len(jax.live_arrays())
  setting = dry_run.Setting.of(config_of())
  dry_run.compile_training(setting)
  assert len(jax.live_arrays()) == before


@pytest.mark.slow
def test_memory_and_work_by_device():
  setting = dry_run.Setting.of(config_of())
  cost = dry_run.Cost.of(dry_run.compile_training(setting), 8)
  state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(setting.state))
  images = 2 * (int(np.prod(setting.image_shape)) + 4)
  key = 8
  assert cost.memory.argument_size_in_bytes == pytest.approx(state + images + key, abs=16)
  alone = dry_run.Setting.of(config_of(parallel__devices=1))
  whole = dry_run.Cost.of(dry_run.compile_training(alone), 1)
  assert 0 < cost.flops - whole.flops / 8 < 20 * setting.parameters  # of the optimiser, on each
  assert whole.collectives == ()


@pytest.mark.slow
def test_work_of_the_diagnostic_counts_every_row():
  """It is that of one gradient of all its images, plus the products of the rows."""
  setting = dry_run.Setting.of(config_of(parallel__devices=1, diagnostics__images=4))
  cost = dry_run.measure_probe(setting, 2**33)
  rows = setting.num_classes * probe.FOLDS
  assert cost.highest_flops == 2 * rows**2 * setting.parameters
  batch = dry_run.Setting.of(config_of(parallel__devices=1, train__batch_size=rows))
  step = dry_run.Cost.of(dry_run.compile_training(batch), 1)
  assert cost.flops == pytest.approx(step.flops, rel=0.4)  # which moves parameters besides


@pytest.mark.slow
def test_work_of_a_training_batch_is_a_forward_and_a_backward_pass_for_each_class():
  setting = dry_run.Setting.of(config_of(parallel__devices=1))
  assert setting.statistics == 'batch'  # a net with BatchNorm
  cost = dry_run.measure_diagnostics(setting, 2**33)
  training = dry_run.Cost.of(dry_run.compile_training(setting), 1).flops
  # a backward pass is about two forward passes
  assert cost.flops == pytest.approx(training * (1 + 2 * setting.num_classes) / 3, rel=0.3)
  assert cost.collectives == ()
  shared = dry_run.Setting.of(config_of(parallel__devices=8))
  found = dry_run.measure_diagnostics(shared, 2**33)
  assert found.flops == pytest.approx(cost.flops / 8, rel=0.01)
  assert {c.kind for c in found.collectives} == {'all-reduce'}
  (note,) = [
    line
    for line in dry_run._notes(shared, dry_run.Images(0, ''))
    if line.startswith('diagnostic step')
  ]
  assert note == (
    'diagnostic step (diagnostics.every): one of 16 training batches of 16 images, a forward and '
    '10 backward passes, shared by all devices'
  )
  with pytest.raises(UserError, match='for 16 batches of 10 classes; found .*statistics=frozen'):
    dry_run.measure_diagnostics(shared, 1e4)


@pytest.mark.slow
def test_fake_devices_in_a_process_of_their_own():
  """64 of them, whatever XLA_FLAGS and JAX_PLATFORMS say; and a batch that they do not divide."""
  script = """
import sys
from csba_jax import config
from csba_jax.planning import dry_run
c = config.default()
c.model.width, c.parallel.fake_devices, c.train.batch_size = 0.05, 64, int(sys.argv[1])
print(dry_run.describe(c))
"""

  def run(batch):
    return subprocess.run(
      [sys.executable, '-c', script, batch], cwd=ROOT, capture_output=True, text=True, check=False,
      env={'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cuda',
           'XLA_FLAGS': '--xla_force_host_platform_device_count=2'},
    )  # fmt: skip

  found = run('128')
  assert found.returncode == 0, found.stderr
  assert 'mesh: 64 fake devices; times for h100' in found.stdout
  assert 'training step: 2 of 128 images on each device' in found.stdout
  assert 'expected train.batch_size that 64 devices divide; found 100' in run('100').stderr


def test_fewer_devices_than_asked_for_after_the_start():
  jax.devices()
  with pytest.raises(UserError, match='4096 fake devices before JAX starts'):
    dry_run.use_fake_devices(4096)
  dry_run.use_fake_devices(8)  # what is there will do


# ---- more classes than a device can hold

PARAMS = {'body': {'kernel': jnp.zeros((100, 50))}, 'head': {'kernel': jnp.zeros((50, 200))}}


@pytest.mark.parametrize(
  ('rows', 'room', 'devices', 'expected'),
  [
    (8142, 600e6, 1, None),
    (8142, 300e6, 1, r'0\.3 GB of a device; found 0\.6 GB, 0\.3 GB of them for the 8142 class'),
    (100, 4.1e6, 1, None),
    (100, 3.9e6, 1, r'the 100 class gradients of head; to fix it: leave this layer out'),
    (100, 4.1e6, 8, r'the 100 class gradients of head'),  # and a copy in one piece
    (100000, 1e9, 1, r'found 44.0 GB, 40.0 GB of them for Grams of 100000 rows for 1 layers'),
  ],
)
def test_room_for_class_gradients(rows, room, devices, expected):
  layers, leaves = Layers.of(PARAMS, None, 'head'), jax.tree.leaves(PARAMS)
  if expected is None:
    layers.check_room(leaves, rows, int(room), devices)
    return
  with pytest.raises(UserError, match=expected) as error:
    layers.check_room(leaves, rows, int(room), devices)
  assert '\n' not in str(error.value)


def losses_of(params, batch):
  hidden = batch['x'] @ params['body']['kernel']
  return (hidden @ params['head']['kernel']).sum(1)


BATCH = {'x': np.ones((6, 100), np.float32), 'label': np.arange(6) % 3}


@pytest.mark.parametrize('function', [class_grams, exact_conflict])
def test_a_layer_that_exceeds_a_device_is_named_and_may_be_left_out(monkeypatch, function):
  monkeypatch.setattr(backend, 'device_bytes', lambda: 100_000)  # the head's take 120,000
  options = {'num_classes': 3, 'per_example': True}
  with pytest.raises(UserError, match='for the 3 class gradients of head; to fix it: leave'):
    function(losses_of, PARAMS, BATCH, **options)

  def body(name):
    return None if name.startswith('head') else 'body'

  found = function(losses_of, PARAMS, BATCH, **options, layer_fn=body)
  assert found is not None


def probe_of(config, monkeypatch, room):
  monkeypatch.setattr(backend, 'device_bytes', lambda: room)
  setting = dry_run.Setting.of(config)
  classes = setting.num_classes
  labels = np.arange(4 * classes) % classes
  images = np.zeros((len(labels), *setting.image_shape), np.uint8)
  part = types.SimpleNamespace(images=images, labels=labels)
  data = types.SimpleNamespace(train=part)
  return probe.ImageProbe(setting.net, config, data, setting.layout)


def test_a_probe_that_exceeds_a_device_is_refused_before_the_first_step(monkeypatch):
  assert probe_of(config_of(), monkeypatch, 2**33)
  with pytest.raises(UserError) as error:
    probe_of(config_of(data__image_size=256, diagnostics__images=128), monkeypatch, 10**7)
  assert str(error.value) == (
    "expected a device's share of the probe within its 0.0 GB; found 0.0 GB: 4 images of each of 4 "
    'folds of 10 classes; to fix it: set --config.diagnostics.images to fewer, or use more devices'
  )
  with pytest.raises(UserError) as error:
    probe_of(config_of(data__num_classes=8142), monkeypatch, 80e9)
  assert str(error.value) == (
    'expected class gradients and Grams within the 80.0 GB of a device, for a probe of 4 folds of '
    '8142 classes; found 328.8 GB, 275.8 GB of them for Grams of 32568 rows for 65 layers; to fix '
    'it: set --config.diagnostics.every=0 and measure the trained net: csba-diagnose '
    '--layers=REGEX, without its head'
  )


@pytest.mark.slow
def test_a_dry_run_says_what_does_not_fit():
  found = dry_run.describe(config_of(data__num_classes=8142, parallel__hardware='v5e'))
  expected = 'diagnostic step: does not fit: expected class gradients and Grams'
  assert any(line.startswith(expected) for line in found.splitlines())
  rows = rows_of(found.split('config: ')[0])
  assert rows['one call, on each device'] == ['training step']
  assert rows['fits into 14.9 GiB'] == ['yes']


def test_a_device_has_memory():
  assert 2**26 < backend.device_bytes() < 2**44


# ---- docs/scaling.md


def test_the_tables_of_the_page_are_those_of_the_results(monkeypatch):
  monkeypatch.syspath_prepend(ROOT)
  scaling = importlib.import_module('benchmarks.scaling')
  found = json.loads(scaling.RESULTS.read_text())
  for case in scaling.CASES:
    lines = [(line['devices'], line['batch']) for line in found['lines'] if line['case'] == case]
    wanted = {(n, batch) for n in scaling.DEVICES for batch in (1024, 128 * n)}
    assert set(lines) == wanted
  assert scaling.tables(found) in scaling.PAGE.read_text(), 'python -m benchmarks.scaling --write'
  for fields in (scaling.fields('imagenet_lt', 8, 1024), scaling.fields('inaturalist', 8, 1024)):
    assert fields.keys() <= config_lib.flatten(config_lib.default()).keys()


# ---- gradient surgery


def test_a_measurement_for_surgery_is_a_diagnostic_step_of_its_own_size():
  fields = {'surgery__name': 'upgrad', 'surgery__every': 50, 'surgery__batches': 3}
  config = config_of(**fields, surgery__images=8, surgery__layers='^stage3/')
  setting = dry_run.Setting.of(config)
  own, layer_fn = setting.of_surgery()
  assert (own.config.diagnostics.batches, own.config.diagnostics.images) == (3, 8)
  assert own.statistics == 'batch'
  assert layer_fn('stage3/block1/conv/kernel') is not None
  assert layer_fn('stage1/block1/conv/kernel') is None
  [line] = dry_run._surgery(setting)
  assert line == (
    'surgery measurement: one of 3 training batches of 16 images, a forward and 10 backward '
    'passes, every 50 steps'
  )
  config.surgery.every = 1
  [line] = dry_run._surgery(dry_run.Setting.of(config))
  assert line.startswith('surgery.every 1: a loop over classes')
  config.surgery.update({'name': 'fixed', 'every': 50, 'source': 'run'})
  assert dry_run._surgery(dry_run.Setting.of(config)) == []


@pytest.mark.slow
@pytest.mark.parametrize('norm', ['group', 'batch'])
def test_the_table_has_a_column_for_surgery(norm):
  fields = {'surgery__name': 'upgrad', 'surgery__batches': 3, 'surgery__images': 800}
  config = config_of(**fields, model__norm=norm, surgery__every=50, diagnostics__images=1600)
  text = dry_run.describe(config)
  [head] = [line for line in text.splitlines() if line.startswith('one call, on each device')]
  assert head.split()[-2:] == ['surgery', 'measurement']
  [work] = [line for line in text.splitlines() if line.startswith('work, GFLOP')]
  *_, diagnostic, measurement = map(float, work.split()[2:])
  # of half the images; of batches it is one of each that both take
  assert measurement == pytest.approx(diagnostic * (0.5 if norm == 'group' else 1), rel=0.1)
