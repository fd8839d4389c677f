"""Variables of Flax NNX in a parameter tree; NNX is not imported where the user has not done so."""

import sys
from typing import Any

import jax

from csba_jax.errors import UserError

PyTree = Any
Path = tuple[Any, ...]


def variables(params: PyTree) -> dict[Path, Any]:
  """The variables in a tree by their paths; none without NNX."""
  kind = getattr(sys.modules.get('flax.nnx'), 'Variable', None)
  if kind is None:
    return {}
  leaves = jax.tree.leaves_with_path(params, is_leaf=lambda node: isinstance(node, kind))
  return {path: leaf for path, leaf in leaves if isinstance(leaf, kind)}


def check_variables(params: PyTree) -> None:
  """Raises UserError for a variable that is no `nnx.Param`, such as a statistic of BatchNorm.

  It would count as a parameter: its gradient would add to the Grams.
  """
  found = variables(params)
  if not found:
    return
  wrong = {path: v for path, v in found.items() if not isinstance(v, sys.modules['flax.nnx'].Param)}
  if wrong:
    path, variable = next(iter(wrong.items()))
    name = jax.tree_util.keystr(path, simple=True, separator='/') or 'params'
    more = f', and {len(wrong) - 1} more variables that are no Param' if len(wrong) > 1 else ''
    raise UserError(
      'params whose NNX variables are all nnx.Param',
      f'{name} of type {type(variable).__name__}{more}',
      'split the model, graph, params, rest = nnx.split(model, nnx.Param, ...), pass params, and '
      'let losses_fn call nnx.merge(graph, params, rest)',
    )
