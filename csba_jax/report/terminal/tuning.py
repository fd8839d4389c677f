"""What a study of learning rates found, as a table."""

import numpy as np

from csba_jax.runtime import text_table
from csba_jax.study import tuning
from csba_jax.study.results import Results


def describe(found: Results) -> str:
  """Mean validation score of every learning rate, the chosen one with a star."""
  scores = tuning.scores(found)
  rates = sorted({rate for by_rate in scores.values() for rate in by_rate})
  varying = tuning.varying(list(scores))
  rows = [['mean validation score at learning rate', *(f'{rate:g} ' for rate in rates)]]
  for key, by_rate in scores.items():
    best = tuning.best(by_rate)
    cells = [
      f'{np.mean(by_rate[rate]):.3f}{"*" if rate == best else " "}' if rate in by_rate else '- '
      for rate in rates
    ]
    rows.append([' '.join(word for word in key.split() if word in varying) or key, *cells])
  runs = sorted({len(values) for by_rate in scores.values() for values in by_rate.values()})
  number = f'{runs[0]}' if len(runs) == 1 else f'{runs[0]} to {runs[-1]}'
  return f'{text_table.align(rows)}\n* chosen; runs a number: {number}; no test part was looked at'
