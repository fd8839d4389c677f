"""A study's report as Markdown: for a terminal, and for GitHub."""

from csba_jax.analysis.findings import Findings
from csba_jax.report import markdown
from csba_jax.report.markdown import escape
from csba_jax.report.study import content


def render(findings: Findings) -> str:
  """The whole report; text of users is escaped, so that it stays text."""
  parts = [f'# {escape(content.title(findings))}', markdown.paragraph(content.question(findings))]
  for section in content.sections(findings):
    blocks = markdown.render(section.blocks)
    if blocks:
      parts += [f'## {escape(section.title)}', *blocks]
  return '\n\n'.join(parts) + '\n'
