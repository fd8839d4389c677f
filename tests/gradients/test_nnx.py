"""NNX: a variable that is no Param is refused, and the way that the message names is right."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from csba_jax.errors import UserError
from csba_jax.gradients import class_gradients, class_grams
from csba_jax.gradients.gram import parameter_names

LABEL = np.array([0, 1, 2, 0, 1, 2])
X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
BATCH = {'x': X, 'label': LABEL}


class Net(nnx.Module):
  def __init__(self):
    rngs = nnx.Rngs(0)
    self.body = nnx.Linear(4, 4, rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.head = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x):
    return self.head(nnx.relu(self.norm(self.body(x))))


def losses(model, batch):
  logits = model(batch['x'])
  return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch['label'][:, None], 1)[:, 0]


@pytest.fixture(scope='module')
def model():
  made = Net()
  made.eval()
  return made


@pytest.mark.parametrize('form', ['module', 'state'])
@pytest.mark.parametrize('function', [class_grams, class_gradients])
def test_statistics_of_batch_norm_are_no_parameters(model, form, function):
  graph, state = nnx.split(model)
  wrong = {
    'module': (losses, model),
    'state': (lambda p, batch: losses(nnx.merge(graph, p), batch), state),
  }[form]
  with pytest.raises(UserError) as e:
    function(*wrong, BATCH, num_classes=3)
  message = str(e.value)
  assert 'found norm/mean of type BatchStat, and 1 more variables that are no Param' in message
  assert 'graph, params, rest = nnx.split(model, nnx.Param, ...)' in message


@pytest.mark.seconds
def test_what_the_message_says_gives_the_grams_of_plain_arrays(model):
  graph, params, rest = nnx.split(model, nnx.Param, ...)

  def losses_fn(params, batch):
    return losses(nnx.merge(graph, params, rest), batch)

  found = class_grams(losses_fn, params, BATCH, num_classes=3, head='^head/', strategy='masked')
  assert list(found.grams) == ['body', 'head', 'norm']
  for c in range(3):
    of_class = jax.tree.map(lambda x, c=c: x[c == LABEL], BATCH)
    g = jax.grad(lambda p, b=of_class: losses_fn(p, b).mean())(params)
    square = sum((leaf**2).sum() for leaf in jax.tree.leaves(g))
    np.testing.assert_allclose(found.total[c, c], square, rtol=1e-4)


def test_a_copy_lets_batch_norm_in_training_renew_its_statistics():
  net = Net()
  net.train()
  graph, params, rest = nnx.split(net, nnx.Param, ...)

  def losses_fn(params, batch):
    return losses(nnx.merge(graph, params, rest, copy=True), batch)

  found = class_grams(losses_fn, params, BATCH, num_classes=3, strategy='masked')
  assert np.isfinite(found.total).all()
  assert not net.norm.mean[...].any()  # as before


def test_a_module_of_parameters_alone_is_named_without_value():
  linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
  assert parameter_names(linear) == ['bias', 'kernel']
  assert parameter_names({'value': jnp.ones(2)}) == ['value']


def test_nnx_is_not_imported_for_those_who_do_not_use_it():
  code = (
    'import sys, jax.numpy as jnp\n'
    'from csba_jax.gradients.gram import Layers\n'
    "Layers.of({'w': jnp.ones(2)}, None, None)\n"
    "assert 'flax.nnx' not in sys.modules\n"
  )
  subprocess.run([sys.executable, '-c', code], check=True)
