"""The net: sizes, names, equal branches, input sizes, types, gradients, statistics."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from csba_jax.methods import losses
from csba_jax.models import capacity, layers, multibranch
from csba_jax.models.attention import ATTENTIONS

CIFAR = (32, 32, 3)
SMALL = (8, 8, 3)
CLASSES = 4
# Compiles in half the time. Not level 0: its CPU code gives NaN gradients of this very net.
QUICK = {'xla_backend_optimization_level': 1}
EXTREMES = ((2, 0.5), (1000, 1.0))
# At 10 classes, 32 pixels and width 1. Another number is another net: results are not comparable.
PARAMETERS = {
  'none': 1351978,
  'none_wide': 1785594,
  'half': 1351978,
  'se': 1387938,
  'cbam': 1388338,
  'csba': 1785130,
  'csba_class': 1943530,
}


def build(attention, image_shape=SMALL, width=0.1, num_classes=CLASSES, dtype=jnp.float32):
  return multibranch.build(num_classes, image_shape, attention, width, dtype)


@functools.cache
def shapes(model, image_shape):
  """{'params': {'stem/full/conv/kernel': ShapeDtypeStruct, ...}, 'batch_stats': ...}, logits"""
  image = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
  logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
  return {kind: flat(tree) for kind, tree in variables.items()}, logits


def flat(tree):
  return {'/'.join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def random_variables(model, image_shape, seed=0):
  """Variables of the size that initialisation gives, without its compilation; nothing is zero."""
  rng = np.random.default_rng(seed)
  image = jnp.zeros((1, *image_shape))

  def draw(path, leaf):
    name = path[-1].key
    if name in ('scale', 'var'):
      return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 25
    value = (rng.normal(size=leaf.shape) * fan_in**-0.5).astype(np.float32)
    # a gate of few hidden units stays alive
    return abs(value) + 1 if name == 'bias' and path[-2].key == 'squeeze' else value

  return jax.tree.map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0), image))


def batch(n, image_shape, seed=1):
  rng = np.random.default_rng(seed)
  images = rng.uniform(-1, 1, (n, *image_shape)).astype(np.float32)
  return images, rng.integers(0, CLASSES, n)


def test_every_attention_has_its_number_of_parameters_here():
  assert ATTENTIONS.keys() == PARAMETERS.keys()


@pytest.mark.parametrize('attention', PARAMETERS)
def test_number_of_parameters(attention):
  model = build(attention, CIFAR, 1.0, 10)
  assert capacity.parameter_count(model, CIFAR) == PARAMETERS[attention]


@pytest.mark.parametrize(('attention', 'paper'), [('none', 1.35e6), ('csba', 1.79e6)])
def test_default_sizes_are_the_papers(attention, paper):
  model = build(attention, CIFAR, 1.0, 10)
  assert capacity.parameter_count(model, CIFAR) == pytest.approx(paper, rel=0.005)


def parameters_by_hand(csba, stem=32, stages=(64, 128, 160), classes=10):
  """Kernels and two numbers a channel for each norm, counted without a net."""
  conv = lambda k, c, d: k * c * d + 2 * d  # noqa: E731
  total, c = conv(9, 3, stem), stem
  blocks = [(stages[0], True), (stages[1], True), (stages[2], True), (stages[2], False)]
  for d, project in blocks:
    total += conv(1, c, d) + conv(9, c, d) + conv(5, c, d) + conv(5, d, d)
    total += 3 * 2 * (d * d + d) if csba else 0
    total += conv(1, 3 * d, d) if project else 0
    c = d
  return total + 3 * stages[-1] * classes + classes


@pytest.mark.parametrize('attention', ['none', 'csba'])
def test_number_of_parameters_by_hand(attention):
  assert PARAMETERS[attention] == parameters_by_hand(attention == 'csba')


def test_class_conditioning_adds_u_v_and_e():
  assert PARAMETERS['csba_class'] - PARAMETERS['csba'] == 2 * 3 * 160**2 + 10 * 3 * 160


@pytest.mark.seconds
@pytest.mark.parametrize(
  ('num_classes', 'width'),
  [
    pytest.param(classes, width, marks=[pytest.mark.slow] * ((classes, width) not in EXTREMES))
    for classes in (2, 10, 100, 1000)
    for width in (0.25, 0.5, 1.0)
  ],
)
def test_wide_control_has_the_capacity_of_csba(num_classes, width):
  wide, csba = (
    capacity.parameter_count(build(attention, CIFAR, width, num_classes), CIFAR)
    for attention in ('none_wide', 'csba')
  )
  assert wide == pytest.approx(csba, rel=0.01)


@pytest.mark.seconds
@pytest.mark.parametrize(('width', 'image_shape'), [(0.1, SMALL), (1.0, (224, 224, 3))])
def test_wide_control_has_the_capacity_of_csba_elsewhere(width, image_shape):
  wide, csba = (
    capacity.parameter_count(build(attention, image_shape, width), image_shape)
    for attention in ('none_wide', 'csba')
  )
  assert wide == pytest.approx(csba, rel=0.01)


def is_branch(name):
  return not re.search(r'/attention/|^head/|^class_gate/', name)


@pytest.mark.parametrize('kind', ['params', 'batch_stats'])
@pytest.mark.parametrize('attention', ['none', 'se', 'cbam', 'csba_class'])
def test_controls_have_the_branches_of_csba_to_the_layer(attention, kind):
  control, csba = (shapes(build(name), SMALL)[0][kind] for name in (attention, 'csba'))
  assert {name: x.shape for name, x in control.items() if is_branch(name)} == {
    name: x.shape for name, x in csba.items() if is_branch(name)
  }
  assert control['stem/full/norm/scale' if kind == 'params' else 'stem/full/norm/mean'].shape


@pytest.mark.seconds
def test_wide_control_has_the_layers_of_none_and_more_channels():
  wide, none = (shapes(build(name), SMALL)[0]['params'] for name in ('none_wide', 'none'))
  assert wide.keys() == none.keys()
  for name, leaf in none.items():
    assert len(wide[name].shape) == len(leaf.shape)
    assert wide[name].shape[:-2] == leaf.shape[:-2]  # kernel sizes
    assert np.prod(wide[name].shape) >= np.prod(leaf.shape)


@pytest.mark.parametrize(
  ('attention', 'where', 'ending'),
  [
    ('none', 0, None),
    ('none_wide', 0, None),
    ('csba', 12, 'branch5x5/excite/bias'),
    ('csba_class', 12, 'branch5x5/excite/bias'),
    ('se', 4, 'gate/squeeze/kernel'),
    ('cbam', 4, 'spatial/kernel'),
  ],
)
def test_every_block_has_its_attention(attention, where, ending):
  # csba: a gate for each of three branches in each of four blocks; se, cbam: one a block
  names = [name for name in shapes(build(attention), SMALL)[0]['params'] if '/attention/' in name]
  gates = {name.rsplit('/', 2)[0] for name in names if name.endswith('squeeze/kernel')}
  assert len(gates) == where
  if ending:
    for block in ('stage1/block1', 'stage2/block1', 'stage3/block1', 'stage3/block2'):
      assert f'{block}/attention/{ending}' in names


def test_layer_names_read_well():
  names = shapes(build('csba_class'), SMALL)[0]['params']
  for name in (
    'stem/full/conv/kernel',
    'stage2/block1/branch3x3/conv/kernel',
    'stage2/block1/branch3x3/norm/scale',
    'stage1/block1/branch5x5/row/conv/kernel',
    'stage1/block1/branch5x5/column/conv/kernel',
    'stage1/block1/attention/branch1x1/squeeze/kernel',
    'stage3/block1/project/conv/kernel',
    'class_gate/excite',
    'head/kernel',
    'head/class_embedding',
  ):
    assert name in names
  assert 'stage3/block2/project/conv/kernel' not in names  # its branches meet the classifier
  assert not [name for name in names if re.search(r'_\d', name)]  # no module is left unnamed


@pytest.mark.parametrize('attention', ATTENTIONS)
def test_head_expression_matches_exactly_the_classifier(attention):
  model = build(attention)
  names = shapes(model, SMALL)[0]['params']
  matched = {name for name in names if re.search(model.head, name)}
  expected = {'head/kernel', 'head/bias'}
  assert matched == expected | ({'head/class_embedding'} if attention == 'csba_class' else set())
  assert not re.search(model.head, 'stage1/head/kernel')  # of an attention, say
  assert names['head/kernel'].shape[-1] == CLASSES
  assert not [name for name in names.keys() - matched if CLASSES in names[name].shape[-1:]]


OTHER_SIZES = [12, 16, 20, 32, 48, 64, 256]


@pytest.mark.seconds
@pytest.mark.parametrize('attention', ATTENTIONS)
@pytest.mark.parametrize(
  'size', [8, 33, 224, *(pytest.param(n, marks=pytest.mark.slow) for n in OTHER_SIZES)]
)
def test_every_input_size_gives_logits(attention, size):
  image_shape = (size, size, 3)
  _, logits = shapes(build(attention, image_shape), image_shape)
  assert logits.shape == (2, CLASSES)
  assert logits.dtype == jnp.float32


@pytest.mark.parametrize('image_shape', [(24, 40, 3), (8, 31, 1), (100, 33, 3)])
def test_images_need_not_be_square(image_shape):
  assert shapes(build('csba_class', image_shape), image_shape)[1].shape == (2, CLASSES)


@pytest.mark.parametrize(
  ('size', 'strided', 'map_size'),
  [(8, 0, 8), (16, 0, 16), (17, 0, 8), (32, 0, 16), (33, 1, 8), (64, 1, 16), (256, 3, 16)],
)
def test_stem_ends_at_a_map_of_at_most_16(size, strided, map_size):
  stem, image = layers.Stem(4, multibranch.LARGEST_MAP), jnp.zeros((1, size, size, 3))
  init = functools.partial(stem.init_with_output, train=False)
  x, variables = jax.eval_shape(init, jax.random.key(0), image)
  assert x.shape == (1, map_size, map_size, 4)
  halvings = {f'down{i + 1}' for i in range(strided)}
  assert variables['params'].keys() == {'full'} | halvings


def test_images_may_be_gray():
  variables, logits = shapes(build('csba', (8, 8, 1)), (8, 8, 1))
  assert variables['params']['stem/full/conv/kernel'].shape[:3] == (3, 3, 1)
  assert logits.shape == (2, CLASSES)


@pytest.mark.parametrize(
  ('width', 'expected'),
  [(1.0, (32, (64, 128, 160))), (0.5, (16, (32, 64, 80))), (1e-3, (1, (1, 1, 1)))],
)
def test_width_scales_every_number_of_channels(width, expected):
  model = build('none', width=width)
  assert (model.stem, model.stages) == expected


@pytest.mark.seconds
@pytest.mark.parametrize('size', [8, 32])
def test_a_real_forward_pass_is_finite_and_keeps_images_apart(size):
  image_shape = (size, size, 3)
  model = build('csba_class', image_shape)
  variables = random_variables(model, image_shape)
  images, _ = batch(3, image_shape)
  apply = jax.jit(model.apply, compiler_options=QUICK)
  logits = np.asarray(apply(variables, images))
  assert np.isfinite(logits).all()
  assert logits.std() > 1e-3
  others = images.copy()
  others[[0, 2]] = 1.0
  changed = np.asarray(apply(variables, others))
  np.testing.assert_allclose(changed[1], logits[1], rtol=1e-4, atol=1e-5)
  assert (changed[0] != logits[0]).any()


@pytest.mark.seconds
@pytest.mark.parametrize('attention', ['csba_class', pytest.param('cbam', marks=pytest.mark.slow)])
def test_half_precision_keeps_float32_parameters_and_logits(attention):
  full, half = build(attention), build(attention, dtype=jnp.bfloat16)
  half_shapes, logits = shapes(half, SMALL)
  assert logits.dtype == jnp.float32
  for kind in ('params', 'batch_stats'):
    assert half_shapes[kind] == shapes(full, SMALL)[0][kind]
    assert {leaf.dtype for leaf in half_shapes[kind].values()} == {jnp.dtype('float32')}
  variables, (images, _) = random_variables(full, SMALL), batch(8, SMALL)
  exact, found = (
    np.asarray(jax.jit(model.apply, compiler_options=QUICK)(variables, images))
    for model in (full, half)
  )
  assert (exact != found).any()
  assert np.abs(exact - found).max() < 0.05 * np.abs(exact).max()


def test_half_precision_reaches_every_convolution():
  model = build('csba_class', dtype=jnp.bfloat16)
  variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *SMALL)))
  jaxpr = jax.make_jaxpr(model.apply)(variables, jnp.zeros((2, *SMALL)))
  convolutions = [
    variable.aval.dtype
    for equation in jaxpr.eqns
    if equation.primitive.name == 'conv_general_dilated'
    for variable in equation.invars
  ]
  assert len(convolutions) == 2 * (1 + 4 * 3)  # the stem; 3x3, row and column in each block
  assert set(convolutions) == {jnp.dtype('bfloat16')}


@functools.cache
def gradients(attention):
  """{name: gradient} of the mean balanced softmax of a random batch, and new statistics."""
  model = build(attention)
  variables = random_variables(model, SMALL)
  images, labels = batch(16, SMALL)
  loss_fn = functools.partial(losses.balanced_softmax, class_counts=np.array([50, 20, 7, 3]))

  def objective(params):
    logits, updated = model.apply(
      {'params': params, 'batch_stats': variables['batch_stats']},
      images,
      train=True,
      mutable=['batch_stats'],
    )
    return loss_fn(logits, labels).mean(), updated['batch_stats']

  grad = jax.jit(jax.grad(objective, has_aux=True), compiler_options=QUICK)
  grads, stats = grad(variables['params'])
  return flat(grads), flat(stats), flat(variables['batch_stats'])


# csba_class has the layers of csba and none
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ('csba', 'none', 'se', 'cbam')]


@pytest.mark.seconds
@pytest.mark.parametrize('attention', ['csba_class', *SLOW])
def test_every_parameter_has_a_finite_gradient_that_is_not_zero(attention):
  grads, _, _ = gradients(attention)
  assert not [name for name, leaf in grads.items() if not np.isfinite(leaf).all()]
  assert not [name for name, leaf in grads.items() if not np.asarray(leaf).any()]


@pytest.mark.seconds
def test_training_moves_the_statistics_and_evaluation_does_not():
  _, after, before = gradients('csba')
  assert after.keys() == before.keys()
  for name, leaf in before.items():
    assert (np.asarray(after[name]) != leaf).any(), name
  model = build('csba')
  variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *SMALL)))
  evaluate = functools.partial(model.apply, train=False, mutable=['batch_stats'])
  jaxpr = jax.make_jaxpr(lambda v, x: evaluate(v, x)[1])(variables, jnp.zeros((2, *SMALL)))
  inputs = {id(variable) for variable in jaxpr.jaxpr.invars}
  assert all(id(variable) in inputs for variable in jaxpr.jaxpr.outvars)  # handed through


@pytest.mark.seconds
def test_statistics_are_a_tenth_of_the_batch():
  _, after, before = gradients('csba')
  images, _ = batch(16, SMALL)
  kernel = random_variables(build('csba'), SMALL)['params']['stem']['full']['conv']['kernel']
  padded = np.pad(images.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
  out = sum(
    padded[:, i : i + 8, j : j + 8] @ kernel[i, j].astype(np.float64)
    for i in range(3)
    for j in range(3)
  )
  for name, value in (('mean', out.mean((0, 1, 2))), ('var', out.var((0, 1, 2)))):
    path = f'stem/full/norm/{name}'
    np.testing.assert_allclose(after[path], 0.9 * before[path] + 0.1 * value, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope='module')
def initial():
  """The real initialisation: seed -> variables."""
  model = build('csba_class')
  init = jax.jit(
    lambda seed: model.init(jax.random.key(seed), jnp.zeros((1, *SMALL))),
    compiler_options={'xla_backend_optimization_level': 0},  # as state.create
  )
  return model, functools.cache(init)


@pytest.mark.seconds
def test_initialisation_is_a_function_of_the_seed(initial):
  _, init = initial
  once, again, other = flat(init(0)), flat(init.__wrapped__(0)), flat(init(1))
  for name, leaf in once.items():
    np.testing.assert_array_equal(leaf, again[name])
    if name.endswith('/kernel') and '/excite/' not in name:  # those start at zero
      assert (np.asarray(leaf) != np.asarray(other[name])).any(), name


@pytest.mark.seconds
def test_initial_net_is_plain_csba_in_value_and_gradient(initial):
  model, init = initial
  variables = init(0)
  images, labels = batch(16, SMALL)

  def loss(params):
    logits = model.apply({'params': params, 'batch_stats': variables['batch_stats']}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  grads = flat(jax.jit(jax.grad(loss), compiler_options=QUICK)(variables['params']))
  assert not np.asarray(grads.pop('class_gate/squeeze')).any()  # V = 0 lets nothing through, yet
  assert not [name for name, leaf in grads.items() if not np.isfinite(leaf).all()]
  still = [name for name, leaf in grads.items() if not np.asarray(leaf).any()]
  assert still == [name for name in grads if '/squeeze/' in name]  # behind a layer of zeros
