"""Learning rates chosen by a study that keeps validation scores alone."""

from csba_jax import grid, results
from csba_jax.errors import UserError
from csba_jax.results import Results


def scores(found: Results) -> dict[str, dict[float, list[float]]]:
  """Validation scores of a tuning study's runs, {`grid.rate_key`: {learning rate: [score, ...]}}.

  Raises:
    UserError: no finished run, or one without a learning rate of its own or a validation part.
  """
  if not found.done:
    raise UserError(
      'at least one finished run',
      f'{len(found.failed)} failed ones, the first with: {found.failed[0]["error"]}',
      'mend the cause and start that study again',
    )
  by_key: dict[str, dict[float, list[float]]] = {}
  for record in found.done:
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


def chosen_rates(folder: str) -> dict[str, float]:
  """The best learning rate by `grid.rate_key`, of the tuning study in a folder.

  Raises:
    UserError: no such study, or rates that have not the same number of runs: it is not finished.
  """
  study = results.read(folder)
  found = scores(study)
  for key, by_rate in found.items():
    planned = {*study.study['config'].get('learning_rates', ()), *by_rate}
    numbers = {len(by_rate.get(rate, ())) for rate in planned}
    if len(numbers) > 1:
      raise UserError(
        f'as many runs of every learning rate in {folder}',
        f'{min(numbers)} to {max(numbers)} for {key}',
        'start that study again: it does what is missing',
      )
  return {key: best(by_rate) for key, by_rate in found.items()}
