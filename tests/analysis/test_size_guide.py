"""Conflict against the outcome over widths and depths of a net."""

import copy
import itertools
import json
import re
import runpy
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from csba_jax.analysis import findings, size_guide
from csba_jax.analysis.comparisons import Study
from csba_jax.analysis.measured import Measured
from csba_jax.report.study import markdown, page
from csba_jax.study import results

simulated = types.SimpleNamespace(**runpy.run_path(Path(__file__).parents[1] / 'simulated.py'))
SIZES = list(itertools.product((0.125, 0.25, 0.5), (1, 2)))


@pytest.fixture(scope='module')
def sized(tmp_path_factory):
  """Six sizes of one variant, each with the runs of another seed of the simulator.

  After the start they differ in how many head-tail pairs are in conflict.
  """
  records = []
  for i, (width, depth) in enumerate(SIZES):
    about, some = simulated.make(seeds=5, variants=('none',), rng=i, conflict_effect=0)
    for record in copy.deepcopy(some):
      record['axes'] |= {'width': width, 'depth': depth}
      record['run'] += f'-w{width}-d{depth}'
      record['config_sha256'] = 'same'
      for entry in (e for e in record['conflict'] if e['at'] != '0'):
        gram = entry['grams']['common']
        for k in (2, 3, 5, 6)[: (5 * i) % 4]:  # of 10 in the upper triangle: (0, 2), (0, 3), ...
          gram[k] = abs(gram[k])
      records.append(record)
  return simulated.write(tmp_path_factory.mktemp('sized'), about, records)


def test_correlation_over_sizes_is_spearmans_of_the_means(sized):
  study = Study(results.read(sized), resamples=99)
  found = size_guide.size_guides(Measured(study))
  assert [(d.at, d.measure) for d in found] == list(
    itertools.product(size_guide.SNAPSHOTS, size_guide.MEASURES)
  )
  for one in found:
    assert [(c['width'], c['depth']) for c in one.cells] == [
      (dict(cell)['width'], dict(cell)['depth']) for cell in study.cells
    ]
    if np.ptp(one.conflict) == 0:  # the simulator's nets all start alike
      assert np.isnan(one.correlation.value)
      continue
    expected = scipy.stats.spearmanr(one.conflict, one.outcome).statistic
    np.testing.assert_allclose(one.correlation.value, expected)
    assert one.correlation.n == len(SIZES)
    assert 'sizes' in one.correlation.method
  scores = [
    np.mean([results.outcome(r, 'macro_f1') for r in study.results.runs(cell, 'none').values()])
    for cell in study.cells
  ]
  np.testing.assert_allclose(found[0].outcome, scores)


def test_sizes_are_compared_on_the_units_that_all_have(sized, tmp_path):
  lines = (sized / 'results.jsonl').read_text().splitlines(keepends=True)
  (tmp_path / 'results.jsonl').write_text(''.join(lines[1:]))
  (tmp_path / 'study.json').write_text((sized / 'study.json').read_text())
  study = Study(results.read(tmp_path), resamples=99)
  found = size_guide.size_guides(Measured(study))[0]
  assert '4 units' in found.correlation.method
  assert len(found.cells) == len(SIZES)
  note = 'conflict as a guide to size: none without seed 0, which not every size has'
  assert size_guide.left_out(study) == [note]
  assert note in findings.analyse(study.results, resamples=99).notes


def test_a_variant_without_a_run_of_some_size_is_named(sized, tmp_path):
  records = [json.loads(line) for line in (sized / 'results.jsonl').read_text().splitlines()]
  about = json.loads((sized / 'study.json').read_text())
  assert size_guide.left_out(Study(results.read(sized), resamples=99)) == []
  more = [
    record | {'axes': record['axes'] | {'variant': 'se'}, 'run': f'se-{record["run"]}'}
    for record in records
    if (record['axes']['width'], record['axes']['depth']) != (0.25, 2)
  ]
  study = Study(results.read(simulated.write(tmp_path, about, records + more)), resamples=99)
  assert {d.variant for d in size_guide.size_guides(Measured(study))} == {'none'}
  assert size_guide.left_out(study) == [
    'conflict as a guide to size: se is left out, without a run of width 0.25 and depth 2'
  ]


def test_a_study_of_one_size_has_no_size_guide(tmp_path):
  study = Study(results.read(simulated.study(tmp_path, seeds=3, variants=('none',))), resamples=99)
  assert size_guide.size_guides(Measured(study)) == ()


def independent(folder):
  """The table of the size guide from the lines of results.jsonl alone.

  Returns:
    {(width, depth): (head-tail conflict at each snapshot, macro-F1)}, means over runs.
  """
  of_size = {}
  for line in (folder / 'results.jsonl').read_text().splitlines():
    record = json.loads(line)
    conflicts = []
    for at in size_guide.SNAPSHOTS:
      (entry,) = (e for e in record['conflict'] if (e['at'], e['part']) == (at, 'train'))
      gram, packed = np.zeros((4, 4)), iter(entry['grams']['common'])
      for i, j in itertools.combinations_with_replacement(range(4), 2):
        gram[i, j] = gram[j, i] = next(packed)
      # the classes of more than 100 images are the first two; conflict: a negative product
      pairs = [(head, tail) for head in (0, 1) for tail in (2, 3)]
      conflicts.append(np.mean([gram[pair] < 0 for pair in pairs]))
    confusion = np.array(record['result']['confusion_matrix'])
    f1 = 2 * np.diag(confusion) / (confusion.sum(0) + confusion.sum(1))
    size = (record['axes']['width'], record['axes']['depth'])
    of_size.setdefault(size, []).append((*conflicts, f1.mean()))
  return {size: np.mean(values, 0) for size, values in of_size.items()}


def rows_of(table):
  return [[cell.strip() for cell in line.strip('| ').split(' | ')] for line in table[2:]]


def number(text):
  return float(text.replace('\N{MINUS SIGN}', '-'))


def test_the_size_tables_of_the_report_are_those_of_the_runs(sized):
  found = findings.analyse(results.read(sized), resamples=99)
  text = markdown.render(found)
  section = text.partition('## Conflict as a guide to depth and width\n')[2].partition('\n## ')[0]
  correlations, sizes = (
    block.splitlines() for block in section.split('\n\n') if block.startswith('| ')
  )
  wanted = independent(sized)

  head = [cell.strip() for cell in sizes[0].strip('| ').split(' | ')]
  assert head == ['size', 'conflict, start', 'conflict, 10 %', 'conflict, end', 'macro-F1']
  shown = {name: [number(cell) for cell in cells] for name, *cells in rows_of(sizes)}
  assert len(shown) == len(SIZES)
  for (width, depth), values in wanted.items():
    # three digits are shown
    np.testing.assert_allclose(shown[f'width {width:g}, depth {depth}'], values, atol=0.00051)

  scores = [values[-1] for values in wanted.values()]
  rows = [row for row in rows_of(correlations) if row[1] == 'head-tail conflict']
  assert [row[2] for row in rows] == ['start', '10 %', 'end']
  assert all((row[0], row[3]) == ('none', str(len(SIZES))) for row in rows)
  assert rows[0][4] == '–'  # all nets start alike
  for row, at in zip(rows[1:], (1, 2), strict=True):
    conflict = [values[at] for values in wanted.values()]
    expected = scipy.stats.spearmanr(conflict, scores).statistic
    np.testing.assert_allclose(number(row[4]), expected, atol=0.0051)
  assert len(rows_of(correlations)) == len(size_guide.SNAPSHOTS) * len(size_guide.MEASURES)


def test_the_page_has_the_same_size_tables(sized):
  found = findings.analyse(results.read(sized), resamples=99)
  section = page.render(found).partition('<section id="size-guide">')[2].partition('</section>')[0]
  rows = re.findall('<tr>(.*?)</tr>', section)
  cells = [re.findall('<t[dh][^>]*>(.*?)</t[dh]>', row) for row in rows]
  text = markdown.render(found)
  same = text.partition('## Conflict as a guide to depth and width\n')[2].partition('\n## ')[0]
  tables = [block.splitlines() for block in same.split('\n\n') if block.startswith('| ')]
  assert [row for row in cells if row[0] not in ('variant', 'size')] == [
    row for table in tables for row in rows_of(table)
  ]
