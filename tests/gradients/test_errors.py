"""Every mistake is named: what was expected, what was found, what to do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from csba_jax.errors import UserError
from csba_jax.gradients import class_gradients, class_grams

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
    'found a tree of arrays',
    '-> [N]',
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
