"""The collectives of programs for training, evaluation and diagnostics, read from HLO."""

from collections import Counter

import jax
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from csba_jax import config as config_lib
from csba_jax.data import pipeline
from csba_jax.gradients import class_grams, dataset
from csba_jax.gradients.gram import Layers
from csba_jax.measure import diagnose, evaluate, probe
from csba_jax.methods import metrics
from csba_jax.models import multibranch
from csba_jax.planning import collectives, dry_run
from csba_jax.run import state as state_lib
from csba_jax.run.net import Metadata, Net
from csba_jax.runtime import sharding

DEVICES = 8
# (line of HLO, kind, arrays, bytes of the result, group, bytes sent)
LINES = {
  'all-reduce': (
    '%r.1 = f32[3,5]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, '
    'use_global_device_ids=true, to_apply=%add, metadata={op_name="jit(f)/sum" id=2}',
    ('all-reduce', ('f32[3,5]',), 60, (0, 1, 2, 3), 2 * 60 * 3 / 4),
  ),
  'tuple with comments': (
    'ROOT %r = (f32[3]{0}, bf16[2,2]{1,0}, /*index=2*/s32[]) all-reduce(%a, %b, /*index=2*/%c), '
    'replica_groups={}, to_apply=%add',
    ('all-reduce', ('f32[3]', 'bf16[2,2]', 's32[]'), 12 + 8 + 4, tuple(range(8)), 2 * 24 * 7 / 8),
  ),
  'layout with tiles': (
    '%r = bf16[128,256]{1,0:T(8,128)(2,1)S(1)} all-gather(bf16[16,256]{1,0:T(8,128)} %x), '
    'replica_groups=[1,8]<=[8], dimensions={0}',
    ('all-gather', ('bf16[128,256]',), 65536, tuple(range(8)), 65536 * 7 / 8),
  ),
  'rows of a transposed array': (
    '%r = u8[4]{0} reduce-scatter(%x), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}',
    ('reduce-scatter', ('u8[4]',), 4, (0, 2, 4, 6), 4 * 3),
  ),
  'axes of a mesh': (
    "%r = f64[2]{0} all-to-all(%x), replica_groups=mesh['data'=4,'fsdp'=2] {'fsdp'}, id=1",
    ('all-to-all', ('f64[2]',), 16, (0, 1), 8),
  ),
  'axes of a mesh in another order': (
    "%r = f32[2]{0} all-reduce(%x), replica_groups=mesh['a'=2,'b'=4], "
    "device_ids=([4,2]T(1,0)) {'a'}, to_apply=%add",
    ('all-reduce', ('f32[2]',), 8, (0, 1), 8),
  ),
  'a part of an axis': (
    "%r = f32[2]{0} all-reduce(%x), replica_groups=mesh['a'=8] {'a':(2)2}, to_apply=%add",
    ('all-reduce', ('f32[2]',), 8, (0, 2), 8),
  ),
  'asynchronous all-reduce': (
    '%s = f32[10]{0} all-reduce-start(%x), replica_groups={{0,1}}, to_apply=%add',
    ('all-reduce', ('f32[10]',), 40, (0, 1), 40),
  ),
  'asynchronous all-gather': (
    '%s = (f32[1,4]{1,0}, f32[2,4]{1,0}) all-gather-start(%x), replica_groups={{0,1}}, dim={0}',
    ('all-gather', ('f32[2,4]',), 32, (0, 1), 16),
  ),
  'asynchronous, several operands': (
    '%s = ((f32[4]{0}, s8[8]{0}), (f32[2]{0}, s8[4]{0}), u32[]) reduce-scatter-start(%x, %y), '
    'replica_groups={{0,1}}',
    ('reduce-scatter', ('f32[2]', 's8[4]'), 12, (0, 1), 12),
  ),
  'permute': (
    '%s = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), '
    'source_target_pairs={{0,1},{1,0}}',
    ('collective-permute', ('f32[4]',), 16, (0, 1), 16),
  ),
  'small and unusual types': (
    '%r = (pred[3]{0}, f8e4m3fn[5]{0}, s4[3]{0}, c64[2]{0}, token[]) all-to-all(%x), '
    'replica_groups={{0}}',
    (
      'all-to-all',
      ('pred[3]', 'f8e4m3fn[5]', 's4[3]', 'c64[2]', 'token[]'),
      3 + 5 + 2 + 16,
      (0,),
      0,
    ),
  ),
}


@pytest.mark.parametrize('case', LINES)
def test_lines_of_hlo(case):
  line, expected = LINES[case]
  (found,) = collectives.read(f'ENTRY %main {{\n  {line}\n}}', DEVICES)
  assert (found.kind, found.arrays, found.bytes, found.group, found.sent) == expected


def test_what_only_names_a_collective_is_none():
  hlo = """
    %all-reduce.1 = f32[3]{0} add(%x, %y)
    %d = f32[3]{0} all-reduce-done(%s)
    %f = f32[3]{0} fusion(%all-gather), kind=kLoop, calls=%all-reduce_computation
    %c = f32[3]{0} custom-call(%x), custom_call_target="all-reduce(x)"
  """
  assert collectives.read(hlo, DEVICES) == []


def test_sources_nodes_and_sums():
  lines = [LINES[name][0] for name in ('all-reduce', 'rows of a transposed array', 'permute')]
  found = collectives.read('\n'.join(lines + lines[:1]), DEVICES)
  assert found[0].source == 'jit(f)/sum'
  assert [c.spans(4) for c in found] == [False, True, False, False]
  sums = collectives.by_kind(found)
  assert list(sums) == ['all-reduce', 'reduce-scatter', 'collective-permute']
  assert sums['all-reduce'] == collectives.Traffic(2, 120, 180.0)


# ---- programs that XLA compiles for eight devices


def config_of(**fields):
  """A narrow net on the smallest images, a batch of two images a device."""
  config = config_lib.default()
  config.data.channels = 3
  config.model.width = 0.05
  config.train.batch_size = 2 * DEVICES
  for field, value in fields.items():
    section, name = field.split('__')
    config[section][name] = value
  return config


def sent_by_training(config):
  setting = dry_run.Setting.of(config)
  assert setting.layout.devices == DEVICES
  return setting, collectives.read(dry_run.compile_training(setting).as_text(), DEVICES)


def sizes(arrays):
  return Counter(collectives.size(array) for array in arrays)


def of_tree(tree):
  return Counter(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.seconds
def test_training_sends_gradients_sums_of_batch_norm_and_the_loss_and_nothing_else():
  """All-reduces: each gradient once, of each BatchNorm channel two sums, and the loss.

  The two sums are those of the forward pass, of values and of squares: as many as there are running
  means and variances. Those of the backward pass are what the gradients of scale and bias are made
  of. Neither crops nor policies gather images.
  """
  everything = {
    'augment__crop_padding': 1,
    'augment__flip': True,
    'augment__policy': 'autoaugment',
    'augment__cutout': 2,
  }
  setting, found = sent_by_training(config_of(**everything))
  assert {c.kind for c in found} == {'all-reduce'}
  assert {c.group for c in found} == {tuple(range(DEVICES))}
  arrays = [array for c in found for array in c.arrays]
  assert all(array.startswith('f32[') for array in arrays)
  expected = of_tree(setting.state.params) + of_tree(setting.state.batch_stats) + Counter([1])
  assert sizes(arrays) == expected
  numbers = setting.parameters + sum(x.size for x in jax.tree.leaves(setting.state.batch_stats)) + 1
  assert sum(c.bytes for c in found) == 4 * numbers


@pytest.mark.slow
def test_mixing_within_the_batch_needs_its_partners_from_other_devices():
  setting, found = sent_by_training(config_of(mixing__name='mixup'))
  gathered = [array for c in found if c.kind == 'all-gather' for array in c.arrays]
  batch = 2 * DEVICES
  pixels = batch * int(np.prod(setting.image_shape))
  assert sorted(sizes(gathered)) == [batch, pixels]  # labels and images
  assert {c.kind for c in found} == {'all-reduce', 'all-gather'}


@pytest.mark.slow
def test_fsdp_gathers_parameters_and_reduces_gradients_in_two_stages():
  """Parameters are gathered once for a step, in pairs of devices.

  XLA for CPUs has no reduce-scatter here: a gradient is reduced in one stage in each pair, of which
  either device keeps its half (what accelerators make a reduce-scatter of), and that half is
  reduced over the pairs.
  """
  setting, found = sent_by_training(config_of(parallel__fsdp=2, model__width=0.3))
  leaves = jax.tree.leaves(setting.state.params)
  split = [x for x in leaves if not x.sharding.is_fully_replicated]
  assert split
  gathers = [c for c in found if c.kind == 'all-gather']
  assert {c.group for c in gathers} == {(0, 1)}
  assert sizes(a for c in gathers for a in c.arrays) == of_tree(split)
  assert {c.kind for c in found} == {'all-gather', 'all-reduce'}
  reduced = {group: Counter() for group in ((0, 1), (0, 2, 4, 6), tuple(range(DEVICES)))}
  for c in found:
    if c.kind == 'all-reduce':
      reduced[c.group] += sizes(c.arrays)
  # the norm of the gradient is a sum over both halves of each
  assert reduced[0, 1] - Counter({1: len(split)}) == of_tree(split)
  assert reduced[0, 2, 4, 6] == Counter(x.size // 2 for x in split)


@pytest.mark.seconds
def test_evaluation_sends_its_sums_alone():
  setting = dry_run.Setting.of(config_of())
  layout, classes = setting.layout, setting.num_classes

  def of(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.split())

  batch = 2 * DEVICES
  compiled = evaluate.eval_step.lower(
    setting.model,
    setting.net.metadata.preprocessing,
    setting.net.variables,
    jax.ShapeDtypeStruct((classes,), np.float32, sharding=layout.whole),
    of(np.uint8, batch, *setting.image_shape),
    of(np.int32, batch),
    of(np.bool_, batch),
    layout=layout,
  ).compile()
  found = collectives.read(compiled.as_text(), DEVICES)
  assert {c.kind for c in found} == {'all-reduce'}
  bins = metrics.CALIBRATION_BINS  # images, right ones and confidences in each
  expected = Counter([classes**2, 1, bins, bins, bins])
  assert sizes(a for c in found for a in c.arrays) == expected


@pytest.mark.slow
def test_the_diagnostic_scatters_class_sums_and_reduces_small_grams():
  """A device reduces its share of [rows, parameters] of a layer; [rows, rows] are all-reduced."""
  setting = dry_run.Setting.of(config_of())
  cost = dry_run.measure_probe(setting, room=2**33)
  rows = setting.num_classes * probe.FOLDS
  leaves = jax.tree.leaves(setting.state.params)
  layers = Layers.of(setting.state.params, None, setting.model.head)
  shares = [-(-sum(leaves[i].size for i in at) // DEVICES) for at in layers.members]
  kinds = collectives.by_kind(cost.collectives)
  assert set(kinds) == {'all-reduce', 'reduce-scatter'}  # no gather: images stay where they are
  assert kinds['reduce-scatter'].bytes == 4 * rows * sum(shares)
  scattered = [a for c in cost.collectives if c.kind == 'reduce-scatter' for a in c.arrays]
  assert sizes(scattered) == Counter(rows * share for share in shares)
  assert kinds['all-reduce'].bytes == 4 * (len(shares) * rows**2 + rows)


@pytest.fixture(scope='module')
def digits():
  config = config_lib.default()
  config.diagnostics.images = 6
  return config, pipeline.load(config, lambda _: None)


SMALL = multibranch.MultiBranch(10, 'csba', stem=4, stages=(6,), blocks=(1,))


def on(devices, digits):
  """(config, data, model, state, layout), the state where it belongs."""
  config, data = digits
  config = config.copy_and_resolve_references()
  config.parallel.devices = devices
  layout = sharding.layout(config)
  state = state_lib.create(SMALL, optax.sgd(0.1), data.image_shape, 0)
  rng = np.random.default_rng(0)  # no layer of zeros
  params = jax.tree.map(
    lambda x: np.asarray(x) + rng.normal(0, 0.05, x.shape).astype(x.dtype), state.params
  )
  state = layout.place_state(jax.device_get(state.replace(params=params)))
  return config, data, SMALL, state, layout


def by_probe(config, data, model, state, layout):
  net = Net.of(model, state, Metadata.of(data))
  return probe.ImageProbe(net, config, data, layout).measure(state).grams


def by_sampling(config, data, model, state, layout, **sampling):
  net = Net.of(model, state, Metadata.of(data))
  sample = diagnose.Sampling(**sampling)
  found = diagnose.measure(net, config, data, data.train, sample, about={})
  return found.grams


def by_class_grams(config, data, model, state, layout):
  chosen = slice(0, 100)
  batch = {'image': data.train.images[chosen], 'label': data.train.labels[chosen]}
  net = Net.of(model, state, Metadata.of(data))
  losses_fn = Partial(diagnose.losses_of(net, config), state.batch_stats)
  found = class_grams(
    losses_fn, state.params, batch, num_classes=10, per_example=True, mesh=layout.grams_mesh
  )
  return np.stack([found.total, *found.grams.values()])


WAYS = {
  'probe': by_probe,
  'exact': lambda *of: by_sampling(*of, exact=True),
  'estimated': lambda *of: by_sampling(*of, images=8, folds=4),
  'class_grams': by_class_grams,
}


@pytest.mark.slow
@pytest.mark.parametrize('way', WAYS)
def test_the_same_matrices_on_one_device_and_on_eight(digits, way):
  one, eight = (WAYS[way](*on(devices, digits)) for devices in (1, DEVICES))
  assert one.shape == eight.shape
  largest = np.abs(one).max((1, 2), keepdims=True)
  assert (largest > 0).any()
  assert np.all(np.abs(eight - one) <= 1e-5 * largest)


@pytest.mark.seconds
def test_a_pass_over_data_sends_only_its_losses(digits):
  """A dispatch of `exact` and `estimated` conflict; sums are reduced once, for the Grams."""
  _, data, model, state, layout = on(DEVICES, digits)
  net = Net.of(model, state, Metadata.of(data))
  losses_fn = Partial(diagnose.losses_of(net, digits[0]), state.batch_stats)
  leaves = jax.tree.leaves(state.params)
  wanted, mesh, size = tuple(range(len(leaves))), layout.mesh, 2 * DEVICES
  rows = dataset._empty_rows(mesh, leaves, 10, wanted)
  batch = {'image': data.train.images, 'label': data.train.labels}
  batch = dataset._take(batch, np.arange(size), size, np.arange(size))
  batch = layout.place_rows(batch, size)
  add = dataset._compiled_add().lower(
    losses_fn, state.params, rows, 0, batch, wanted=wanted, mesh=mesh
  )
  (found,) = collectives.read(add.compile().as_text(), DEVICES)
  assert (found.kind, found.arrays) == ('all-reduce', ('f32[]',))
  grams = dataset._grams.lower([rows], mesh).compile()
  kinds = collectives.by_kind(collectives.read(grams.as_text(), DEVICES))
  parameters = -(-sum(x.size for x in leaves) // DEVICES)
  assert kinds['reduce-scatter'].bytes == 4 * 10 * parameters
  assert kinds['all-reduce'].bytes == 4 * 10**2
  assert set(kinds) == {'all-reduce', 'reduce-scatter'}
