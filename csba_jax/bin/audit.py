"""csba-audit FOLDER [--workdir=DIR] [--layout=auto|classes]

Looks at a folder of photos, CLASS/photo.jpg, before a net is trained on it: photos of each class,
sizes, files that are unreadable or odd, and copies, also those in different classes. With --workdir
it writes audit.json, a page audit.html with thumbnails, and copies.csv, which keeps copies on one
side of every split.
Example: csba-audit photos --workdir=runs/photos
"""

from pathlib import Path

from absl import flags

from csba_jax.bin import _main

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for audit.json, audit.html and copies.csv.')
_LAYOUT = flags.DEFINE_enum(
  'layout',
  'auto',
  ('auto', 'classes'),
  'auto: folders train, val and test with class folders inside are parts. classes: they are '
  'classes.',
)


def main(folder: str) -> int:
  """Prints what there is in the folder, and writes it."""
  from csba_jax.data import audit
  from csba_jax.files import expanded
  from csba_jax.report.audit import content, page

  if _WORKDIR.value:
    audit.check_outside(folder, _WORKDIR.value)
  found = _main.unless_stopped(
    lambda tick: audit.audit_folder(folder, _LAYOUT.value, tick), 'stopped: nothing was written'
  )
  print(content.describe(found))
  if _WORKDIR.value:
    workdir: Path = expanded(_WORKDIR.value)
    for path in page.write(found, workdir):
      print(f'written: {path}')
    if found.copies:
      print(f'flags that keep copies on one side of every split: {content.use_of_copies(workdir)}')
  return 0


def cli() -> None:
  """Entry point of the console script."""
  _main.run(main, operand='FOLDER')


if __name__ == '__main__':
  cli()
