"""Advice as text: what each rule found, and the command of the training to try next."""

import shlex
import textwrap
from collections.abc import Sequence

from csba_jax.analysis.advice.rules import Finding, next_fields
from csba_jax.files import expanded
from csba_jax.runtime import text_table

WIDEST, NARROWEST = 100, 60  # columns of a line


def describe(findings: Sequence[Finding], workdir: str) -> str:
  """A row for each finding, and what to do next.

  Args:
    findings: of `rules.advise`.
    workdir: folder of the run, as it was given.
  """
  names = max(len(finding.rule) for finding in findings)
  indent = names + len('  not known  ')
  width = min(max(text_table.columns(), NARROWEST), WIDEST)
  lines = ['advice (a problem: yes, no, or not known)']
  for rule, verdict, text, _ in findings:
    first, *rest = textwrap.wrap(text, width - indent, break_on_hyphens=False)
    lines.append(f'{rule:<{names}}  {verdict:<9}  {first}')
    lines += [' ' * indent + line for line in rest]
  return '\n'.join([*lines, f'next: {next_step(findings, workdir)}'])


def next_step(findings: Sequence[Finding], workdir: str) -> str:
  """The command of the training to try next, or what comes before one."""
  fields = next_fields(findings)
  if fields:
    where = workdir.rstrip('/') if workdir.strip('./') else str(expanded(workdir).resolve())
    changed = '-'.join(str(value) for value in fields.values())
    words = ['csba-train', f'--config={where}/config.json']
    words += [f'--config.{field}={value}' for field, value in fields.items()]
    return shlex.join([*words, f'--workdir={where}-{changed}'])
  found = [finding.rule for finding in findings if finding.verdict == 'yes']
  if found:
    return f'see first to: {found[0]}'
  if any(finding.verdict == 'not known' for finding in findings):
    return 'nothing that these numbers ask for; what is not known needs more validation images'
  return 'nothing that these numbers ask for'
