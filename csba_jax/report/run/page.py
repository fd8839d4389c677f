"""The report of a run as a page of HTML."""

from pathlib import Path

from csba_jax.analysis import run_facts
from csba_jax.analysis.run_facts import RunFacts
from csba_jax.files import expanded, write_atomically
from csba_jax.report.html.document import document
from csba_jax.report.run import content
from csba_jax.run.workdir import writing_to

FILE = 'report.html'
LEAD = 'How good the net is for each class, what it gets wrong, and what to try next.'


def render(facts: RunFacts) -> str:
  """The whole page; it holds test images, so keep it as private as the photos."""
  makers = (
    content.results,
    content.advice,
    content.confusion,
    content.mistakes,
    content.conflict,
    content.data_on_page,
  )
  return document(content.title(facts), LEAD, [make(facts) for make in makers], photos=True)


def write(workdir: str) -> Path:
  """Writes report.html into the folder of a finished run; returns its path.

  Raises:
    UserError: there is no finished run, or the page cannot be written.
  """
  page = render(run_facts.with_mistakes(run_facts.facts_of(workdir)))
  path = expanded(workdir) / FILE
  with writing_to(path.parent):
    write_atomically(path, lambda file: file.write(page.encode()))
  return path
