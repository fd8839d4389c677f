"""report.md, report.html and the picture of a study, and what a terminal shows of it."""

from pathlib import Path

from csba_jax.analysis import findings as findings_lib
from csba_jax.analysis import wording
from csba_jax.analysis.findings import Findings
from csba_jax.files import expanded, write_atomically
from csba_jax.report.study import content, markdown, page
from csba_jax.report.terminal import tuning
from csba_jax.run.workdir import writing_to
from csba_jax.study import results


def write(folder: str, pool: bool = False) -> str:
  """Analyses a study and writes its report beside its results; returns the summary.

  A study that only tunes has no report: its table is returned, and nothing is written.

  Args:
    folder: of the study.
    pool: see `results.read`.

  Raises:
    UserError: as `results.read` and `findings.analyse`, or a folder that cannot be written.
  """
  found = results.read(folder, pool)
  if not found.study['config'].get('test', True):
    return tuning.describe(found)
  findings = findings_lib.analyse(found)
  path = expanded(folder)
  with writing_to(path):
    for name, text in files(findings).items():
      _write(path / name, text)
  return f'{summary(findings)}\nwritten: {path}/report.md, {path}/report.html'


def _write(path: Path, text: str) -> None:
  write_atomically(path, lambda file: file.write(text.encode()))


def files(findings: Findings) -> dict[str, str]:
  """The content of each file of a report; report.md shows the picture where there is one."""
  made = {'report.md': markdown.render(findings), 'report.html': page.render(findings)}
  drawn = page.forest(findings)
  return made | ({content.FOREST: drawn} if drawn else {})


def summary(findings: Findings) -> str:
  """The claims and the pairs of methods with their verdicts, and the notes."""
  lines = [f'{claim.title}: {claim.verdict}' for claim in findings.claims]
  of_methods = [c for c in findings.method_pairs if c.verdict]
  cells = [c.cell for c in of_methods]
  for c in of_methods:
    where = wording.cell(c.cell, cells)
    lines.append(f'{wording.versus(c)}{f", {where}" * bool(where)}: {c.verdict}')
  return '\n'.join([*lines, *(f'note: {note}' for note in findings.notes)])
