"""Which losses depend on the rest of their batch, and what follows for the strategy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from csba_jax.errors import UserError
from csba_jax.gradients import batches, class_gradients, class_grams, per_example

C, N = 4, 12
LABEL = np.array([3, 0, 1, 0, 2, 0, 1, 3, 0, 2, 1, 0])
INDEPENDENT = ['mlp_layer_norm', 'cnn_group_norm', 'self_attention', 'rnn', 'depthwise_separable']


@pytest.fixture(scope='module')
def trained(zoo):
  """The model with BatchNorm in training, and a batch."""
  model = zoo.MODELS['batch_norm_in_training'](jnp.float32)
  return model, {**model.inputs, 'label': LABEL}


def fresh(losses_fn):
  """The same function with another constant: nothing is known of it."""
  constant = object()
  return lambda params, batch: losses_fn(params, batch) if constant else None


def same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert abs(x - y).max() <= 1e-5 * abs(y).max()


def differ(a, b):
  return any(
    abs(x - y).max() > 1e-3 * abs(y).max()
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
  )


@pytest.mark.seconds
@pytest.mark.parametrize('name', INDEPENDENT)
def test_models_without_statistics_of_the_batch_may_be_stacked(zoo, name):
  model = zoo.MODELS[name](jnp.float32)
  batch = {**model.inputs, 'label': LABEL}
  assert per_example.is_per_example(Partial(fresh(model.losses_fn)), model.params, batch)


@pytest.mark.seconds
def test_auto_is_masked_where_losses_are_coupled(trained):
  model, batch = trained
  losses_fn = fresh(model.losses_fn)
  expected = class_grams(losses_fn, model.params, batch, num_classes=C, strategy='masked')
  same(class_grams(losses_fn, model.params, batch, num_classes=C), expected)
  same(
    class_gradients(losses_fn, model.params, batch, num_classes=C),
    class_gradients(losses_fn, model.params, batch, num_classes=C, strategy='masked'),
  )
  wrong = class_grams(
    losses_fn, model.params, batch, num_classes=C, strategy='stacked', per_example=True
  )
  assert differ(wrong.grams, expected.grams)  # so it was worth asking


def test_stacked_of_coupled_losses_raises_and_says_the_way_out(trained):
  model, batch = trained
  with pytest.raises(UserError) as e:
    class_grams(fresh(model.losses_fn), model.params, batch, num_classes=C, strategy='stacked')
  for words in ('BatchNorm', 'train=False', 'per_example=True', "strategy='masked'"):
    assert words in str(e.value)


@pytest.mark.seconds
def test_a_batch_of_one_image_tells_nothing_about_the_next(trained):
  model, batch = trained
  losses_fn = fresh(model.losses_fn)
  class_grams(losses_fn, model.params, jax.tree.map(lambda x: x[:1], batch), num_classes=C)
  found = class_grams(losses_fn, model.params, batch, num_classes=C)
  same(found, class_grams(losses_fn, model.params, batch, num_classes=C, strategy='masked'))


def test_a_head_of_zeros_does_not_hide_coupling(trained):
  model, batch = trained
  params = {**model.params, 'head': jax.tree.map(jnp.zeros_like, model.params['head'])}
  losses = model.losses_fn(params, batch)
  assert np.ptp(losses) == 0  # they would not show it
  assert not per_example.is_per_example(Partial(fresh(model.losses_fn)), params, batch)


def test_losses_divided_by_the_size_of_the_batch_are_coupled(zoo):
  model = zoo.MODELS['mlp_layer_norm'](jnp.float32)
  batch = {**model.inputs, 'label': LABEL}

  def losses_fn(params, batch):
    return model.losses_fn(params, batch) / len(batch['label'])

  assert not per_example.is_per_example(Partial(losses_fn), model.params, batch)


@pytest.mark.seconds
def test_the_answer_is_asked_for_once(zoo, monkeypatch):
  model = zoo.MODELS['mlp_layer_norm'](jnp.float32)
  compare, asked = per_example._compare, []
  monkeypatch.setattr(per_example, '_compare', lambda *a: asked.append(None) or compare(*a))
  losses_fn = fresh(model.losses_fn)
  for shift in (0, 1):
    batch = {**model.inputs, 'label': (LABEL + shift) % C}
    class_grams(losses_fn, model.params, batch, num_classes=C)
    class_gradients(losses_fn, model.params, batch, num_classes=C)
  assert len(asked) == 1


def test_stated_answers_are_not_asked_for(zoo, monkeypatch):
  model = zoo.MODELS['mlp_layer_norm'](jnp.float32)
  monkeypatch.setattr(per_example, '_compare', lambda *a: pytest.fail('asked'))
  batch = {**model.inputs, 'label': LABEL}
  losses_fn = fresh(model.losses_fn)
  for options in ({'per_example': True}, {'per_example': False}, {'strategy': 'masked'}):
    class_grams(losses_fn, model.params, batch, num_classes=C, **options)


def under_jit(model, batch, **options):
  return jax.jit(lambda p, b: class_grams(model.losses_fn, p, b, num_classes=C, **options))(
    model.params, batch
  )


def test_flat_traced_labels_take_masked_and_refuse_stacked(zoo):
  model = zoo.MODELS['mlp_layer_norm'](jnp.float32)
  batch = {**model.inputs, 'label': LABEL}
  expected = under_jit(model, batch, strategy='masked')
  same(under_jit(model, batch), expected)
  with pytest.raises(UserError, match=r"class-stacked.*traced.*stack it.*strategy='masked'"):
    under_jit(model, batch, strategy='stacked', per_example=True)


@pytest.mark.seconds
def test_traced_stacks_are_stacked_only_where_it_is_stated(zoo, trained):
  model = zoo.MODELS['mlp_layer_norm'](jnp.float32)
  batch = batches.stack({**model.inputs, 'label': LABEL}, C)
  with pytest.raises(UserError, match=r'per-example losses.*per_example=None under jit.*state'):
    under_jit(model, batch, strategy='stacked')
  with pytest.raises(UserError, match=r'per-example losses.*per_example=False'):
    under_jit(model, batch, strategy='stacked', per_example=False)
  model, batch = trained
  batch = batches.stack(batch, C)
  masked = under_jit(model, batch, strategy='masked')
  same(under_jit(model, batch), masked)
  assert differ(under_jit(model, batch, per_example=True).grams, masked.grams)


def test_labels_known_under_jit_are_stacked(zoo):
  model = zoo.MODELS['mlp_layer_norm'](jnp.float32)

  @jax.jit
  def step(params, x):
    batch = {'x': x, 'label': LABEL}
    options = {'strategy': 'stacked', 'per_example': True}
    return class_grams(model.losses_fn, params, batch, num_classes=C, **options)

  x = jnp.asarray(model.inputs['x'])
  same(step(model.params, x), under_jit(model, {'x': x, 'label': LABEL}, strategy='masked'))


def test_coupled_losses_on_a_mesh_raise(trained):
  model, batch = trained
  mesh = jax.make_mesh((8,), ('data',))
  for strategy in ('auto', 'masked', 'stacked'):
    with pytest.raises(UserError, match=r'per-example losses for.*train=False'):
      class_grams(model.losses_fn, model.params, batch, num_classes=C, strategy=strategy, mesh=mesh)
  with pytest.raises(UserError, match=r'a mesh.*per_example=None under jit.*or pass no mesh'):
    under_jit(model, batch, mesh=mesh)
