"""Every mistake is named: what was expected, what was found, what to do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from csba_jax.errors import UserError
from csba_jax.gradients import (
  batch_conflict,
  class_gradients,
  class_grams,
  estimated_conflict,
  exact_conflict,
)

C, N = 3, 6
LABEL = np.array([0, 1, 2, 0, 1, 2])
X = np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32)
BATCH = {'x': X, 'label': LABEL}
STACKED = {'x': X.reshape(C, 2, 4), 'label': np.repeat(np.arange(C), 2).reshape(C, 2)}
PARAMS = {'body': {'w': jnp.eye(4)}, 'head': {'w': jnp.ones((4, C)), 'b': jnp.zeros(C)}}


def logits(params, batch):
  return (
    jnp.tanh(batch['x'] @ params['body']['w']) @ params['head']['w'] + params['head']['b'][None]
  )


def losses(params, batch):
  return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch), batch['label'])


def root(params, batch):
  """0 everywhere, with a gradient that is not finite."""
  return jnp.sqrt((0 * batch['x'] * params['w'][None]).sum(1))


def case(name, *words, function=losses, params=PARAMS, batch=BATCH, classes=C, **options):
  return pytest.param(function, params, batch, classes, options, words, id=name)


def without(key):
  return {k: v for k, v in BATCH.items() if k != key}


CASES = [
  case(
    'label too large',
    "batch['label'] from 0 to num_classes - 1 = 2",
    'found 3',
    'correct the labels',
    batch={**BATCH, 'label': LABEL + 1},
  ),
  case(
    'label negative',
    'num_classes - 1 = 2',
    'found -1',
    'correct the labels',
    batch={**BATCH, 'label': LABEL - 1},
  ),
  case(
    'fewer classes than labels',
    'num_classes - 1 = 1',
    'found 2',
    'number of classes',
    classes=2,
  ),
  case(
    'float labels',
    'integer',
    'found float32',
    'class indices',
    batch={**BATCH, 'label': LABEL.astype(np.float32)},
  ),
  case(
    'boolean labels', 'integer', 'found bool', 'class indices', batch={**BATCH, 'label': LABEL > 1}
  ),
  case('no label', "'label'", "found keys ['x']", "use 'label' as the key", batch=without('label')),
  case('not a dict', 'dict', 'found tuple', "use 'label' as the key", batch=(X, LABEL)),
  case(
    'three dimensions',
    '[N] or [C, n]',
    'found [3, 2, 1]',
    'reshape',
    batch={'x': X.reshape(C, 2, 1, 4), 'label': LABEL.reshape(C, 2, 1)},
  ),
  case(
    'label of no dimensions', '[N] or [C, n]', 'found []', 'reshape', batch={'label': np.int32(1)}
  ),
  case(
    'empty',
    'images',
    'shape [0]',
    'pass at least one image',
    batch={'x': X[:0], 'label': LABEL[:0]},
  ),
  case(
    'rows of none',
    'images',
    'shape [3, 0]',
    'pass at least one image',
    batch={'x': STACKED['x'][:, :0], 'label': STACKED['label'][:, :0]},
  ),
  case(
    'mask of wrong shape',
    "batch['mask'] of shape [6]",
    'found [6, 1]',
    'reshape',
    batch={**BATCH, 'mask': np.ones((N, 1))},
  ),
  case(
    'mask of another length',
    '[6]',
    'found mask of shape [5]',
    'let losses_fn close over',
    batch={**BATCH, 'mask': np.ones(N - 1)},
  ),
  case(
    'mask that leaves none',
    'images',
    'found a mask that leaves none',
    'correct the mask',
    batch={**BATCH, 'mask': np.zeros(N)},
  ),
  case(
    'array of another length',
    "[6] of 'label' in front",
    'found x of shape [5, 4]',
    'let losses_fn close over',
    batch={**BATCH, 'x': X[:5]},
  ),
  case(
    'scalar in the batch',
    "[6] of 'label'",
    'found scale/a of shape []',
    'let losses_fn close over',
    batch={**BATCH, 'scale': {'a': 2.0}},
  ),
  case(
    'wrong number of rows',
    'num_classes = 4 rows',
    'found 3 rows',
    'stack C rows',
    batch=STACKED,
    classes=4,
  ),
  case(
    'row with another class',
    'class c in row c',
    'found labels [0, 1] in row 1',
    'sort the rows, or pass a flat batch',
    batch={**STACKED, 'label': np.array([[0, 0], [0, 1], [2, 2]])},
  ),
  case('no classes', 'at least 1', 'found 0', 'pass the number of classes', classes=0),
  case('half a class', 'whole number', 'found 2.5', 'pass the number of classes', classes=2.5),
  case(
    'a float of classes', 'whole number', 'found 3.0', 'pass the number of classes', classes=3.0
  ),
  case(
    'mean loss',
    'one loss for each of the 6 examples',
    'found shape []',
    'leave out the mean',
    function=lambda p, b: losses(p, b).mean(),
  ),
  case(
    'a loss for each class',
    'each of the 6 examples',
    'found shape [6, 3]',
    '-> [N]',
    function=logits,
  ),
  case(
    'two results',
    'each of the 6 examples',
    'found a tuple of 2',
    'return the losses [N] alone',
    function=lambda p, b: (losses(p, b), logits(p, b)),
  ),
  case(
    'integer losses',
    'float losses',
    'found int32',
    'return losses',
    function=lambda p, b: (logits(p, b).argmax(1) != b['label']).astype(jnp.int32),
  ),
  case(
    'labels beyond the logits',
    'finite losses',
    'NaN or infinity from losses_fn in classes [3]',
    'labels beyond the number of logits',
    batch={**BATCH, 'label': np.array([0, 1, 2, 0, 1, 3])},
    classes=4,
    strategy='masked',
  ),
  case(
    'gradient at the root of 0',
    'finite class gradients',
    'NaN or infinity in w, from finite losses',
    'square roots',
    function=root,
    params={'w': jnp.ones(4)},
    per_example=True,
  ),
  case(
    'integer parameters',
    'float arrays',
    'found step of type int32',
    'eqx.partition, nnx.split',
    params={**PARAMS, 'step': jnp.int32(3)},
  ),
  case(
    'a function among the parameters',
    'float arrays',
    'found act of type',
    'eqx.partition, nnx.split',
    params={**PARAMS, 'act': jnp.tanh},
  ),
  case(
    'a number among the parameters',
    'float arrays',
    'leaf of type float',
    'jnp.asarray',
    params={**PARAMS, 'a': 1.0},
  ),
  case(
    'shapes for parameters',
    'float arrays',
    'ShapeDtypeStruct',
    'initialise',
    params=jax.eval_shape(lambda: PARAMS),
  ),
  case(
    'strings in the batch',
    'arrays of numbers',
    'found name of type <U1',
    'leave it out',
    batch={**BATCH, 'name': np.array(list('abcdef'))},
  ),
  case(
    'objects in the batch',
    'arrays of numbers',
    'found name of type object',
    'leave it out',
    batch={**BATCH, 'name': np.array([None] * N)},
  ),
  case(
    'a list in the batch',
    'arrays in the batch',
    'found x, a list',
    'np.asarray',
    batch={**BATCH, 'x': X.tolist()},
  ),
  case(
    'a list of labels',
    "batch['label'], an array",
    'found list',
    'np.asarray',
    batch={**BATCH, 'label': LABEL.tolist()},
  ),
  case(
    'names for labels',
    'integer type',
    'found <U1',
    'np.unique(names, return_inverse=True)[1]',
    batch={**BATCH, 'label': np.array(list('abcabc'))},
  ),
  case(
    'one-hot labels',
    'integer type',
    'found float64',
    'labels.argmax(-1)',
    batch={**BATCH, 'label': np.eye(C)[LABEL]},
  ),
  case(
    'one-hot labels of integers',
    'class indices',
    'found one-hot rows',
    'labels.argmax(-1)',
    batch={**BATCH, 'label': np.eye(C, dtype=int)[LABEL]},
  ),
  case(
    'labels in a column',
    '3 rows',
    'found 6 rows',
    'labels [N]',
    batch={**BATCH, 'label': LABEL[:, None]},
  ),
  case(
    'keys that are no strings',
    'strings',
    "found keys ['label', 0]",
    'name the arrays',
    batch={'label': LABEL, 0: X},
  ),
  case('mask None', 'shape [6]', 'found None', 'leave it out', batch={**BATCH, 'mask': None}),
  case(
    'weights for a mask',
    '0 for padding',
    'found 0.5',
    'multiply the losses',
    batch={**BATCH, 'mask': np.full(N, 0.5)},
  ),
  case(
    'mask of NaN',
    '0 for padding',
    'found nan',
    'multiply the losses',
    batch={**BATCH, 'mask': np.full(N, np.nan)},
  ),
  case('truth for classes', 'whole number', 'found True', 'number of classes', classes=True),
  case('no function', 'losses_fn, a function', 'found NoneType', 'itself', function=None),
  case(
    'a Partial of a name',
    'Partial of arrays',
    'found str among them',
    'functools.partial',
    function=Partial(lambda mode, p, b: losses(p, b), 'train'),
  ),
  case('no result', 'each of the 6 examples', 'found None', '-> [N]', function=lambda p, b: None),
  case(
    'a dict of losses',
    'each of the 6 examples',
    "found a dict with the keys ['loss']",
    '-> [N]',
    function=lambda p, b: {'loss': losses(p, b)},
  ),
  case(
    'three arguments',
    'that JAX can trace',
    'found TypeError',
    'by itself',
    function=lambda p, b, key: losses(p, b),
  ),
  case(
    'another key',
    'that JAX can trace',
    "KeyError: 'image', in test_errors.py, line",
    "the keys ['label', 'x']",
    function=lambda p, b: b['image'],
  ),
  case(
    'NumPy in the loss',
    'that JAX can trace',
    'TracerArrayConversionError',
    'jax.numpy',
    function=lambda p, b: np.asarray(losses(p, b)),
  ),
  case(
    'float() in the loss',
    'that JAX can trace',
    'ConcretizationTypeError',
    'jax.debug.print',
    function=lambda p, b: losses(p, b) * float(b['x'][0, 0]),
  ),
  case(
    'if in the loss',
    'that JAX can trace',
    'TracerBoolConversionError',
    'jax.lax',
    function=lambda p, b: losses(p, b) if b['x'].sum() > 0 else 0,
  ),
  case('a word for per_example', 'True, False or None', "found 'yes'", 'one', per_example='yes'),
  case('no parameters', 'at least one array', 'found an empty tree', 'pass', params={}),
  case(
    'unknown strategy',
    'auto, masked, stacked',
    "found 'fast'",
    'correct it',
    strategy='fast',
  ),
]

CASES_OF_GRAMS = [
  case(
    'layer_fn that names nothing',
    'layer_fn that names',
    'None for all of body/w, head/b, head/w',
    'return a name',
    layer_fn=lambda name: None,
  ),
  case(
    'head that matches nothing',
    'head that matches',
    "'^classifier', which matches none of body/w",
    'correct the regular expression',
    head='^classifier',
  ),
  case(
    'head that splits a layer',
    'layers as a whole',
    "'head/w', which takes a part of head",
    'widen the regular expression',
    head='head/w',
  ),
]

CASES_OF_GRAMS += [
  case('layer_fn a name', 'layer_fn that maps', "found 'head'", 'lambda', layer_fn='head'),
  case(
    'layer_fn that fails',
    'layer_fn that maps',
    "found IndexError for 'body/w'",
    'correct',
    layer_fn=lambda name: name[99],
  ),
  case(
    'layer_fn to a number',
    'layer_fn that maps',
    "found 3 for 'body/w'",
    'return a string',
    layer_fn=lambda name: 3,
  ),
  case(
    'layer with the name of a scope',
    'other names than shared and total',
    "found 'shared'",
    'give another name',
    layer_fn=lambda name: 'shared',
  ),
  case('head no expression', 'regular expression', "found '('", 'correct it', head='('),
  case('head of all', 'regular expression', "found ''", "'^head/', or None", head=''),
  case('head a list', 'regular expression', "found ['head']", "'^head/', or None", head=['head']),
  case('max_bytes as text', 'number of bytes', "found '4GB'", '2**30', max_bytes='4GB'),
  case('max_bytes None', 'number of bytes', 'found None', '2**30', max_bytes=None),
  case('max_bytes below 0', 'number of bytes', 'found -1', '2**30', max_bytes=-1),
  case(
    'devices for a mesh', 'jax.sharding.Mesh', 'found list', 'jax.make_mesh', mesh=jax.devices()
  ),
]


def raises(function, losses_fn, params, batch, classes, options, words):
  with pytest.raises(UserError) as e:
    function(losses_fn, params, batch, num_classes=classes, **options)
  message = str(e.value)
  assert re.fullmatch(r'expected \S.*; found \S.*; to fix it: \S.*', message)
  for word in words:
    assert word in message


@pytest.mark.parametrize('function', [class_grams, class_gradients])
@pytest.mark.parametrize(('losses_fn', 'params', 'batch', 'classes', 'options', 'words'), CASES)
def test_the_message_says_what_to_do(function, losses_fn, params, batch, classes, options, words):
  raises(function, losses_fn, params, batch, classes, options, words)


@pytest.mark.parametrize(
  ('losses_fn', 'params', 'batch', 'classes', 'options', 'words'), CASES_OF_GRAMS
)
def test_the_message_about_layers_says_what_to_do(
  losses_fn, params, batch, classes, options, words
):
  raises(class_grams, losses_fn, params, batch, classes, options, words)


@pytest.mark.parametrize('function', [exact_conflict, estimated_conflict])
@pytest.mark.parametrize(
  ('data', 'found'),
  [
    (None, 'found NoneType'),
    ([BATCH], 'found list'),
    (without('label'), "found keys ['x']"),
    ({**BATCH, 'x': X.tolist()}, "found 'x' of type list"),
    ({**BATCH, 'x': {'a': X}}, "found 'x' of type dict"),
    ({**BATCH, 'name': np.array(list('abcdef'))}, "found 'name' of type <U1"),
    ({**BATCH, 'x': X[:5]}, "found 'x' of shape [5, 4]"),
    ({**BATCH, 'mask': np.ones(N)}, "found an entry 'mask'"),
    ({**BATCH, 'label': np.eye(C)[LABEL]}, 'labels.argmax(-1)'),
    ({**BATCH, 'label': LABEL[:, None]}, 'labels[:, 0]'),
    ({**BATCH, 'label': np.array(list('abcabc'))}, 'np.unique'),
  ],
)
def test_the_message_about_data(function, data, found):
  with pytest.raises(UserError, match=re.escape(found)):
    function(losses, PARAMS, data, num_classes=C)


def test_messages_about_what_else_a_data_set_takes():
  for wrong, found in (
    ({'num_classes': '3'}, "found '3'"),
    ({'num_classes': C, 'mesh': jax.devices()}, 'found list'),
    ({'num_classes': C, 'max_bytes': '1'}, 'number of bytes'),
    ({'num_classes': C, 'per_example': 'yes'}, 'True, False or None'),
  ):
    with pytest.raises(UserError, match=found):
      exact_conflict(losses, PARAMS, BATCH, **{'per_example': True, **wrong})
  spread = jax.device_put(PARAMS, NamedSharding(mesh_of(AxisType.Auto), PartitionSpec()))
  with pytest.raises(UserError, match='found no mesh, and params on 2 devices'):
    exact_conflict(losses, spread, BATCH, num_classes=C, per_example=True)


@pytest.mark.parametrize(
  ('given', 'found'),
  [
    (BATCH, 'a list of batches; found dict'),
    (3, 'a list of batches; found int'),
    ([BATCH], 'at least 2 batches; found 1'),
    ([(X, LABEL)] * 2, 'found tuple'),
    ([{**BATCH, 'name': np.array(list('abcdef'))}] * 2, 'found name of type <U1'),
  ],
)
def test_the_message_about_batches(given, found):
  with pytest.raises(UserError, match=found):
    batch_conflict(losses, PARAMS, given, num_classes=C)


def mesh_of(kind):
  return jax.make_mesh((2,), ('data',), axis_types=(kind,))


@pytest.mark.seconds
@pytest.mark.parametrize('strategy', ['masked', 'stacked'])
def test_arrays_on_explicit_axes_give_the_same_grams(strategy):
  """jax.make_mesh makes such axes by default."""
  mesh = mesh_of(AxisType.Explicit)
  batch = jax.device_put(BATCH, NamedSharding(mesh, PartitionSpec('data')))
  params = jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec()))
  given = {'num_classes': C, 'strategy': strategy, 'per_example': True}
  found = class_grams(losses, params, batch, **given)
  expected = class_grams(losses, PARAMS, BATCH, **given)
  np.testing.assert_allclose(found.total, expected.total, rtol=1e-5, atol=1e-6)
  with jax.set_mesh(mesh), pytest.raises(UserError, match='jax.set_mesh with explicit axes'):
    class_grams(losses, params, batch, **given)


@pytest.mark.seconds
def test_one_random_key_for_each_example():
  def noisy(params, batch):
    noise = jax.vmap(lambda key: jax.random.normal(key, (4,)))(batch['key'])
    return losses(params, {**batch, 'x': batch['x'] + noise})

  batch = {**BATCH, 'key': jax.random.split(jax.random.key(0), N)}
  assert class_grams(noisy, PARAMS, batch, num_classes=C).counts.tolist() == [2, 2, 2]


def test_a_parameter_without_entries_and_one_of_float64_count_nothing():
  params = {**PARAMS, 'empty': np.zeros((0, 3), np.float64)}
  found = exact_conflict(losses, params, BATCH, num_classes=C, per_example=True)
  assert not found.gram('empty' if 'empty' in found.scopes else 'parameters').any()


def test_under_jit_what_shapes_tell_is_still_said():
  def step(params, batch):
    return class_grams(losses, params, batch, num_classes=C)

  for batch, words in [
    ({**BATCH, 'label': LABEL.astype(np.float32)}, 'integer'),
    ({**BATCH, 'x': X[:5]}, 'in front'),
    ({**BATCH, 'mask': np.ones((N, 2))}, 'mask'),
  ]:
    with pytest.raises(UserError, match=words):
      jax.jit(step)(PARAMS, batch)


def test_labels_of_padding_are_not_looked_at():
  batch = {**BATCH, 'label': np.where(LABEL == 2, -1, LABEL), 'mask': LABEL != 2}
  found = class_grams(losses, PARAMS, batch, num_classes=C, strategy='stacked', per_example=True)
  assert found.counts.tolist() == [2, 2, 0]
