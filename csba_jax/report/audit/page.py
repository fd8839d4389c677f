"""The report of an audit as a page of HTML, and all files of an audit."""

import pathlib

from csba_jax.data import audit as audit_lib
from csba_jax.data.audit import Audit
from csba_jax.report.audit import content
from csba_jax.report.html.document import document

LEAD = 'What there is in the folder, and what to look at before a net is trained on it.'


def render(audit: Audit) -> str:
  """The whole page; it holds thumbnails, so keep it as private as the photos."""
  return document(content.title(audit), LEAD, content.sections(audit), photos=True)


def write(audit: Audit, folder: pathlib.Path) -> list[pathlib.Path]:
  """Writes audit.json, audit.html and copies.csv.

  Raises:
    UserError: they cannot be written.
  """
  paths = audit_lib.save(audit, folder)
  return [*paths, *audit_lib.write_all(folder, {'audit.html': render(audit)})]
