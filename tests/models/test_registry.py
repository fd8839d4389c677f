"""The model table: what it builds and what it says when it cannot."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csba_jax import config as config_lib
from csba_jax.errors import UserError
from csba_jax.models import classifiers, layers, multibranch, registry

NAMES = list(registry.MODELS)
EVERY = [(name, a) for name in NAMES for a in registry.attentions_of(name)]
FAST = [('multibranch', 'csba'), ('resnet32', 'none'), ('resnet32_branches', 'cbam'), ('vit', 'se')]
assert set(FAST) <= set(EVERY)


def model_config(**fields):
  config = config_lib.default().model
  config.width = 0.1
  config.update(fields)
  return config


def test_unknown_model_lists_the_known_ones():
  with pytest.raises(UserError) as error:
    registry.build(model_config(name='resnet99'), 10, (32, 32, 3))
  assert str(error.value) == (
    f"expected model.name among {', '.join(registry.MODELS)}; found 'resnet99'; "
    'to fix it: set --config.model.name'
  )


def test_unknown_attention_lists_the_models_own():
  with pytest.raises(UserError) as error:
    registry.build(model_config(attention='eca'), 10, (32, 32, 3))
  assert str(error.value) == (
    'expected model.attention of multibranch among none, none_wide, half, se, cbam, csba, '
    'csba_class; '
    "found 'eca'; to fix it: set --config.model.attention"
  )


@pytest.mark.parametrize(
  ('name', 'attention', 'said'),
  [
    (
      'resnet32',
      'csba',
      "expected model.attention of resnet32 among none; found 'csba'; to fix it: set "
      '--config.model.name to one of multibranch, resnet32_branches, resnet18_branches, '
      'resnet50_branches, efficientnet_lite0_branches, vit, since csba needs '
      'branches, or set --config.model.attention=none',
    ),
    (
      'vit',
      'cbam',
      'expected model.attention of vit among none, none_wide, half, se, csba, csba_class; '
      "found 'cbam'; to fix it: set --config.model.name to one of multibranch, "
      'resnet32_branches, resnet18_branches, resnet50_branches, efficientnet_lite0_branches, '
      'since cbam needs image maps, or set --config.model.attention=none',
    ),
    (
      'resnet32',
      'cbam',
      "expected model.attention of resnet32 among none; found 'cbam'; to fix it: set "
      '--config.model.name to one of multibranch, resnet32_branches, resnet18_branches, '
      'resnet50_branches, efficientnet_lite0_branches, since cbam needs branches and '
      'image maps, or set --config.model.attention=none',
    ),
  ],
)
def test_attention_of_another_model_names_the_models_that_have_it(name, attention, said):
  with pytest.raises(UserError) as error:
    registry.build(model_config(name=name, attention=attention), 10, (32, 32, 3))
  assert str(error.value) == said


@pytest.mark.parametrize(
  ('name', 'norm', 'said'),
  [
    (
      'resnet32',
      'layer',
      "expected model.norm of resnet32 among batch, group; found 'layer'; to fix it: set "
      '--config.model.norm',
    ),
    (
      'vit',
      'group',
      "expected model.norm at its default, since vit has LayerNorm; found 'group'; to fix it: "
      'remove --config.model.norm',
    ),
  ],
)
def test_norm_that_a_model_cannot_have(name, norm, said):
  with pytest.raises(UserError) as error:
    registry.build(model_config(name=name, attention='none', norm=norm), 10, (32, 32, 3))
  assert str(error.value) == said


@pytest.mark.seconds
@pytest.mark.parametrize(('name', 'attention'), [e for e in EVERY if registry.MODELS[e[0]].norms])
def test_a_net_with_group_norm_has_the_same_parameters_and_no_statistics(name, attention):
  found = {}
  for norm in layers.NORMS:
    model = registry.build(model_config(name=name, attention=attention, norm=norm), 4, (8, 8, 3))
    found[norm] = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  assert found['group']['params'] == found['batch']['params']
  assert set(found['group']) == {'params'}
  assert set(found['batch']) == {'params', 'batch_stats'}


@pytest.mark.seconds
@pytest.mark.parametrize('attention', ['none', pytest.param('cbam', marks=pytest.mark.slow)])
def test_with_group_norm_images_do_not_see_each_other_in_training(attention):
  model = registry.build(model_config(attention=attention, norm='group'), 4, (8, 8, 3))
  images = jax.random.normal(jax.random.key(1), (3, 8, 8, 3))
  variables = model.init(jax.random.key(0), images)
  logits = jax.jit(lambda images: model.apply(variables, images, train=True))
  changed = logits(images.at[1:].set(0.5))
  np.testing.assert_allclose(changed[0], logits(images)[0], rtol=1e-5, atol=1e-6)
  assert not np.allclose(changed[1], logits(images)[1])
  evaluated = model.apply(variables, images, train=False)
  np.testing.assert_allclose(logits(images), evaluated, rtol=1e-4, atol=1e-5)


def test_unknown_head_lists_the_known_ones():
  with pytest.raises(UserError) as error:
    registry.build(model_config(head='mlp'), 10, (32, 32, 3))
  assert str(error.value) == (
    "expected model.head among linear, cosine, scaled; found 'mlp'; "
    'to fix it: set --config.model.head'
  )


@pytest.mark.parametrize('kind', classifiers.KINDS)
@pytest.mark.parametrize('name', NAMES)
def test_config_decides_the_head(name, kind):
  model = registry.build(model_config(name=name, attention='none', head=kind), 5, (8, 8, 1))
  assert model.classifier == classifiers.Classifier(kind, 30.0)


@pytest.mark.parametrize(
  ('name', 'attention'),
  [pytest.param(*net, marks=[pytest.mark.seconds] * (net not in FAST)) for net in EVERY],
)
def test_every_model_gives_logits_and_has_a_head(name, attention):
  model = registry.build(model_config(name=name, attention=attention), 5, (8, 8, 1))
  image = jnp.zeros((2, 8, 8, 1))
  logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
  assert (logits.shape, logits.dtype) == ((2, 5), jnp.float32)
  names = [
    '/'.join(key.key for key in path) for path, _ in jax.tree.leaves_with_path(variables['params'])
  ]
  head = [parameter for parameter in names if re.search(model.head, parameter)]
  assert 0 < len(head) < len(names)


def test_config_decides_width_and_type():
  model = registry.build(
    model_config(attention='csba_class', width=0.25, dtype='bfloat16'), 7, (16, 16, 3)
  )
  expected = multibranch.MultiBranch(7, 'csba_class', 8, (16, 32, 40), jnp.bfloat16)
  assert model == expected


@pytest.mark.parametrize('name', NAMES)
def test_two_builds_of_one_config_are_equal(name):
  # models are static arguments of compiled functions: unequal ones would compile twice
  config = model_config(name=name, attention='none')
  make = registry.MODELS[name].build
  a = registry.build(config, 5, (8, 8, 1))
  getattr(getattr(make, 'func', make), 'cache_clear', lambda: None)()
  b = registry.build(config, 5, (8, 8, 1))
  assert a is not b
  assert a == b
  assert hash(a) == hash(b)


@pytest.mark.parametrize('name', ['multibranch', 'resnet32_branches', 'resnet18_branches', 'vit'])
def test_the_start_of_gates_reaches_every_net_that_has_them(name):
  for gate, expected in (('identity', 'csba'), ('half', 'csba/half')):
    config = model_config(name=name, attention='csba', gate=gate)
    assert registry.build(config, 10, (32, 32, 3)).attention == expected
  config = model_config(name=name, attention='none', gate='half')
  assert registry.build(config, 10, (32, 32, 3)).attention == 'none'
