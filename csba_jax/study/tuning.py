"""Learning rates chosen by a study that keeps validation scores alone."""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from csba_jax import config as config_lib
from csba_jax.errors import UserError
from csba_jax.study import grid, results
from csba_jax.study.results import Results

# fields of a base that a tuning may have of its own: all but the rate only look at a run
FREE = ('diagnostics.', 'train.log_every', 'train.save_every', 'train.learning_rate')


def scores(found: Results) -> dict[str, dict[float, list[float]]]:
  """Validation scores of a tuning study's runs, {`grid.rate_key`: {learning rate: [score, ...]}}.

  Raises:
    UserError: no finished run, or one without a learning rate of its own or a validation part.
  """
  if not found.done:
    raise UserError(
      'at least one finished run',
      f'{len(found.failed)} failed ones, the first with: {found.failed[0]["error"]}',
      'remove the cause and start that study again',
    )
  by_key: dict[str, dict[float, list[float]]] = {}
  for record in found.done:
    if record['axes']['split'] == 'naive':
      continue  # copies on both sides flatter a score
    rate = record['axes'].get('learning_rate')
    score = record['result'].get('validation_macro_f1')
    if rate is None or score is None:
      raise UserError(
        'a study of learning rates, with a validation part',
        f'run {record["run"]} without',
        'set learning_rates in its config, and base.data.val_fraction',
      )
    by_key.setdefault(grid.rate_key(record['axes']), {}).setdefault(rate, []).append(score)
  return by_key


def best(by_rate: dict[float, list[float]]) -> float:
  """The rate with the best mean score; of equal ones the smallest."""
  return max(sorted(by_rate), key=lambda rate: sum(by_rate[rate]) / len(by_rate[rate]))


def chosen_rates(study: ml_collections.ConfigDict) -> dict[str, float] | None:
  """The best learning rate by `grid.rate_key`, of the study in `study.tuned_by`; None without one.

  Raises:
    UserError: no study there; one of another base (but for diagnostics and the learning rate) or
      with seeds of this study; rates without all the runs of its plan: it is not finished.
  """
  if not study.tuned_by:
    return None
  folder = study.tuned_by
  tuned = results.read(folder)
  found = scores(tuned)
  config = tuned.study['config']
  if different := [*_differences(config['base'], study.base), *_other_methods(config, study)]:
    raise UserError(
      f'the base of this study in {folder}', '; '.join(different), 'tune this base, or correct it'
    )
  if shared := _seeds_of(tuned) & {
    (what, seed)
    for unit in grid.units(study)
    for what, seed in (('seed', unit['seed']), ('data.seed', grid.data_seed(study, unit)))
  }:
    words = ', '.join(f'{what} {seed}' for what, seed in sorted(shared))
    raise UserError(
      f'rates chosen in {folder} on seeds that are none of this study',
      f'{words} in both',
      'set --config.first_seed of one of them',
    )
  number = _planned(config)
  for key, by_rate in found.items():
    rates = {*config.get('learning_rates', ()), *by_rate}
    numbers = {len(by_rate.get(rate, ())) for rate in rates}
    if numbers != {number}:
      raise UserError(
        f'{number} runs of every learning rate in {folder}',
        f'{min(numbers)} to {max(numbers)} for {key}',
        'start that study again: it does what is missing',
      )
  return {key: best(by_rate) for key, by_rate in found.items()}


def at_ends(study: ml_collections.ConfigDict) -> list[str]:
  """In words, which rates of the study's nets are the smallest or the largest that was tried."""
  if not study.tuned_by:
    return []
  nets = [
    {f'variant={variant}', f'method={method}'}
    for variant in study.variants
    for method in study.methods
  ]
  found = {
    key: by_rate
    for key, by_rate in scores(results.read(study.tuned_by)).items()
    if any(net <= set(key.split()) for net in nets)
  }
  words = varying(list(found))
  named: dict[tuple, list[str]] = {}
  for key, by_rate in found.items():
    rates, chosen = sorted(by_rate), best(by_rate)
    if len(rates) > 1 and chosen in (rates[0], rates[-1]):
      name = ' '.join(word for word in key.split() if word in words) or key
      named.setdefault((chosen == rates[-1], *rates), []).append(name)
  return [
    f'learning rates of {study.tuned_by}: the {"largest" if largest else "smallest"} of '
    f'{", ".join(f"{rate:g}" for rate in rates)} was the best for {_enumerated(names)}; a '
    f'{"larger" if largest else "smaller"} one was not tried'
    for (largest, *rates), names in sorted(named.items())
  ]


def varying(keys: Sequence[str]) -> set[str]:
  """The words of keys ('axis=value ...') that not all of them have."""
  sets = [set(key.split()) for key in keys]
  if not sets:
    return set()
  return functools.reduce(operator.or_, sets) - functools.reduce(operator.and_, sets)


def _enumerated(names: Sequence[str]) -> str:
  *others, last = sorted(names)
  return f'{", ".join(others)} and {last}' if others else last


def _differences(there: Mapping[str, Any], here: ml_collections.ConfigDict) -> list[str]:
  """Fields that the tuning should have had as the study has them."""
  tuned, asked = (
    {
      field: value
      for field, value in config_lib.flatten(config_lib.completed(base)).items()
      if not (grid.is_place(field) or field.startswith(FREE))
    }
    for base in (there, here)
  )
  return config_lib.differences(tuned, asked)


def _other_methods(there: Mapping[str, Any], here: ml_collections.ConfigDict) -> list[str]:
  """Own methods that the tuning defined in another way under the same name."""
  tuned, asked = there.get('own_methods') or {}, here.own_methods
  both = [name for name in asked if name in tuned]
  return [
    f'own_methods.{name}.{words}'
    for name in both
    for words in config_lib.differences({**tuned[name]}, {**asked[name]})
  ]


def _seeds_of(tuned: Results) -> set[tuple[str, int]]:
  """('seed', 3) and ('data.seed', 3) of every run."""
  found = {('seed', record['axes']['seed']) for record in tuned.done}
  return found | {
    ('data.seed', record['config']['data']['seed'])
    for record in tuned.done
    if 'seed' in record.get('config', {}).get('data', {})
  }


def _planned(config: Mapping[str, Any]) -> int:
  """How many units a study has of each cell and variant, naive folds aside."""
  folds = config['base']['data'].get('folds', 0)
  return folds * config.get('repeats', 1) if folds else config['seeds']
