"""What a study config declares beside the protocol: methods and pairs of variants of its own."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from csba_jax import config as config_lib
from csba_jax.errors import UserError, shown
from csba_jax.study import protocol


def check_methods(study: ml_collections.ConfigDict, why_not: Callable[[str], str]) -> None:
  """Raises UserError for a method that there is not, or for a wrong one among own_methods.

  Args:
    why_not: of a field of the base: why a method may not set it, in words; '' where it may.
  """
  fields = config_lib.flatten(config_lib.default())
  for name, changes in study.own_methods.items():
    if not re.fullmatch('[A-Za-z0-9_]+', str(name)) or name in protocol.METHODS:
      raise UserError(
        'names of own_methods of letters, digits and _, other than those of the protocol '
        f'({", ".join(protocol.METHODS)})',
        repr(name),
        'rename the method',
      )
    if not isinstance(changes, Mapping) or not changes:
      raise UserError(
        f"own_methods.{name} as fields of base with their values, such as {{'loss.name': 'ldam'}}",
        repr(changes),
        'correct the config',
      )
    for field, value in changes.items():
      if field not in fields:
        raise UserError(
          'fields of csba_jax.config.default() in own_methods',
          f'{field} in {name}',
          'correct the name of the field',
        )
      if reason := why_not(field):
        raise UserError(
          'own_methods that set fields of the training alone',
          f'{field} in {name}: {reason}',
          'remove it from the method',
        )
      kind = type(fields[field])
      if type(value) is not kind and not (kind is float and type(value) is int):
        wanted = f'{field} of type {kind.__name__} in own_methods.{name}'
        raise UserError(wanted, repr(value), 'correct the config')
    tried = study.base.copy_and_resolve_references()
    apply(tried, changes)
    try:
      config_lib.check(tried)
    except UserError as error:
      words = f'in own_methods.{name} {error.expected}'
      raise UserError(words, error.found, 'correct the config') from error
  known = {**protocol.METHODS, **study.own_methods}
  if unknown := [name for name in study.methods if name not in known]:
    raise UserError(
      f'methods: some of {", ".join(known)}',
      repr(unknown[0]),
      'set --config.methods=..., or define it in own_methods',
    )


def apply(config: ml_collections.ConfigDict, changes: Mapping[str, Any]) -> None:
  """Sets fields, such as 'loss.name', of a run's config."""
  for field, value in changes.items():
    *sections, name = field.split('.')
    section = config[sections[0]] if sections else config
    section[name] = float(value) if isinstance(section[name], float) else value


def check_pairs(study: ml_collections.ConfigDict) -> None:
  """Raises UserError for pairs of variants that cannot be compared."""
  _check(study.pairs, study.variants, 'variants', "pairs=(('csba', 'none'),)")


def check_method_pairs(study: ml_collections.ConfigDict) -> None:
  """Raises UserError for pairs of methods that cannot be compared."""
  like = "method_pairs=(('balanced_softmax', 'cross_entropy'),)"
  _check(study.method_pairs, study.methods, 'methods', like)


def check_naive(study: ml_collections.ConfigDict) -> None:
  """Raises UserError for naive folds of a tuning, or of what is not run."""
  if study.naive_repeats and not study.test:
    raise UserError(
      'naive folds in a study with a test part: they show what a leak into it is worth',
      f'naive_repeats={study.naive_repeats}, test=False',
      'set --config.naive_repeats=0 or --config.test=True',
    )
  for axis, named, there in (
    ('variants', study.naive_variants, study.variants),
    ('methods', study.naive_methods, study.methods),
  ):
    field = f'naive_{axis}'
    if named and not study.naive_repeats:
      raise UserError(
        f'{field} only with naive_repeats of 1 or more',
        f'{field}={tuple(named)}, naive_repeats={study.naive_repeats}',
        f'remove {field}, or set --config.naive_repeats=1',
      )
    if lacking := [name for name in named if name not in there]:
      raise UserError(
        f'{field}: some of the {axis} ({", ".join(there)})',
        shown(lacking[0]),
        f'add it to {axis}, or remove it',
      )


def runs_naive(study: ml_collections.ConfigDict, at: Mapping[str, Any]) -> bool:
  """Whether a variant with a method also has folds with duplicates on both sides."""
  of_variant = at['variant'] in (study.naive_variants or study.variants)
  return of_variant and at['method'] in (study.naive_methods or study.methods)


def _check(pairs: Sequence[Any], there: Sequence[str], what: str, like: str) -> None:
  """UserError for what is no pair, or one of something that is not run, or the same pair again."""
  seen: set[frozenset] = set()
  for pair in pairs:
    named = isinstance(pair, tuple | list) and all(isinstance(name, str) for name in pair)
    if not named or len(pair) != 2 or pair[0] == pair[1]:
      raise UserError(
        f'pairs of two {what}, (treatment, control), such as {like}',
        repr(pair),
        'correct the config',
      )
    if lacking := [name for name in pair if name not in there]:
      raise UserError(
        f'pairs of the {what} that are run ({", ".join(there)})',
        f'{lacking[0]} in {tuple(pair)}',
        f'add it to {what}, or correct the pair',
      )
    if frozenset(pair) in seen:
      raise UserError(f'each pair of {what} once', repr(tuple(pair)), 'name it once')
    seen.add(frozenset(pair))


def methods(study: ml_collections.ConfigDict) -> dict[str, dict[str, Any]]:
  """What each method sets in the base: every field that any of the methods changes.

  A field that a method does not name has the protocol's plain value, or else that of the base.
  """
  base, own = config_lib.flatten(study.base), study.own_methods
  plain = {field: base[field] for changes in own.values() for field in changes} | protocol.PLAIN
  return {name: plain | {**changes} for name, changes in {**protocol.METHODS, **own}.items()}
