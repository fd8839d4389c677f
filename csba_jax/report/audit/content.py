"""What the report of an audit says: its lines, and the sections of its page."""

import io
import math
import pathlib
import shlex
from collections.abc import Mapping, Sequence

import numpy as np

from csba_jax.data.audit import COPIES_COLUMN, COPIES_FILE, ODD, Audit
from csba_jax.data.decoding import Unreadable, decode_image
from csba_jax.data.image_folder import read_image
from csba_jax.files import expanded
from csba_jax.report.html import svg
from csba_jax.report.html.blocks import Block, Code, Figure, Items, Photos, Section, Table, Text
from csba_jax.runtime import plain, text_table

SHOWN = 24  # sets of copies with thumbnails, for each kind
IN_A_SET = 4  # thumbnails of one set
NAMED = 12  # files that one line or list names
THUMBNAIL, QUALITY = 128, 80  # pixels, and of JPEG
LARGE = 10  # photos of a set that should be looked at
FEW = 20  # photos of a class, below which a score of it says little
_WIDE = 640  # pixels of the figure


def describe(audit: Audit) -> str:
  """Counts, sizes, copies and odd files as text for a terminal."""
  rows = [['class', 'photos', 'copies of others']]
  counts, redundant = audit.class_counts, audit.redundant
  for c in _by_size(audit):
    rows.append([plain.clean(audit.class_names[c]), f'{counts[c]:,}', f'{redundant[c]:,}'])
  lines = [title(audit), '', text_table.align(rows), '', *facts(audit)]
  for together in audit.across_classes[:NAMED]:
    lines.append(f'  {_listed(together, " = ")}')
  if len(audit.across_classes) > NAMED:
    lines.append(f'  and {len(audit.across_classes) - NAMED:,} more')
  for name, reason in audit.unreadable[:NAMED]:
    lines.append(f'  unreadable: {plain.clean(name)} ({reason})')
  if len(audit.unreadable) > NAMED:
    lines.append(f'  and {len(audit.unreadable) - NAMED:,} more that cannot be read')
  return '\n'.join(lines)


def title(audit: Audit) -> str:
  """'photos: 878 photos of 6 classes'."""
  name = expanded(audit.folder).resolve().name or audit.folder
  number = int(audit.readable.sum())
  return plain.clean(f'{name}: {number:,} photos of {len(audit.class_names)} classes')


def facts(audit: Audit) -> list[str]:
  """One sentence on each thing that was found; what is wrong comes last."""
  return [*_balance(audit), *_files(audit), *_copies(audit)]


def sections(audit: Audit) -> list[Section]:
  """The page: classes, files, and copies with thumbnails."""
  found = [Section('Classes', 'classes', _classes(audit)), Section('Files', 'files', _odd(audit))]
  across, inside = audit.across_classes, _others(audit)
  if across:
    lead = (
      'Photos of a row are copies of each other, or look the same, and lie in different classes. '
      'At least one label of each row is wrong, or the classes overlap. Look at them first.'
    )
    found.append(Section('Labels to check', 'labels', [Text(lead), *_rows(audit, across)]))
  if audit.across_parts:
    lead = (
      'Photos of a row are copies of each other, or look the same, and lie in different parts. If '
      'one of them is trained on, scores of the other part are too good. Move them into one part.'
    )
    found.append(
      Section('Copies in two parts', 'parts', [Text(lead), *_rows(audit, audit.across_parts)])
    )
  if inside:
    exact = set(audit.identical)
    lead = (
      'Photos of a row are byte-identical, or look the same. A copy of a training photo in the '
      'test part makes the score too good. If photos of a row are no copies, remove their lines '
      f'from {COPIES_FILE}.'
    )
    alike = sorted(inside, key=lambda s: s in exact)  # those that have to be looked at first
    found.append(Section('Copies', 'copies', [Text(lead), *_rows(audit, alike)]))
  return found


def use_of_copies(folder: pathlib.Path) -> str:
  """The flags that keep copies on one side of every split."""
  manifest = shlex.quote(f'--config.data.manifest={folder / COPIES_FILE}')
  return f'{manifest} --config.data.group_column={COPIES_COLUMN}'


def _others(audit: Audit) -> list[tuple[str, ...]]:
  """Sets of copies that are in one class and in one part."""
  shown = {*audit.across_classes, *audit.across_parts}
  return [together for together in audit.copies if together not in shown]


def _balance(audit: Audit) -> list[str]:
  counts, names = audit.training_counts, audit.class_names
  most, least = int(counts.argmax()), int(counts.argmin())
  factor = audit.imbalance_factor
  words = f'{factor:.3g}' if math.isfinite(factor) else 'infinite'
  lines = [
    plain.clean(
      f'Imbalance factor {words}: {names[most]} has {counts[most]:,} photos, {names[least]} '
      f'{counts[least]:,}.'
    )
  ]
  if audit.part_of is not None:
    parts = ', '.join(f'{part} {number:,}' for part, number in audit.part_counts.items())
    lines.append(f'Photos in the parts that the folder gives: {parts}.')
  single = audit.class_counts - audit.redundant
  few = [c for c in _by_size(audit) if single[c] < FEW]
  if few:
    listed = ', '.join(f'{names[c]} ({single[c]})' for c in few[:NAMED])
    lines.append(
      plain.clean(
        f'Fewer than {FEW} photos, copies counted once: {listed}. A score of such a class says '
        'little; take more photos of it.'
      )
    )
  return lines


def _files(audit: Audit) -> list[str]:
  sides = audit.sizes[audit.readable]
  shorter = sides.min(1)
  formats = ', '.join(f'{name} {number:,}' for name, number in audit.formats.items())
  lines = [
    f'Shorter side: {shorter.min()} to {shorter.max()} pixels, median {int(np.median(shorter))}. '
    f'Formats: {formats}.'
  ]
  lines += [
    f'{kind[0].upper()}{kind[1:]}: {_number(len(files), "file")}. {ODD[kind]}'
    for kind, files in audit.odd.items()
  ]
  if audit.left_out:
    lines.append(plain.clean(audit.left_out))
  if audit.unreadable:
    lines.append(f'Files that cannot be read, and are left out: {len(audit.unreadable):,}.')
  return lines


def _copies(audit: Audit) -> list[str]:
  if not audit.copies:
    return ['No photo is a copy of another one.']
  together = sum(map(len, audit.copies))
  exact = sum(map(len, audit.identical)) - len(audit.identical)
  lines = [
    f'Copies: {together:,} photos in {_number(len(audit.copies), "set")}, '
    f'{together - len(audit.copies):,} more than one of each set; {exact:,} of these are '
    'byte-identical, the others look the same.'
  ]
  largest = max(map(len, audit.copies))
  if largest >= LARGE:
    lines.append(
      f'The largest set has {largest:,} photos. Look at it: drawings, scans and photos before one '
      'background look alike to the search without being copies.'
    )
  if audit.across_parts:
    number = len(audit.across_parts)
    lines.append(
      f'Sets of copies in different parts: {number:,}. Scores of a part with copies of training '
      'photos are too good. Move each set into one part.'
    )
  if audit.across_classes:
    number = len(audit.across_classes)
    lines.append(f'Sets of copies in different classes: {number:,}. Check their labels.')
  return lines


def _classes(audit: Audit) -> list[Block]:
  order = _by_size(audit)
  names = [plain.clean(audit.class_names[c]) for c in order]
  counts, redundant = audit.class_counts[order], audit.redundant[order]
  nothing = float('nan')
  series = [
    svg.Series('photos', [(float(n), nothing, nothing) for n in counts], 0),
    svg.Series(
      'copies counted once',
      [(float(n - r), nothing, nothing) for n, r in zip(counts, redundant, strict=True)],
      4,
    ),
  ]

  def draw() -> Sequence[str]:
    log = bool(counts.min() > 0 and counts.max() >= 20 * counts.min())
    limits = None if log else (0.0, float(counts.max()))
    what = 'Photos of each class'
    drawn = svg.dots(names, series, title=what, axis='photos', limits=limits, log=log, width=_WIDE)
    return [drawn]

  rows = [
    [name, f'{n:,}', f'{r:,}', f'{n / max(counts.sum(), 1):.1%}']
    for name, n, r in zip(names, counts.tolist(), redundant.tolist(), strict=True)
  ]
  head = ['class', 'photos', 'copies of others', 'share']
  return [
    Items(_balance(audit)),
    Figure('Photos of each class, largest first.', draw),
    Table('Photos of each class', head, rows),
  ]


def _odd(audit: Audit) -> list[Block]:
  found: list[Block] = [Items([*_files(audit), *_copies(audit)])]
  rows = [[kind, _listed(files), f'{len(files):,}'] for kind, files in audit.odd.items()]
  if rows:
    found.append(Table('Odd files', ['what', 'such as', 'files'], rows, left=2))
  if audit.unreadable:
    lines = [f'{plain.clean(name)}: {reason}' for name, reason in audit.unreadable]
    found += [Text('Files that cannot be read:', 'note'), Code('\n'.join(lines))]
  return found


def _rows(audit: Audit, sets: Sequence[Sequence[str]]) -> list[Block]:
  """A row of thumbnails for each of the first sets, and how many there are."""
  found: list[Block] = []
  label_of = dict(zip(audit.names, audit.labels.tolist(), strict=True))
  path_of = dict(zip(audit.names, audit.paths, strict=True))
  if len(sets) > SHOWN:
    found.append(Text(f'The first {SHOWN} of {len(sets):,} sets; audit.json lists all.', 'small'))
  for together in sets[:SHOWN]:
    ordered = _labels_first(together, label_of)
    pictures = [(thumbnail(path_of[name]), name) for name in ordered[:IN_A_SET]]
    found.append(Photos([one for one in pictures if one[0]]))
    if gone := [name for data, name in pictures if not data]:
      found.append(Text(f'No longer readable: {_listed(gone)}.', 'small'))
    if len(together) > IN_A_SET:
      found.append(Text(f'And {_listed(ordered[IN_A_SET:])}.', 'small'))
  return found


def thumbnail(path: pathlib.Path) -> bytes:
  """A small JPEG file of a photo; b'' if it cannot be read any more."""
  from PIL import Image

  try:
    image = decode_image(read_image(path), channels=3, image_size=THUMBNAIL)
  except Unreadable:
    return b''
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'JPEG', quality=QUALITY)
  return file.getvalue()


def _labels_first(together: Sequence[str], label_of: Mapping[str, int]) -> list[str]:
  """The same photos: the first of each class, then the others."""
  first = {label_of[name]: name for name in reversed(together)}
  return sorted(together, key=lambda name: first[label_of[name]] != name)


def _listed(names: Sequence[str], between: str = ', ') -> str:
  some = between.join(plain.clean(name) for name in names[:NAMED])
  return some + (f' and {len(names) - NAMED} more' if len(names) > NAMED else '')


def _number(n: int, what: str) -> str:
  """'1 file', '2,000 files'."""
  return f'{n:,} {what}{"s" * (n != 1)}'


def _by_size(audit: Audit) -> list[int]:
  """Classes, largest first."""
  return np.argsort(-audit.class_counts, kind='stable').tolist()
