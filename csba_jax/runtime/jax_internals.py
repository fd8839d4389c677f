"""The one module that uses JAX's internals: traced programs (jaxprs) and the coordination service.

They are not part of JAX's public API and may change. The code was written for JAX 0.10.2 and
0.11.2, and the test suite runs with both. If another version has other internals, a function takes
a slower public way, warns once and does not raise.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax import Array, lax
from jax.extend import core

PyTree = Any
Convolve = Callable[..., Array]  # (lhs, rhs, **params of conv_general_dilated_p) -> output


class UnknownJaxFormWarning(RuntimeWarning):
  """This version of JAX has internals that the project does not know; it takes a slower way."""


@functools.cache  # once for each text
def _say(what: str, instead: str) -> None:
  warnings.warn(
    f'JAX {jax.__version__}: {what}; {instead}. The results are the same.',
    UnknownJaxFormWarning,
    stacklevel=3,
  )


def has_grouped_convolutions(fun: Callable[..., PyTree], *args: PyTree) -> bool:
  """Whether `fun` has a convolution with groups, of features or of the batch.

  True if the traced program cannot be read: what a caller does for groups is right for any program.

  Args:
    fun: it is traced with `args`, arrays or shapes; errors of its own are raised.
  """
  closed = jax.make_jaxpr(fun)(*args)
  try:
    return any(
      eqn.params['feature_group_count'] * eqn.params['batch_group_count'] > 1
      for eqn in _convolutions(closed.jaxpr)
    )
  except Exception as error:  # nobody knows what an unknown form raises
    _say(f'a program cannot be read ({_text(error)})', 'its classes are unrolled')
    return True


def with_convolutions(fun: Callable[..., PyTree], convolve: Convolve) -> Callable[..., PyTree]:
  """`fun` with each of its convolutions replaced by `convolve`; the result is not differentiable.

  Convolutions inside loops, branches and calls are replaced too: the equation of a loop stays, and
  the programs in it are rewritten. An equation of an unknown form stays as it is.

  Args:
    fun: any function of pytrees.
    convolve: called as `lax.conv_general_dilated_p.bind` is; it must return the same array.
  """

  def replaced(*args: PyTree) -> PyTree:
    closed, out = jax.make_jaxpr(fun, return_shape=True)(*args)
    try:
      leaves = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args), convolve)
    except Exception as error:
      _say(f'a program cannot be evaluated ({_text(error)})', 'its convolutions stay as they are')
      return fun(*args)
    return jax.tree.unflatten(jax.tree.structure(out), leaves)

  return replaced


def _convolutions(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
  for eqn in jaxpr.eqns:
    if eqn.primitive is lax.conv_general_dilated_p:
      yield eqn
    for inner in core.jaxprs_in_params(eqn.params):
      yield from _convolutions(inner)


def _evaluate(
  jaxpr: core.Jaxpr, consts: Sequence[Array], args: Sequence[Array], convolve: Convolve
) -> list[Array]:
  """The outputs of a jaxpr whose convolutions are replaced."""
  env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

  def read(atom: core.Var | core.Literal) -> Array:
    return atom.val if isinstance(atom, core.Literal) else env[atom]

  found: Sequence[Array]
  for eqn in jaxpr.eqns:
    values = [read(atom) for atom in eqn.invars]
    if eqn.primitive is lax.conv_general_dilated_p:
      found = [convolve(*values, **eqn.params)]
    else:
      found = _bind(_with_programs(eqn, convolve), values)
    env.update(zip(eqn.outvars, found, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _bind(eqn: core.JaxprEqn, values: Sequence[Array]) -> Sequence[Array]:
  """The outputs of one equation, for values of its inputs."""
  inputs = {
    v: x for v, x in zip(eqn.invars, values, strict=True) if not isinstance(v, core.Literal)
  }
  origin = core.DebugInfo('one equation', __name__, None, None)
  alone = core.Jaxpr((), list(inputs), eqn.outvars, [eqn], eqn.effects, origin)
  return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*inputs.values())


def _with_programs(eqn: core.JaxprEqn, convolve: Convolve) -> core.JaxprEqn:
  """An equation with replaced convolutions in its programs, such as the body of a loop."""
  if not any(True for inner in core.jaxprs_in_params(eqn.params) for _ in _convolutions(inner)):
    return eqn
  try:
    return eqn.replace(params={k: _replaced(v, convolve) for k, v in eqn.params.items()})
  except Exception as error:  # as above
    _say(
      f'the programs inside {eqn.primitive} cannot be replaced ({_text(error)})',
      'their convolutions stay as they are',
    )
    return eqn


def _replaced(value: Any, convolve: Convolve) -> Any:
  """A parameter of an equation, with replaced convolutions in the programs that it holds."""
  if isinstance(value, tuple | list):
    return type(value)(_replaced(x, convolve) for x in value)
  if not isinstance(value, core.Jaxpr | core.ClosedJaxpr):
    return value
  closed = value if isinstance(value, core.ClosedJaxpr) else core.ClosedJaxpr(value, ())
  evaluate = functools.partial(_evaluate, closed.jaxpr, closed.consts, convolve=convolve)
  new = jax.make_jaxpr(lambda *args: evaluate(args))(*closed.in_avals)
  if [a.shape for a in new.out_avals] != [a.shape for a in closed.out_avals]:
    raise ValueError(f'{new.out_avals} in the place of {closed.out_avals}')
  if isinstance(value, core.ClosedJaxpr):
    return new
  if new.consts:
    raise ValueError(f'{len(new.consts)} constants in a program that has none')
  return new.jaxpr


def _text(error: Exception) -> str:
  return f'{type(error).__name__}: {" ".join(str(error).split())[:100]}'


# ---- the coordination service of several processes

# Words in the errors of collectives and barriers that have lost a process. JAX has no error type
# for it: jaxlib 0.10.2 and 0.11.2 raise JaxRuntimeError. The texts that were seen, on CPUs, are in
# tests/runtime/test_jax_internals.py. No run on GPUs has lost a process yet: NCCL is assumed.
_WORDS_OF_A_LOSS = (
  'CoordinationService',
  'coordination service',
  'heartbeat',
  'Gloo',
  'NCCL',
  'closed by peer',
  'reset by peer',
)


def coordination_client() -> Any:
  """The client of the coordination service, or None; jax.distributed does not give access to it.

  None: the service does not run, or this version of JAX keeps it elsewhere. Then a process that
  fails cannot tell the others why. They still notice, through JAX, that it is gone.
  """
  try:
    from jax._src import distributed

    return distributed.global_state.client
  except (ImportError, AttributeError) as error:
    _say(
      f'the coordination service cannot be asked ({_text(error)})',
      'a process whose run fails elsewhere learns that it fails, and not why',
    )
    return None


def coordinator_address() -> str:
  """HOST:PORT of process 0, as JAX determined it; '' if JAX has none or it cannot be read."""
  try:
    from jax._src import distributed

    return distributed.global_state.coordinator_address or ''
  except (ImportError, AttributeError):
    return ''


def tells_of_a_lost_process(error: BaseException) -> bool:
  """Whether an error of JAX says that another process of the run is lost."""
  return isinstance(error, jax.errors.JaxRuntimeError) and any(
    words in str(error) for words in _WORDS_OF_A_LOSS
  )
