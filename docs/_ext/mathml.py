"""Formulas as MathML, made when the site is built: readers need no script and no other server."""

from docutils import nodes
from latex2mathml.converter import convert


def visit_inline(self, node):
  """A formula inside of a line."""
  self.body.append(convert(node.astext()))
  raise nodes.SkipNode


def visit_block(self, node):
  """A formula on lines of its own."""
  self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>\n')
  raise nodes.SkipNode


def setup(app):
  """Sphinx calls this for every extension."""
  app.add_html_math_renderer('mathml', (visit_inline, None), (visit_block, None))
