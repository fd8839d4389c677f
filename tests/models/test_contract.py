"""What every registered model keeps, on narrow nets of one block a stage."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict
from jax.tree_util import Partial

from csba_jax.gradients import class_grams
from csba_jax.models import (
  capacity,
  classifiers,
  efficientnet_lite,
  multibranch,
  registry,
  resnet,
  resnet_imagenet,
  vit,
)

CLASSES = 4
SMALL = (8, 8, 3)
# Compiles in half the time. Not level 0: its CPU code gives NaN gradients of some nets.
QUICK = {'xla_backend_optimization_level': 1}


def photo(bottleneck, attention, *args):
  shape = (1, 1), bottleneck, attention, (8, 8, 12)
  return resnet_imagenet.PhotoResNet(CLASSES, *shape, *args)


def lite(*args, **options):
  channels = (6, 5, 6, 7, 6, 5, 7, 8, 9)
  return efficientnet_lite.EfficientNetLite(CLASSES, channels, 1, *args, **options)


# name in the registry: (attention, dtype, kind of head) -> the net, as narrow and shallow as can be
NETS = {
  'multibranch': lambda *args: multibranch.MultiBranch(CLASSES, args[0], 2, (3, 2, 3), *args[1:]),
  'resnet32': lambda _, *args: resnet.ResNet(CLASSES, (3, 4, 6), 1, *args),
  'resnet32_branches': lambda a, *args: resnet.BranchedResNet(CLASSES, a, (3, 4, 5), 1, *args),
  'resnet18': lambda _, *args: photo(False, '', *args),
  'resnet50': lambda _, *args: photo(True, '', *args),
  'resnet18_branches': lambda a, *args: photo(False, a, *args),
  'resnet50_branches': lambda a, *args: photo(True, a, *args),
  'efficientnet_lite0': lambda _, *args: lite(*args),
  'efficientnet_lite0_branches': lambda a, *args: lite(*args, attention=a),
  'vit': lambda attention, *args: vit.ViT(CLASSES, attention, 4, 6, 1, *args),
}
TABLE = {name: registry.attentions_of(name) for name in registry.MODELS if name != 'tiny'}
EVERY = [(name, attention) for name in TABLE for attention in TABLE[name]]
RICHEST = [(name, attentions[-1]) for name, attentions in TABLE.items()]
# where compilation costs seconds: multibranch has such tests of its own
NEW = [(name, attention) for name, attention in RICHEST if name != 'multibranch']
CLASS_CONDITIONED = [name for name, attentions in TABLE.items() if 'csba_class' in attentions]


def net(name, attention, dtype=jnp.float32, head='linear'):
  classifier = classifiers.Classifier(head)
  return NETS[name]('none' if attention == 'none_wide' else attention, dtype, classifier)


def flat(tree):
  return {'/'.join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def shapes(model, image_shape=SMALL):
  """Shapes of (logits, {'params': tree, ...}) for two images."""
  image = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
  return jax.eval_shape(model.init_with_output, jax.random.key(0), image)


def random_variables(model, dtype=np.float32):
  """Variables of the size that initialisation gives; nothing is zero and no gate dead."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    name = path[-1].key
    if name in ('scale', 'var'):
      return rng.uniform(0.5, 1.5, leaf.shape).astype(dtype)
    fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 25
    value = (rng.normal(size=leaf.shape) * fan_in**-0.5).astype(dtype)
    return abs(value) + 1 if name == 'bias' and path[-2].key == 'squeeze' else value

  return jax.tree.map_with_path(draw, shapes(model)[1])


def batch(n, dtype=np.float32):
  rng = np.random.default_rng(1)
  return rng.uniform(-1, 1, (n, *SMALL)).astype(dtype), rng.integers(0, CLASSES, n)


MORE_SHAPES = ((33, 33, 3), (12, 40, 3), (256, 256, 3))


def test_every_model_is_tried_here():
  assert NETS.keys() == TABLE.keys()


@pytest.mark.parametrize(
  'image_shape',
  [(8, 8, 1), *(pytest.param(s, marks=pytest.mark.seconds) for s in MORE_SHAPES)],
)
@pytest.mark.parametrize(('name', 'attention'), [*NEW, ('resnet32_branches', 'cbam')])
def test_every_image_size_gives_logits_and_float32_parameters(name, attention, image_shape):
  logits, variables = shapes(net(name, attention, jnp.bfloat16), image_shape)
  assert (logits.shape, logits.dtype) == ((2, CLASSES), jnp.float32)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  assert not [name for name in flat(variables) if re.search(r'[A-Z]|_\d', name)]  # all are named


@pytest.mark.seconds
@pytest.mark.parametrize(
  ('name', 'attention', 'kind'),
  [(*net, 'linear') for net in EVERY]
  + [(*net, kind) for net in RICHEST for kind in classifiers.KINDS[1:]],
)
def test_head_expression_matches_exactly_the_classifier(name, attention, kind):
  model = net(name, attention, head=kind)
  names = flat(shapes(model)[1]['params'])
  expected = {'linear': {'kernel', 'bias'}, 'cosine': {'kernel'}}
  expected = expected.get(kind, {'kernel', 'bias', 'scale'})
  expected |= {'class_embedding'} if attention == 'csba_class' else set()
  matched = {parameter for parameter in names if re.search(model.head, parameter)}
  assert matched == {f'head/{parameter}' for parameter in expected}
  assert names['head/kernel'].shape[-1] == CLASSES
  assert bool([p for p in names if p.startswith('class_gate/')]) == (attention == 'csba_class')


@pytest.mark.seconds
@pytest.mark.parametrize('num_classes', [2, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', ['resnet32_branches', 'vit'])  # multibranch: its own test
def test_wide_control_has_the_capacity_of_csba(name, num_classes):
  make, image_shape = registry.MODELS[name].build, (32, 32, 3)
  wide, csba = (
    capacity.parameter_count(
      make(num_classes, image_shape, attention, 1.0, jnp.dtype('float32')), image_shape
    )
    for attention in ('none_wide', 'csba')
  )
  assert wide == pytest.approx(csba, rel=0.01)


@pytest.mark.seconds
@pytest.mark.parametrize(
  ('name', 'attention', 'kind'),
  [
    ('resnet32', 'none', 'linear'),
    ('resnet32_branches', 'csba_class', 'cosine'),
    ('vit', 'csba_class', 'scaled'),
    pytest.param('resnet32_branches', 'cbam', 'scaled', marks=pytest.mark.slow),
    pytest.param('vit', 'se', 'cosine', marks=pytest.mark.slow),
  ],
)
def test_gradient_reaches_every_parameter_and_is_that_of_finite_differences(name, attention, kind):
  with jax.enable_x64(True):
    model = net(name, attention, jnp.float64, kind)
    variables = random_variables(model, np.float64)
    images, labels = batch(12, np.float64)

    def loss(params):
      logits, _ = model.apply(
        {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
      )
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    both = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
    params, rng, step = variables['params'], np.random.default_rng(2), 1e-6
    _, grads = both(params)
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)
    ahead, behind = (
      both(jax.tree.map(lambda p, d: p + sign * step * d, params, direction))[0]  # noqa: B023
      for sign in (1, -1)
    )
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), grads, direction)))
    grads, slope, difference = jax.device_get((grads, slope, (ahead - behind) / (2 * step)))
  assert slope == pytest.approx(difference, rel=1e-5)
  assert not [name for name, leaf in flat(grads).items() if not np.isfinite(leaf).all()]
  assert not [name for name, leaf in flat(grads).items() if not leaf.any()]


@pytest.mark.seconds
@pytest.mark.parametrize(
  ('name', 'attention'),
  [
    *(('multibranch', kind) for kind in ('se', 'cbam', 'csba', 'csba_class')),
    ('resnet32_branches', 'csba'),
    ('resnet18_branches', 'csba_class'),
    ('vit', 'csba'),
  ],
)
def test_a_net_starts_as_its_control(name, attention):
  """Logits and the first gradient are those of `none`, on the parameters that both have."""
  own = net(name, attention)
  images, labels = batch(8)
  variables = jax.jit(own.init, compiler_options=QUICK)(jax.random.key(0), images[:1])
  control = {key: leaf for key, leaf in flat(variables).items() if not is_attention(key)}

  def logits_and_gradient(model, variables):
    statistics = variables.get('batch_stats', {})

    def loss(params):
      logits, _ = model.apply(
        {'params': params, 'batch_stats': statistics}, images, train=True, mutable=['batch_stats']
      )
      each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return each.mean(), logits

    grads, logits = jax.grad(loss, has_aux=True)(variables['params'])
    return logits, grads

  run = jax.jit(logits_and_gradient, static_argnums=0, compiler_options=QUICK)
  logits, grads = run(own, variables)
  expected, control_grads = run(net(name, 'none'), unflatten(control))
  np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-6)
  grads, control_grads = flat(grads), flat(control_grads)
  assert {key for key in grads if not is_attention(f'params/{key}')} == control_grads.keys()
  for key, leaf in control_grads.items():
    np.testing.assert_allclose(grads[key], leaf, rtol=1e-4, atol=1e-5 * np.abs(leaf).max() + 1e-9)
  assert max(np.abs(leaf).max() for key, leaf in grads.items() if 'excite' in key) > 0


def is_attention(name):
  return '/attention/' in name or name.endswith('/class_embedding') or '/class_gate/' in name


def unflatten(leaves):
  return unflatten_dict({tuple(key.split('/')): leaf for key, leaf in leaves.items()})


@pytest.mark.seconds
@pytest.mark.parametrize('name', CLASS_CONDITIONED)
def test_csba_class_with_zero_v_and_e_is_csba(name):
  model, conditioned = net(name, 'csba'), net(name, 'csba_class')
  variables = random_variables(conditioned)
  params, (images, _) = variables['params'], batch(3)
  params['class_gate']['excite'][:] = 0
  params['head']['class_embedding'][:] = 0
  plain = {key: leaf for key, leaf in params.items() if key != 'class_gate'}
  plain['head'] = {key: params['head'][key] for key in ('kernel', 'bias')}
  expected, found = (
    np.asarray(jax.jit(m.apply, compiler_options=QUICK)({**variables, 'params': p}, images))
    for m, p in ((model, plain), (conditioned, params))
  )
  assert np.abs(expected).max() > 0.1
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.seconds
@pytest.mark.parametrize(('name', 'attention'), NEW)
def test_half_precision_is_near_and_images_do_not_see_each_other(name, attention):
  variables, (images, _) = random_variables(net(name, attention)), batch(8)
  exact, half = (
    jax.jit(net(name, attention, dtype).apply, compiler_options=QUICK)
    for dtype in (jnp.float32, jnp.bfloat16)
  )
  expected, found = np.asarray(exact(variables, images)), np.asarray(half(variables, images))
  assert (expected != found).any()
  assert np.abs(expected - found).max() < 0.05 * np.abs(expected).max()
  others = images.copy()
  others[1:] = 1.0
  changed = np.asarray(exact(variables, others))
  np.testing.assert_allclose(changed[0], expected[0], rtol=1e-4, atol=1e-5)
  assert (changed[1] != expected[1]).any()


@pytest.mark.seconds
@pytest.mark.parametrize(
  ('name', 'attention'),
  [pytest.param(*net, marks=[pytest.mark.slow] * (net[0] != 'vit')) for net in NEW],
)
def test_strategies_of_class_grams_agree(name, attention):
  model = net(name, attention)
  variables = random_variables(model)
  params, images = variables.pop('params'), batch(12)[0]
  labels = np.arange(12) % CLASSES
  together = {'image': images, 'label': labels}
  by_class = {  # [C, n, ...]
    key: x.reshape(-1, CLASSES, *x.shape[1:]).swapaxes(0, 1) for key, x in together.items()
  }

  def losses(statistics, params, batch):
    logits = model.apply({**statistics, 'params': params}, batch['image'])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])

  def both(params, *batches):
    options = {'num_classes': CLASSES, 'per_example': True, 'head': model.head}
    return [
      class_grams(Partial(losses, variables), params, batch, strategy=strategy, **options)
      for strategy, batch in zip(('masked', 'stacked'), batches, strict=True)
    ]

  masked, stacked = jax.jit(both, compiler_options=QUICK)(params, together, by_class)
  layers = flat(shapes(net(name, attention))[1]['params'])
  assert stacked.grams.keys() == {layer.rpartition('/')[0] for layer in layers}
  for layer, expected in masked.grams.items():
    norms = np.sqrt(np.diagonal(expected))
    assert norms.min() > 0, layer
    error = np.abs(stacked.grams[layer] - expected) / np.outer(norms, norms)
    assert error.max() < 1e-4, layer
  body = sum(gram for layer, gram in masked.grams.items() if layer != 'head')
  np.testing.assert_allclose(masked.shared, body, rtol=1e-4, atol=1e-4 * np.abs(body).max())
