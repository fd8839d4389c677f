"""Sphinx reads this file to build the pages: `make docs`, or python -m sphinx docs docs/_build."""

import pkgutil
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / '_ext')]

import docstrings  # noqa: E402

import csba_jax  # noqa: E402

project = 'csba_jax'
author = 'the csba_jax authors'
copyright = author
version = release = csba_jax.__version__

extensions = [
  'myst_parser',
  'sphinx.ext.autodoc',
  'sphinx.ext.napoleon',
  'sphinx.ext.viewcode',
  'mathml',
  'sphinx_copybutton',
  'sphinx_gallery.gen_gallery',
]
exclude_patterns = ['_build', 'images/README.md']

html_math_renderer = 'mathml'
html_theme = 'sphinx_book_theme'
html_title = 'csba_jax'
html_static_path = ['_static']
html_css_files = ['site.css']
html_theme_options = {
  'navbar_persistent': [],  # the search stands in the sidebar
  'show_navbar_depth': 1,
  'show_toc_level': 2,
  'use_download_button': False,
  'use_fullscreen_button': False,
}

myst_enable_extensions = ['dollarmath', 'amsmath', 'deflist', 'attrs_inline']
myst_heading_anchors = 3
myst_dmath_double_inline = True

default_role = 'py:obj'
smartquotes_action = 'D'  # dashes alone: 'label' is a key, and ... is an axis
autodoc_default_options = {'members': True, 'member-order': 'bysource'}
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'
autodoc_typehints_format = 'short'
autodoc_preserve_defaults = True
autodoc_class_signature = 'mixed'
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

sphinx_gallery_conf = {
  'examples_dirs': ['../examples'],
  'plot_gallery': False,  # they take a minute each: their pictures are kept in _static/examples
  'remove_config_comments': True,
  'show_memory': False,
  'write_computation_times': False,
  'thumbnail_size': (320, 280),
  'gallery_dirs': ['gallery'],
}


def modules_of(package: str) -> list[str]:
  """Names of the modules of a package, packages inside of it included."""
  path = HERE.parent / package.replace('.', '/')
  return sorted(
    found.name for found in pkgutil.walk_packages([str(path)], f'{package}.') if not found.ispkg
  )


def insert_modules(app, docname, source):
  """Puts a section for each module of a package in place of <!-- modules of PACKAGE -->."""

  def sections(found):
    return '\n\n'.join(
      f'## {name.removeprefix(found[1] + ".")}\n\n```{{eval-rst}}\n.. automodule:: {name}\n```'
      for name in modules_of(found[1])
    )

  source[0] = re.sub(r'<!-- modules of ([\w.]+) -->', sections, source[0])


def read_docstring(app, what, name, obj, options, lines):
  """Docstrings as Sphinx wants them; fields of a class with the comments behind them."""
  lines[:] = docstrings.readable(lines + (docstrings.attributes(obj) if what == 'class' else []))


def read_signature(app, what, name, obj, options, signature, annotation):
  """Signatures of Flax modules without what Flax adds to them."""
  if signature:
    signature = re.sub(r', parent=<[^>]*>, name=None', '', signature)
    signature = re.sub(r'<function (\w+)>', r'\1', signature)
    signature = signature.replace('lambda : ...', 'lambda: None')
    signature = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r'\1', signature)
  return signature, annotation


def skip_member(app, what, name, obj, skip, options):
  """A default that is a type or a function is no member of its own, nor is a field of a tuple."""
  default = what == 'class' and name in ('dtype', 'gradient_fn')
  return True if default or type(obj).__name__ == '_tuplegetter' else None


def repair_links(app, pagename, templatename, context, doctree):
  """The links [docs] of source pages, to what is documented under the name of its package.

  sphinx.ext.viewcode keeps one name for each module, and csba_jax.gradients has the names of its.
  """
  if not pagename.startswith('_modules/csba_jax/gradients/'):
    return
  module = pagename.removeprefix('_modules/').replace('/', '.')
  known = app.env.domaindata['py']['objects']

  def repaired(found):
    name = f'{module}.{found[1]}'
    return f'#{name}"' if name in known and not known[name].aliased else found[0]

  context['body'] = re.sub(r'#csba_jax\.gradients\.([\w.]+)"', repaired, context['body'])


def setup(app):
  """Connects what is written here."""
  app.connect('source-read', insert_modules)
  app.connect('autodoc-process-signature', read_signature)
  app.connect('autodoc-skip-member', skip_member)
  app.connect('html-page-context', repair_links)
  app.connect('autodoc-process-docstring', read_docstring, priority=1)
