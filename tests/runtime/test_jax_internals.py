"""JAX's internals: the forms that are known, and what an unknown form leads to."""

import ast
import sys
import types
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core

from csba_jax.gradients import class_grams, loops
from csba_jax.runtime import backend, jax_internals
from csba_jax.runtime.jax_internals import UnknownJaxFormWarning

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 5, 4, 3)), jnp.float32)
KERNEL = jnp.asarray(RNG.normal(size=(3, 3, 3, 3)), jnp.float32)


@pytest.fixture(autouse=True)
def nothing_said():
  """Every test gets the warning again."""
  jax_internals._say.cache_clear()
  yield
  jax_internals._say.cache_clear()


def convolve(x, kernel, groups=1):
  return lax.conv_general_dilated(
    x, kernel[:, :, : 3 // groups], (1, 1), 'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=groups,
  )  # fmt: skip


def tripled(lhs, rhs, **params):
  return 3 * lax.conv_general_dilated_p.bind(lhs, rhs, **params)


@jax.custom_jvp
def custom(x):
  return convolve(x, KERNEL)


@jax.custom_vjp
def custom_backward(x):
  return convolve(x, KERNEL)


custom.defjvp(lambda primals, tangents: (custom(*primals), custom(*tangents)))
custom_backward.defvjp(lambda x: (custom_backward(x), None), lambda _, g: (convolve(g, KERNEL),))


def repeated(fun, x):
  start, go_on = (0, x), lambda value: value[0] < 2
  return lax.while_loop(go_on, lambda value: (value[0] + 1, fun(value[1])), start)[1]


# what holds a convolution, and how often it is done in a row
HOLDERS = {
  'plain': (lambda x: convolve(x, KERNEL), 1),
  'jit': (jax.jit(lambda x: convolve(x, KERNEL)), 1),
  'remat': (jax.checkpoint(lambda x: convolve(x, KERNEL)), 1),
  'custom_jvp': (custom, 1),
  'custom_vjp': (custom_backward, 1),
  'cond': (lambda x: lax.cond(x.sum() > -1e9, custom, jnp.sin, x), 1),
  'switch': (lambda x: lax.switch(2, [jnp.sin, jnp.cos, custom], x), 1),
  'scan': (lambda x: lax.scan(lambda x, k: (custom(x) + k, k), x, jnp.zeros(2))[0], 2),
  'while': (lambda x: repeated(custom, x), 2),
  'jit of scan of cond': (
    jax.jit(lambda x: lax.scan(lambda x, _: (HOLDERS['cond'][0](x), 0), x, None, 3)[0]),
    3,
  ),
}


@pytest.mark.parametrize('name', HOLDERS)
def test_convolutions_are_replaced_wherever_they_stand(name):
  fun, times = HOLDERS[name]
  found = jax.jit(jax_internals.with_convolutions(fun, tripled))(X)
  expected = np.asarray(fun(X)) * 3**times
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * abs(expected).max())


def test_gradients_of_a_scan_are_replaced_too():
  """Its backward pass has the residuals of scan, whose form differs between versions."""

  def fun(x, kernel):
    body = lambda x, shift: (jnp.tanh(convolve(x, kernel) + shift), x.sum())  # noqa: E731
    last, sums = lax.scan(body, x, jnp.arange(3.0), reverse=True)
    return (last**2).sum() + sums.sum()

  gradient = jax.grad(fun, (0, 1))
  seen = []

  def watched(lhs, rhs, **params):
    seen.append(params['dimension_numbers'])
    return lax.conv_general_dilated_p.bind(lhs, rhs, **params)

  found = jax_internals.with_convolutions(gradient, watched)(X, KERNEL)
  assert len(seen) >= 3  # forward, and two gradients
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, gradient(X, KERNEL))


@pytest.mark.parametrize(('groups', 'expected'), [(1, False), (3, True)])
def test_groups_are_found_inside_loops(groups, expected):
  def fun(x):
    return lax.fori_loop(0, 2, lambda _, x: convolve(x, KERNEL, groups), x)

  assert jax_internals.has_grouped_convolutions(fun, X) is expected


def test_errors_of_the_function_itself_are_raised():
  def fun(x):
    raise KeyError('of the model')

  with pytest.raises(KeyError, match='of the model'):
    jax_internals.with_convolutions(fun, tripled)(X)
  with pytest.raises(KeyError, match='of the model'):
    jax_internals.has_grouped_convolutions(fun, X)


# ---- forms that no version has yet


class Wrapped:
  """A made-up form in which a later JAX may hold the body of a loop."""

  def __init__(self, closed):
    self.closed = closed


def made_up(monkeypatch, kind):
  """Gives JAX another form of one of its internals."""
  if kind == 'equations have no replace':
    monkeypatch.setattr(
      jax_internals, '_replaced', lambda *_: (_ for _ in ()).throw(AttributeError('no replace'))
    )
  elif kind == 'a program that cannot be walked':

    def gone(params):
      raise KeyError('num_consts')

    monkeypatch.setattr(core, 'jaxprs_in_params', gone)
  elif kind == 'a program that cannot be built':

    def changed(*args, **kwargs):
      raise TypeError('unexpected argument')

    monkeypatch.setattr(jax_internals, '_bind', changed)


UNKNOWN = {
  'equations have no replace': 'programs inside scan cannot be replaced',
  'a program that cannot be walked': 'a program cannot be',
  'a program that cannot be built': 'a program cannot be evaluated',
}


@pytest.mark.parametrize('kind', UNKNOWN)
def test_an_unknown_form_gives_the_same_and_says_so_once(monkeypatch, kind):
  fun, _ = HOLDERS['scan']
  expected = jax.jit(fun)(X)
  made_up(monkeypatch, kind)
  same = jax_internals.with_convolutions(fun, lax.conv_general_dilated_p.bind)
  with pytest.warns(UnknownJaxFormWarning, match=UNKNOWN[kind]) as said:
    found = same(X)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert len(said) == 1
  text = str(said[0].message)
  assert f'JAX {jax.__version__}' in text
  assert '\n' not in text
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    same(X)


def test_groups_that_cannot_be_told_are_taken_to_be_there(monkeypatch):
  made_up(monkeypatch, 'a program that cannot be walked')
  with pytest.warns(UnknownJaxFormWarning, match='its classes are unrolled'):
    assert jax_internals.has_grouped_convolutions(HOLDERS['plain'][0], X)


def test_a_primitive_that_keeps_its_program_in_another_form():
  """Its convolutions stay, the others are replaced, and there is no warning: it may be no loop."""
  hidden_p = core.Primitive('hidden_loop')
  hidden_p.multiple_results = True
  hidden_p.def_impl(lambda x, body: core.jaxpr_as_fun(body.closed)(x))
  hidden_p.def_abstract_eval(lambda x, body: body.closed.out_avals)
  body = Wrapped(jax.make_jaxpr(HOLDERS['plain'][0])(X))

  def fun(x):
    return convolve(hidden_p.bind(x, body=body)[0], KERNEL)

  found = jax_internals.with_convolutions(fun, tripled)(X)
  np.testing.assert_allclose(found, 3 * fun(X), rtol=1e-4, atol=1e-4)


@pytest.mark.seconds
@pytest.mark.parametrize('kind', UNKNOWN)
def test_grams_of_a_model_with_a_scan_do_not_depend_on_known_forms(monkeypatch, kind):
  """The public result is right, whichever form has changed."""
  labels = jnp.arange(6) % 3
  images = jnp.asarray(RNG.normal(size=(6, 5, 4, 3)), jnp.float32)

  def losses_fn(params, batch):
    body = lambda x, scale: (jnp.tanh(convolve(x, params['kernel'])) * scale, None)  # noqa: E731
    out, _ = lax.scan(body, batch['image'], params['scales'])
    return (out**2).mean((1, 2, 3)) * (1 + batch['label'])

  params = {'kernel': KERNEL, 'scales': jnp.array([1.0, 2.0])}
  arguments = (params, {'image': images, 'label': labels})
  options = {'num_classes': 3, 'strategy': 'stacked', 'per_example': True}
  expected = class_grams(losses_fn, *arguments, **options)
  jax.clear_caches()
  made_up(monkeypatch, kind)
  with pytest.warns(UnknownJaxFormWarning):
    found = class_grams(lambda p, b: losses_fn(p, b), *arguments, **options)
  np.testing.assert_allclose(found.total, expected.total, rtol=1e-4)


def test_unrolled_classes_give_the_same(monkeypatch):
  """If the program cannot say whether it has groups."""
  xs = jnp.stack([X, 2 * X, 3 * X])
  expected = jax.jit(lambda xs: loops.map_classes(HOLDERS['plain'][0], xs, 2))(xs)
  monkeypatch.setattr(jax_internals, 'has_grouped_convolutions', lambda *_: True)
  assert backend.classes_at_once(3, 2) == 1
  found = jax.jit(lambda xs: loops.map_classes(HOLDERS['plain'][0], xs, 2))(xs)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# ---- the coordination service


def test_a_service_that_is_elsewhere_is_no_error(monkeypatch):
  assert jax_internals.coordination_client() is None  # one process
  assert jax_internals.coordinator_address() == ''
  monkeypatch.setitem(sys.modules, 'jax._src.distributed', types.ModuleType('distributed'))
  monkeypatch.setattr(jax._src, 'distributed', sys.modules['jax._src.distributed'])
  with pytest.warns(UnknownJaxFormWarning, match='the coordination service cannot be asked'):
    assert jax_internals.coordination_client() is None
  assert jax_internals.coordinator_address() == ''


# Seen when one of two CPU processes was killed, with jaxlib 0.10.2 and 0.11.2: in a collective (the
# first two), in a barrier while a checkpoint was saved, in a call of the service on process 0.
SEEN = (
  'UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Read error '
  '[127.0.0.1]:41395: Connection reset by peer',
  'UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:547] Connection '
  'closed by peer [127.0.0.1]:11408',
  'INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 1 heartbeat timeout. '
  'This indicates that the remote task has failed, got preempted, or crashed unexpectedly. '
  "[type.googleapis.com/tensorflow.CoordinationServiceError='']",
  'UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was '
  'preempted/died/restarted unexpectedly or this task is experiencing network issues.',
)
ASSUMED = ('NCCL',)


@pytest.mark.parametrize('text', SEEN)
def test_a_lost_process_is_known_by_the_texts_that_were_seen(text):
  assert jax_internals.tells_of_a_lost_process(jax.errors.JaxRuntimeError(text))
  assert not jax_internals.tells_of_a_lost_process(ValueError(text))


def test_every_word_of_a_loss_was_seen_or_is_said_to_be_assumed():
  for words in jax_internals._WORDS_OF_A_LOSS:
    assert (words in ASSUMED) != any(words in text for text in SEEN), words
    assert jax_internals.tells_of_a_lost_process(jax.errors.JaxRuntimeError(f'INTERNAL: {words}'))


def test_other_errors_are_no_loss():
  assert not jax_internals.tells_of_a_lost_process(jax.errors.JaxRuntimeError('out of memory'))


# ---- nobody else reads them


@pytest.mark.parametrize(
  'path', sorted((ROOT / 'csba_jax').rglob('*.py')), ids=lambda p: str(p.relative_to(ROOT))
)
def test_internals_are_read_in_one_place(path):
  if path.name == 'jax_internals.py':
    return
  private = ('jax._src', 'jax.extend', 'jax.interpreters', 'jaxlib')
  tree = ast.parse(path.read_text())
  names = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  assert not [name for name in names if name.startswith(private)]
  assert not [n for n in names if n.endswith(('.eqns', '.jaxpr', '.primitive'))]
