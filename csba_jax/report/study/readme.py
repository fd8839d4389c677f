"""The results section of results/README.md, made from the folders of the studies."""

import os
from pathlib import Path

from csba_jax.analysis import findings as findings_lib
from csba_jax.analysis import wording
from csba_jax.analysis.findings import Findings
from csba_jax.errors import UserError
from csba_jax.files import expanded, write_atomically
from csba_jax.report import markdown
from csba_jax.report.study import content, figures
from csba_jax.run.workdir import writing_to
from csba_jax.runtime import plain
from csba_jax.study import results

BEGIN, END = '<!-- results: made by csba-report --readme -->', '<!-- end of results -->'
METRICS = ('accuracy', 'balanced_accuracy')  # beside the primary outcome and macro-F1
MOST_CLASSES = 20  # whose training images are listed


def update(readme: str, folder: str, pool: bool = False) -> str:
  """Puts the section of all studies under a folder between the marks of a README; says what it did.

  Args:
    pool: see `results.read`.

  Raises:
    UserError: no studies there, a README without the marks, or one that cannot be written.
  """
  path = expanded(readme)
  try:
    before = path.read_bytes().decode()  # not read_text: line ends stay as they are
  except (OSError, UnicodeDecodeError) as error:
    found = getattr(error, 'strerror', None) or str(error)
    raise UserError(f'a README in UTF-8 at {path}', found, 'correct --readme') from error
  after = replaced(before, section(Path(folder), pool, path.parent), str(path))
  with writing_to(path.parent):
    write_atomically(path, lambda file: file.write(after.encode()))
  return f'{path} {"is as it was" if after == before else "updated"}'


def replaced(readme: str, text: str, name: str = 'README.md') -> str:
  """The README with this text between its marks."""
  if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(END) < readme.index(BEGIN):
    raise UserError(f'the lines {BEGIN} and {END} in {name}, once each', 'not so', 'put them back')
  head, _, rest = readme.partition(BEGIN)
  return f'{head}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}'


def section(folder: Path, pool: bool = False, beside: Path | None = None) -> str:
  """Every study under a folder, in the order of names, those that only tune left out.

  Args:
    beside: folder of the README, from where the links lead; the working directory by default.
  """
  parts = []
  for path in sorted(folder.glob('*/study.json')):
    found = results.read(path.parent, pool)
    if found.study['config'].get('test', True):
      link = os.path.relpath(path.parent, beside)
      parts.append(of_study(findings_lib.analyse(found), Path(link).as_posix()))
  if not parts:
    raise UserError(f'studies under {folder}', 'none', 'run csba-study with a --workdir there')
  return '\n'.join(parts)


def of_study(findings: Findings, folder: str) -> str:
  """Verdicts, a picture, a table of scores, and where the rest is.

  Args:
    folder: of the study, as a link from the README.
  """
  about = findings.about
  lines = [
    f'### {markdown.escape(findings.name)}',
    '',
    f'{about["runs"]} runs, {about["failed"]} failed; {len(findings.class_names)} classes, images '
    f'to train in the first condition: {markdown.escape(_training_images(findings))}. '
    f'{markdown.escape("; ".join(about["devices"]))}, JAX {about["versions"].get("jax", "?")}. '
    f'Whole report: [{folder}/report.md]({folder}/report.md), `report.html` beside it. Made by:',
    '',
    # as it is, but that no command can look like one of the marks
    *(f'    {plain.clean(command).replace("<!--", "<! --")}' for command in about['commands']),
    '',
    *_claims(findings),
    *_picture(findings, folder),
    *(f'{markdown.escape(note)}.\n' for note in findings.notes if note.startswith('pooled: ')),
    *(f'Caution: {markdown.escape(caution)}.\n' for caution in findings.cautions),
    *_scores(findings),
    *_method_pairs(findings),
  ]
  return '\n'.join(lines) + '\n'


def _claims(findings: Findings) -> list[str]:
  """The links with their verdicts; nothing for a study that asks nothing about attention."""
  rows = [f'| {markdown.escape(claim.title)} | **{claim.verdict}** |' for claim in findings.claims]
  return ['| link of the argument | verdict |', '| --- | --- |', *rows, ''] if rows else []


def _picture(findings: Findings, folder: str) -> list[str]:
  """The forest plot that `write.write` leaves in the study's folder, if the study has one."""
  if not any(c.verdict for c in findings.comparisons):
    return []
  outcome = markdown.escape(findings.outcome)
  return [
    f'![forest plot]({folder}/{content.FOREST})',
    '',
    f'Primary differences of {outcome}, treatment − control, with their intervals.',
    '',
  ]


def _training_images(findings: Findings) -> str:
  """'Clean (149), Dusty (136), Broken (8)', the largest class first; of many classes both ends."""
  names, counts = findings.class_names, findings.class_counts[0]
  order = figures.order(findings, findings.cells[0])
  labels = [f'{plain.clean(names[c])} ({counts[c]:.0f})' for c in order]
  return ', '.join(labels) if len(labels) <= MOST_CLASSES else f'{labels[0]} to {labels[-1]}'


def _method_pairs(findings: Findings) -> list[str]:
  """Methods against methods on the primary outcome; nothing for a study without such pairs."""
  family = [c for c in findings.method_pairs if c.verdict]
  if not family:
    return []
  cells = [c.cell for c in family]
  rows = [
    f'| {markdown.escape(wording.cell(c.cell, cells) or "all")} '
    f'| {markdown.escape(wording.versus(c))} | {c.difference.n} '
    f'| {wording.interval(c.difference, signed=True, limits=c.limits)} '
    f'| {wording.probability(c.adjusted_p)} | **{c.verdict}** |'
    for c in family
  ]
  outcome = markdown.escape(findings.outcome)
  return [
    '',
    f'| condition | methods | pairs | difference of {outcome} | p (Holm) | a gain |',
    '| --- | --- | --- | --- | --- | --- |',
    *rows,
    '',
    'Method − its control, with 95 % intervals. Both runs of a pair have the same seed or fold. '
    'Where seeds share a subset of the training images, the subset counts once.',
  ]


def _scores(findings: Findings) -> list[str]:
  """Means over runs with 95 % intervals, a row for each condition and variant."""
  first = next(iter(findings.scores[0].metrics))
  names = list(dict.fromkeys([first, 'macro_f1', *METRICS]))
  names = [name for name in names if name in findings.scores[0].metrics]
  titles = [wording.METRICS.get(name, findings.outcome) for name in names]
  rows = [
    f'| condition | variant | parameters | runs | {" | ".join(map(markdown.escape, titles))} |',
    '| --- ' * (4 + len(names)) + '|',
  ]
  for score in findings.scores:
    metrics = ' | '.join(wording.interval(score.metrics[name]) for name in names)
    cell = markdown.escape(wording.cell(score.cell, findings.cells) or 'all')
    number = score.metrics[first].n
    rows.append(f'| {cell} | `{score.variant}` | {score.parameters:,} | {number} | {metrics} |')
  return [*rows, '', 'Means over runs with 95 % intervals in brackets, cut to 0 to 1.']
