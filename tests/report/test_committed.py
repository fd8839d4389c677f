"""The reports under results/ are those that their results make."""

import itertools
import re
from pathlib import Path

import pytest

from csba_jax.analysis import findings
from csba_jax.report.study import write
from csba_jax.study import results

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STUDIES = sorted(path.parent.name for path in ROOT.glob('results/*/report.md'))
NUMBER = re.compile(r'-?\d+(?:\.\d+)?(?:e[-+]\d+)?')


def alike(a, b):
  """The same to the letter, but that the last decimal of a number may be the next one.

  Another SciPy, or another processor, may sum in another order: what lies between two roundings
  then goes to either side. Whole numbers are counts, and the same.
  """
  if NUMBER.split(a) != NUMBER.split(b):
    return False
  return all(
    x == y or near(x, y) for x, y in zip(NUMBER.findall(a), NUMBER.findall(b), strict=True)
  )


def near(x, y):
  if not {'.', 'e'} & set(x + y):
    return False
  unit = max(10.0 ** -len(text.partition('e')[0].partition('.')[2]) for text in (x, y))
  power = max(10.0 ** int(text.partition('e')[2] or 0) for text in (x, y))
  return abs(float(x) - float(y)) < 1.01 * unit * power


@pytest.mark.parametrize('name', STUDIES)
def test_reports_are_those_of_the_results(name):
  folder = ROOT / 'results' / name
  found = findings.analyse(results.read(folder))
  for file, text in write.files(found).items():
    committed = (folder / file).read_text(encoding='utf-8')
    lines = itertools.zip_longest(committed.splitlines(), text.splitlines(), fillvalue='')
    # not the whole texts: pytest would be minutes over their differences
    wrong = [(i, a[:300], b[:300]) for i, (a, b) in enumerate(lines, 1) if not alike(a, b)]
    assert not wrong[:3], (
      f'{len(wrong)} lines of {file}: csba-report --workdir=results/{name} makes it anew'
    )


@pytest.mark.parametrize(
  ('a', 'b', 'wanted'),
  [
    ('0.123 [−0.050, 0.2]', '0.124 [−0.051, 0.3]', True),
    ('0.123', '0.125', False),
    ('M60 17.1h-3', 'M60 17.2h-3', True),
    ('1.23e+05', '1.24e+05', True),
    ('1.23e+05', '1.25e+05', False),
    ('M9.9 1', 'M10 1', True),  # a coordinate is as short as it can be
    ('3 pairs of seeds', '3 pairs of folds', False),
    ('n = 5', 'n = 6', False),
    ('+0.001', '−0.001', False),
  ],
)
def test_alike(a, b, wanted):
  assert alike(a, b) == wanted
