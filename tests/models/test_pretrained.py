"""Weights from a file: what is taken, what stays, and every way in which a file can be wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from csba_jax import config as config_lib
from csba_jax.errors import UserError
from csba_jax.methods import optimizers, second_stages
from csba_jax.models import pretrained, registry
from csba_jax.run.net import Metadata, Preprocessing


def variables():
  """A few variables of a net, all 0."""
  params = {
    'stem': {'conv': {'kernel': jnp.zeros((7, 7, 3, 4))}, 'norm': {'scale': jnp.zeros(4)}},
    'head': {'kernel': jnp.zeros((1, 4, 2))},
    'stage4': {'attention': {'gate': {'bias': jnp.zeros(2)}}},
  }
  return {'params': params, 'batch_stats': {'stem': {'norm': {'mean': jnp.zeros(4)}}}}


def tensors():
  rng = np.random.default_rng(0)
  return {
    'conv1.weight': rng.normal(size=(4, 3, 7, 7)).astype(np.float32),
    'bn1.weight': rng.normal(size=4).astype(np.float16),
    'bn1.running_mean': rng.normal(size=4).astype(np.float64),
    'fc.weight': np.ones((9, 4), np.float32),
  }


def test_a_file_and_a_folder(tmp_path):
  given = tensors()
  save_file(given, tmp_path / 'model.safetensors')
  for path in (tmp_path / 'model.safetensors', tmp_path):
    found = pretrained.load('resnet18', str(path), variables())
    stem = found['params']['stem']
    np.testing.assert_array_equal(
      stem['conv']['kernel'], given['conv1.weight'].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(stem['norm']['scale'], given['bn1.weight'].astype(np.float32))
    mean = found['batch_stats']['stem']['norm']['mean']
    np.testing.assert_allclose(mean, given['bn1.running_mean'], rtol=1e-6)
    assert {mean.dtype, stem['norm']['scale'].dtype} == {jnp.dtype('float32')}
    assert not np.asarray(found['params']['head']['kernel']).any()  # they start anew
    assert not np.asarray(found['params']['stage4']['attention']['gate']['bias']).any()


@pytest.mark.parametrize(
  ('change', 'expected'),
  [
    ({'bn1.weight': None}, 'with a tensor bn1.weight; found none of 3, such as '),
    ({'bn1.weight': np.zeros(5, np.float32)}, r'bn1.weight of shape \[4\] in .*; found \[5\]'),
    ({'conv1.weight': np.zeros((4, 1, 7, 7), np.float32)}, r'\[7, 7, 3, 4\] .* \[7, 7, 1, 4\]'),
    ({'bn1.weight': np.full(4, np.nan, np.float32)}, 'finite numbers in bn1.weight'),
  ],
)
def test_tensors_that_do_not_fit(tmp_path, change, expected):
  given = {k: v for k, v in (tensors() | change).items() if v is not None}
  save_file(given, tmp_path / 'w.safetensors')
  with pytest.raises(UserError, match=expected):
    pretrained.load('resnet18', str(tmp_path / 'w.safetensors'), variables())


@pytest.mark.parametrize(
  'content', [b'', b'no weights', b'\xff' * 100, b'\x08' + b'\0' * 7 + b'[1, 2] ']
)
def test_other_files(tmp_path, content):
  (tmp_path / 'w.safetensors').write_bytes(content)
  with pytest.raises(UserError, match='expected a safetensors file at .*csba-convert-weights'):
    pretrained.load('resnet18', str(tmp_path / 'w.safetensors'), variables())
  with pytest.raises(UserError, match='expected a file of weights at .*/nix; found none'):
    pretrained.load('resnet18', str(tmp_path / 'nix'), variables())
  with pytest.raises(UserError, match='expected a file of weights at .*model.safetensors; found'):
    pretrained.find(str(tmp_path))


@pytest.mark.parametrize(
  ('names', 'expected'),
  [
    (['conv1.weight', 'layer4.1.bn2.weight'], 'resnet18'),
    (['layer4.1.bn2.weight', 'layer1.0.bn3.weight', 'layer3.5.bn3.weight'], 'resnet50'),
    (['_conv_stem.weight', '_blocks.15._bn2.weight'], 'efficientnet_lite0'),
    (['conv_stem.weight', 'blocks.6.0.bn3.weight'], 'efficientnet_lite0'),
  ],
)
def test_a_file_is_recognised_by_its_names(tmp_path, names, expected):
  path = tmp_path / 'model.safetensors'
  save_file({name: np.zeros(1, np.float32) for name in names}, path)
  assert pretrained.recognise(str(path)) == pretrained.recognise(str(tmp_path)) == expected


@pytest.mark.parametrize(
  'names',
  [
    ['layer4.1.bn2.weight', 'layer4.2.bn2.weight'],  # ResNet-34
    ['layer3.5.bn3.weight', 'layer3.6.bn3.weight', 'layer1.0.bn3.weight'],  # ResNet-101
    ['blocks.6.0.bn3.weight', 'blocks.0.0.se.conv_reduce.weight'],  # EfficientNet-B0
    ['_blocks.15._bn2.weight', '_blocks.16._bn2.weight'],  # Lite1
    ['blocks.6.0.bn3.weight', 'blocks.1.2.bn3.weight'],  # Lite1 of timm
    ['something'],
  ],
)
def test_files_of_other_nets_are_not_recognised(tmp_path, names):
  path = tmp_path / 'w.safetensors'
  save_file({name: np.zeros(1, np.float32) for name in names}, path)
  with pytest.raises(
    UserError, match=f'of resnet18, resnet50, efficientnet_lite0 in .*such as {min(names)};'
  ):
    pretrained.recognise(str(path))
  with pytest.raises(UserError, match='a file of weights at'):
    pretrained.recognise(str(tmp_path / 'nix'))


def test_weights_of_a_deeper_net_are_refused(tmp_path):
  path = tmp_path / 'w.safetensors'
  save_file(tensors() | {'layer4.2.bn2.weight': np.zeros(4, np.float32)}, path)
  with pytest.raises(UserError, match='resnet18 in .*; found layer4.2.bn2.weight, of another net'):
    pretrained.load('resnet18', str(path), variables())


@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'efficientnet_lite0'])
def test_marks_are_names_that_the_net_has_or_lacks(name):
  config = model_config(name=name, init='')
  model = registry.build(config, 5, (32, 32, 3))
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)
  row = pretrained.PRETRAINED[name]
  own = {n for key in flatten_dict(shapes, sep='/') for n in row.torch_names(key)}
  assert set(row.has) <= own
  assert not set(row.lacks) & own


def model_config(**changes):
  config = config_lib.default()
  config.model.update({'name': 'resnet18', 'attention': 'none', 'init': 'w'} | changes)
  return config.model


@pytest.mark.parametrize(
  ('changes', 'channels', 'expected'),
  [
    ({'name': 'vit', 'attention': 'csba'}, 3, 'model.init with model.name among resnet18, '),
    ({'norm': 'group'}, 3, 'expected model.norm=batch with model.init.*; found group'),
    ({'width': 0.5}, 3, 'expected model.width=1 with model.init.*; found 0.5'),
    ({'depth': 2}, 3, 'expected model.depth=1 with'),
    ({'name': 'resnet18_branches', 'attention': 'none_wide'}, 3, 'other than none_wide'),
    ({}, 1, 'images of 3 channels with model.init; found 1'),
  ],
)
def test_models_without_weights(changes, channels, expected):
  with pytest.raises(UserError, match=expected):
    registry.build(model_config(**changes), 5, (32, 32, channels))


def test_pixels_are_scaled_as_the_weights_were_trained():
  found = Preprocessing.of(model_config())
  pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 3), np.uint8)
  expected = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  np.testing.assert_allclose(found(jnp.asarray(pixels)), expected, atol=1e-5)
  assert Preprocessing.of(model_config(init='')) == Preprocessing()
  metadata = Metadata(('a', 'b'), np.asarray([1, 2]), (3, 3, 3), found)
  assert Metadata.of_record(metadata.record()).preprocessing == found
  assert hash(found)  # it is a static argument of compiled programs


# ---- learning rates


def optimizer(total=10, **train):
  config = config_lib.default()
  config.model.update({'name': 'resnet18', 'attention': 'none', 'init': 'w'})
  config.train.update({'momentum': 0.0, 'weight_decay': 0.1, 'warmup_fraction': 0.0} | train)
  return optimizers.build(config, total)


@pytest.mark.parametrize('kind', ['sgd', 'adamw'])
def test_pretrained_weights_wait_and_then_move_slowly(kind):
  params = {'stem': {'kernel': jnp.ones(3)}, 'head': {'kernel': jnp.ones(3)}}
  grads = {'stem': {'kernel': jnp.full(3, 0.5)}, 'head': {'kernel': jnp.full(3, 0.5)}}
  tx, _ = optimizer(optimizer=kind, pretrained_rate=0.25, frozen=0.3)
  plain, _ = optimizer(optimizer=kind)
  state, other = tx.init(params), plain.init(params)
  for step in range(6):
    updates, state = tx.update(grads, state, params)
    expected, other = plain.update(grads, other, params)
    np.testing.assert_allclose(updates['head']['kernel'], expected['head']['kernel'], rtol=1e-5)
    factor = 0.0 if step < 3 else 0.25
    np.testing.assert_allclose(
      updates['stem']['kernel'], factor * expected['stem']['kernel'], rtol=1e-5
    )
  optax.apply_updates(params, updates)


@pytest.mark.parametrize(
  ('field', 'value', 'found'),
  [
    ('pretrained_rate', 0.1, '0.1 and 0'),
    ('frozen', 0.5, '1 and 0.5'),
  ],
)
def test_settings_of_pretrained_weights_without_any_are_refused(field, value, found):
  config = config_lib.default()
  config.train[field] = value
  with pytest.raises(UserError) as error:
    optimizers.build(config, 10)
  assert str(error.value) == (
    'expected train.pretrained_rate=1 and train.frozen=0 without model.init; '
    f'found {found}; to fix it: set --config.model.init, or remove both'
  )


@pytest.mark.parametrize(
  ('stage', 'init', 'frozen', 'expected'),
  [
    ('none', '', 0.0, True),
    ('none', 'w', 0.0, True),
    ('none', 'w', 0.9, True),
    ('none', 'w', 1.0, False),
    ('crt', '', 0.0, False),
    ('crt', 'w', 0.0, False),
  ],
)
def test_when_steps_take_the_statistics_of_their_batch(stage, init, frozen, expected):
  config = config_lib.default()
  config.stage.method, config.model.init, config.train.frozen = stage, init, frozen
  assert second_stages.updates_statistics(config) == expected
