"""Sums of class gradients of one batch in a compiled step, against a loop of jax.grad."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csba_jax.gradients import batch_sums
from csba_jax.runtime import backend

C, N = 4, 11
LABELS = {
  'unsorted': np.array([3, 0, 1, 0, 2, 0, 1, 3, 0, 2, 0]),
  'a class absent': np.array([3, 0, 1, 0, 3, 0, 1, 3, 0, 1, 0]),
  'one class': np.full(N, 2),
  'the last class alone': np.full(N, C - 1),
  'a row filled to the last image': np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]),
}


def net(coupled):
  """(forward, params, images): a net of a convolution, a norm and a classifier, in float64."""
  rng = np.random.default_rng(0)
  params = {
    'conv': rng.normal(size=(3, 3, 2, 4)),
    'scale': rng.normal(size=4) + 1,
    'head': rng.normal(size=(4, C)),
  }

  def forward(params, batch):
    x = jax.lax.conv_general_dilated(
      batch['image'], params['conv'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    axes = (0, 1, 2) if coupled else (1, 2, 3)
    mean, square = x.mean(axes, keepdims=True), (x**2).mean(axes, keepdims=True)
    x = (x - mean) * jax.lax.rsqrt(square - mean**2 + 1e-3) * params['scale'][None, None, None]
    logits = jnp.tanh(x).mean((1, 2)) @ params['head']
    losses = -jax.nn.log_softmax(logits)[jnp.arange(len(logits)), batch['label']]
    return losses, {'mean': mean} if coupled else {}

  return forward, params, rng.normal(size=(N, 5, 5, 2))


@functools.cache
def compiled(form, coupled, rows=None, at_once=None):
  """The form as one program; `rows` and `at_once` keep those of other settings apart."""
  del rows, at_once
  return jax.jit(functools.partial(form, net(coupled)[0], num_classes=C))


@functools.cache
def of_class(coupled):
  """(params, batch, class) -> sum of its losses and its gradient; a pass of the whole batch."""
  forward = net(coupled)[0]

  def total(params, batch, c):
    return jnp.where(batch['label'] == c, forward(params, batch)[0], 0).sum()

  return jax.jit(jax.value_and_grad(total))


def compare(found, coupled, params, batch):
  sums, losses, auxiliary = found
  there = [of_class(coupled)(params, batch, c) for c in range(C)]
  np.testing.assert_allclose(losses, [loss for loss, _ in there], rtol=1e-12, atol=1e-12)
  for c, (_, gradient) in enumerate(there):
    for name, value in gradient.items():
      np.testing.assert_allclose(sums[name][c], value, rtol=1e-9, atol=1e-10)
  if coupled:
    np.testing.assert_allclose(auxiliary['mean'], statistics(params, batch), rtol=1e-12)
  else:
    assert auxiliary == {}


@functools.cache
def _forward(coupled):
  return jax.jit(net(coupled)[0])


def statistics(params, batch):
  return _forward(True)(params, batch)[1]['mean']


@pytest.mark.parametrize('labels', LABELS)
@pytest.mark.parametrize(
  ('rows', 'at_once'),
  [(3, 2), *(pytest.param(*v, marks=pytest.mark.seconds) for v in ((3, 1), (16, 1)))],
)
def test_rows_of_one_class_give_the_sums_of_a_loop(labels, rows, at_once, monkeypatch):
  monkeypatch.setattr(backend, 'ROW_IMAGES', rows)
  monkeypatch.setattr(backend, 'classes_at_once', lambda classes, images: at_once)
  with jax.enable_x64(True):
    _, params, images = net(False)
    batch = {'image': images, 'label': LABELS[labels]}
    found = compiled(batch_sums.independent, False, rows, at_once)(params, batch)
    compare(found, False, params, batch)


@pytest.mark.parametrize('coupled', [True, False])
@pytest.mark.parametrize('labels', LABELS)
def test_pullbacks_give_the_sums_of_a_loop(coupled, labels):
  with jax.enable_x64(True):
    _, params, images = net(coupled)
    batch = {'image': images, 'label': LABELS[labels]}
    compare(compiled(batch_sums.coupled, coupled)(params, batch), coupled, params, batch)


def test_batches_of_other_classes_need_no_other_program(monkeypatch):
  monkeypatch.setattr(backend, 'ROW_IMAGES', 3)
  _, params, images = net(False)
  params = jax.tree.map(jnp.float32, params)
  program = jax.jit(functools.partial(batch_sums.independent, net(False)[0], num_classes=C))
  for labels in LABELS.values():
    program(params, {'image': jnp.float32(images), 'label': labels})
  assert program._cache_size() == 1


def test_fewer_images_than_a_row():
  with jax.enable_x64(True):
    forward, params, images = net(False)
    batch = {'image': images[:2], 'label': np.array([1, 1])}
    program = jax.jit(functools.partial(batch_sums.independent, forward, num_classes=C))
    compare(program(params, batch), False, params, batch)
