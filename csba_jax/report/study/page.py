"""A study's report as one page of HTML."""

from csba_jax.analysis.findings import Findings
from csba_jax.report.html import svg
from csba_jax.report.html.blocks import Figure
from csba_jax.report.html.document import document, style_sheet
from csba_jax.report.study import content


def render(findings: Findings) -> str:
  """The whole page."""
  sections = content.sections(findings)
  return document(content.title(findings), content.question(findings), sections)


def forest(findings: Findings) -> str:
  """The picture of the summary as the content of an SVG file; '' of findings without one."""
  for section in content.sections(findings):
    for block in section.blocks:
      if isinstance(block, Figure) and block.file == content.FOREST:
        return svg.standalone(block.draw()[0], style_sheet('figure.css'))
  return ''
