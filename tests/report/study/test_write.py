"""The report of a study's folder: both files, the summary, and what is no report."""

import runpy
import types
from pathlib import Path

import pytest

from csba_jax.analysis import findings
from csba_jax.errors import UserError
from csba_jax.report.study import markdown, page, write
from csba_jax.study import results

simulated = types.SimpleNamespace(**runpy.run_path(Path(__file__).parents[2] / 'simulated.py'))
FILES = ['results.jsonl', 'study.json']


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def small(folder, **options):
  return simulated.study(folder, **{'seeds': 2, 'variants': ('none', 'csba'), **options})


def test_both_files_and_the_summary(tmp_path):
  summary = write.write(str(small(tmp_path))).splitlines()
  found = findings.analyse(results.read(tmp_path))
  assert names(tmp_path) == ['forest.svg', 'report.html', 'report.md', *FILES]
  assert (tmp_path / 'forest.svg').read_text(encoding='utf-8') == page.forest(found)
  assert (tmp_path / 'report.md').read_text(encoding='utf-8') == markdown.render(found)
  assert (tmp_path / 'report.html').read_text(encoding='utf-8') == page.render(found)
  claims = [f'{claim.title}: {claim.verdict}' for claim in found.claims]
  notes = [f'note: {note}' for note in found.notes]
  assert len(claims) == 6
  assert len(notes) == 2  # too few seeds, and no snapshot of the tested net
  written = f'written: {tmp_path}/report.md, {tmp_path}/report.html'
  assert summary == [*claims, *notes, written]


def test_again_gives_the_same_files(tmp_path):
  small(tmp_path, variants=('none',))
  write.write(str(tmp_path))
  before = {path: path.read_bytes() for path in tmp_path.iterdir()}
  write.write(str(tmp_path))
  assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_study_that_only_tunes_has_a_table_and_no_report(tmp_path):
  simulated.write(tmp_path, *simulated.tuning({'none': {0.1: [0.5], 0.2: [0.75]}}))
  text = write.write(str(tmp_path))
  assert '0.750*' in text
  assert names(tmp_path) == FILES


@pytest.mark.parametrize('taken', ['report.md', 'report.html'])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, taken):
  small(tmp_path, variants=('none',))
  (tmp_path / taken).mkdir()  # stops root too, whom a mode would not
  with pytest.raises(UserError, match=f'can be written at {tmp_path}; found ') as caught:
    write.write(str(tmp_path))
  assert '\n' not in str(caught.value)
  assert not [name for name in names(tmp_path) if name.startswith('.')]


def test_runs_of_different_versions_only_together_on_demand(tmp_path):
  about, records = simulated.make(seeds=2, variants=('none',))
  records[0]['versions'] = records[0]['versions'] | {'numpy': '2.5.0'}
  simulated.write(tmp_path, about, records)
  with pytest.raises(UserError, match='--pool'):
    write.write(str(tmp_path))
  assert names(tmp_path) == FILES
  assert 'note: pooled: versions.numpy: 2.4.0 in 1 runs, 2.5.0 in 1' in write.write(
    str(tmp_path), pool=True
  )


def test_no_study(tmp_path):
  with pytest.raises(UserError, match='no study.json there'):
    write.write(str(tmp_path / 'nix'))
