"""A run that begins with the weights of a file."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from csba_jax import config as config_lib
from csba_jax.data import pipeline
from csba_jax.errors import UserError
from csba_jax.measure import evaluate
from csba_jax.models import registry, resnet_imagenet
from csba_jax.run import restore
from csba_jax.runtime.signals import StopRequest
from csba_jax.training import loop
from csba_jax.training.job import Job


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  """Two classes of photos that differ in their colour."""
  folder = tmp_path_factory.mktemp('photos')
  rng = np.random.default_rng(0)
  for name, number, shade in (('dark', 20, 40), ('light', 12, 200)):
    (folder / name).mkdir()
    for i in range(number):
      pixels = np.clip(rng.normal(shade, 20, (20, 24, 3)), 0, 255).astype(np.uint8)
      PIL.Image.fromarray(pixels).save(folder / name / f'{i:02d}.png')
  return folder


def config_of(photos, weights, **changes):
  config = config_lib.load('image_folder')
  config.data.dir, config.data.image_size, config.augment.crop_padding = str(photos), 16, 0
  config.model.update({'name': 'resnet18', 'attention': 'none', 'width': 1.0})
  config.model.init = str(weights)
  config.train.update({'epochs': 2, 'batch_size': 8, 'eval_every': 1, 'save_every': 1})
  config.update_from_flattened_dict(changes)
  return config


def saved(config, path):
  """Weights of a net of its own, under torchvision's names; the net's variables by our names."""
  plain = config.model.copy_and_resolve_references()
  plain.init = ''
  model = registry.build(plain, 1000, (16, 16, 3))
  variables = jax.jit(model.init)(jax.random.key(5), jnp.zeros((1, 16, 16, 3)))
  flat = {name: np.asarray(value) for name, value in flatten_dict(variables, sep='/').items()}
  tensors = {}
  for name, value in flat.items():
    for found in resnet_imagenet.torch_names(name):
      value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value
      tensors[found] = np.ascontiguousarray(value)
  save_file(tensors, path)
  return {name: value for name, value in flat.items() if not name.startswith('params/head/')}


def differs(a, b):
  return bool((np.asarray(a) != np.asarray(b)).any())


@pytest.mark.slow
def test_frozen_weights_stay_and_the_file_is_needed_once(photos, tmp_path):
  path = tmp_path / 'w.safetensors'
  config = config_of(photos, path, **{'train.frozen': 0.5, 'train.pretrained_rate': 0.1})
  weights = saved(config, path)
  workdir = tmp_path / 'run'
  with StopRequest() as stop:
    result = loop.train_and_evaluate(config, str(workdir), stop)
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  assert result['init'] == {'file': str(path), 'sha256': digest}
  net = json.loads((workdir / 'net.json').read_text())
  assert net['preprocessing']['divisor'] == pytest.approx([58.395, 57.12, 57.375])
  path.unlink()
  last = flatten_dict(restore.load_net(str(workdir), 'latest').variables, sep='/')
  moved = [name for name, value in weights.items() if (np.asarray(last[name]) != value).any()]
  assert {name for name in weights if name.startswith('params/')} <= set(moved)
  again = evaluate.evaluate_run(str(workdir))
  assert again['macro_f1'] == result['macro_f1']
  with StopRequest() as stop:  # it is finished, and needs no file
    assert loop.train_and_evaluate(config, str(workdir), stop) == result


@pytest.mark.slow
def test_while_frozen_only_the_head_moves(photos, tmp_path):
  path = tmp_path / 'w.safetensors'
  config = config_of(photos, path, **{'train.frozen': 0.9, 'train.weight_decay': 0.1})
  config.train.epochs = 1  # of three steps, all frozen: step 3 would be the first that moves them
  weights = saved(config, path)
  data = pipeline.load(config, lambda line: None)
  job = Job.of(config, data)
  state, origin = job.begin()
  assert origin['init']['file'] == str(path)
  begun = flatten_dict({'params': state.params, 'batch_stats': state.batch_stats}, sep='/')
  for name, value in weights.items():
    np.testing.assert_array_equal(begun[name], value)
  grads = jax.tree.map(jnp.ones_like, state.params)
  updates, _ = job.program.tx.update(grads, state.opt_state, state.params)
  flat = flatten_dict(updates, sep='/')
  still = {name for name, value in flat.items() if not np.asarray(value).any()}
  assert still == {name.removeprefix('params/') for name in weights if name.startswith('params/')}
  assert (job.plan.frozen, job.plan.total) == (3, 3)
  rows = slice(0, config.train.batch_size)
  batch = {'image': data.train.images[rows], 'label': data.train.labels[rows]}
  frozen, whole = (
    jax.jit(job.step_fn(step)).lower(state, batch, job.key).compile() for step in (2, 3)
  )
  # a forward pass, and augmentation, of the three passes that a step with a gradient takes
  assert frozen.cost_analysis()['flops'] < 0.6 * whole.cost_analysis()['flops']
  after, found = frozen(state, batch, job.key)
  moved = flatten_dict(after.params, sep='/')
  for name, value in flatten_dict(state.params, sep='/').items():
    assert (np.asarray(moved[name]) == value).all() == (f'params/{name}' in weights), name
  jax.tree.map(np.testing.assert_array_equal, after.batch_stats, state.batch_stats)
  # the loss with the running statistics, written anew; the photos are mirrored by the key
  rows = np.arange(config.train.batch_size)
  logits = {}
  for mirrored in (False, True):
    images = job.net(state).metadata.preprocessing(
      batch['image'][:, :, ::-1] if mirrored else batch['image']
    )
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    logits[mirrored] = job.program.model.apply(variables, images, train=False)
  losses = [-jax.nn.log_softmax(each)[rows, batch['label']] for each in logits.values()]
  low, high = np.min(losses, 0).mean(), np.max(losses, 0).mean()
  assert low - 1e-5 < found['loss'] < high + 1e-5
  assert found['grad_norm'] > 0
  thawed, expected = whole(state, batch, job.key)
  assert any(jax.tree.leaves(jax.tree.map(differs, thawed.batch_stats, state.batch_stats)))
  assert abs(found['loss'] - expected['loss']) > 1e-3  # with the statistics of the batch


@pytest.mark.slow
def test_weights_that_are_frozen_for_the_whole_run_are_those_of_the_file(photos, tmp_path):
  path = tmp_path / 'w.safetensors'
  config = config_of(photos, path, **{'train.frozen': 1.0})
  weights = saved(config, path)
  with StopRequest() as stop:
    result = loop.train_and_evaluate(config, str(tmp_path / 'run'), stop)
  last = flatten_dict(restore.load_net(str(tmp_path / 'run'), 'latest').variables, sep='/')
  for name, value in weights.items():
    np.testing.assert_array_equal(last[name], value)
  assert result['checkpoint_step'] > 0


def test_a_file_that_is_not_there_ends_the_run_at_once(photos, tmp_path, monkeypatch):
  config = config_of(photos, tmp_path / 'nix.safetensors')
  monkeypatch.setattr(loop.pipeline, 'load', lambda *args: pytest.fail('read'))
  with StopRequest() as stop, pytest.raises(UserError, match='a file of weights at .*nix'):
    loop.train_and_evaluate(config, str(tmp_path / 'run'), stop)
  assert not (tmp_path / 'run/config.json').exists()
