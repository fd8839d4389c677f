"""Conflict against the outcome over widths and depths of a net."""

import copy
import itertools
import json
import runpy
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from csba_jax.analysis import findings, size_guide
from csba_jax.analysis.comparisons import Study
from csba_jax.analysis.conflict import Measured
from csba_jax.report.study import markdown, page
from csba_jax.study import results

simulated = types.SimpleNamespace(**runpy.run_path(Path(__file__).parents[1] / 'simulated.py'))
SIZES = list(itertools.product((0.125, 0.25, 0.5), (1, 2)))


@pytest.fixture(scope='module')
def sized(tmp_path_factory):
  """Six sizes of one variant, each with the runs of another seed of the simulator."""
  records = []
  for i, (width, depth) in enumerate(SIZES):
    about, some = simulated.make(seeds=5, variants=('none',), rng=i, conflict_effect=0)
    for record in copy.deepcopy(some):
      record['axes'] |= {'width': width, 'depth': depth}
      record['run'] += f'-w{width}-d{depth}'
      record['config_sha256'] = 'same'
      records.append(record)
  return simulated.write(tmp_path_factory.mktemp('sized'), about, records)


def test_correlation_over_sizes_is_spearmans_of_the_means(sized):
  study = Study(results.read(sized), resamples=99)
  found = size_guide.design(Measured(study))
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
  found = size_guide.design(Measured(study))[0]
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
  assert {d.variant for d in size_guide.design(Measured(study))} == {'none'}
  assert size_guide.left_out(study) == [
    'conflict as a guide to size: se is left out, without a run of width 0.25 and depth 2'
  ]


def test_a_study_of_one_size_has_no_design(tmp_path):
  study = Study(results.read(simulated.study(tmp_path, seeds=3, variants=('none',))), resamples=99)
  assert size_guide.design(Measured(study)) == ()


def test_both_reports_show_it(sized):
  found = findings.analyse(results.read(sized), resamples=99)
  for text in (markdown.render(found), page.render(found)):
    assert 'Conflict as a guide to depth and width' in text
