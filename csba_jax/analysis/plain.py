"""Each link of the argument in one sentence, for a reader who knows no statistics."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from csba_jax.analysis import wording
from csba_jax.analysis.comparisons import Study
from csba_jax.analysis.conflict import END
from csba_jax.analysis.types import (
  REFUTED,
  SUPPORTED,
  UNDECIDED,
  UNTESTED,
  VERDICTS,
  Comparison,
  Link,
)

MOST_NAMED = 3  # conditions whose numbers are written out; of more, the smallest and the largest


@dataclasses.dataclass(frozen=True)
class Statement:
  """What a verdict on one link means, and the numbers that go with it."""

  study: Study
  says: Mapping[str, str]  # by verdict; of UNTESTED what was not tested, 'whether ...'
  title: str  # of the numbers, such as 'difference of macro-F1'
  # of a Comparison or a Link, None for what is not shown; of several of one condition the lowest is
  number: Callable[[Any], float | None]

  def of(
    self,
    verdict: str,
    numbers: Sequence[Comparison | Link],
    pair: tuple[str, str],
    conditions: int,
    failed: str = '',
  ) -> str:
    """One sentence.

    Args:
      verdict: on the link.
      numbers: the comparisons or links that it was read off.
      pair: (treatment, control) that decides.
      conditions: in which something was measured.
      failed: title of the link that this one rests on, if that one is not supported.
    """
    if verdict == UNTESTED:
      why = f'"{failed}" is {REFUTED}' if failed else 'nothing was run or measured that could tell'
      return f'It was not tested {self.says[UNTESTED]}: {why}.'
    shown: dict[str, float] = {}
    for one in numbers:
      value = self.number(one) if (one.treatment, one.control) == pair else None
      if value is not None and math.isfinite(value):
        condition = wording.cell(one.cell, [dict(cell) for cell in self.study.main_cells])
        shown[condition] = min(value, shown.get(condition, math.inf))
    return f'{self.says[verdict]}{_listed(self.title, shown)}.'


def gain(study: Study, name: str, control: str) -> Statement:
  """On the primary outcome."""
  outcome, smallest = wording.metric(study.outcome), study.smallest_effect
  enough = f' by {smallest:g} or more, the smallest gain that would matter' if smallest else ''
  return Statement(
    study,
    {
      SUPPORTED: f'{name} has a higher {outcome} than {control}',
      REFUTED: f'{name} does not raise {outcome} over {control}{enough}',
      UNDECIDED: f'It is open whether {name} has a higher {outcome} than {control}',
      UNTESTED: f'whether {name} has a higher {outcome} than {control}',
    },
    f'difference of {outcome}',
    lambda c: c.difference.value,
  )


def reduction(study: Study, name: str, control: str) -> Statement:
  """On gradient conflict; shown is head-tail conflict at the end of the run."""

  def number(c: Comparison) -> float | None:
    place = tuple(c.cell[key] for key in wording.PLACE)
    shown = place == (END, 'train', 'common') and c.outcome == 'head_tail_conflict'
    return c.difference.value if shown else None

  return Statement(
    study,
    {
      SUPPORTED: f'The gradients of the classes conflict less with {name} than with {control}',
      REFUTED: f'{name} does not reduce the conflict between the gradients of the classes by a '
      f'tenth or more, compared with {control}',
      UNDECIDED: f'It is open whether {name} reduces the conflict between the gradients of the '
      'classes',
      UNTESTED: f'whether {name} reduces the conflict between the gradients of the classes',
    },
    'difference of the share of head-tail pairs in conflict at the end of the run',
    number,
  )


def association(study: Study, name: str) -> Statement:
  """On conflict reduction against gain; shown is the correlation by the first measure."""

  def number(link: Link) -> float | None:
    return link.within.value if link.verdict and link.measure.startswith('mean negative') else None

  return Statement(
    study,
    {
      SUPPORTED: f'Where {name} reduces the conflict of a class more, the class gains more F1',
      REFUTED: f'Where {name} reduces the conflict of a class more, the class gains no more F1',
      UNDECIDED: 'It is open whether less conflict goes with more F1',
      UNTESTED: 'whether less conflict goes with more F1',
    },
    'rank correlation of the reduction with the gain',
    number,
  )


def offset(study: Study, name: str, control: str) -> Statement:
  """On accuracy and head F1; shown is the lower of the two differences."""
  margin = f'{study.margin:g}'
  return Statement(
    study,
    {
      SUPPORTED: f'{name} costs less than {margin} of accuracy and of F1 of the large classes, '
      f'compared with {control}',
      REFUTED: f'{name} costs more than {margin} of accuracy and of F1 of the large classes, '
      f'compared with {control}',
      UNDECIDED: f'It is open whether {name} costs more than {margin} of accuracy or of F1 of the '
      'large classes',
      UNTESTED: f'whether {name} costs more than {margin} of accuracy or of F1 of the large '
      'classes',
    },
    'lower of the two differences',
    lambda c: c.difference.value,
  )


def overall(name: str, verdict: str, verdicts: Sequence[str]) -> str:
  """On the whole argument."""
  says = {
    SUPPORTED: f'{name} makes a better tail, and less conflict between classes goes with it',
    REFUTED: f'These runs do not support the argument that {name} makes a better tail by less '
    'conflict between classes',
    UNDECIDED: f'It is open whether {name} makes a better tail by less conflict between classes',
  }[verdict]
  numbers = [f'{verdicts.count(v)} {v}' for v in VERDICTS if v != UNTESTED or UNTESTED in verdicts]
  return f'{says}: of {len(verdicts)} links {", ".join(numbers)}.'


def _listed(title: str, shown: Mapping[str, Any]) -> str:
  """' (difference of macro-F1: −0.012 with drw; −0.019 with class balanced)'; '' of nothing."""
  if not shown:
    return ''
  words = {cell: wording.number(value, signed=True) for cell, value in shown.items()}
  if len(shown) == 1:
    return f' ({title}: {next(iter(words.values()))})'
  if len(shown) <= MOST_NAMED:
    return f' ({title}: {"; ".join(f"{value} with {cell}" for cell, value in words.items())})'
  low, high = (wording.number(end(shown.values()), signed=True) for end in (min, max))
  return f' ({title}: {low} to {high} in {len(shown)} conditions)'
